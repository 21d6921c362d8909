"""Labels for every patch of an image, and the linear layer that learns to predict them.

The official Kosmos-2 starts from CLIP's vision tower, trained on hundreds of millions of images.
The bundled model starts from labels instead: for each patch, the kind and the color of the thing
that covers it, and the box of that thing. Such labels are dense (one for each patch), so the ViT
learns much faster from them than from texts. When train.py trains from scratch, the first steps have nothing but patch
labels, and afterwards their loss is added to that of the texts.
"""

import torch
import torch.nn.functional as F
from scenes import COLORS, KINDS, Scene
from torch import Tensor, nn

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


class PatchHead(nn.Module):
    """A linear layer that predicts the labels of each patch from the ViT's features."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.sizes = [len(KINDS) + 1, len(COLORS) + 1, 4]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, N, E) and labels (B, N - 1, 6) -> loss and accuracy.

        The accuracy is the share of the covered patches whose kind is right.
        """
        x = self.linear(features[:, 1:] * self.width**0.5)  # without [CLS]; features have unit length
        kinds, colors, boxes = x.float().split(self.sizes, dim=-1)
        kind, color = labels[..., 0].long(), labels[..., 1].long()
        covered = kind != BACKGROUND
        loss = F.cross_entropy(kinds.flatten(0, 1), kind.flatten())
        if not covered.any():
            return loss, loss.new_tensor(1.0)
        loss = loss + F.cross_entropy(colors[covered], color[covered])
        loss = loss + 5 * F.l1_loss(boxes[covered].sigmoid(), labels[..., 2:][covered])
        accuracy = (kinds.argmax(dim=-1) == kind)[covered].float().mean()
        return loss, accuracy
