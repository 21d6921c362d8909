"""Train the small Kosmos-2 that comes with this repository, from nothing, on two CPU cores.

    python tiny/train.py --out runs/tiny              trains, resumes if runs/tiny holds a checkpoint
    python tiny/train.py --out runs/tiny --steps 50   a minute, to see it move

Writes checkpoint.pt (what a run resumes from), log.jsonl, loss.png, and at the end the model in the
published layout. Everything about the data follows from the step number: a resumed run sees the scenes
the uninterrupted one would have seen.

What makes so small a model learn to see in an hour, each found by measuring:
- `init_weights`: features of the ViT have length one, so the resampler's `dense` starts near std 1, or
  the picture drowns in the latents; the ViT starts with real positions; location tokens start as smooth
  functions of their place, so that a near miss is already nearly right.
- `Packer`: encoding a picture costs as much as reading several texts about it, so every picture carries
  as many as fit into one row; a mask keeps them from seeing each other.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from evaluate import HELD_OUT, evaluate  # noqa: E402
from scenes import Example, Scene, captions, tasks  # noqa: E402

from kosmos2 import (  # noqa: E402
    BOS,
    EOS,
    FIRST_POSITION,
    PAD,
    Kosmos2,
    Kosmos2Config,
    TextConfig,
    VisionConfig,
    preprocess_image,
)  # fmt: skip
from load_weights import SENTENCEPIECE, save_checkpoint  # noqa: E402
from tokenizer import GRID, Tokenizer, plain  # noqa: E402

CONFIG = Kosmos2Config(
    vision=VisionConfig(image_size=112, patch_size=14, width=192, layers=4, heads=3, mlp_width=768),
    text=TextConfig(vocab_size=1, width=192, layers=4, heads=3, mlp_width=768, max_positions=2048, no_repeat_ngram_size=0),
    latent_query_num=32,
)
LR = 2e-3


# ----------------------------------------------------------------------------------------------------
# Vocabulary
# ----------------------------------------------------------------------------------------------------


def train_vocabulary(model_file: Path, scenes: int = 5000) -> None:
    """A sentencepiece model of the texts about some scenes; every printable ASCII character is in it."""
    import sentencepiece

    texts = []
    for seed in range(scenes):
        for example in tasks(Scene.random(seed), random.Random(seed)):
            texts.append(plain(example.prompt + " " + example.answer))
    # The trainer proposes as a piece what at least two different words have in common.
    texts += [word + end for word in sorted(set(re.findall(r"\w+", " ".join(texts)))) for end in ".,"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(model_file.with_suffix("")),
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="unigram",
        required_chars="".join(chr(c) for c in range(33, 127)),
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )


# ----------------------------------------------------------------------------------------------------
# Initial weights
# ----------------------------------------------------------------------------------------------------


def sincos_2d(rows: int, columns: int, width: int) -> torch.Tensor:
    """(rows * columns, width): sines and cosines of both coordinates, slow to fast, each row of length one."""
    quarter = width // 4
    frequencies = math.pi * torch.logspace(0, math.log10(min(rows, columns)), quarter) / 2
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    angles = [v.flatten()[:, None] * frequencies for v in (x, y)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.normalize(F.pad(table, (0, width - 4 * quarter)), dim=1)


@torch.no_grad()
def init_weights(model: Kosmos2, first_location: int, seed: int = 0) -> None:
    """Fan-in scaling everywhere; the three exceptions are named in the module's docstring."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()
    for block in [*model.vision.layers, *model.decoder.layers]:
        for last in (block.attn.out_proj, block.mlp.fc2):
            last.weight *= 0.5
    E, grid = model.config.vision.width, model.config.vision.grid
    model.vision.class_embedding.normal_(std=E**-0.5)
    model.resampler.dense.weight.normal_(std=1.0)
    model.resampler.latent_query.normal_(std=1.0)
    model.vision.position_embedding[1:] = sincos_2d(grid, grid, E) * math.sqrt(E)
    locations = slice(first_location, first_location + GRID * GRID)
    model.decoder.embed_tokens.weight[locations] = sincos_2d(GRID, GRID, model.config.text.width)


# ----------------------------------------------------------------------------------------------------
# Data: many texts about one picture, packed into one row
# ----------------------------------------------------------------------------------------------------

# How many examples of each task a scene contributes at most; the rest of the row stays empty.
MIXTURE = {
    "caption": 1, "detail": 0.6, "plain caption": 0.2, "plain detail": 0.2,
    "ground": 2, "ground several": 2, "refer": 2, "refer relation": 3, "describe box": 2,
    "color": 0.5, "shape": 0.5, "where": 0.6, "relation": 0.6, "count": 0.7, "yes or no": 0.7,
    "color grounded": 0.5, "shape grounded": 0.5, "where grounded": 0.5, "relation grounded": 1,
    "count grounded": 0.7, "yes or no grounded": 0.7, "color of box": 0.6, "shape in box": 0.6,
}  # fmt: skip


def choose(examples: list[Example], rng: random.Random) -> list[Example]:
    """A draw from everything that can be said about a scene, in the proportions of MIXTURE."""
    rng.shuffle(examples)
    room = {task: int(most) + (rng.random() < most % 1) for task, most in MIXTURE.items()}
    chosen = []
    for example in examples:
        if room[example.task] > 0:
            room[example.task] -= 1
            chosen.append(example)
    return chosen


ALONE, EMPTY = -1, -2  # numbers of texts: 0 is the picture, 1, 2, … what is said about it


class Packer:
    """Scenes -> rows of one picture and several independent texts about it.

    A row is `<s> <image> slots </image>`, then the texts one after the other. A text sees the picture and
    itself, and its positions continue those of the picture, as if it stood alone; only answers carry loss.
    """

    def __init__(self, tokenizer: Tokenizer, config: Kosmos2Config, length: int, seed: int):
        self.tokenizer, self.config, self.length, self.seed = tokenizer, config, length, seed
        self.prefix, self.prefix_mask = tokenizer.encode_prompt("", 1)

    def row(self, seed: int):
        """pixels, tokens (T,), positions (T,), text number of each token (T,), targets (T,)."""
        scene, rng = Scene.random(seed), random.Random(seed)
        pixels = preprocess_image(scene.draw(), self.config.vision.image_size)
        P = len(self.prefix)
        tokens, positions, texts, targets = list(self.prefix), list(range(P)), [0] * P, [-100] * P
        for number, example in enumerate(choose(tasks(scene, rng), rng), start=1):
            prompt = self.tokenizer.encode(example.prompt, add_bos=False)
            text = prompt + self.tokenizer.encode_caption(example.answer) + [EOS]
            if len(tokens) + len(text) > self.length:
                continue
            tokens += text
            positions += range(P, P + len(text))
            texts += [number] * len(text)
            targets += [-100] * (len(prompt) - 1) + text[len(prompt) :] + [-100]
        if rng.random() < 0.3:  # a sentence without a picture
            text = self.tokenizer.encode_caption(plain(captions(scene)[0].prompt + captions(scene)[0].answer))
            text = [BOS, *text, EOS]
            if len(tokens) + len(text) <= self.length:
                tokens += text
                positions += range(len(text))
                texts += [ALONE] * len(text)
                targets += [*text[1:], -100]
        empty = self.length - len(tokens)
        fill = [(tokens, PAD), (positions, 0), (texts, EMPTY), (targets, -100)]
        return pixels, *(torch.tensor(values + [value] * empty) for values, value in fill)

    def batch(self, step: int, size: int) -> dict[str, torch.Tensor]:
        first = self.seed + step * size
        pixels, tokens, positions, texts, targets = map(
            torch.stack, zip(*(self.row(first + i) for i in range(size)), strict=True)
        )
        return dict(pixels=pixels, tokens=tokens, positions=positions + FIRST_POSITION, texts=texts, targets=targets)


def packed_loss(model: Kosmos2, pixels, tokens, positions, texts, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of a packed batch, and that of every target."""
    image_mask = torch.zeros_like(tokens, dtype=torch.bool)
    image_mask[:, 2 : 2 + model.config.latent_query_num] = True
    x = model.embed(tokens, pixels, image_mask=image_mask)  # (B, T, D)
    mine = texts[:, :, None] == texts[:, None, :]
    picture = (texts[:, :, None] > 0) & (texts[:, None, :] == 0)
    T = tokens.shape[1]
    mask = (mine | picture) & torch.ones(T, T, dtype=torch.bool).tril()
    x = model.decoder(x, positions, mask[:, None])
    wanted = targets != -100
    logits = model.decoder.unembed(x[wanted]).float()  # (targets, V)
    losses = F.cross_entropy(logits, targets[wanted], reduction="none")
    return losses.mean(), losses


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(model: Kosmos2, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest; both at one learning rate.

    Muon gives all directions of a matrix's step one size. Measured here: after 500 steps the loss of the
    location tokens is 4.2 with it and 5.0 with AdamW alone.
    """
    inside = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    outside = [p for name, p in model.named_parameters() if not (".layers." in name and p.dim() == 2)]
    return [
        torch.optim.Muon(inside, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


class Steps(torch.utils.data.Dataset):
    """The batch of every step, so that a worker process can prepare them ahead."""

    def __init__(self, packer: Packer, first: int, last: int, batch: int):
        self.packer, self.first, self.last, self.size = packer, first, last, batch

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int):
        return self.packer.batch(self.first + i, self.size)


class Run:
    """A training run and all that it keeps in its folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.out
        self.folder.mkdir(parents=True, exist_ok=True)
        words = self.folder / SENTENCEPIECE
        if not words.exists():
            print("making the vocabulary", file=sys.stderr)
            train_vocabulary(words)
        self.tokenizer = Tokenizer(words, CONFIG.latent_query_num)
        config = replace(CONFIG, text=replace(CONFIG.text, vocab_size=self.tokenizer.vocab_size))
        self.model = Kosmos2(config)
        init_weights(self.model, self.tokenizer.first_location, args.seed)
        self.optimizers = make_optimizers(self.model, args.lr)
        self.packer = Packer(self.tokenizer, config, args.length, seed=args.seed * 100_000_000)
        self.step, self.minutes = 0, 0.0
        self.log: list[dict] = []
        if (self.folder / "checkpoint.pt").exists():
            self.resume()

    def resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.minutes, self.log = state["step"], state["minutes"], state["log"]
        print(f"resuming {self.folder} at step {self.step}", file=sys.stderr)

    def save(self) -> None:
        """Written beside its place, then moved there: a run that is killed here keeps the checkpoint before."""
        state = {
            "step": self.step, "minutes": self.minutes, "log": self.log, "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }  # fmt: skip
        torch.save(state, self.folder / "checkpoint.pt.part")
        os.replace(self.folder / "checkpoint.pt.part", self.folder / "checkpoint.pt")

    def train_step(self, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """One update; returns the loss on location tokens and on words."""
        lr = learning_rate(self.step, self.args.steps, self.args.lr)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss, losses = packed_loss(self.model, **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        targets = batch["targets"][batch["targets"] != -100]
        locations = targets >= self.tokenizer.first_location
        return losses[locations].mean().item(), losses[~locations].mean().item()

    def measure(self, scenes: int) -> dict[str, float]:
        """Accuracy by task on scenes held out from training."""
        self.model.eval()
        found = evaluate(self.model, self.tokenizer, scenes, HELD_OUT)
        self.model.train()
        return {task: round(share, 4) for task, (share, _) in found.items()}

    def train(self) -> None:
        args = self.args
        steps = Steps(self.packer, self.step, args.steps, args.batch)
        loader = torch.utils.data.DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=8)
        recent, clock = [], time.perf_counter()
        for batch in loader:
            recent.append(self.train_step(batch))
            now = time.perf_counter()
            self.minutes, clock = self.minutes + (now - clock) / 60, now
            if self.step % 20 == 0 or self.step == args.steps:
                locations, words = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                self.log.append({"step": self.step, "minutes": round(self.minutes, 2),
                                 "locations": round(locations, 4), "words": round(words, 4)})  # fmt: skip
                recent = []
                self.progress(locations, words)
            if self.step % args.save_every == 0 or self.step == args.steps:
                if self.step % (4 * args.save_every) == 0 or self.step == args.steps:
                    self.log.append({"step": self.step, "accuracy": self.measure(args.scenes)})
                    print("\n" + json.dumps(self.log[-1]), file=sys.stderr)
                self.save()
        self.finish()

    def progress(self, locations: float, words: float) -> None:
        done = self.step / self.args.steps
        left = self.minutes / self.step * (self.args.steps - self.step)
        bar = "#" * round(30 * done) + "." * (30 - round(30 * done))
        line = f"[{bar}] {self.step}/{self.args.steps}  loss: locations {locations:.3f}, words {words:.3f}  {left:.0f} min left"
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """The model in the published layout, the log, and its curves as a picture."""
        save_checkpoint(self.model, self.folder / SENTENCEPIECE, self.folder)
        with open(self.folder / "log.jsonl", "w") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in self.log)
        draw_curves(self.log, self.folder / "loss.png")
        print(f"\nwrote {self.folder}", file=sys.stderr)


def draw_curves(log: list[dict], path: Path) -> None:
    """Loss of words and locations, and accuracy of some tasks, over the steps; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("\nmatplotlib is not installed: no loss.png", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = [row for row in log if "words" in row]
    for name, color in (("locations", "#c62828"), ("words", "#1565c0")):
        left.plot([r["step"] for r in rows], [r[name] for r in rows], color=color, label=name)
    left.set(title="Loss per token", xlabel="step", ylabel="cross-entropy, nats", yscale="log")
    rows = [row for row in log if "accuracy" in row]
    shown = ["ground", "ground several", "refer relation", "caption", "describe box", "color", "count"]
    for task in shown:
        points = [(r["step"], r["accuracy"][task]) for r in rows if task in r["accuracy"]]
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=task)
    right.set(title="Hits on held-out scenes", xlabel="step", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    fig.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "tiny", help="folder of the run")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--length", type=int, default=224, help="tokens a row, filled with texts about one picture")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the scenes")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="accuracy is measured every fourth time")
    parser.add_argument("--scenes", type=int, default=60, help="held-out scenes to measure on while training")
    run = Run(parser.parse_args())
    try:
        run.train()
    except KeyboardInterrupt:
        print(f"\nstopped at step {run.step}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
