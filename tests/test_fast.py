"""Faster linear layers: the multi-core kernel for a few rows, and 8- and 16-bit weights."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, TINY, copy, prompt_batch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_loader import assert_same

import load_weights
from inference import fast
from inference.convert import save_checkpoint
from inference.fast import (
    MultiCoreLinear,
    PackedAttention,
    PackedEmbedding,
    PackedLinear,
    input_steps,
    load_checkpoint,
    multi_core_linear,
    quantize,
    sliced_matmul,
)
from kosmos2 import Attention, Kosmos2, preprocess_image
from load_weights import PRECISIONS, SENTENCEPIECE


def some_layer(K=192, N=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    weight *= torch.rand(N, 1, generator=generator) * 3 + 0.01  # outputs of very different size
    return weight, torch.randn(N, generator=generator)


def error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def scene_pixels(count: int) -> torch.Tensor:
    """The bundled image, and parts of it: (count, 3, S, S)."""
    image = Image.open(TINY / "scene.png").convert("RGB")
    parts = [image.crop((20 * i, 10 * i, image.width, image.height)) for i in range(count)]
    return torch.stack(
        [preprocess_image(part, load_weights.Checkpoint(TINY).config.vision.image_size) for part in parts]
    )


# ---- float32 on all cores --------------------------------------------------------------------------


@pytest.mark.parametrize("maker", ["intel", "other"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (16, 1), (3, 5), (17, 1)])
@pytest.mark.parametrize("outputs", [4096, 4099])
def test_few_rows(shape, maker, outputs, monkeypatch):
    """A few rows times a large matrix equal F.linear, also for a prime number of outputs."""
    monkeypatch.setattr(fast, "cpu_maker", lambda: maker)
    weight, bias = some_layer(K=256, N=outputs)
    x = torch.randn(*shape, 256)
    for b in (bias, None):
        found = multi_core_linear(x, weight, b)
        torch.testing.assert_close(found, F.linear(x, weight, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("maker", "rows", "sliced"),
    [("intel", 1, False), ("intel", 7, True), ("intel", 16, True), ("intel", 17, False),
     ("other", 1, True), ("other", 16, True), ("other", 17, False)],
)  # fmt: skip
def test_the_kernel_depends_on_the_cpu_and_the_rows_only(maker, rows, sliced, monkeypatch):
    """Never on the clock: otherwise logits would change from run to run."""
    calls = []
    monkeypatch.setattr(fast, "cpu_maker", lambda: maker)
    monkeypatch.setattr(fast, "sliced_matmul", lambda *given: calls.append(1) or sliced_matmul(*given))
    weight, _ = some_layer(K=256, N=4096)
    for _ in range(3):
        multi_core_linear(torch.randn(rows, 256), weight)
    multi_core_linear(torch.randn(rows, 256).double(), weight.double())
    multi_core_linear(torch.randn(rows, 256), weight[:64])  # a small matrix
    assert len(calls) == (3 if sliced else 0)


@pytest.mark.parametrize(
    ("text", "maker"), [("GenuineIntel", "intel"), ("AuthenticAMD", "other"), ("", "other")]
)
def test_the_maker_of_the_cpu(text, maker, monkeypatch):
    monkeypatch.setattr(fast.Path, "is_file", lambda path: True)
    monkeypatch.setattr(fast.Path, "read_text", lambda path: f"vendor_id\t: {text}\nflags\t\t: fpu vme")
    fast.cpu_maker.cache_clear()
    assert fast.cpu_maker() == maker
    monkeypatch.undo()
    fast.cpu_maker.cache_clear()


def test_logits_repeat_from_run_to_run():
    """To the last bit, in processes of their own, for all numbers of rows up to 17."""
    script = (
        "import sys, torch, zlib; sys.path.insert(0, sys.argv[1])\n"
        "from inference.fast import load_checkpoint, multi_core_linear\n"
        "torch.manual_seed(0)\nweight, found = torch.randn(4096, 256), []\n"
        "for precision in ('fp32', 'fp16', 'int8'):\n"
        "    model, _ = load_checkpoint(sys.argv[2], precision)\n"
        "    with torch.inference_mode():\n"
        "        for rows in range(1, 18):\n"
        "            found.append(multi_core_linear(torch.randn(rows, 256), weight))\n"
        "            found.append(model(torch.randint(4, 999, (rows, 1))))\n"
        "print(zlib.crc32(b''.join(t.numpy().tobytes() for t in found)))"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(TINY)]
    outputs = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1 and outputs != {b""}


def test_the_layers_of_each_precision(small_folder):
    """Layers for all cores in fp32, plain ones in bf16, packed ones in fp16 and int8."""
    kinds = {"fp32": MultiCoreLinear, "bf16": torch.nn.Linear, "fp16": PackedLinear, "int8": PackedLinear}
    for precision, kind in kinds.items():
        model, _ = load_checkpoint(small_folder, precision)
        assert type(model.decoder.layers[0].mlp.fc1) is kind and not model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_tensors_as_in_the_plain_loader(small, small_folder, precision):
    assert_same(load_checkpoint(small_folder, precision)[0], small, PRECISIONS[precision])


def test_the_same_ids_as_with_plain_layers(tiny):
    """`tiny` has the layers of fp32 on all cores."""
    model, tokenizer = tiny
    plain, _ = load_weights.load_checkpoint(TINY)
    tokens, image_mask, pad_mask = prompt_batch(tokenizer, ["<grounding>An image of", "An image of"])
    inputs = (tokens, scene_pixels(2), None, image_mask, pad_mask)
    assert model.generate(*inputs) == plain.generate(*inputs)


# ---- 8 and 16 bits ---------------------------------------------------------------------------------


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
    if with_kernel.packed is None:
        pytest.skip("this PyTorch has no such kernel")
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(fast, "INT8_KERNEL", "none of that name")
        without = PackedLinear(packed, bias, scale)
    assert without.packed is None
    expected = F.linear(x, weight, bias)
    same_rounding = bits == 16 or input_steps() == 127  # without VNNI, the kernel has half of the steps
    most = {8: 0.015 if same_rounding else 0.03, 16: 5e-4}[bits]
    for row in range(20):
        assert error(with_kernel(x)[:, row], expected[:, row]) < most
        assert error(without(x)[:, row], expected[:, row]) < most
        assert error(with_kernel(x)[:, row], without(x)[:, row]) < (1e-5 if same_rounding else most)


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_are_independent(bits):
    weight, bias = some_layer()
    layer = PackedLinear(
        *([weight.half(), bias] if bits == 16 else [quantize(weight)[0], bias, quantize(weight)[1]])
    )
    rows = torch.randn(30, 192) * torch.logspace(-4, 4, 30)[:, None]
    alone = torch.cat([layer(row[None]) for row in rows])
    # Relative to the largest output of each row. (Without AVX-512, the order of a sum depends on the
    # number of rows.)
    size = alone.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(layer(rows) / size, alone / size, rtol=0, atol=2e-6)


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
        "import sys, torch; sys.path.insert(0, sys.argv[1])\nfrom inference.fast import PackedLinear\n"
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
    """Logits of the bundled model, in a batch and alone. Inputs may have half as many steps."""
    model, tokenizer = tiny
    most *= 127 / fast.input_steps() if precision == "int8" else 1
    packed, _ = load_checkpoint(TINY, precision)
    prompts = ["<grounding>An image of", "<grounding><phrase> a star</phrase>"]
    pixels = scene_pixels(2)
    tokens, image_mask, pad_mask = prompt_batch(tokenizer, prompts)
    with torch.inference_mode():
        expected = model(tokens, pixels, None, image_mask, pad_mask)
        found = packed(tokens, pixels, None, image_mask, pad_mask)
        assert error(found[~pad_mask], expected[~pad_mask]) < most
        for row, prompt in enumerate(prompts):
            ids, mask, _ = prompt_batch(tokenizer, [prompt])
            alone = packed(ids, pixels[row : row + 1], None, mask)[0, -1]
            assert error(found[row, -1], alone) < most / 5


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


def test_int8_is_for_cpus():
    with pytest.raises(ValueError, match="for CPUs|not available"):
        load_checkpoint(TINY, "int8", device="cuda")


@pytest.mark.parametrize("precision", ["fp64", "INT8", "", None])
def test_unknown_precisions(precision):
    with pytest.raises(ValueError, match="expected one of fp32, bf16, fp16, int8"):
        load_checkpoint(TINY, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_weights_that_are_not_finite_are_named(small_folder, tmp_path, precision):
    folder = copy(small_folder, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.model.layers.1.ffn.fc1.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.ffn.fc1.weight .* NaN"):
        load_checkpoint(folder, precision)


def test_values_too_large_for_half_precision_are_named(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["image_to_text_projection.dense.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"dense.weight .* too large .* fp32 or bf16"):
        load_checkpoint(folder, precision="fp16")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tied_weights_that_differ_are_refused(small_folder, tmp_path, precision):
    folder = copy(small_folder, tmp_path / "untied")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["text_model.model.embed_tokens.weight"] * 2
    save_file(tensors | {"text_model.lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"text_model.lm_head.weight differs"):
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


def test_memory_while_loading(tmp_path):
    """A checkpoint of 400 MB: the process grows by little more than the weights, and half as much
    for bf16."""
    wide = replace(SMALL, text=replace(SMALL.text, width=1152, heads=3, mlp_width=4608, layers=6))
    model = Kosmos2(wide)
    save_checkpoint(model, TINY / SENTENCEPIECE, tmp_path)
    size = os.path.getsize(tmp_path / "model.safetensors") / 2**20
    del model
    script = (
        "import resource, sys\nsys.path.insert(0, sys.argv[1])\nfrom inference.fast import load_checkpoint\n"
        "import torch; torch.zeros(9) @ torch.zeros(9)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\nload_checkpoint(sys.argv[2], sys.argv[3])\nprint(peak() - before)"
    )
    for precision, most in (("fp32", 1.15), ("bf16", 0.65), ("int8", 0.75)):
        run = [sys.executable, "-c", script, str(ROOT), str(tmp_path), precision]
        grown = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        assert grown < most * size, (precision, grown, size)
