"""Writing checkpoints: any accepted form to the published layout, in any precision, or nothing at all."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, TINY, copy, needs_transformers, prompt_batch, rough, run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_loader import assert_same, fairseq_state, published, with_rows

from inference import convert
from inference.convert import check_finite, check_target, replacing, save_checkpoint
from inference.fast import PackableCheckpoint, load_checkpoint
from kosmos2 import Kosmos2
from load_weights import HUGGING_FACE, INT8_FILE, SENTENCEPIECE, Checkpoint, rename, report
from tokenizer import Tokenizer

FC1 = rename("decoder.layers.0.mlp.fc1.weight", HUGGING_FACE)


def save_as(folder, precision, to) -> str:
    """`python -m inference.convert FOLDER TO --precision PRECISION`; returns the report on the result."""
    assert convert.main([str(folder), str(to), "--precision", precision]) == 0
    return report(PackableCheckpoint(to))


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def int8_folder(small_folder, tmp_path):
    save_as(small_folder, "int8", tmp_path / "int8")
    return tmp_path / "int8"


# ---- What is written -------------------------------------------------------------------------------


def test_the_original_layout_becomes_the_published_one(small, small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "fairseq")
    (folder / "model.safetensors").unlink()
    torch.save(fairseq_state(small), folder / "kosmos-2.pt")
    command = [sys.executable, "-m", "inference.convert", folder, tmp_path / "saved"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "original (fairseq)" in done.stdout and "vision            39" in done.stdout
    assert done.stdout.endswith("saved in fp32\n")
    assert_same(load_checkpoint(tmp_path / "saved")[0], small)
    a, b = published(tmp_path / "saved"), published(small_folder)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_has_three_files(small_folder):
    """No temporary ones are left, and everybody may read the weights."""
    assert sorted(contents(small_folder)) == ["config.json", "model.safetensors", SENTENCEPIECE]
    assert (small_folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_configuration_comes_back(small_folder):
    config = json.loads((small_folder / "config.json").read_text())
    assert config["model_type"] == "kosmos-2" and config["dtype"] == "float32"
    assert config["text_config"]["scale_embedding"] is True and config["text_config"]["eos_token_id"] == 2
    assert Checkpoint(small_folder).config == SMALL


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_a_checkpoint_is_saved_as_stored(small_folder, tmp_path, precision):
    """Without --precision. Most weights of an fp16 checkpoint are float16, although most of its tensors
    are float32."""
    first = save_as(small_folder, precision, tmp_path / "first")
    assert convert.main([str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    assert report(PackableCheckpoint(tmp_path / "second")).splitlines()[1:] == first.splitlines()[1:]
    before, after = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert before == after


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_packed_checkpoint_computes_the_same(small_folder, tmp_path, precision):
    """A checkpoint saved in fp16 or int8 gives the same bits as one packed while it is loaded."""
    save_as(small_folder, precision, tmp_path / "saved")
    original, tokenizer = load_checkpoint(small_folder, precision)
    saved, _ = load_checkpoint(tmp_path / "saved", precision)
    tokens, image_mask, _ = prompt_batch(tokenizer, ["<grounding> An image of"])
    pixels = torch.rand(1, 3, SMALL.vision.image_size, SMALL.vision.image_size)
    logits = [model(tokens, pixels, image_mask=image_mask) for model in (original, saved)]
    assert torch.equal(*logits)


def test_int8_is_a_quarter(small_folder, int8_folder):
    """Of the matrices; biases and norms stay float32."""
    small_bytes = sum(t.nbytes for t in published(small_folder).values() if t.dim() == 2)
    tensors = load_file(int8_folder / INT8_FILE)
    int8 = [t for t in tensors.values() if t.dtype == torch.int8]
    assert len(int8) == sum(name.endswith("_scale") for name in tensors) > 20
    assert sum(t.nbytes for t in int8) < 0.27 * small_bytes


def test_an_int8_checkpoint_in_other_precisions(small, int8_folder, tmp_path):
    """Every weight is within half a quantization step of the original."""
    steps = load_file(int8_folder / INT8_FILE)
    model, _ = load_checkpoint(int8_folder)
    originals = small.state_dict()
    quantized = 0
    for name, tensor in model.state_dict().items():
        scale = steps.get(rename(name, HUGGING_FACE) + "_scale")
        if scale is None:
            assert torch.equal(tensor, originals[name])
        else:
            assert ((tensor - originals[name]).abs() <= 0.5001 * scale[:, None]).all()
            quantized += 1
    assert quantized > 20 and all(t.dtype == torch.float32 for t in model.state_dict().values())
    save_as(int8_folder, "bf16", tmp_path / "bf16")
    assert load_checkpoint(tmp_path / "bf16", "bf16")[0].decoder.embed_tokens.weight.dtype == torch.bfloat16


@needs_transformers
def test_transformers_reads_fp16_and_refuses_int8(small, small_folder, int8_folder, tmp_path):
    from transformers import Kosmos2ForConditionalGeneration

    save_as(small_folder, "fp16", tmp_path / "fp16")
    reference = Kosmos2ForConditionalGeneration.from_pretrained(tmp_path / "fp16", dtype=torch.float32)
    embedding = reference.text_model.model.embed_tokens.weight
    assert torch.equal(embedding, small.decoder.embed_tokens.weight.half().float())
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        Kosmos2ForConditionalGeneration.from_pretrained(int8_folder)


def test_the_tokenizer_can_be_elsewhere(capsys, small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "bare")
    (folder / SENTENCEPIECE).unlink()
    status, _, error = run(capsys, folder, tmp_path / "saved", command=convert)
    assert status == 1 and SENTENCEPIECE in error and not (tmp_path / "saved").exists()
    tokenizer = TINY / SENTENCEPIECE
    assert run(capsys, folder, tmp_path / "saved", "--tokenizer", tokenizer, command=convert)[0] == 0
    assert contents(tmp_path / "saved") == contents(small_folder)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_surplus_rows_are_kept(small_folder, tmp_path, precision):
    folder = with_rows(small_folder, tmp_path / "more", 28)
    save_as(folder, precision, tmp_path / "saved")
    model, tokenizer = load_checkpoint(tmp_path / "saved")
    assert model.config.text.vocab_size == tokenizer.vocab_size == SMALL.text.vocab_size + 28


@pytest.mark.parametrize("grid", [8, 33])
def test_the_grid_is_kept(small_folder, tmp_path, grid):
    """Of 33 x 33 cells, one would otherwise read the last 65 as surplus rows, and get other boxes."""
    text = replace(SMALL.text, vocab_size=Tokenizer(TINY / SENTENCEPIECE, 5, grid).vocab_size)
    save_checkpoint(
        Kosmos2(replace(SMALL, text=text, location_grid=grid)), TINY / SENTENCEPIECE, tmp_path / "a"
    )
    save_as(tmp_path / "a", "int8", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert load_checkpoint(folder)[1].grid == grid


# ---- What is refused -------------------------------------------------------------------------------


def test_damaged_models_are_not_saved(tmp_path):
    model = rough(Kosmos2(SMALL), seed=0)
    model.resampler.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"resampler.dense.weight has NaN"):
        check_finite(model)
    with pytest.raises(ValueError, match=r"resampler.dense.weight has NaN"):
        save_checkpoint(model, TINY / SENTENCEPIECE, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_packed_models_are_not_saved(small_folder, tmp_path, precision):
    packed, tokenizer = load_checkpoint(small_folder, precision)
    with pytest.raises(ValueError, match="a packed model cannot be saved"):
        save_checkpoint(packed, tokenizer.model_file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damaged_weights_are_not_converted(capsys, small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "nan")
    tensors = published(folder)
    tensors[FC1][3, 5] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    for precision in ("fp32", "fp16", "int8"):
        status, _, error = run(capsys, folder, tmp_path / "new", "--precision", precision, command=convert)
        assert status == 1 and FC1 in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_not_there(capsys, tmp_path):
    status, out, error = run(capsys, tmp_path / "none.pt", tmp_path / "new", command=convert)
    assert (status, out, error.count("\n")) == (1, "", 1) and "none.pt" in error


def test_an_unfinished_training_run_is_not_converted(capsys, small, tmp_path):
    torch.save({"kosmos2_training": 1, "model": small.state_dict()}, tmp_path / "checkpoint.pt")
    status, _, error = run(capsys, tmp_path / "checkpoint.pt", tmp_path / "new", command=convert)
    assert status == 1 and "unfinished training run" in error


def test_folders_that_cannot_be_written(capsys, small_folder, tmp_path):
    """A file; a folder with other weights, which a loader would read instead."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_target(tmp_path / "file")
    for name in ("pytorch_model.bin", INT8_FILE, "kosmos-2.pt"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("")
        with pytest.raises(ValueError, match=f"already has {name}"):
            check_target(folder)
    check_target(tmp_path / f"with {INT8_FILE}", INT8_FILE)
    check_target(small_folder)
    before = contents(small_folder)
    status, _, error = run(capsys, small_folder, small_folder, "--precision", "int8", command=convert)
    assert status == 1 and "already has model.safetensors" in error and contents(small_folder) == before


def test_a_failed_save_leaves_the_old_checkpoint(small, small_folder, tmp_path, monkeypatch):
    """Weights, tokenizer and configuration are replaced together or not at all."""
    folder = copy(small_folder, tmp_path / "old")
    before = contents(folder)

    def full_disk(*args, **kwargs):
        raise SafetensorError("No space left on device")

    (tmp_path / "other.model").write_bytes(b"another tokenizer")
    monkeypatch.setattr(convert, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small, tmp_path / "other.model", folder)
    assert contents(folder) == before


def test_replacing_a_file(tmp_path):
    file = tmp_path / "file"
    with replacing(file) as part:
        part.write_text("first")
        assert not file.exists()
    with pytest.raises(KeyError), replacing(file) as part:
        part.write_text("half of the sec")
        raise KeyError
    assert contents(tmp_path) == {"file": b"first"}


# ---- Damaged int8 checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda q, scale: {FC1: q}, f"{FC1}: int8"),
        (lambda q, scale: {f"{FC1}_scale": scale}, rf"missing tensors \(1\): {FC1}"),
        (lambda q, scale: {FC1: q, f"{FC1}_scale": scale * float("nan")}, "NaN"),
        (lambda q, scale: {FC1: q, f"{FC1}_scale": -scale}, "non-positive"),
        (lambda q, scale: {FC1: q, f"{FC1}_scale": scale[:3]}, f"{FC1}: int8"),
        (lambda q, scale: {FC1: q, f"{FC1}_scale": scale.to(torch.int64)}, f"{FC1}: int8"),
        (
            lambda q, scale: {FC1: q[:5], f"{FC1}_scale": scale[:5]},
            rf"{FC1}: expected \(88, 48\), got \(5, 48\)",
        ),
    ],
    ids=["no scales", "no matrix", "NaN", "negative", "too few", "integers", "shape"],
)
def test_damaged_int8_checkpoints(int8_folder, damage, error, precision):
    tensors = load_file(int8_folder / INT8_FILE)
    changed = damage(tensors.pop(FC1), tensors.pop(f"{FC1}_scale"))
    save_file(tensors | changed, int8_folder / INT8_FILE)
    with pytest.raises(ValueError, match=error):
        load_checkpoint(int8_folder, precision)


def test_scales_of_a_float_matrix(int8_folder):
    tensors = load_file(int8_folder / INT8_FILE)
    save_file(tensors | {FC1: tensors[FC1].float()}, int8_folder / INT8_FILE)
    with pytest.raises(ValueError, match=rf"unexpected tensors \(1\): {FC1}_scale"):
        load_checkpoint(int8_folder)


def test_only_matrices_are_in_int8(int8_folder):
    norm = rename("decoder.layer_norm.weight", HUGGING_FACE)
    tensors = load_file(int8_folder / INT8_FILE)
    tensors |= {norm: torch.ones(48, dtype=torch.int8), f"{norm}_scale": torch.ones(48)}
    save_file(tensors, int8_folder / INT8_FILE)
    with pytest.raises(ValueError, match=f"{norm}: int8"):
        load_checkpoint(int8_folder, "int8")


def test_the_plain_loader_names_the_other_one(int8_folder):
    import load_weights

    for precision in ("fp32", "bf16"):
        with pytest.raises(ValueError, match=r"is in int8; load it with inference\.fast\.load_checkpoint"):
            load_weights.load_checkpoint(int8_folder, precision)
