"""Labels for every patch of an image, and the linear layer that learns to predict them.

The official Kosmos-2 starts from CLIP's vision tower, trained on hundreds of millions of images.
The bundled model starts from labels instead: for each patch, the kind and the color of the thing
that covers it, and the box of that thing. Such labels are dense (one for each patch), so the ViT
learns much faster from them than from captions. When train.py trains from scratch, the first steps
have nothing but patch labels, and afterwards their loss is added to that of the tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from training.scenes import COLORS, KINDS, Scene, Thing
from training.stickers import sticker_image

BACKGROUND = 0  # the label of a patch without a thing; kinds and colors follow from 1


def patch_labels(scene: Scene, grid: int) -> Tensor:
    """(grid * grid, 6): kind, color and box (x1, y1, x2, y2) of the topmost thing on each patch."""
    labels = torch.zeros(grid, grid, 6)
    colors = [None, *COLORS]
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        if thing.sticker is None:
            overlap = cell_overlap(y1, y2, grid)[:, None] * cell_overlap(x1, x2, grid)  # (grid, grid), areas
        else:
            overlap = opaque_overlap(thing, grid)
        enough = 0.3 / grid**2
        covered = overlap >= min(enough, overlap.max().item())  # at least one patch
        kind = scene.kinds.index(thing.kind) + 1
        labels[covered] = torch.tensor([kind, colors.index(thing.color), x1, y1, x2, y2])
    return labels.flatten(0, 1)


def cell_overlap(start: float, end: float, grid: int) -> Tensor:
    """The length of start..end in each cell of 0..1, (grid,)."""
    edges = torch.arange(grid + 1) / grid
    left = edges[:-1].clamp(min=start)
    right = edges[1:].clamp(max=end)
    return (right - left).clamp(min=0)


def opaque_overlap(thing: Thing, grid: int, scale: int = 8) -> Tensor:
    """The area of a sticker's opaque pixels in each cell, (grid, grid)."""
    x1, y1, x2, y2 = (round(v * grid * scale) for v in thing.box)
    alpha = sticker_image(thing.sticker, thing.look).getchannel("A")
    mask = Image.new("L", (grid * scale, grid * scale))
    mask.paste(alpha.resize((max(x2 - x1, 1), max(y2 - y1, 1))), (x1, y1))
    return torch.from_numpy(np.array(mask.reduce(scale))) / 255 / grid**2


class PatchHead(nn.Module):
    """A linear layer that predicts the labels of each patch from the ViT's features."""

    def __init__(self, width: int, kinds: int = len(KINDS)):
        super().__init__()
        self.sizes = [kinds + 1, len(COLORS) + 1, 4]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of features (B, N, E) and labels (B, N - 1, 6)."""
        x = features[:, 1:] * features.shape[-1] ** 0.5  # without [CLS]; features have unit length
        kinds, colors, boxes = self.linear(x).float().split(self.sizes, dim=-1)
        kind = labels[..., 0].long()  # (B, N - 1)
        color = labels[..., 1].long()
        covered = kind != BACKGROUND
        loss = F.cross_entropy(kinds.flatten(0, 1), kind.flatten())
        if not covered.any():
            return loss
        loss = loss + F.cross_entropy(colors[covered], color[covered])
        return loss + 5 * F.l1_loss(boxes[covered].sigmoid(), labels[..., 2:][covered])
