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

from kosmos2 import FIRST_POSITION, Kosmos2, Kosmos2Config, TextConfig, VisionConfig, preprocess_image  # noqa: E402
from scenes import Example, Scene, tasks  # noqa: E402
from tokenizer import GRID, Tokenizer, plain  # noqa: E402

CONFIG = Kosmos2Config(
    vision=VisionConfig(image_size=112, patch_size=14, width=192, layers=4, heads=3, mlp_width=768),
    text=TextConfig(vocab_size=1, width=192, layers=4, heads=3, mlp_width=768, max_positions=2048, no_repeat_ngram_size=0),
    latent_query_num=32,
)
HELD_OUT = 1_000_000_000  # scenes from this seed on are never trained on


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
            text = prompt + self.tokenizer.encode_caption(example.answer) + [self.tokenizer.special["</s>"]]
            if len(tokens) + len(text) > self.length:
                continue
            tokens += text
            positions += range(P, P + len(text))
            texts += [number] * len(text)
            targets += [-100] * (len(prompt) - 1) + text[len(prompt) :] + [-100]
        empty = self.length - len(tokens)
        fill = [(tokens, 1), (positions, 0), (texts, -1), (targets, -100)]
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
    picture = texts[:, None, :] == 0
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


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def optimizers(model: Kosmos2, args) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
    if not args.muon:
        return [torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.AdamW(rest, args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
            torch.optim.Muon(matrices, args.muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def main():
    from evaluate import evaluate

    p = argparse.ArgumentParser()
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=5)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--length", type=int, default=224)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--muon", type=float, default=0)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer("/work/dev/tinyspm/sentencepiece.bpe.model", CONFIG.latent_query_num)
    cfg = replace(CONFIG, text=replace(CONFIG.text, vocab_size=tok.vocab_size))
    model = Kosmos2(cfg)
    init_weights(model, tok.first_location)
    opts = optimizers(model, args)
    base = [o.param_groups[0]["lr"] for o in opts]
    pk = Packer(tok, cfg, args.length, 0)
    class D(torch.utils.data.Dataset):
        def __len__(self): return args.steps
        def __getitem__(self, i): return pk.batch(i, args.batch)
    dl = torch.utils.data.DataLoader(D(), batch_size=None, num_workers=1, prefetch_factor=8)
    t0 = time.time(); acc = []; gn = []
    for step, b in enumerate(dl):
        for o, l in zip(opts, base):
            for g in o.param_groups: g["lr"] = learning_rate(step, args.steps, l)
        with torch.autocast("cpu", torch.bfloat16):
            loss, losses = packed_loss(model, **b)
        loss.backward()
        gn.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for o in opts: o.step(); o.zero_grad()
        wanted = b["targets"][b["targets"] != -100]
        loc = wanted >= tok.first_location
        acc.append((losses[loc].mean().item(), losses[~loc].mean().item()))
        if step % 100 == 99:
            a = torch.tensor(acc[-100:]).mean(0)
            print(f"{step+1} {time.time()-t0:.0f}s loc {a[0]:.3f} words {a[1]:.3f} gn {sum(gn[-100:])/100:.2f}", flush=True)
        if step % 1000 == 999 or step + 1 == args.steps:
            model.eval(); print({k: round(v[0], 3) for k, v in evaluate(model, tok, 60, HELD_OUT).items()}, flush=True); model.train()
            torch.save(model.state_dict(), args.out / "model.pt")


if __name__ == "__main__":
    main()
