"""Faster linear layers: the multi-core kernel for a few rows, and 8- and 16-bit weights."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, copy
from safetensors.torch import load_file, save_file
from scenes import Scene

import load_weights
from kosmos2 import Attention, finish, pad_left, preprocess_images
from load_weights import (
    PackedAttention,
    PackedEmbedding,
    PackedLinear,
    input_steps,
    load_checkpoint,
    multi_core_linear,
    quantize,
    rows_times_slices,
    save_checkpoint,
    slices_times_columns,
)


def some_layer(K=192, N=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    weight *= torch.rand(N, 1, generator=generator) * 3 + 0.01  # outputs of very different size
    return weight, torch.randn(N, generator=generator)


def error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernel", [None, slices_times_columns, rows_times_slices])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (16, 1), (3, 5), (17, 1)])
def test_few_rows(shape, kernel, monkeypatch):
    """A few rows times a large matrix equal F.linear, also for a prime number of outputs."""
    if kernel is not None:
        monkeypatch.setattr(load_weights, "fastest_kernel", lambda rows: kernel)
    for N in (4096, 4099):
        weight, bias = some_layer(K=256, N=N)
        x = torch.randn(*shape, 256)
        torch.testing.assert_close(
            multi_core_linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(multi_core_linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16])
def test_packed_weights(bits):
    """Close to the float layer, with and without PyTorch's kernel; those two are even closer."""
    weight, bias = some_layer()
    # Inputs halfway between two int8 steps could be rounded differently by the two: avoid them.
    steps = torch.randint(-126, 127, (3, 20, 192)) + 0.8 * (torch.rand(3, 20, 192) - 0.5)
    steps[..., 0] = 127
    x = steps * torch.logspace(-5, 1, 20)[:, None]  # rows of very different size
    packed, scale = quantize(weight) if bits == 8 else (weight.half(), None)
    with_kernel = PackedLinear(packed, bias, scale)
    if with_kernel.packed is None or (bits == 8 and input_steps() != 127):
        pytest.skip("this PyTorch or CPU has no such kernel")
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr("load_weights.INT8_KERNEL", "none of that name")
        without = PackedLinear(packed, bias, scale)
    assert without.packed is None
    expected = F.linear(x, weight, bias)
    most = {8: 0.015, 16: 5e-4}[bits]
    for row in range(20):
        assert error(with_kernel(x)[:, row], expected[:, row]) < most
        assert error(without(x)[:, row], expected[:, row]) < most
        assert error(with_kernel(x)[:, row], without(x)[:, row]) < 1e-5


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_are_independent(bits):
    weight, bias = some_layer()
    layer = PackedLinear(
        *([weight.half(), bias] if bits == 16 else [quantize(weight)[0], bias, quantize(weight)[1]])
    )
    rows = torch.randn(30, 192) * torch.logspace(-4, 4, 30)[:, None]
    alone = torch.cat([layer(row[None]) for row in rows])
    torch.testing.assert_close(layer(rows), alone, rtol=1e-6, atol=0)


def test_quantization_of_difficult_weights():
    """A row of zeros, one outlier, a constant row, a tiny value; and an input of zeros."""
    weight = torch.zeros(4, 16)
    weight[1, 3], weight[2], weight[3, 0] = -1e4, 0.5, 1e-20
    q, scale = quantize(weight)
    assert q.abs().max() == 127 and torch.isfinite(scale).all()
    torch.testing.assert_close(q.float() * scale[:, None], weight, rtol=1e-6, atol=0)
    layer = PackedLinear(q, None, scale)
    assert (layer(torch.zeros(2, 16)) == 0).all()
    assert not torch.isfinite(layer(torch.full((1, 16), torch.nan))).any()  # NaN must not turn into numbers


def test_no_sum_overflows():
    """The largest possible weights and inputs, also if fbgemm may not use VNNI instructions."""
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\nfrom load_weights import PackedLinear\n"
        "layer, x = PackedLinear(torch.full((64, 256), 127, dtype=torch.int8), None, torch.ones(64)), torch.ones(2, 256)\n"
        "x[1, ::2] = -1\nprint(layer(x)[:, 5].tolist(), layer(-x)[:, 5].tolist())"
    )
    for instructions in ("", "AVX2"):
        run = [sys.executable, "-c", script, str(ROOT)]
        done = subprocess.run(
            run,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": instructions},
        )
        assert [float(v) for v in re.findall(r"-?[\d.]+", done.stdout)] == pytest.approx(
            [32512, 0, -32512, 0], rel=1e-6
        ), instructions


def test_embedding_and_output_projection_share_their_weights():
    weight, _ = some_layer()
    q, scale = quantize(weight)
    embedding = PackedEmbedding(q, scale)
    tokens = torch.tensor([[3, 199], [0, 3]])
    rows = embedding(tokens)
    torch.testing.assert_close(rows, (q.float() * scale[:, None])[tokens])
    assert error(embedding.unembed(rows), F.linear(rows, weight)) < 0.015


@pytest.mark.parametrize(("precision", "most"), [("fp16", 1e-3), ("int8", 0.05)])
def test_packed_models(tiny, precision, most):
    """Logits of the bundled model, in a batch and alone."""
    model, tokenizer = tiny
    packed, _ = load_checkpoint(TINY, precision)
    prompts = [
        tokenizer.encode_prompt(p) for p in ("<grounding>An image of", "<grounding><phrase> a star</phrase>")
    ]
    pixels = preprocess_images([Scene.random(seed).draw() for seed in (1, 2)], model.config.vision.image_size)
    tokens, image_mask, pad_mask = pad_left(prompts)
    with torch.inference_mode():
        expected = model(tokens, pixels, None, image_mask, pad_mask)[~pad_mask]
        found = packed(tokens, pixels, None, image_mask, pad_mask)[~pad_mask]
        assert error(found, expected) < most
        for row, (ids, mask) in enumerate(prompts):
            alone = packed(torch.tensor([ids]), pixels[row : row + 1], None, torch.tensor([mask]))[0, -1]
            assert error(found.split([len(ids) for ids, _ in prompts])[row][-1], alone) < most / 5


def test_packed_models_need_no_special_mode():
    """A packed model has no gradients, so it runs without torch.no_grad()."""
    model, tokenizer = load_checkpoint(TINY, "int8")
    ids, mask = tokenizer.encode_prompt("An image of")
    logits, loss = model(
        torch.tensor([ids]),
        torch.randn(1, 3, *[model.config.vision.image_size] * 2),
        None,
        torch.tensor([mask]),
        labels=torch.tensor([ids]),
    )
    assert torch.isfinite(logits).all() and not loss.requires_grad


def test_errors_of_packed_models(small_folder, tmp_path):
    packed, tokenizer = load_checkpoint(TINY, "int8")
    with pytest.raises(ValueError, match="cannot be saved"):
        save_checkpoint(packed, tokenizer.model_file, tmp_path / "saved")
    with pytest.raises(ValueError, match="for CPUs"):
        load_checkpoint(TINY, "int8", device="cuda")
    folder = copy(small_folder, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.model.layers.1.ffn.fc1.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    for precision in ("int8", "fp16"):
        with pytest.raises(ValueError, match=r"layers.1.ffn.fc1.weight .* NaN"):
            load_checkpoint(folder, precision)


def test_packed_attention_is_one_matmul(tiny):
    """Self-attention gets its queries, keys and values from one layer; the resampler's attention,
    which has two inputs, does not."""
    packed, _ = load_checkpoint(TINY, "int8")
    for name, module in packed.named_modules():
        if isinstance(module, Attention):
            assert isinstance(module, PackedAttention) == (name != "resampler.x_attn"), name
    x = torch.randn(2, 5, 192)
    with torch.inference_mode():
        expected = tiny[0].decoder.layers[0].attn.project(x, None)
        found = packed.decoder.layers[0].attn.project(x, None)
    for one, other in zip(expected, found, strict=True):
        assert error(other, one) < 0.02
    with pytest.raises(ValueError, match="self-attention"):  # its context must not be ignored
        packed.decoder.layers[0].attn(x, context=x)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_precisions_share_a_prefix(precision):
    """Questions that share the prefill of their image get the answers they get alone."""
    model, tokenizer = load_checkpoint(TINY, precision)
    pixels = preprocess_images([Scene.random(1).draw()], model.config.vision.image_size)
    texts = (
        "<grounding>An image of",
        "<grounding><phrase> a star</phrase>",
        "Question: How many stars are there? Answer:",
    )
    head, head_mask = tokenizer.encode_prompt("")
    prefix = model.prefill(
        torch.tensor([head]), pixels, image_mask=torch.tensor([head_mask]), max_new_tokens=0
    )
    questions, _, pad_mask = pad_left([(tokenizer.encode(text, add_bos=False), []) for text in texts])
    together = finish(model.prefill(questions, pad_mask=pad_mask, prefix=prefix, max_new_tokens=20))
    for text, result in zip(texts, together, strict=True):
        tokens, image_mask, _ = pad_left([tokenizer.encode_prompt(text)])
        alone = finish(model.prefill(tokens, pixels, None, image_mask, max_new_tokens=20))[0]
        assert result.ids == alone.ids
        assert result.probabilities == pytest.approx(
            alone.probabilities, abs=0.02 if precision == "int8" else 1e-4
        )
