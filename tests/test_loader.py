"""Every form of checkpoint gives the same model; every damaged one is refused, naming what is
wrong."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT, SMALL, TINY, copy, needs_transformers, rough
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import load_weights
from kosmos2 import Kosmos2, pad_left
from load_weights import (
    EMBEDDING,
    FAIRSEQ,
    HUGGING_FACE,
    OURS,
    SENTENCEPIECE,
    Checkpoint,
    load_checkpoint,
    rename,
    save_checkpoint,
)
from tokenizer import Tokenizer

LM_HEAD = "text_model.lm_head.weight"


def published(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def fairseq_state(model: Kosmos2) -> dict:
    """What fairseq's trainer would have saved: configuration objects, weights, leftovers."""
    weights = {rename(name, FAIRSEQ): tensor for name, tensor in model.state_dict().items()}
    weights["gpt_model.decoder.output_projection.weight"] = model.state_dict()[EMBEDDING]
    weights["gpt_model.decoder.embed_positions._float_tensor"] = torch.zeros(1)
    weights["gpt_model.decoder.self_attn_sope.scale"] = torch.ones(32)
    return {"args": None, "cfg": {"model": argparse.Namespace(layers=3, path=ROOT)}, "model": weights,
            "optimizer_history": [{"num_updates": 1}], "extra_state": OrderedDict(epoch=1)}  # fmt: skip


def assert_same(model: Kosmos2, small: Kosmos2, dtype=torch.float32):
    expected = small.state_dict()
    assert model.state_dict().keys() == expected.keys() and not model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype)), name


# ------------------------------------------------------------------------------------------ accepted forms


def test_folder_and_bare_file(small, small_folder):
    for path in (small_folder, small_folder / "model.safetensors", str(small_folder)):
        model, tokenizer = load_checkpoint(path)
        assert_same(model, small)
        assert model.config == SMALL and tokenizer.num_image_tokens == SMALL.latent_query_num


def test_shards(small, small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "shards")
    tensors = published(folder)
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        index |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for path in (folder, folder / "model.safetensors.index.json"):
        assert_same(load_checkpoint(path)[0], small)
    save_file({names[0]: tensors[names[0]]}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="another shard"):
        load_checkpoint(folder)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00003-of-00003"):
        load_checkpoint(folder)


@pytest.mark.parametrize("zip_format", [True, False])
def test_pytorch_bin(small, small_folder, tmp_path, zip_format):
    folder = copy(small_folder, tmp_path / "bin")
    state = OrderedDict(published(folder))
    state[LM_HEAD] = state[rename(EMBEDDING, HUGGING_FACE)]  # one storage, two names
    state["vision_model.model.post_layernorm.weight"] = torch.nn.Parameter(
        state["vision_model.model.post_layernorm.weight"]
    )
    q_proj = "text_model.model.layers.0.self_attn.q_proj.weight"
    state[q_proj] = state[q_proj].t().contiguous().t()  # stored column by column
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)
    assert_same(load_checkpoint(folder)[0], small)
    assert_same(load_checkpoint(folder / "pytorch_model.bin")[0], small)


def test_fairseq(small, small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "fairseq")
    (folder / "model.safetensors").unlink()
    torch.save(fairseq_state(small), folder / "kosmos-2.pt")
    assert_same(load_checkpoint(folder)[0], small)
    assert_same(load_checkpoint(folder / "kosmos-2.pt")[0], small)
    assert Checkpoint(folder).problems() == []


@pytest.mark.parametrize("keep", [{"embed"}, {"head"}, {"embed", "head"}])
def test_either_or_both_of_the_tied_weights(small, small_folder, tmp_path, keep):
    folder = copy(small_folder, tmp_path / "tied")
    tensors = published(folder)
    embed = tensors.pop(rename(EMBEDDING, HUGGING_FACE))
    if "embed" in keep:
        tensors[rename(EMBEDDING, HUGGING_FACE)] = embed
    if "head" in keep:
        tensors[LM_HEAD] = embed.clone()
    tensors["text_model.model.embed_positions.weights"] = torch.zeros(4, 48)  # a known leftover
    save_file(tensors, folder / "model.safetensors")
    assert_same(load_checkpoint(folder)[0], small)


def test_tied_weights_that_differ_are_refused(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "untied")
    tensors = published(folder)
    save_file(tensors | {LM_HEAD: tensors[rename(EMBEDDING, HUGGING_FACE)] * 2}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=LM_HEAD):
        load_checkpoint(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_and_expected_type_are_independent(small, small_folder, tmp_path, stored, precision):
    folder = copy(small_folder, tmp_path / "types")
    save_file({name: t.to(stored) for name, t in published(folder).items()}, folder / "model.safetensors")
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model, _ = load_checkpoint(folder, precision=precision)
    state = small.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected and torch.equal(tensor, state[name].to(stored).to(expected))


def test_without_config_the_published_sizes_are_meant(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "bare")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"772 tensors missing.*expected \(257, 1024\)"):
        load_checkpoint(folder)


def test_saving_gives_the_published_layout_back(small, small_folder, tmp_path):
    torch.save(fairseq_state(small), tmp_path / "kosmos-2.pt")
    for name in ("config.json", SENTENCEPIECE):
        shutil.copy(small_folder / name, tmp_path / name)
    run = [sys.executable, ROOT / "load_weights.py", tmp_path, "--save", tmp_path / "saved"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "original (fairseq)" in done.stdout and "complete" in done.stdout
    assert "vision            39" in done.stdout and not list((tmp_path / "saved").glob("*.part"))
    assert_same(load_checkpoint(tmp_path / "saved")[0], small)
    a, b = published(tmp_path / "saved"), published(small_folder)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_as(folder, precision, to) -> str:
    """`load_weights.py FOLDER --save TO --precision PRECISION`; returns the report on the result."""
    assert load_weights.main([str(folder), "--save", str(to), "--precision", precision]) == 0
    return load_weights.report(Checkpoint(to))


def test_a_checkpoint_is_saved_as_stored(small_folder, tmp_path):
    """Most weights of an fp16 checkpoint are float16, although most of its tensors are float32."""
    first = save_as(small_folder, "fp16", tmp_path / "first")
    assert load_weights.main([str(tmp_path / "first"), "--save", str(tmp_path / "second")]) == 0
    second = load_weights.report(Checkpoint(tmp_path / "second"))
    assert first.splitlines()[1:] == second.splitlines()[1:]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_packed_checkpoint_computes_the_same(small_folder, tmp_path, precision):
    """A checkpoint saved in fp16 or int8 gives the same bits as one packed while it is loaded."""
    report = save_as(small_folder, precision, tmp_path / "saved")
    assert {"fp16": "float16 x", "int8": "int8 x"}[precision] in report
    original, tokenizer = load_checkpoint(small_folder, precision)
    saved, _ = load_checkpoint(tmp_path / "saved", precision)
    tokens, image_mask, _ = pad_left([tokenizer.encode_prompt("<grounding> An image of")])
    pixels = torch.rand(1, 3, SMALL.vision.image_size, SMALL.vision.image_size)
    logits = [model(tokens, pixels, image_mask=image_mask) for model in (original, saved)]
    assert torch.equal(*logits)
    again = save_as(tmp_path / "saved", precision, tmp_path / "again")
    assert again.splitlines()[1:] == report.splitlines()[1:]
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    same = load_file(tmp_path / "again" / file.name)
    for name, tensor in load_file(file).items():
        assert torch.equal(tensor, same[name])


def test_an_int8_checkpoint_in_other_precisions(small, small_folder, tmp_path):
    """Every weight is within half a quantization step of the original."""
    save_as(small_folder, "int8", tmp_path / "saved")
    steps = load_file(tmp_path / "saved" / "model.int8.safetensors")
    model, _ = load_checkpoint(tmp_path / "saved")
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
    save_as(tmp_path / "saved", "bf16", tmp_path / "bf16")
    assert load_checkpoint(tmp_path / "bf16", "bf16")[0].decoder.embed_tokens.weight.dtype == torch.bfloat16


def test_damaged_int8_checkpoints(small_folder, tmp_path):
    save_as(small_folder, "int8", tmp_path / "saved")
    file = tmp_path / "saved" / "model.int8.safetensors"
    tensors = load_file(file)
    name = rename("decoder.layers.0.mlp.fc1.weight", HUGGING_FACE)
    without = {n: t for n, t in tensors.items() if n != f"{name}_scale"}
    nan = torch.full_like(tensors[f"{name}_scale"], float("nan"))
    for damaged, error in (
        (without, "without scales"),
        (tensors | {f"{name}_scale": nan}, "NaN"),
        (tensors | {f"{name}_scale": nan[:3]}, "_scale: expected"),
        (tensors | {name: tensors[name].float()}, "not floating point|float32"),
    ):
        save_file(damaged, file)
        for precision in ("fp32", "int8"):
            with pytest.raises(ValueError, match=error):
                load_checkpoint(tmp_path / "saved", precision)


def test_scales_that_cannot_be(small_folder, tmp_path):
    save_as(small_folder, "int8", tmp_path / "saved")
    file = tmp_path / "saved" / "model.int8.safetensors"
    tensors = load_file(file)
    name = rename("decoder.layers.0.mlp.fc1.weight", HUGGING_FACE)
    norm = rename("decoder.layer_norm.weight", HUGGING_FACE)
    scale = tensors[f"{name}_scale"]
    of_norm = {norm: torch.ones(48, dtype=torch.int8), f"{norm}_scale": torch.ones(48)}
    for changed, error in (
        ({f"{name}_scale": -scale}, "non-positive"),
        ({f"{name}_scale": torch.ones_like(scale, dtype=torch.int64)}, "_scale: i64"),
        (of_norm, "layer_norm.weight: int8"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(ValueError, match=error):
            load_checkpoint(tmp_path / "saved", "int8")


def test_one_tensor_under_two_names(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "twice")
    tensors = published(folder)
    name = next(iter(tensors))
    save_file(tensors | {f"module.{name}": tensors[name] * 5}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="twice"):
        load_checkpoint(folder)


def test_sparse_tensors_are_refused(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "sparse")
    tensors = published(folder)
    (folder / "model.safetensors").unlink()
    name = rename("decoder.layers.0.mlp.fc1.weight", HUGGING_FACE)
    for odd in (tensors[name].to_sparse(), torch.empty_like(tensors[name], device="meta")):
        torch.save(tensors | {name: odd}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="dense"):
            load_checkpoint(folder)


def test_a_failed_save_leaves_the_old_checkpoint(small, small_folder, tmp_path, monkeypatch):
    """Weights, tokenizer and configuration are replaced together or not at all."""
    folder = copy(small_folder, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise SafetensorError("No space left on device")

    (tmp_path / "other.model").write_bytes(b"another tokenizer")
    monkeypatch.setattr(load_weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small, tmp_path / "other.model", folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_damaged_models_are_not_saved(tmp_path):
    model = rough(Kosmos2(SMALL), seed=0)
    model.resampler.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"resampler.dense.weight has NaN"):
        save_checkpoint(model, TINY / SENTENCEPIECE, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 10**6), ("embed_dim", 48 * 10**10), ("vocab_size", 2**62)]
)
def test_impossible_sizes(small_folder, tmp_path, name, value):
    folder = copy(small_folder, tmp_path / "large")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected at most"):
        load_checkpoint(folder)


def test_deeply_nested_json(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "nested")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        load_checkpoint(folder)


@needs_transformers
def test_transformers_reads_fp16_and_refuses_int8(small, small_folder, tmp_path):
    from transformers import Kosmos2ForConditionalGeneration

    save_as(small_folder, "fp16", tmp_path / "fp16")
    reference = Kosmos2ForConditionalGeneration.from_pretrained(tmp_path / "fp16", dtype=torch.float32)
    embedding = reference.text_model.model.embed_tokens.weight
    assert torch.equal(embedding, small.decoder.embed_tokens.weight.half().float())
    save_as(small_folder, "int8", tmp_path / "int8")
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        Kosmos2ForConditionalGeneration.from_pretrained(tmp_path / "int8")
    assert (
        load_weights.main([str(small_folder), "--save", str(tmp_path / "fp16"), "--precision", "int8"]) == 1
    )


def test_every_name_of_the_published_model_has_its_place():
    """885 tensors; spelled as both layouts spell them."""
    with torch.device("meta"):
        from kosmos2 import Kosmos2Config

        names = list(Kosmos2(Kosmos2Config()).state_dict())
    for column in (1, 2):
        theirs = [rename(name, column) for name in names]
        assert len(set(theirs)) == len(names) == 885 and None not in theirs
    assert rename("vision.pre_layernorm.bias", HUGGING_FACE) == "vision_model.model.pre_layrnorm.bias"
    assert (
        rename("vision.layers.11.mlp.fc2.bias", FAIRSEQ)
        == "img_model.visual.transformer.resblocks.11.mlp.c_proj.bias"
    )
    assert (
        rename("decoder.layers.3.attn.inner_attn_ln.bias", HUGGING_FACE)
        == "text_model.model.layers.3.self_attn.inner_attn_ln.bias"
    )
    assert (
        rename("decoder.layers.3.norm2.bias", FAIRSEQ) == "gpt_model.decoder.layers.3.final_layer_norm.bias"
    )


# ------------------------------------------------------------------------------------------------- refused


def test_tensors_missing_unexpected_and_misshaped_are_named(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "wrong")
    tensors = published(folder)
    del tensors["image_to_text_projection.latent_query"]
    tensors["text_model.model.layers.9.ffn.fc1.bias"] = torch.zeros(3)
    tensors["vision_model.model.post_layernorm.bias"] = torch.zeros(7)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as refused:
        load_checkpoint(folder)
    message = str(refused.value)
    assert "1 tensor missing: image_to_text_projection.latent_query" in message
    assert "1 tensor unexpected: text_model.model.layers.9.ffn.fc1.bias" in message
    assert (
        "vision_model.model.post_layernorm.bias: expected (40,), got (7,)" in message and "\n" not in message
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(small_folder, tmp_path, value):
    folder = copy(small_folder, tmp_path / "nan")
    tensors = published(folder)
    tensors["image_to_text_projection.dense.bias"][3] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"image_to_text_projection\.dense\.bias"):
        load_checkpoint(folder)


def test_values_too_large_for_half_precision_are_named(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "large")
    tensors = published(folder)
    tensors["image_to_text_projection.dense.weight"][3, 5] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="fp32 or bf16"):
        load_checkpoint(folder, precision="fp16")


class Bomb:
    """Pickled, it asks whoever loads it to create a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def test_nothing_in_a_pickle_is_executed(small, small_folder, tmp_path):
    fuse = tmp_path / "exploded"
    state = fairseq_state(small)
    state["cfg"] = Bomb(fuse)
    torch.save(state, tmp_path / "kosmos-2.pt")
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control"))).close()
    assert (tmp_path / "control").exists()  # the bomb works …
    for name in ("config.json", SENTENCEPIECE):
        shutil.copy(small_folder / name, tmp_path / name)
    assert_same(load_checkpoint(tmp_path / "kosmos-2.pt")[0], small)
    assert not fuse.exists()  # … but not here
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="safely"):
        load_checkpoint(tmp_path / "old.pt")
    assert not fuse.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "kosmos-2.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_damaged_files(small, small_folder, tmp_path, name, damage):
    folder = copy(small_folder, tmp_path / "damaged")
    if name != "model.safetensors":
        torch.save(fairseq_state(small) if name.endswith("pt") else published(folder), folder / name)
        (folder / "model.safetensors").unlink()
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    (folder / name).write_bytes(
        {"truncated": content[:middle], "empty": b"", "text": b"<html>not found</html>",
         "flipped": content[: middle] + bytes(255 - b for b in content[middle : middle + 4]) + content[middle + 4 :]}[damage]
    )  # fmt: skip
    if damage == "flipped" and name == "model.safetensors":
        return  # the format has no checksum; a flipped bit of a weight cannot be told from a weight
    with pytest.raises(ValueError, match=rf"{name}.*(damaged|safely|download)"):
        load_checkpoint(folder)


def test_paths_that_lead_nowhere(tmp_path, small_folder):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_checkpoint(tmp_path)
    folder = copy(small_folder, tmp_path / "wordless")
    (folder / SENTENCEPIECE).unlink()
    with pytest.raises(FileNotFoundError, match="sentencepiece"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, tokenizer=TINY / SENTENCEPIECE)
    assert load_checkpoint(folder, tokenizer=TINY)


def test_hub_ids(monkeypatch):
    """Offline, or without huggingface_hub, one error line explains how to get the files."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        load_checkpoint("microsoft/kosmos-2-patch14-224")


def test_a_vocabulary_of_another_size_is_refused(small_folder, tmp_path, official_model_file):
    with pytest.raises(ValueError, match="65037"):
        load_checkpoint(small_folder, tokenizer=official_model_file)


def test_unknown_precision(small_folder):
    with pytest.raises(ValueError, match="fp64"):
        load_checkpoint(small_folder, precision="fp64")


def test_command_reports_what_is_missing(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "incomplete")
    tensors = published(folder)
    del tensors["image_to_text_projection.latent_query"]
    save_file(tensors, folder / "model.safetensors")
    done = subprocess.run([sys.executable, ROOT / "load_weights.py", folder], capture_output=True, text=True)
    assert done.returncode == 1 and "NOT complete" in done.stdout and "latent_query" in done.stdout
    done = subprocess.run(
        [sys.executable, ROOT / "load_weights.py", tmp_path / "x.pt"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_loading_does_not_import_the_compiler():
    """It takes longer than all the rest: see `random_parameter`."""
    script = "import sys; sys.path.insert(0, sys.argv[1])\nfrom load_weights import load_checkpoint\nload_checkpoint(sys.argv[2])\n"
    script += "print('torch._dynamo' in sys.modules)"
    run = [sys.executable, "-c", script, str(ROOT), str(TINY)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False\n"


def test_memory_while_loading(tmp_path):
    """A checkpoint of 400 MB: the process grows by little more than the weights, and half as much
    for bf16."""
    from dataclasses import replace

    wide = replace(SMALL, text=replace(SMALL.text, width=1152, heads=3, mlp_width=4608, layers=6))
    model = Kosmos2(wide)
    save_checkpoint(model, TINY / SENTENCEPIECE, tmp_path)
    size = os.path.getsize(tmp_path / "model.safetensors") / 2**20
    del model
    script = (
        "import resource, sys\nsys.path.insert(0, sys.argv[1])\nfrom load_weights import load_checkpoint\n"
        "import torch; torch.zeros(9) @ torch.zeros(9)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\nload_checkpoint(sys.argv[2], sys.argv[3])\nprint(peak() - before)"
    )
    for precision, most in (("fp32", 1.15), ("bf16", 0.65), ("int8", 0.75)):
        run = [sys.executable, "-c", script, str(ROOT), str(tmp_path), precision]
        grown = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        assert grown < most * size, (precision, grown, size)


# ------------------------------------------------------------------- files of fine-tuning runs and other programs


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "student.model."])
@pytest.mark.parametrize("layout", [OURS, HUGGING_FACE, FAIRSEQ])
def test_a_prefix_of_all_names_is_removed(small, small_folder, tmp_path, prefix, layout):
    folder = copy(small_folder, tmp_path / "prefixed")
    (folder / "model.safetensors").unlink()
    state = {prefix + rename(name, layout): tensor for name, tensor in small.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(load_checkpoint(folder)[0], small)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_names_are_removed(small, small_folder, tmp_path, wrapper):
    folder = copy(small_folder, tmp_path / "wrapped")
    state = {}
    for name, tensor in published(folder).items():
        state[name.replace("text_model.", f"text_model.{wrapper}")] = tensor
    save_file(state, folder / "model.safetensors")
    assert_same(load_checkpoint(folder)[0], small)


@pytest.mark.parametrize(
    "keys", [["state_dict"], ["model_state_dict"], ["model"], ["checkpoint", "model"], ["module"]]
)
def test_wrapped_state_dicts(small, small_folder, tmp_path, keys):
    folder = copy(small_folder, tmp_path / "nested")
    content = published(folder)
    (folder / "model.safetensors").unlink()
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}}
    torch.save(content, folder / "pytorch_model.bin")
    if keys[0] == "checkpoint":  # not a name for weights
        with pytest.raises(ValueError, match="state dict"):
            load_checkpoint(folder)
    else:
        assert_same(load_checkpoint(folder)[0], small)


def test_ngram_size_is_read_where_transformers_saves_it(small_folder, tmp_path):
    """config.json first, then generation_config.json, then the published default."""
    folder = copy(small_folder, tmp_path / "resaved")
    config = json.loads((folder / "config.json").read_text())
    assert load_checkpoint(folder)[0].config.text.no_repeat_ngram_size == 0
    (folder / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 5}))
    assert load_checkpoint(folder)[0].config.text.no_repeat_ngram_size == 0
    del config["text_config"]["no_repeat_ngram_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(folder)[0].config.text.no_repeat_ngram_size == 5
    (folder / "generation_config.json").unlink()
    assert load_checkpoint(folder)[0].config.text.no_repeat_ngram_size == 3


@needs_transformers
def test_a_model_saved_by_transformers_behaves_the_same(small, small_folder, tmp_path):
    from transformers import Kosmos2ForConditionalGeneration

    folder = copy(small_folder, tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["no_repeat_ngram_size"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    before = load_checkpoint(folder)[0].config
    Kosmos2ForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "resaved")
    after, _ = load_checkpoint(tmp_path / "resaved", tokenizer=folder)
    assert after.config == before
    assert_same(after, small)


def test_a_config_with_a_byte_order_mark(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "bom")
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert load_checkpoint(folder)[0].config == SMALL


def test_integer_tensors_raise(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "quantized")
    tensors = published(folder)
    name = "text_model.model.layers.1.ffn.fc1.weight"
    tensors[name] = (tensors[name] * 10).to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"not floating point.*{name}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "sentencepiece.bpe.model"])
def test_git_lfs_pointers_are_recognized(small_folder, tmp_path, name):
    folder = copy(small_folder, tmp_path / "lfs")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("m.gguf", b"GGUF\x03", "GGUF"), ("m.bin", b"GGUF\x03", "GGUF"), ("m.h5", b"\x89HDF\r\n\x1a\n", "HDF5"), ("m.onnx", b"\x08\x07", "ONNX")],
)  # fmt: skip
def test_other_formats_are_named(small_folder, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(tmp_path / name)
    if not name.endswith(".bin"):
        with pytest.raises(FileNotFoundError, match=words):
            load_checkpoint(tmp_path)


def test_lora_adapters_are_mentioned(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "adapter")
    save_file({"base_model.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="LoRA adapter .* not applied"):
        load_checkpoint(folder)
    tensors = published(folder) | {"text_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="LoRA weights: merge"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="LoRA adapter: merge"):
        load_checkpoint(folder)


def test_a_vocabulary_with_other_first_pieces_raises(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red star", "a blue moon"] * 20), model_prefix=str(tmp_path / "other"), vocab_size=18, hard_vocab_limit=False,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected first pieces <unk> <s> </s>"):
        Tokenizer(tmp_path / "other.model")


def test_dangerous_functions_in_a_pickle_raise(small, small_folder, tmp_path):
    """A file that names os.system is refused; other names get stand-ins that do nothing."""

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'gotcha'}",)

    folder = copy(small_folder, tmp_path / "hostile")
    (folder / "model.safetensors").unlink()
    torch.save(fairseq_state(small) | {"cfg": Command()}, folder / "kosmos-2.pt")
    with pytest.raises(ValueError, match="safely"):
        load_checkpoint(folder)
    assert not (tmp_path / "gotcha").exists()


def test_the_grid_follows_from_the_vocabulary(small, small_folder, tmp_path):
    from dataclasses import replace

    tokenizer = Tokenizer(TINY / SENTENCEPIECE, SMALL.latent_query_num, grid=16)
    config = replace(SMALL, text=replace(SMALL.text, vocab_size=tokenizer.vocab_size))
    model = Kosmos2(config)
    save_checkpoint(model, TINY / SENTENCEPIECE, tmp_path / "coarse")
    assert load_checkpoint(tmp_path / "coarse")[1].grid == 16
