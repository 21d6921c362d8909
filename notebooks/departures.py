"""Departures from Kosmos-2, and what each costs a trained model (used by 10_departures).

A departure changes one part of the model, as a mistake in a port would. Here it is a list of
patches, and `Trial.measure` runs the model with these patches on captions and phrases of unseen
scenes. `cost` compares two such measurements.
"""

import math
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F

import kosmos2
from kosmos2 import (
    Decoder,
    Embedding,
    Kosmos2,
    Resampler,
    VisionTransformer,
    finish,
    pad_left,
    preprocess_image,
)
from tokenizer import Tokenizer, iou, parse
from training.data import encode_example
from training.evaluate import HELD_OUT, choose_examples, score
from training.scenes import Example, Scene

FIRST_SEED = HELD_OUT + 40_000

# ----------------------------------------------------------------------------------------------------
# The changed parts
# ----------------------------------------------------------------------------------------------------

vision_forward = VisionTransformer.forward
encode_image = Kosmos2.encode_image
embed_tokens = Embedding.forward
decoder_forward = Decoder.forward
sinusoidal_positions = kosmos2.sinusoidal_positions


def without_cls(self, pixels):
    return vision_forward(self, pixels)[:, 1:]


def resample_without_latents(self, features):
    latents = self.latent_query.expand(len(features), -1, -1)
    return self.x_attn(latents, context=self.dense(features))


def image_after_scale(self, pixels):
    """Image embeddings that are not multiplied by √D: divided by it here, as the decoder multiplies
    all."""
    return encode_image(self, pixels) / math.sqrt(self.config.text.width)


def no_scale(self, x, *others):
    return decoder_forward(self, x / math.sqrt(x.shape[-1]), *others)


def tokens_without_scale(self, tokens):
    """Token embeddings that are divided by √D, because the decoder multiplies all."""
    return embed_tokens(self, tokens) / math.sqrt(self.embedding_dim)


def interleaved(positions, width):
    return sinusoidal_positions(positions, width).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def textbook_wavelengths(positions, width):
    frequencies = torch.exp(torch.arange(width // 2) * -math.log(10000) / (width // 2))
    angles = positions[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def in_blocks(blocks, part: str, name: str, value) -> list:
    """Patches that set `block.part.name` in all blocks."""
    return [patch.object(getattr(block, part), name, value) for block in blocks]


# ----------------------------------------------------------------------------------------------------
# The departures, by name
# ----------------------------------------------------------------------------------------------------


def vision_departures(model: Kosmos2) -> dict[str, list]:
    vit = model.vision
    return {
        "ViT: no LayerNorm before the first block": [patch.object(vit, "pre_layernorm", torch.nn.Identity())],
        "ViT: GELU instead of QuickGELU": in_blocks(vit.layers, "mlp", "activation", F.gelu),
        "ViT: [CLS] is not passed on": [patch.object(VisionTransformer, "forward", without_cls)],
        "ViT: features not of unit length": [patch.object(F, "normalize", lambda x, dim: x)],
        "resampler: latents not among the keys": [
            patch.object(Resampler, "forward", resample_without_latents)
        ],
    }


def input_departures(model: Kosmos2) -> dict[str, list]:
    return {
        "image embeddings inserted after the scale": [
            patch.object(Kosmos2, "encode_image", image_after_scale)
        ],
        "only image embeddings scaled": [patch.object(Embedding, "forward", tokens_without_scale)],
        "nothing scaled": [patch.object(Decoder, "forward", no_scale)],
        "positions from 1": [patch.object(kosmos2, "FIRST_POSITION", 1)],
        "positions from 0": [patch.object(kosmos2, "FIRST_POSITION", 0)],
        "sines and cosines interleaved": [patch.object(kosmos2, "sinusoidal_positions", interleaved)],
        "the textbook's wavelengths": [patch.object(kosmos2, "sinusoidal_positions", textbook_wavelengths)],
    }


def block_departures(model: Kosmos2) -> dict[str, list]:
    layers, identity = model.decoder.layers, torch.nn.Identity()
    attention = in_blocks(layers, "attn", "inner_attn_ln", identity)
    mlp = in_blocks(layers, "mlp", "ffn_layernorm", identity)
    return {
        "no sub-LN in attention": attention,
        "no sub-LN in the MLP": mlp,
        "no sub-LN at all": attention + mlp,
        "QuickGELU in the decoder": in_blocks(layers, "mlp", "activation", kosmos2.quick_gelu),
        "tanh GELU in the decoder": in_blocks(layers, "mlp", "activation", tanh_gelu),
    }


# ----------------------------------------------------------------------------------------------------
# Measuring what they cost
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """What a model does with some scenes."""

    logits: torch.Tensor  # (prompts, V), of the first new token
    named: list[float]  # for each scene, the share of its objects that a plain caption names
    overlaps: list[float]  # for each scene, the IoU of the first box of a phrase with the correct box


class Trial:
    """Unseen scenes, with a prompt for a caption and a phrase to ground for each."""

    def __init__(self, model: Kosmos2, tokenizer: Tokenizer, count: int):
        self.model = model
        self.tokenizer = tokenizer
        self.captions: list[tuple[Scene, Example]] = []
        self.phrases: list[tuple[Scene, Example]] = []
        seed = FIRST_SEED
        while len(self.captions) < count:
            chosen = choose_examples(1, seed, only=("plain caption", "ground"))
            by_task = {example.task: (scene, example) for scene, example in chosen}
            if "ground" in by_task:  # not if the scene is empty, or every name matches several objects
                self.captions.append(by_task["plain caption"])
                self.phrases.append(by_task["ground"])
            seed += 1
        size = model.config.vision.image_size
        self.pixels = torch.stack([preprocess_image(scene.draw(), size) for scene, _ in self.captions])

    def measure(self, patches: Iterable = ()) -> Measurement:
        """Run the model with these patches applied."""
        with ExitStack() as stack:
            for change in patches:
                stack.enter_context(change)
            image_embeds = self.model.encode_image(self.pixels)
            caption_logits, captions = self._answers(self.captions, image_embeds, 30)
            phrase_logits, boxes = self._answers(self.phrases, image_embeds, 4)
        named = []
        for (scene, example), answer in zip(self.captions, captions, strict=True):
            named.append(statistics.mean(score(example, answer, scene)))
        overlaps = []
        for (_, example), answer in zip(self.phrases, boxes, strict=True):
            found = [box for entity in parse(answer)[1] for box in entity.boxes]
            overlaps.append(iou(found[0], example.targets[0].box) if found else 0.0)
        return Measurement(torch.cat([caption_logits, phrase_logits]), named, overlaps)

    def _answers(self, chosen, image_embeds, max_new_tokens: int) -> tuple[torch.Tensor, list[str]]:
        """The logits after each prompt, and the answers."""
        prompts = [encode_example(self.tokenizer, example) for _, example in chosen]
        tokens, image_mask, pad_mask = pad_left(prompts)
        state = self.model.prefill(
            tokens, None, image_embeds, image_mask, pad_mask, max_new_tokens=max_new_tokens
        )
        logits = state.logits
        return logits, [self.tokenizer.decode(row.ids) for row in finish(state)]


def cost(unchanged: list[float], changed: list[float]) -> tuple[float, float]:
    """How much the mean over the scenes falls, and the standard error of that difference.

    Both lists are about the same scenes, so the difference is taken scene by scene: what makes one
    scene harder than another cancels.
    """
    differences = [a - b for a, b in zip(unchanged, changed, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), error


def certain(unchanged: list[float], changed: list[float]) -> bool:
    """Whether the cost is above three standard errors (by chance alone: once in 700 times)."""
    mean, error = cost(unchanged, changed)
    return mean > 3 * error


def logit_change(unchanged: Measurement, changed: Measurement) -> float:
    """The size of the change of the logits, relative to the logits."""
    return float((changed.logits - unchanged.logits).norm() / unchanged.logits.norm())


def rows(unchanged: Measurement, measured: dict[str, Measurement]) -> list[tuple]:
    """A row of the table for each departure; * marks a certain cost."""
    table = []
    for name, changed in measured.items():
        row = [name, f"{logit_change(unchanged, changed):.4f}"]
        for before, after in ((unchanged.named, changed.named), (unchanged.overlaps, changed.overlaps)):
            mean, error = cost(before, after)
            mark = "*" if certain(before, after) else ""
            row.append(f"{mean:+.3f} ± {error:.3f} {mark}")
        table.append(tuple(row))
    return table
