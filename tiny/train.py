"""Train a Kosmos-2: the small one that comes with this repository from nothing, or any one on GRIT data.

    python tiny/train.py --out runs/tiny              from nothing, on scenes; about an hour on two cores
    python tiny/train.py --out runs/short --steps 50  a minute, to see it move
    python tiny/train.py --out runs/mine --checkpoint WEIGHTS --data grit.jsonl --train resampler --lr 1e-4
    torchrun --nproc-per-node 8 tiny/train.py ...     the same on many processes

Writes checkpoint.pt (what a run resumes from), and at the end the model in the published layout, log.jsonl
and loss.png. Everything about the data follows from the step number: a resumed run sees what the
uninterrupted one would have seen, and so do any number of processes together.

What makes so small a model learn to see in an hour, each found by measuring:
- `init_weights`: features of the ViT have length one, so the resampler's `dense` starts near std 1, or
  the picture drowns in the latents; the ViT starts with real positions; location tokens start as smooth
  functions of their place, so that a near miss is already nearly right.
- Rows of one picture and many texts (data.py): encoding a picture costs as much as reading several texts.
- Muon for the matrices inside the blocks (`make_optimizers`).
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

# A batch's number of targets differs from step to step. oneDNN would keep the kernels it makes for a thousand
# such shapes, and several GB of scratch memory with them.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from data import Grit, Scenes, Steps  # noqa: E402
from evaluate import HELD_OUT, evaluate  # noqa: E402
from scenes import Scene, tasks  # noqa: E402

from kosmos2 import Kosmos2, Kosmos2Config, TextConfig, VisionConfig  # noqa: E402
from load_weights import SENTENCEPIECE, load_checkpoint, save_checkpoint  # noqa: E402
from tokenizer import GRID, Tokenizer, plain  # noqa: E402

CONFIG = Kosmos2Config(
    vision=VisionConfig(image_size=112, patch_size=14, width=192, layers=4, heads=3, mlp_width=768),
    text=TextConfig(vocab_size=1, width=192, layers=4, heads=3, mlp_width=768, max_positions=2048, no_repeat_ngram_size=0),
    latent_query_num=32,
)
PARTS = ["vision", "resampler", "decoder"]


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
    """Fan-in scaling everywhere, halved for the last matrix of each residual branch, and biases of zero.

    The three exceptions are named in the module's docstring.
    """
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
# The objective
# ----------------------------------------------------------------------------------------------------


class Losses(nn.Module):
    """Next-token losses of a batch of data.py, one for every target.

    The rows are read with a mask under which each text sees the picture (text 0) and itself.
    """

    def __init__(self, model: Kosmos2):
        super().__init__()
        self.model = model

    def forward(self, pixels, image_mask, tokens, positions, texts, targets):
        model, T = self.model, tokens.shape[1]
        x = model.embed(tokens, pixels, image_mask=image_mask)  # (B, T, D)
        same = texts[:, :, None] == texts[:, None, :]  # (B, T, T)
        picture = (texts[:, :, None] > 0) & (texts[:, None, :] == 0)
        mask = (same | picture) & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        x = model.decoder(x, positions, mask[:, None])
        asked = targets != -100
        logits = model.decoder.unembed(x[asked]).float()  # (targets, V): the others need none
        return F.cross_entropy(logits, targets[asked], reduction="none")  # (targets,)


def recompute_activations(model: Kosmos2) -> None:
    """Keep only every block's input for the backward pass and run the block again there: less memory, more time."""
    for block in [*model.vision.layers, *model.decoder.layers]:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(model: Kosmos2, name: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices inside the blocks and AdamW for the rest, at one learning rate.

    Muon gives all directions of a matrix's step one size. Measured on the scenes: after 500 steps the loss of
    the location tokens is 4.2 with it and 5.0 with AdamW alone.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = [p for n, p in trained if name == "muon" and ".layers." in n and p.dim() == 2]
    chosen = {id(p) for p in inside}
    outside = [p for _, p in trained if id(p) not in chosen]
    made = [torch.optim.Muon(inside, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")] if inside else []
    return [*made, torch.optim.AdamW(outside, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]


class Run:
    """A training run and all that it keeps in its folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.out
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device("cuda", self.rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = self.open_model()
        for name, part in self.model.named_children():
            part.requires_grad_(name in args.train)
        self.model.to(self.device).train()
        if args.recompute:
            recompute_activations(self.model)
        self.losses = Losses(self.model)
        if self.world > 1:
            self.losses = nn.parallel.DistributedDataParallel(self.losses)
        self.optimizers = make_optimizers(self.model, args.optimizer, args.lr)
        config = self.model.config
        if args.data:
            self.source = Grit(args.data, self.tokenizer, config, args.seed)
        else:
            self.source = Scenes(self.tokenizer, config, args.length, first=args.seed * 100_000_000)
        self.step, self.minutes = 0, 0.0
        self.log: list[dict] = []
        if (self.folder / "checkpoint.pt").exists():
            self.resume()

    def open_model(self) -> tuple[Kosmos2, Tokenizer]:
        """The checkpoint to go on from; without one the small model, with a vocabulary of its own."""
        if self.args.checkpoint:
            return load_checkpoint(self.args.checkpoint)
        words = self.folder / SENTENCEPIECE
        if self.rank == 0 and not words.exists():
            self.say("making the vocabulary\n")
            train_vocabulary(words)
        if self.world > 1:
            dist.barrier()
        tokenizer = Tokenizer(words, CONFIG.latent_query_num)
        model = Kosmos2(replace(CONFIG, text=replace(CONFIG.text, vocab_size=tokenizer.vocab_size)))
        init_weights(model, tokenizer.first_location, self.args.seed)
        return model, tokenizer

    def resume(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.device)
        self.model.load_state_dict(self.model.state_dict() | state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.minutes, self.log = state["step"], state["minutes"], state["log"]
        self.say(f"resuming {self.folder} at step {self.step}\n")

    def save(self) -> None:
        """Written beside its place, then moved there: a run that is killed here keeps the checkpoint before."""
        if self.rank == 0:
            trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
            state = {
                "step": self.step, "minutes": self.minutes, "log": self.log, "model": trained,
                "optimizers": [o.state_dict() for o in self.optimizers],
            }  # fmt: skip
            torch.save(state, self.folder / "checkpoint.pt.part")
            os.replace(self.folder / "checkpoint.pt.part", self.folder / "checkpoint.pt")

    def train_step(self, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """One update from all micro-batches of all processes; returns the mean losses.

        The gradient is that of the mean over all targets of the step, wherever they were computed.
        """
        lr = learning_rate(self.step, self.args.steps, self.args.lr)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr
        count = self.sum_over_processes([float((b["targets"] != -100).sum()) for b in micro_batches])
        sums = torch.zeros(4)  # losses and numbers of location tokens and of words
        for i, batch in enumerate(micro_batches):
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            last = i == len(micro_batches) - 1
            with nullcontext() if last or self.world == 1 else self.losses.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.args.fp32):
                    losses = self.losses(**batch)
                (losses.sum() * self.world / count).backward()  # the processes' gradients are averaged
            targets = batch["targets"][batch["targets"] != -100]
            place, losses = targets >= self.tokenizer.first_location, losses.detach()
            sums += torch.stack([losses[place].sum(), place.sum(), losses[~place].sum(), (~place).sum()]).cpu()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        places, n_places, words, n_words = (self.sum_over_processes([v]) for v in sums.tolist())
        return {"locations": places / max(n_places, 1), "words": words / max(n_words, 1)}

    def sum_over_processes(self, values: list[float]) -> float:
        total = torch.tensor(sum(values), dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.item()

    def measure(self) -> dict[str, float]:
        """Accuracy by task on scenes held out from training."""
        self.model.eval()
        found = evaluate(self.model, self.tokenizer, self.args.scenes, HELD_OUT)
        self.model.train()
        return {task: round(share, 4) for task, (share, _) in found.items()}

    def train(self) -> None:
        args = self.args
        last_step = max(args.steps, self.step)  # nothing is left to do where an earlier run went further
        steps = Steps(self.source, self.step, last_step, args.batch, args.accumulate, self.rank, self.world)
        loader = torch.utils.data.DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=8)
        recent, clock = [], time.perf_counter()
        for micro_batches in loader:
            recent.append(self.train_step(micro_batches))
            now = time.perf_counter()
            self.minutes, clock = self.minutes + (now - clock) / 60, now
            last = self.step == args.steps
            if self.step % args.log_every == 0 or last:
                means = {name: round(sum(r[name] for r in recent) / len(recent), 4) for name in recent[0]}
                self.log.append({"step": self.step, "minutes": round(self.minutes, 2), **means})
                self.progress(means)
                recent = []
            if not args.data and (self.step % (4 * args.save_every) == 0 or last) and self.rank == 0:
                self.log.append({"step": self.step, "accuracy": self.measure()})
                self.say("\n" + json.dumps(self.log[-1]) + "\n")
            if self.step % args.save_every == 0 or last:
                self.save()
        self.finish()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, end="", file=sys.stderr, flush=True)

    def progress(self, losses: dict[str, float]) -> None:
        done = self.step / self.args.steps
        left = self.minutes / self.step * (self.args.steps - self.step)
        bar = "#" * round(30 * done) + "." * (30 - round(30 * done))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.say(f"\r[{bar}] {self.step}/{self.args.steps}  loss: {shown}  {left:.0f} min left ")

    def finish(self) -> None:
        """The model in the published layout, the log, and its curves as a picture."""
        if self.rank == 0:
            save_checkpoint(self.model, self.tokenizer.model_file, self.folder)
            with open(self.folder / "log.jsonl", "w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in self.log)
            draw_curves(self.log, self.folder / "loss.png")
            self.say(f"\nwrote {self.folder}\n")


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
        if axes.lines:
            axes.legend(frameon=False)
    fig.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE.parent / "runs" / "tiny", help="folder of the run")
    p.add_argument("--checkpoint", help="go on from these weights (all that load_weights.py reads)")
    p.add_argument("--data", type=Path, metavar="JSONL", help="GRIT-format records; without it the scenes")
    p.add_argument("--train", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to train, of {', '.join(PARTS)} (default: all)")
    p.add_argument("--steps", type=int, default=5500)
    p.add_argument("--batch", type=int, default=32, help="pictures a step, over all processes")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute a step's batch in N parts")
    p.add_argument("--length", type=int, default=224, help="tokens a row of scenes is filled up to")
    p.add_argument("--lr", type=float, default=2e-3, help="at its peak")
    p.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    p.add_argument("--fp32", action="store_true", help="compute in float32 instead of bfloat16 autocast")
    p.add_argument("--recompute", action="store_true", help="save memory: recompute activations in the backward pass")
    p.add_argument("--seed", type=int, default=0, choices=range(10), help="of the weights and of the data's order")
    p.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    p.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="accuracy is measured every fourth time")
    p.add_argument("--scenes", type=int, default=60, help="held-out scenes to measure on while training")
    return p.parse_args()


def main() -> int:
    args = parse_arguments()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        run = Run(args)
        run.train()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
