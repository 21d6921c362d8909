"""Kosmos-2 in OpenVINO, a peer for `tests/benchmark.py --openvino`.

    python tests/openvino_peer.py [--scenes 60]    what 8- and 4-bit weights cost the bundled model

Our model is traced to OpenVINO (ViT and resampler as one graph, the decoder with its keys and
values as OpenVINO's own state as another); NNCF compresses the weights. Needs the packages openvino
and nncf.
"""

import argparse
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_card import boxes_kept  # noqa: E402

from kosmos2 import EOS, FIRST_POSITION, Kosmos2, Row, preprocess_image  # noqa: E402
from load_weights import load_checkpoint  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from training.evaluate import HELD_OUT, answers, choose_examples, encode_example  # noqa: E402

TRACED_TOKENS = 20


class TracedCache:
    """A KVCache that concatenates: tracing does not follow the fixed buffer of `KVCache`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys = keys
        self.values = values

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, k], dim=2)  # (1, H, S, hd)
        self.values = torch.cat([self.values, v], dim=2)  # (1, H, S, hd)
        return self.keys, self.values


class DecoderStep(nn.Module):
    """x (1, T, D), positions (1, T), keys and values of every layer -> logits (1, V), keys, values."""

    def __init__(self, model: Kosmos2):
        super().__init__()
        self.decoder = model.decoder

    def forward(self, x: Tensor, positions: Tensor, *past: Tensor):
        caches = [TracedCache(k, v) for k, v in zip(past[::2], past[1::2], strict=True)]
        S = past[0].shape[2] + x.shape[1]
        # Not causal_mask: tracing would make the offset of its tril a constant.
        mask = positions[0][:, None] - FIRST_POSITION >= torch.arange(S)  # (T, S)
        x = self.decoder(x, positions, mask, caches)  # (1, T, D)
        logits = F.linear(x[:, -1], self.decoder.embed_tokens.weight)  # (1, V)
        return logits, *[t for cache in caches for t in (cache.keys, cache.values)]


class ImageEncoder(nn.Module):
    """pixels (1, 3, image_size, image_size) -> image_embeds (1, Q, D)."""

    def __init__(self, model: Kosmos2):
        super().__init__()
        self.vision = model.vision
        self.resampler = model.resampler

    def forward(self, pixels: Tensor) -> Tensor:
        return self.resampler(self.vision(pixels))


@torch.inference_mode()
def convert_image_encoder(model: Kosmos2) -> ov.Model:
    size = model.config.vision.image_size
    pixels = torch.zeros(1, 3, size, size)
    return ov.convert_model(ImageEncoder(model), example_input=pixels, input=[pixels.shape])


@torch.inference_mode()
def convert_decoder(model: Kosmos2) -> ov.Model:
    """The decoder with its keys and values as variables of the graph."""
    text = model.config.text
    head_width = text.width // text.heads
    x = torch.randn(1, TRACED_TOKENS, text.width)
    positions = torch.arange(TRACED_TOKENS)[None] + FIRST_POSITION + 3
    past = [torch.randn(1, text.heads, 3, head_width) for _ in range(2 * text.layers)]
    shapes = [ov.PartialShape([1, -1, text.width]), ov.PartialShape([1, -1])]
    shapes += [ov.PartialShape([1, text.heads, -1, head_width])] * len(past)  # the state needs a fixed batch
    graph = ov.convert_model(DecoderStep(model), example_input=(x, positions, *past), input=shapes)
    names = {}
    for i in range(len(past)):
        graph.inputs[2 + i].get_tensor().set_names({f"past.{i}"})
        graph.outputs[1 + i].get_tensor().set_names({f"present.{i}"})
        names[f"past.{i}"] = f"present.{i}"
    graph.inputs[0].get_tensor().set_names({"x"})
    graph.inputs[1].get_tensor().set_names({"positions"})
    graph.outputs[0].get_tensor().set_names({"logits"})
    apply_make_stateful_transformation(graph, names)
    return graph


def convert(model: Kosmos2, bits: int) -> tuple[ov.Model, ov.Model]:
    """The image encoder and the decoder with weights of 32 (unchanged), 8 or 4 bits.

    With 4 bits, the image encoder has 8.
    """
    encoder = convert_image_encoder(model)
    decoder = convert_decoder(model)
    if bits < 32:
        eight = nncf.CompressWeightsMode.INT8_ASYM
        encoder = nncf.compress_weights(encoder, mode=eight)
    if bits == 8:
        decoder = nncf.compress_weights(decoder, mode=eight)
    if bits == 4:
        four = nncf.CompressWeightsMode.INT4_SYM
        decoder = nncf.compress_weights(decoder, mode=four, group_size=64)
    return encoder, decoder


class OpenVino:
    """Two converted graphs as a model. Greedy, one image at a time."""

    def __init__(self, name: str, model: Kosmos2, tokenizer: Tokenizer, graphs, **options):
        """model: only its token embeddings are used. options: OpenVINO's, by name."""
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        options["PERFORMANCE_HINT"] = "LATENCY"
        options["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        encoder, decoder = graphs
        core = ov.Core()
        self.encoder = core.compile_model(encoder, "CPU", options)
        self.decoder = core.compile_model(decoder, "CPU", options).create_infer_request()

    @torch.inference_mode()
    def generate(
        self, ids: list[int], image_mask: list[bool], pixels: Tensor, most: int, least=0
    ) -> list[int]:
        """The new ids after a prompt with one image; pixels (1, 3, image_size, image_size)."""
        image_embeds = torch.from_numpy(self.encoder(pixels.numpy())[0])  # (1, Q, D)
        mask = torch.tensor([image_mask])
        x = self.model.embed(torch.tensor([ids]), image_embeds=image_embeds, image_mask=mask)  # (1, T, D)
        self.decoder.reset_state()
        positions = np.arange(len(ids))[None] + FIRST_POSITION
        new: list[int] = []
        while True:
            logits = self.decoder.infer({"x": x.numpy(), "positions": positions})["logits"][0]  # (V,)
            if len(new) < least:
                logits[EOS] = -np.inf
            new.append(int(logits.argmax()))
            if new[-1] == EOS or len(new) == most:
                return new
            x = self.model.decoder.embed_tokens(torch.tensor([[new[-1]]]))  # (1, 1, D)
            positions = positions[:, -1:] + 1

    def caption(self, pixels: Tensor, count: int) -> list[list[int]]:
        ids, image_mask = self.tokenizer.encode_prompt("<grounding>An image of")
        return [self.generate(ids, image_mask, pixels, count, count)]


def main() -> None:
    """How many answers of the bundled model keep their ids and boxes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=60)
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(ROOT / "tiny")
    chosen = choose_examples(args.scenes, HELD_OUT, only=["caption", "detail", "ground", "refer"])
    expected = answers(model, tokenizer, chosen)
    print("| weights | same ids | boxes with IoU >= 0.9 |\n|---|---|---|")
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    for bits in (32, 8, 4):
        peer = OpenVino(f"OpenVINO, {bits} bits", model, tokenizer, convert(model, bits), **options)
        found = []
        for scene, example in chosen:
            pixels = preprocess_image(scene.draw(), model.config.vision.image_size)[None]
            ids = peer.generate(*encode_example(tokenizer, example), pixels, most=120)
            found.append(Row([], ids, [1.0] * len(ids)))
        same = sum(a.ids == b.ids for a, b in zip(expected, found, strict=True)) / len(chosen)
        kept, count = boxes_kept(tokenizer, chosen, expected, found)
        print(f"| {peer.name} | {same:.3f} of {len(chosen)} | {kept:.3f} of {count} |", flush=True)


if __name__ == "__main__":
    main()
