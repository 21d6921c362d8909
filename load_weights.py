"""Load a Kosmos-2 checkpoint in any published format, checking every tensor.

    python load_weights.py CHECKPOINT    report what is in it and which tensors are missing

CHECKPOINT is a folder in the published layout (config.json, sentencepiece.bpe.model, and
model.safetensors or shards with an index), a .safetensors file, a Hugging Face pytorch_model.bin,
the original kosmos-2.pt of fairseq, a saved state dict, or a hub id (microsoft/kosmos-2-patch14-224).
"""

import json
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kosmos2 import BOS, EOS, PAD, Kosmos2, Kosmos2Config, TextConfig, VisionConfig
from tokenizer import Tokenizer, printable

SENTENCEPIECE = "sentencepiece.bpe.model"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- Tensor names ----------------------------------------------------------------------------------

# Name prefixes: ours, Hugging Face, fairseq. First match wins; {} is the number of a layer. What
# follows is the same in all three: tensors are only renamed, never transposed, split or merged.
# fmt: off
NAMES = [
    ("vision.class_embedding", "vision_model.model.embeddings.class_embedding", "img_model.visual.class_embedding"),
    ("vision.patch_embedding.", "vision_model.model.embeddings.patch_embedding.", "img_model.visual.conv1."),
    ("vision.position_embedding", "vision_model.model.embeddings.position_embedding.weight", "img_model.visual.positional_embedding"),
    ("vision.pre_layernorm.", "vision_model.model.pre_layrnorm.", "img_model.visual.ln_pre."),
    ("vision.layers.{}.norm1.", "vision_model.model.encoder.layers.{}.layer_norm1.", "img_model.visual.transformer.resblocks.{}.ln_1."),
    ("vision.layers.{}.attn.", "vision_model.model.encoder.layers.{}.self_attn.", "img_model.visual.transformer.resblocks.{}.ts_attn."),
    ("vision.layers.{}.norm2.", "vision_model.model.encoder.layers.{}.layer_norm2.", "img_model.visual.transformer.resblocks.{}.ln_2."),
    ("vision.layers.{}.mlp.fc1.", "vision_model.model.encoder.layers.{}.mlp.fc1.", "img_model.visual.transformer.resblocks.{}.mlp.c_fc."),
    ("vision.layers.{}.mlp.fc2.", "vision_model.model.encoder.layers.{}.mlp.fc2.", "img_model.visual.transformer.resblocks.{}.mlp.c_proj."),
    ("vision.post_layernorm.", "vision_model.model.post_layernorm.", "img_model.visual.ln_post."),
    ("resampler.", "image_to_text_projection.", "img_connector."),
    ("decoder.layers.{}.norm1.", "text_model.model.layers.{}.self_attn_layer_norm.", "gpt_model.decoder.layers.{}.self_attn_layer_norm."),
    ("decoder.layers.{}.attn.", "text_model.model.layers.{}.self_attn.", "gpt_model.decoder.layers.{}.self_attn."),
    ("decoder.layers.{}.norm2.", "text_model.model.layers.{}.final_layer_norm.", "gpt_model.decoder.layers.{}.final_layer_norm."),
    ("decoder.layers.{}.mlp.", "text_model.model.layers.{}.ffn.", "gpt_model.decoder.layers.{}.ffn."),
    ("decoder.", "text_model.model.", "gpt_model.decoder."),
]
# fmt: on
OURS, HUGGING_FACE, FAIRSEQ = 0, 1, 2  # the columns of NAMES
LAYOUTS = ["kosmos2.py", "the published (Hugging Face)", "the original (fairseq)"]
FIRST_WORDS = [{row[column].split(".")[0] for row in NAMES} for column in range(3)]

EMBEDDING = "decoder.embed_tokens.weight"
OUTPUT_PROJECTIONS = {
    "text_model.lm_head.weight",
    "gpt_model.decoder.output_projection.weight",
}  # equal to EMBEDDING
UNUSED_BUFFERS = {  # stored by the original and by older versions of transformers
    "text_model.model.embed_positions.weights",
    "vision_model.model.embeddings.position_ids",
    "gpt_model.decoder.embed_positions._float_tensor",
    "gpt_model.decoder.self_attn_sope.scale",
}
# What torch.compile, FSDP, activation checkpointing and DDP add to the names of a wrapped module.
WRAPPERS = r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."


def rename(name: str, layout: int) -> str:
    """The name of one of our tensors in another layout."""
    for row in NAMES:
        pattern = re.escape(row[OURS]).replace(r"\{\}", r"(\d+)")
        match = re.match(pattern, name)
        if match:
            return row[layout].format(*match.groups()) + name[match.end() :]
    raise ValueError(f"no published name for {name}")


def strip_wrappers(names: list[str]) -> dict[str, str]:
    """Each stored name -> the name without the prefixes of wrappers and of larger modules."""
    known = "|".join(set().union(*FIRST_WORDS))
    prefix = re.compile(rf"(?:\w+\.)*?(?=(?:{known})\.)")
    return {name: prefix.sub("", re.sub(WRAPPERS, "", name), count=1) for name in names}


# ---- config.json -----------------------------------------------------------------------------------

# Our field -> its key in a published config.json.
VISION_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
}
TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "width": "embed_dim",
    "layers": "layers",
    "heads": "attention_heads",
    "mlp_width": "ffn_dim",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
# Settings that are hard-coded in kosmos2.py: (part, key, value).
HARD_CODED = [
    ("", "model_type", "kosmos-2"),
    ("vision_config", "hidden_act", "quick_gelu"),
    ("vision_config", "num_channels", 3),
    ("text_config", "activation_function", "gelu"),
    ("text_config", "scale_embedding", True),
    ("text_config", "add_cross_attention", False),
    ("text_config", "bos_token_id", BOS),
    ("text_config", "pad_token_id", PAD),
    ("text_config", "eos_token_id", EOS),
]


def read_config(path: str | Path) -> Kosmos2Config:
    """Read a published config.json. Unknown keys are ignored, missing keys have the published values.

    FileNotFoundError if there is no such file; ValueError for one that is not JSON, belongs to
    another architecture, or has values that kosmos2.py does not support.
    """
    published = read_json(path)
    parts = {"": published}
    for name in ("vision_config", "text_config"):
        parts[name] = published.get(name) or {}
        if not isinstance(parts[name], dict):
            raise ValueError(f"{path}: {name}: expected a JSON object, got {parts[name]!r}")
    for part, key, supported in HARD_CODED:
        value = parts[part].get(key, supported)
        if value != supported:
            raise ValueError(f"{path}: {key} is {value!r}; only {supported!r} is supported")
    given = parts["vision_config"]
    vision = {ours: given[key] for ours, key in VISION_KEYS.items() if key in given}
    given = parts["text_config"]
    text = {ours: given[key] for ours, key in TEXT_KEYS.items() if key in given}
    # transformers 5 moves no_repeat_ngram_size to another file.
    generation_config = Path(path).with_name("generation_config.json")
    other = read_json(generation_config) if generation_config.is_file() else {}
    ngram_size = published.get("no_repeat_ngram_size", other.get("no_repeat_ngram_size"))
    if ngram_size is not None:
        text.setdefault("no_repeat_ngram_size", ngram_size)
    sizes = {key: published[key] for key in ("latent_query_num", "location_grid") if key in published}
    try:
        return Kosmos2Config(VisionConfig(**vision), TextConfig(**text), **sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: str | Path) -> dict:
    """A JSON object, with or without a byte order mark."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


# ---- Files -----------------------------------------------------------------------------------------


class LazyTensor(NamedTuple):
    """A tensor in a file: what is known without reading it, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


FLOATS = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # safetensors -> torch
DTYPES = FLOATS | {"i8": "int8"}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors file; ValueError if it is damaged."""

    def read(name: str) -> Tensor:
        # One long-lived mmap would keep every page resident and double peak memory.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                dtype = part.get_dtype().lower()
                shape = tuple(part.get_shape())
                found[name] = LazyTensor(shape, DTYPES.get(dtype, dtype), partial(read, name))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from None
    return found


class Inert:
    """Stands in for what is pickled next to the tensors (argparse, omegaconf, ...); ignores everything."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs): ...

    def __setstate__(self, state): ...


def inert_dict(*args) -> dict:
    return {}  # stands in for defaultdict, whose items PyTorch only restores into a dict


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file written by torch.save; ValueError if it is damaged or cannot be read safely.

    A pickle can call any function, so weights_only=True; classes that it forbids become `Inert`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            if archive.testzip() is not None:
                raise ValueError("checksum error")
        stand_ins = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            stand_ins.append((inert_dict if name == "collections.defaultdict" else Inert, name))
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().split("\n")[0][:100]
        raise ValueError(
            f"{path} is not a checkpoint, damaged or unsafe to read ({type(error).__name__}: {reason}); "
            "download it again, or if you trust it, re-save its state dict with a recent PyTorch"
        ) from None
    found = {}
    for name, t in find_state_dict(content, path).items():
        if t.layout is not torch.strided or t.is_nested or t.is_meta:
            raise ValueError(f"{path}: {name} is not a dense tensor; save it as one")
        found[name] = LazyTensor(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.detach)
    return found


STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "ema")  # of training checkpoints


def find_state_dict(content, path: Path) -> dict[str, Tensor]:
    """The state dict in what torch.save stored: the object itself, or an entry such as "model"."""
    content = content if isinstance(content, dict) else {}
    if "kosmos2_training" in content:
        raise ValueError(f"{path} is an unfinished training run; training/README.md shows how to finish it")
    for _ in range(4):  # a malicious file may contain itself
        for key in STATE_DICT_KEYS:
            if isinstance(content.get(key), dict):
                content = content[key]
    tensors = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if not tensors:
        raise ValueError(f"{path} has no state dict; expected tensors by name, or a dict with such an entry")
    return tensors


WEIGHT_FILES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "kosmos-2.pt",
]
INT8_FILE = "model.int8.safetensors"  # read by inference/fast.py only


def read_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file in any supported format."""
    suffix = file.suffix.lower()
    with open(file, "rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if suffix in (".json", ".gguf", ".h5", ".onnx", ".msgpack", ".tflite"):
        raise ValueError(f"{file} has no weights that can be read; expected .safetensors, .bin or .pt")
    return read_safetensors(file) if suffix == ".safetensors" else read_torch(file)


def find_checkpoint(path: str | Path, weight_files=WEIGHT_FILES) -> tuple[Path, list[Path]]:
    """A folder, file or hub id -> (its folder, the files with its weights)."""
    given = str(path)
    path = Path(path)
    if not path.exists():
        looks_like_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given) and not path.parent.exists()
        if not looks_like_hub_id or path.suffix in (".safetensors", ".bin", ".pt", ".json"):
            raise FileNotFoundError(f"no checkpoint at {given}")
        path = download(given)
    if (path / "refs" / "main").is_file():  # a repository in the hub's cache
        path = path / "snapshots" / (path / "refs" / "main").read_text().strip()
    candidates = [path] if path.is_file() else [path / name for name in weight_files]
    for file in candidates:
        if file.is_file():
            return file.parent, read_index(file) if file.name.endswith(".index.json") else [file]
    if (path / INT8_FILE).is_file():
        raise ValueError(f"{path} is in int8; load it with inference.fast.load_checkpoint")
    raise FileNotFoundError(f"no model.safetensors, pytorch_model.bin, shard index or kosmos-2.pt in {path}")


def read_index(index: Path) -> list[Path]:
    """The shards that an index file lists."""
    try:
        weight_map = read_json(index)["weight_map"]
        files = sorted(set(weight_map.values()))
        shards = [index.parent / Path(name).name for name in files]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not a shard index; download it again") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"missing next to {index}: {', '.join(missing)}; download them")
    return shards


def download(hub_id: str) -> Path:
    """Fetch a checkpoint from the Hugging Face hub; returns its folder."""
    by_hand = f"download config.json, model.safetensors and {SENTENCEPIECE} into one folder and pass it"
    try:
        from huggingface_hub import snapshot_download  # optional
    except ImportError:
        raise FileNotFoundError(f"{hub_id} not found; pip install huggingface_hub, or {by_hand}") from None
    files = ["config.json", "generation_config.json", "model*.safetensors*", SENTENCEPIECE]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # network, permissions, unknown repository: each has its own class
        kind = type(error).__name__
        raise FileNotFoundError(f"could not fetch {hub_id} ({kind}); retry, or {by_hand}") from None


# ---- The checkpoint --------------------------------------------------------------------------------


class Checkpoint:
    """The configuration of a checkpoint and its tensors under our names, not read yet."""

    weight_files = WEIGHT_FILES

    def __init__(self, path: str | Path):
        self.path = path
        self.folder, self.files = find_checkpoint(path, self.weight_files)
        config_file = self.folder / "config.json"
        self.has_config = config_file.is_file()
        self.config = read_config(config_file) if self.has_config else Kosmos2Config()
        self.stored = self.read_files()
        self.layout = HUGGING_FACE
        for layout, words in enumerate(FIRST_WORDS):
            if any(name.split(".")[0] in words for name in self.stored):
                self.layout = layout
        with torch.device("meta"):
            self.model = Kosmos2(self.config)
        self.names = {ours: rename(ours, self.layout) for ours in self.model.state_dict()}  # ours -> stored
        # Output projections may be stored, too. One of them may be the only copy of the embedding.
        self.tied = sorted(OUTPUT_PROJECTIONS & self.stored.keys())
        if self.tied and self.names[EMBEDDING] not in self.stored:
            self.names[EMBEDDING] = self.tied.pop()
        known = self.stored.keys() & set(self.names.values())
        if len(known) < len(self.names) / 10:
            found = listing(sorted(self.stored)[:3]) or "no tensors"
            raise ValueError(f"{path} is the checkpoint of another model, not Kosmos-2: it has {found}, ...")

    def read_files(self) -> dict[str, LazyTensor]:
        """The tensors of all files, by their names without wrappers."""
        stored = {}
        for file in self.files:
            tensors = read_tensors(file)
            for original, name in strip_wrappers(list(tensors)).items():
                if name in stored:
                    raise ValueError(f"{file} has {name} a second time (in another shard, or with a prefix)")
                stored[name] = tensors[original]
        return stored

    def problems(self) -> list[str]:
        """Missing, unexpected and invalid tensors, by name; empty if there are none."""
        shapes = {self.names[ours]: tuple(t.shape) for ours, t in self.model.state_dict().items()}
        wrong_shape = []
        wrong_type = []
        for name in sorted(shapes.keys() & self.stored.keys()):
            shape, dtype, _ = self.stored[name]
            if shape != shapes[name]:
                wrong_shape.append(f"{name}: expected {shapes[name]}, got {shape}")
            if dtype not in FLOATS.values():
                wrong_type.append(f"{name}: {dtype}")
        known = shapes.keys() | OUTPUT_PROJECTIONS | UNUSED_BUFFERS
        found = {
            "missing tensors": sorted(shapes.keys() - self.stored.keys()),
            "unexpected tensors": sorted(self.stored.keys() - known),
            "tensors of the wrong shape": wrong_shape,
            "tensors whose type is not floating point": wrong_type,
        }
        problems = [f"{what} ({len(names)}): {listing(names)}" for what, names in found.items() if names]
        if problems and not self.has_config:
            problems.append("no config.json is next to the weights, so the published sizes were assumed")
        return problems

    def notes(self) -> list[str]:
        """Warnings that do not prevent loading."""
        adapters = self.folder.glob("adapter_model.*")
        return [
            f"the LoRA adapter {file} is not applied; merge it into the weights first" for file in adapters
        ]

    def numel(self, ours: str) -> int:
        return math.prod(self.stored[self.names[ours]].shape)

    def tensor(self, ours: str, dtype: torch.dtype, device="cpu", copy: bool = True) -> Tensor:
        """One tensor, read, checked and converted; with copy=False it may keep the file mapped."""
        stored = self.stored[self.names[ours]]
        tensor = stored.read().to(device=device, dtype=dtype, copy=copy)
        # NaN and infinity survive a sum, which needs no memory of the tensor's size.
        total = float(tensor.sum(dtype=torch.float32))
        if not math.isfinite(total) and not torch.isfinite(tensor).all():
            where = f"{self.names[ours]} in {self.folder}"
            if torch.isfinite(stored.read()).all():
                raise ValueError(f"{where} has values too large for {dtype}; load it as fp32 or bf16")
            raise ValueError(f"{where} has NaN or infinite values; the checkpoint is damaged")
        return tensor

    def check_tied(self) -> None:
        """ValueError if a stored output projection differs from the embedding."""
        for name in self.tied:
            embedding = self.stored[self.names[EMBEDDING]].read()
            if not torch.equal(self.stored[name].read().to(embedding.dtype), embedding):
                raise ValueError(f"{name} differs from the token embedding; Kosmos-2 has one matrix for both")


def listing(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return printable(", ".join(names[:10]) + more, 2000)


# ---- Loading ---------------------------------------------------------------------------------------


def choose_device(device: str, precision: str) -> torch.device:
    """A device by name; "auto" is the GPU if there is one. Under torchrun, each process takes its own."""
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available() and precision != "int8":
            device = "cuda"
        elif torch.backends.mps.is_available() and precision != "int8":
            device = "mps"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device} is not available; use cpu") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device} is not supported; use cpu, cuda or mps")
    if chosen.type == "cuda" and chosen.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def load_checkpoint(path, precision="fp32", device="cpu", tokenizer=None) -> tuple[Kosmos2, Tokenizer]:
    """Load a checkpoint in any accepted format -> (model in eval mode, tokenizer).

    path: see the module docstring. config.json and the sentencepiece model are read from next to the
    weights (or `tokenizer`); without a config.json, the published sizes are assumed. precision: fp32,
    bf16, or on a GPU fp16, regardless of the stored one. device: cpu, cuda, mps, or auto (a GPU if there is
    one). On a CPU, inference.fast.load_checkpoint is faster.

    FileNotFoundError for missing files; ValueError for tensors or a tokenizer that do not fit (with names).
    """
    device = choose_device(device, precision)
    if precision not in PRECISIONS or (precision == "fp16" and device.type == "cpu"):
        raise ValueError(f"precision {precision!r} is not supported here: use fp32, bf16 or inference.fast")
    checkpoint = Checkpoint(path)
    found_tokenizer = check_checkpoint(checkpoint, tokenizer)
    return read_model(checkpoint, PRECISIONS[precision], device).eval(), found_tokenizer


def check_checkpoint(checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> Tokenizer:
    """Raise unless everything is there; returns the tokenizer."""
    problems = checkpoint.problems()
    if problems:
        listed = "; ".join(problems)
        raise ValueError(f"{checkpoint.path} is not a complete Kosmos-2 of these sizes: {listed}")
    for note in checkpoint.notes():
        warnings.warn(note, stacklevel=3)
    return find_tokenizer(checkpoint, tokenizer)


def read_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device = "cpu") -> Kosmos2:
    """All tensors in one dtype."""
    # The largest first: while a tensor is converted, it is in memory twice.
    largest_first = sorted(checkpoint.names, key=checkpoint.numel, reverse=True)
    state = {name: checkpoint.tensor(name, dtype, device) for name in largest_first}
    checkpoint.check_tied()
    checkpoint.model.load_state_dict(state, strict=True, assign=True)
    return checkpoint.model


MOST_UNUSED = 1024  # rows of the embedding after the location tokens: padding, or tokens that others added


def find_tokenizer(checkpoint: Checkpoint, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer next to a checkpoint, or at `path`; ValueError if its vocabulary does not fit."""
    model_file = checkpoint.folder if path is None else Path(path)
    if model_file.is_dir():
        model_file /= SENTENCEPIECE
    if not model_file.is_file():
        raise FileNotFoundError(f"no sentencepiece model at {model_file}; pass its path as the tokenizer")
    config = checkpoint.config
    tokenizer = Tokenizer(model_file, config.latent_query_num, config.location_grid)
    unused = config.text.vocab_size - tokenizer.vocab_size
    if not 0 <= unused <= MOST_UNUSED:
        raise ValueError(
            f"{model_file} does not fit: with {config.location_grid} x {config.location_grid} location tokens "
            f"it has {tokenizer.vocab_size} tokens, the checkpoint {config.text.vocab_size}"
        )
    return Tokenizer(model_file, config.latent_query_num, config.location_grid, unused)


# ---- The command -----------------------------------------------------------------------------------


def report(checkpoint: Checkpoint) -> str:
    """What a checkpoint contains, one line for each part of the model."""
    lines = [f"{checkpoint.folder}: {LAYOUTS[checkpoint.layout]} layout"]
    lines.append(f"{'part':<12}{'tensors':>8}{'parameters':>15}  stored as")
    for part in ("vision", "resampler", "decoder"):
        names = [stored for ours, stored in checkpoint.names.items() if ours.startswith(part)]
        tensors = [checkpoint.stored[name] for name in names if name in checkpoint.stored]
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        stored_as = ", ".join(sorted({tensor.dtype for tensor in tensors}))
        lines.append(f"{part:<12}{len(tensors):>8}{parameters:>15,}  {stored_as}")
    return "\n".join(lines + checkpoint.notes())


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python load_weights.py CHECKPOINT (a folder, file or hub id)", file=sys.stderr)
        return 2
    try:
        checkpoint = Checkpoint(arguments[0])
        print(report(checkpoint))
        problems = checkpoint.problems()
        print("NOT complete: " + "; ".join(problems) if problems else "complete")
        return 1 if problems else 0
    except (OSError, ValueError) as error:
        print(f"load_weights: {printable(str(error), 2000)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
