"""Reading checkpoints: every form gives the same model; every damaged one is refused, naming what is wrong."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, TINY, copy, needs_transformers
from safetensors.torch import load_file, save_file

import load_weights
from kosmos2 import Kosmos2, Kosmos2Config
from load_weights import (
    EMBEDDING,
    FAIRSEQ,
    HUGGING_FACE,
    OURS,
    SENTENCEPIECE,
    Checkpoint,
    load_checkpoint,
    rename,
)
from tokenizer import Tokenizer, box_to_tokens

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


def as_bin(folder: Path, content, **options) -> Path:
    """Store `content` with torch.save as the only weights of a checkpoint folder."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin", **options)
    return folder


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


def test_pytorch_bin(small, small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "bin")
    state = OrderedDict(published(folder))
    state[LM_HEAD] = state[rename(EMBEDDING, HUGGING_FACE)]  # one storage, two names
    state["vision_model.model.post_layernorm.weight"] = torch.nn.Parameter(
        state["vision_model.model.post_layernorm.weight"]
    )
    q_proj = "text_model.model.layers.0.self_attn.q_proj.weight"
    state[q_proj] = state[q_proj].t().contiguous().t()  # stored column by column
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
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
    with pytest.raises(ValueError, match=r"missing tensors \(772\).*expected \(2048,\).*no config.json"):
        load_checkpoint(folder)


def test_one_tensor_under_two_names(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "twice")
    tensors = published(folder)
    name = next(iter(tensors))
    save_file(tensors | {f"module.{name}": tensors[name] * 5}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="a second time"):
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


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 10**6), ("embed_dim", 48 * 10**10), ("vocab_size", 2**62)]
)
def test_impossible_sizes(small_folder, tmp_path, name, value):
    folder = copy(small_folder, tmp_path / "large")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected an integer from 1 to"):
        load_checkpoint(folder)


def test_deeply_nested_json(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "nested")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        load_checkpoint(folder)


def test_every_name_of_the_published_model_has_its_place():
    """885 tensors; spelled as both layouts spell them."""
    with torch.device("meta"):
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
    assert "missing tensors (1): image_to_text_projection.latent_query" in message
    assert "unexpected tensors (1): text_model.model.layers.9.ffn.fc1.bias" in message
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
    with pytest.raises(ValueError, match="unsafe to read"):
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
    middle = len(content) // 2  # 80 bytes: more than the padding between two tensors
    (folder / name).write_bytes(
        {"truncated": content[:middle], "empty": b"", "text": b"<html>not found</html>",
         "flipped": content[: middle] + bytes(255 - b for b in content[middle : middle + 80]) + content[middle + 80 :]}[damage]
    )  # fmt: skip
    if damage == "flipped" and name == "model.safetensors":
        return  # the format has no checksum; a flipped bit of a weight cannot be told from a weight
    with pytest.raises(ValueError, match=rf"{name}.*(damaged|safely|download)"):
        load_checkpoint(folder)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("entry", ["", "data.pkl", "data/7"])
def test_compressed_files_are_refused(small_folder, tmp_path, method, entry):
    """All entries, or only one of them: torch.save compresses none."""
    folder = as_bin(copy(small_folder, tmp_path / "zip"), published(small_folder))
    original = (folder / "pytorch_model.bin").rename(tmp_path / "original")
    with (
        zipfile.ZipFile(original) as archive,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w") as compressed,
    ):
        for name in archive.namelist():
            chosen = method if entry in name else zipfile.ZIP_STORED
            compressed.writestr(name, archive.read(name), compress_type=chosen)
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(folder)


def test_a_compressed_file_is_not_unpacked(tmp_path, monkeypatch):
    """200 MB of zeros in 200 kB: refused without reading an entry, be it only for its checksum."""
    with (
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data/0", "w") as entry,
    ):
        for _ in range(200):
            entry.write(bytes(2**20))

    def forbidden(*arguments, **options):
        raise AssertionError("an entry was opened")

    monkeypatch.setattr(zipfile.ZipFile, "open", forbidden)
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [{"a": torch.zeros(3)}], {"epoch": 3}, {}, torch.nn.Linear(2, 2)]
)
def test_files_without_a_state_dict(small_folder, tmp_path, content):
    """A tensor, a list, numbers, nothing, a whole module."""
    with pytest.raises(ValueError, match="no state dict"):
        load_checkpoint(as_bin(copy(small_folder, tmp_path / "other"), content))


def test_a_file_that_contains_itself(small_folder, tmp_path):
    endless: dict = {}
    endless["model"] = endless
    with pytest.raises(ValueError, match="no state dict"):
        load_checkpoint(as_bin(copy(small_folder, tmp_path / "endless"), endless))


def test_old_torch_files_are_refused(small_folder, tmp_path):
    """Before 1.6, torch.save did not write zip files; the message says how to convert one."""
    old = dict(_use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="re-save its state dict with a recent PyTorch"):
        load_checkpoint(as_bin(copy(small_folder, tmp_path / "old"), published(small_folder), **old))


def test_an_unfinished_training_run_is_named(small, small_folder, tmp_path):
    content = {"kosmos2_training": 1, "step": 1900, "model": small.state_dict()}
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is an unfinished training run; training/README"):
        load_checkpoint(tmp_path / "checkpoint.pt")


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


@pytest.mark.parametrize("hub_id", ["microsoft/kosmos-2-patch14-224", "some-one/my.kosmos_2"])
def test_hub_ids(monkeypatch, hub_id):
    """Without huggingface_hub, one line explains how to get the files."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        FileNotFoundError, match=f"{hub_id} not found; pip install huggingface_hub, or download"
    ):
        load_checkpoint(hub_id)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def snapshot_download(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    hub = argparse.Namespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(
        FileNotFoundError, match=r"could not fetch a/b \(ConnectionError\); retry, or .*"
    ) as no:
        load_checkpoint("a/b")
    assert "\n" not in str(no.value)


def test_a_checkpoint_is_fetched_from_the_hub(monkeypatch, small, small_folder):
    hub = argparse.Namespace(snapshot_download=lambda hub_id, allow_patterns: str(small_folder))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_same(load_checkpoint("a/b")[0], small)


def test_a_folder_of_the_hub_cache(small, small_folder, tmp_path):
    """models--OWNER--NAME leads to the snapshot that its refs/main names."""
    repository = tmp_path / "models--microsoft--kosmos-2-patch14-224"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "e91cfb"
    snapshot.mkdir(parents=True)
    for file in small_folder.iterdir():  # the files of a snapshot are links to blobs
        blob = repository / "blobs" / f"hash-of-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_checkpoint(repository)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("e91cfb")
    for path in (repository, snapshot, snapshot / "model.safetensors"):
        assert_same(load_checkpoint(path)[0], small)
    (repository / "refs" / "main").write_text("deleted")
    with pytest.raises(FileNotFoundError, match="snapshots/deleted"):
        load_checkpoint(repository)


@pytest.mark.parametrize("name", ["model.SAFETENSORS", "Model.SafeTensors"])
def test_capital_letters_in_a_suffix(small, small_folder, tmp_path, name):
    folder = copy(small_folder, tmp_path / "upper")
    (folder / "model.safetensors").rename(folder / name)
    assert_same(load_checkpoint(folder / name)[0], small)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.JSON", "m.gguf", "m.h5", "m.onnx"])
def test_files_without_weights_are_not_called_damaged(small_folder, tmp_path, name):
    shutil.copy(small_folder / "config.json", tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} has no weights .* expected \.safetensors, \.bin or \.pt"):
        load_checkpoint(tmp_path / name)


def test_a_vocabulary_of_another_size_is_refused(small_folder, tmp_path, official_model_file):
    with pytest.raises(ValueError, match="65037"):
        load_checkpoint(small_folder, tokenizer=official_model_file)


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp64", "FP32", ""])
def test_precisions_of_other_layers(small_folder, precision):
    """fp16 and int8 on a CPU need the layers of inference/fast.py, as the one line says."""
    with pytest.raises(
        ValueError, match=rf"precision '{precision}' .*fp32, bf16.*inference\.fast"
    ) as refused:
        load_checkpoint(small_folder, precision)
    assert "\n" not in str(refused.value)


def test_layers_are_plain(small_folder):
    for module in load_checkpoint(small_folder)[0].modules():
        assert not isinstance(module, torch.nn.Linear) or type(module) is torch.nn.Linear


def test_loading_imports_nothing_from_the_folders():
    """Nor the compiler, which takes longer than all the rest: see `random_parameter`."""
    script = "import sys; sys.path.insert(0, sys.argv[1])\nfrom load_weights import load_checkpoint\n"
    script += "load_checkpoint(sys.argv[2])\n"
    script += "print([m for m in sys.modules if m.split('.')[0] in ('inference', 'sample') or m == 'torch._dynamo'])"
    run = [sys.executable, "-c", script, str(ROOT), str(TINY)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"


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


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_usage_errors_are_one_line(capsys, arguments):
    assert load_weights.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointers_are_recognized(small_folder, tmp_path, name):
    folder = copy(small_folder, tmp_path / "lfs")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_checkpoint(folder)


def test_lora_adapters_are_mentioned(small_folder, tmp_path):
    folder = copy(small_folder, tmp_path / "adapter")
    save_file({"base_model.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="LoRA adapter .* not applied"):
        load_checkpoint(folder)


def test_dangerous_functions_in_a_pickle_raise(small, small_folder, tmp_path):
    """A file that names os.system is refused; other names get stand-ins that do nothing."""

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'gotcha'}",)

    folder = copy(small_folder, tmp_path / "hostile")
    (folder / "model.safetensors").unlink()
    torch.save(fairseq_state(small) | {"cfg": Command()}, folder / "kosmos-2.pt")
    with pytest.raises(ValueError, match="unsafe to read"):
        load_checkpoint(folder)
    assert not (tmp_path / "gotcha").exists()


# --------------------------------------------------------------------- grid and surplus rows of the vocabulary


def with_rows(folder: Path, to: Path, surplus: int, **config_changes) -> Path:
    """Copy a checkpoint, with this many more rows of its embedding."""
    copy(folder, to, **config_changes)
    tensors = published(folder)
    name = rename(EMBEDDING, HUGGING_FACE)
    old = tensors[name]
    more = torch.randn(max(surplus, 0), old.shape[1])
    save_file(tensors | {name: torch.cat([old, more])[: len(old) + surplus]}, to / "model.safetensors")
    config = json.loads((to / "config.json").read_text())
    config["text_config"]["vocab_size"] += surplus
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("surplus", [1, 3, 28, 63, 65, 129, 499, 1024])
def test_surplus_rows_do_not_change_the_grid(small, small_folder, tmp_path, surplus):
    """Padding to a multiple of 64, a task token; 65 and 129 are the location tokens of 33 x 33 and 34 x 34."""
    model, tokenizer = load_checkpoint(with_rows(small_folder, tmp_path / "more", surplus))
    assert tokenizer.grid == 32
    assert tokenizer.vocab_size == model.config.text.vocab_size == SMALL.text.vocab_size + surplus
    first = SMALL.text.vocab_size
    assert [tokenizer.id_to_token[i] for i in (first - 1, first)] == ["<patch_index_1023>", "<unused>"]
    ids = tokenizer.encode("<phrase> a</phrase>", [(0.1, 0.2, 0.7, 0.9)])
    assert ids == Tokenizer(TINY / SENTENCEPIECE).encode("<phrase> a</phrase>", [(0.1, 0.2, 0.7, 0.9)])


def test_surplus_rows_are_never_generated(small_folder, tmp_path):
    """Not even if they are the most likely by far."""
    folder = with_rows(small_folder, tmp_path / "more", 28)
    tensors = published(folder)
    name = rename(EMBEDDING, HUGGING_FACE)
    tensors[name][-28:] *= 1000  # of both signs, so some logits are huge
    save_file(tensors, folder / "model.safetensors")
    model, tokenizer = load_checkpoint(folder)
    tokens = torch.tensor([tokenizer.encode(prompt) for prompt in ("a", "<phrase>", "<object>")])
    options = dict(max_new_tokens=20, temperature=1.0, seed=3)
    free = model.generate(tokens, **options)
    assert any(i >= tokenizer.end_of_locations for row in free for i in row)
    for row in model.generate(tokens, **options, constraint=tokenizer.allowed_tokens):
        assert max(row) < tokenizer.end_of_locations


@pytest.mark.parametrize("surplus", [-1, -64, 1025, 3000])
def test_vocabularies_that_do_not_fit(small_folder, tmp_path, surplus):
    """Too small for the location tokens, or too large for padding: the message has both sizes and the grid."""
    sizes = f"32 x 32 location tokens it has {SMALL.text.vocab_size} tokens, the checkpoint "
    with pytest.raises(ValueError, match=sizes + str(SMALL.text.vocab_size + surplus)):
        load_checkpoint(with_rows(small_folder, tmp_path / "other", surplus))


@pytest.mark.parametrize("grid", [8, 33, 40])
def test_another_grid_is_written_in_the_configuration(small, small_folder, tmp_path, grid):
    surplus = grid**2 - 32**2
    folder = with_rows(small_folder, tmp_path / "grid", surplus, location_grid=grid)
    model, tokenizer = load_checkpoint(folder)
    assert model.config.location_grid == tokenizer.grid == grid
    assert tokenizer.id_to_token[-1] == f"<patch_index_{grid**2 - 1:04d}>"
    box = (0.1, 0.2, 0.7, 0.9)
    ids = tokenizer.encode("<phrase> a</phrase>", [box])
    assert [i for i in map(tokenizer.location_index, ids) if i is not None] == [*box_to_tokens(box, grid)]
