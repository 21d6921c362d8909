"""Pretrain the vision transformer: every patch predicts what covers it.

The official Kosmos-2 starts from CLIP's vision tower, trained on hundreds of millions of images.
Ours starts from this: a linear layer on the ViT's features predicts, for each patch, the kind and
the color of the thing that covers it and the box of that thing. Such labels are dense (100 per
image), and an image takes about a quarter of the time of a row of texts. train.py runs this first
when it trains from scratch.
"""

import sys
import time

import torch
import torch.nn.functional as F
from scenes import COLORS, KINDS, Scene
from torch import Tensor, nn

from kosmos2 import Kosmos2, preprocess_image

FIRST_SEED = 2_000_000_000  # scenes that train.py and evaluate.py do not use
BACKGROUND = 0  # the label of a patch without a thing; kinds and colors follow from 1


def patch_labels(scene: Scene, grid: int) -> Tensor:
    """(grid * grid, 6): kind, color and box (x1, y1, x2, y2) of the topmost thing on each patch."""
    labels = torch.zeros(grid, grid, 6)
    edges = torch.arange(grid + 1) / grid
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        columns = (edges[1:].clamp(max=x2) - edges[:-1].clamp(min=x1)).clamp(min=0)  # overlap, (grid,)
        rows = (edges[1:].clamp(max=y2) - edges[:-1].clamp(min=y1)).clamp(min=0)
        overlap = rows[:, None] * columns  # (grid, grid)
        covered = overlap >= min(0.3 / grid**2, overlap.max().item())
        kind = KINDS.index(thing.kind) + 1
        color = 0 if thing.color is None else list(COLORS).index(thing.color) + 1
        labels[covered] = torch.tensor([kind, color, x1, y1, x2, y2])
    return labels.flatten(0, 1)


class PatchData(torch.utils.data.Dataset):
    """Item i: pixels (B, 3, image_size, image_size) and labels (B, N - 1, 6) of the i-th batch."""

    def __init__(self, image_size: int, grid: int, batch: int, steps: int):
        self.image_size, self.grid = image_size, grid
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        pixels, labels = [], []
        for n in range(i * self.batch, (i + 1) * self.batch):
            scene = Scene.random(FIRST_SEED + n)
            pixels.append(preprocess_image(scene.draw(), self.image_size))
            labels.append(patch_labels(scene, self.grid))
        return torch.stack(pixels), torch.stack(labels)


class PatchClassifier(nn.Module):
    """The ViT with a linear layer that predicts the labels of each patch."""

    def __init__(self, model: Kosmos2):
        super().__init__()
        self.vision = model.vision
        self.width = model.config.vision.width
        self.sizes = [len(KINDS) + 1, len(COLORS) + 1, 4]
        self.head = nn.Linear(self.width, sum(self.sizes))

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, share of covered patches with the right kind)"""
        features = self.vision(pixels)[:, 1:] * self.width**0.5  # (B, N - 1, E), without [CLS]
        kinds, colors, boxes = self.head(features).float().split(self.sizes, dim=-1)
        kind, color = labels[..., 0].long(), labels[..., 1].long()
        covered = kind != BACKGROUND
        loss = F.cross_entropy(kinds.flatten(0, 1), kind.flatten())
        loss = loss + F.cross_entropy(colors[covered], color[covered])
        loss = loss + 5 * F.l1_loss(boxes[covered].sigmoid(), labels[..., 2:][covered])
        accuracy = (kinds.argmax(dim=-1) == kind)[covered].float().mean()
        return loss, accuracy


def pretrain_vision(model: Kosmos2, make_optimizers, steps: int, batch: int = 64, lr: float = 2e-3) -> None:
    """Train model.vision in place."""
    if steps == 0:
        return
    config = model.config.vision
    classifier = PatchClassifier(model)
    optimizers = make_optimizers(classifier, "muon", lr)
    data = PatchData(config.image_size, config.grid, batch, steps)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8)
    started = time.perf_counter()
    for step, (pixels, labels) in enumerate(loader):
        rate = lr * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = classifier(pixels, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            minutes = (time.perf_counter() - started) / 60
            text = (
                f"step {step}/{steps}, loss {loss.item():.3f}, kinds {accuracy.item():.3f}, {minutes:.1f} min"
            )
            print(f"\rpretraining the ViT: {text} ", end="", file=sys.stderr, flush=True)
