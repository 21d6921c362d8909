"""Load a Kosmos-2 checkpoint in any published format, checking every tensor.

    python load_weights.py CHECKPOINT               report what is in it and whether it is complete
    python load_weights.py CHECKPOINT --save DIR    rewrite it in the published layout
    python load_weights.py CHECKPOINT --save DIR --precision int8    a quarter of the size of fp32, loads faster

CHECKPOINT is a folder in the published layout (config.json, sentencepiece.bpe.model, and
model.safetensors or shards with an index), a .safetensors file, a Hugging Face pytorch_model.bin,
the original kosmos-2.pt of fairseq, a state dict saved from a training run, or a hub id such as
microsoft/kosmos-2-patch14-224.

Order: names, config.json, files, faster linear layers, loading, saving, the command.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kosmos2 import (
    BOS,
    EOS,
    PAD,
    Attention,
    Block,
    Embedding,
    Kosmos2,
    Kosmos2Config,
    TextConfig,
    VisionConfig,
)
from tokenizer import GRID, TAGS, Tokenizer, open_sentencepiece, refuse_lfs_pointer

SENTENCEPIECE = "sentencepiece.bpe.model"

# The dtype of weights and activations. On a CPU, fp16 and int8 apply to the large matrices only
# (`PackedLinear`; int8 also rounds their inputs); everything else is float32 there.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
PACKED = ("fp16", "int8")

# ----------------------------------------------------------------------------------------------------
# Tensor names
# ----------------------------------------------------------------------------------------------------

# Name prefixes: ours, Hugging Face, fairseq. First match wins; {} is the number of a layer. What
# follows the prefix is the same in all three layouts: tensors are only renamed, never transposed,
# split or merged.
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
FIRST_WORDS = {
    column: {row[column].split(".")[0] for row in NAMES} for column in (OURS, HUGGING_FACE, FAIRSEQ)
}

EMBEDDING = "decoder.embed_tokens.weight"
SCALE = "_scale"  # the scales of an int8 matrix NAME.weight are stored as NAME.weight_scale
OUTPUT_PROJECTIONS = {
    "text_model.lm_head.weight",
    "gpt_model.decoder.output_projection.weight",
}  # equal to EMBEDDING
UNUSED_BUFFERS = {  # stored by older versions
    "text_model.model.embed_positions.weights",
    "vision_model.model.embeddings.position_ids",
    "gpt_model.decoder.embed_positions._float_tensor",
    "gpt_model.decoder.self_attn_sope.scale",
}
# Names that torch.compile, FSDP, activation checkpointing and DDP put in front of a wrapped module.
WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."


def rename(name: str, layout: int) -> str:
    """The name of one of our tensors in another layout."""
    for row in NAMES:
        pattern = re.escape(row[OURS]).replace(r"\{\}", r"(\d+)")  # {} stands for the number of a block
        match = re.match(pattern, name)
        if match:
            return row[layout].format(*match.groups()) + name[match.end() :]
    raise ValueError(f"no published name for {name}")


def strip_wrappers(names: list[str]) -> dict[str, str]:
    """Each stored name -> the name without wrappers and without a prefix that all names share."""
    stripped = {name: re.sub(rf"(?<![^.]){WRAPPERS}", "", name) for name in names}
    known = set().union(*FIRST_WORDS.values())
    while all("." in name for name in stripped.values()):
        first_words = {name.split(".")[0] for name in stripped.values()}
        if len(first_words) != 1 or first_words & known:
            break
        stripped = {stored: name.partition(".")[2] for stored, name in stripped.items()}
    return stripped


# ----------------------------------------------------------------------------------------------------
# config.json
# ----------------------------------------------------------------------------------------------------

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


def renamed(settings: dict, keys: dict[str, str]) -> dict:
    """The settings that `keys` (ours -> published) lists, under our names."""
    return {ours: settings[key] for ours, key in keys.items() if key in settings}


def read_config(path: str | Path) -> Kosmos2Config:
    """Read a published config.json. Unknown keys are ignored, missing keys default to the published
    values.

    no_repeat_ngram_size is read from config.json, then from generation_config.json next to it,
    where transformers 5 moves it when it saves a model. Raises FileNotFoundError if there is no
    such file; ValueError for a file that is not JSON, belongs to another architecture, or has
    values that kosmos2.py does not support.
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
    vision = renamed(parts["vision_config"], VISION_KEYS)
    text = renamed(parts["text_config"], TEXT_KEYS)
    ngram_size = find_ngram_size(path, published)
    if ngram_size is not None:
        text.setdefault("no_repeat_ngram_size", ngram_size)
    latents = published.get("latent_query_num", Kosmos2Config.latent_query_num)
    try:
        return Kosmos2Config(VisionConfig(**vision), TextConfig(**text), latents)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def find_ngram_size(path: str | Path, published: dict) -> int | None:
    """no_repeat_ngram_size from the top level of config.json or from generation_config.json."""
    if "no_repeat_ngram_size" in published:
        return published["no_repeat_ngram_size"]
    generation_config = Path(path).with_name("generation_config.json")
    if not generation_config.is_file():
        return None
    return read_json(generation_config).get("no_repeat_ngram_size")


def read_json(path: str | Path) -> dict:
    """A JSON object, with or without a byte order mark."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def published_config(config: Kosmos2Config) -> dict:
    """The content of a published config.json."""
    published = {"model_type": "kosmos-2", "architectures": ["Kosmos2ForConditionalGeneration"]}
    published["latent_query_num"] = config.latent_query_num
    published["vision_config"] = {key: getattr(config.vision, ours) for ours, key in VISION_KEYS.items()}
    published["text_config"] = {key: getattr(config.text, ours) for ours, key in TEXT_KEYS.items()}
    for part, key, value in HARD_CODED:
        if part:
            published[part][key] = value
    return published


# ----------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------


class LazyTensor(NamedTuple):
    """A tensor in a file: what is known without reading it, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


FLOATS = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # safetensors -> torch
DTYPES = FLOATS | {"i8": "int8"}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .safetensors file; ValueError if it is damaged."""

    def reader(name: str) -> Callable[[], Tensor]:
        # Reopen the file per tensor: one long-lived mmap would keep every page resident and double
        # peak memory.
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return read

    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                dtype = part.get_dtype().lower()
                found[name] = LazyTensor(tuple(part.get_shape()), DTYPES.get(dtype, dtype), reader(name))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}); download it again"
        ) from None
    return found


class Inert:
    """Stands in for objects pickled next to the tensors (argparse, omegaconf, ...); ignores everything."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs): ...

    def __setstate__(self, state): ...


def inert_dict(*args) -> dict:
    """Stands in for defaultdict, whose items PyTorch only restores into a dict."""
    return {}


def read_torch(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file written by torch.save: pytorch_model.bin, fairseq's kosmos-2.pt, a
    training checkpoint.

    A pickle can call any function, so the file is read with weights_only=True, and every other
    class it names is replaced by `Inert`. ValueError if the file is damaged or cannot be read that
    way.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("checksum error")
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [
                (inert_dict if name == "collections.defaultdict" else Inert, name) for name in unsafe
            ]
            with torch.serialization.safe_globals(stand_ins):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:  # the format before PyTorch 1.6
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).strip().split("\n")[0][:100]
        raise ValueError(
            f"{path} is damaged or cannot be read safely ({type(error).__name__}: {reason}); "
            "download it again, or if you trust it, re-save its state dict with a recent PyTorch"
        ) from None
    found = {}
    for name, t in unwrap_state_dict(content, path).items():
        if t.layout is not torch.strided or t.is_nested or t.is_meta:
            raise ValueError(f"{path}: {name} is not a dense tensor; save it as one")
        found[name] = LazyTensor(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.detach)
    return found


STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "ema")  # of training checkpoints
MOST_NESTED = 4  # a file may be malicious and contain itself


def unwrap_state_dict(content, path: Path) -> dict[str, Tensor]:
    """The state dict in what torch.save stored: the object itself, or an entry such as "model"."""
    for _ in range(MOST_NESTED):
        if not isinstance(content, dict):
            break
        inner = [content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)]
        if inner:
            content = inner[0]
            continue
        tensors = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
        if not tensors:
            break
        return tensors
    raise ValueError(
        f"{path} has no state dict; expected tensors by name, or a dict with a state_dict or model entry"
    )


# Formats that are not supported: how the file begins, its extension, what it is.
OTHER_FORMATS = [
    (b"GGUF", ".gguf", "a GGUF file (llama.cpp)"),
    (b"\x89HDF", ".h5", "an HDF5 file (TensorFlow)"),
    (None, ".onnx", "an ONNX file"),
    (None, ".msgpack", "a Flax file"),
    (None, ".tflite", "a TensorFlow Lite file"),
]
# Our int8 layout has its own name: transformers would load model.safetensors and ignore the scales.
INT8_FILE = "model.int8.safetensors"
WEIGHT_FILES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "kosmos-2.pt",
    INT8_FILE,
]


def read_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file in any supported format; for others, ValueError names the format."""
    refuse_lfs_pointer(file)
    with open(file, "rb") as opened:
        beginning = opened.read(40)
    for magic, ending, kind in OTHER_FORMATS:
        if (magic and beginning.startswith(magic)) or file.suffix.lower() == ending:
            raise ValueError(f"{file} is {kind}; expected .safetensors, .bin or .pt")
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def find_checkpoint(path: str | Path) -> tuple[Path, list[Path]]:
    """A folder, file or hub id -> (its folder, the files with its weights).

    FileNotFoundError if there are none.
    """
    given = str(path)
    path = Path(path)
    if not path.exists():
        looks_like_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given) and not path.parent.exists()
        if not looks_like_hub_id or path.suffix in (".safetensors", ".bin", ".pt", ".json"):
            raise FileNotFoundError(f"no checkpoint at {given}")
        path = download(given)
    candidates = [path] if path.is_file() else [path / name for name in WEIGHT_FILES]
    for file in candidates:
        if file.is_file():
            return file.parent, read_index(file) if file.name.endswith(".index.json") else [file]
    others = []
    for file in sorted(path.iterdir()):
        for _, ending, kind in OTHER_FORMATS:
            if file.suffix.lower() == ending:
                others.append(f"{file.name} is {kind}")
    if (path / "adapter_model.safetensors").is_file():
        others.append("adapter_model.safetensors is a LoRA adapter: merge it into its base model first")
    hint = f" ({'; '.join(others)})" if others else ""
    raise FileNotFoundError(
        f"no model.safetensors, pytorch_model.bin, shard index or kosmos-2.pt in {path}{hint}"
    )


def read_index(index: Path) -> list[Path]:
    """The shards that an index file lists."""
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in files]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not a shard index; download it again") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"missing next to {index}: {', '.join(missing)}; download them")
    return shards


def download(hub_id: str) -> Path:
    """Fetch a checkpoint from the Hugging Face hub; returns its folder."""
    by_hand = (
        f"download config.json, model.safetensors and {SENTENCEPIECE} of {hub_id} from the Hugging Face hub "
        "into one folder and pass that folder"
    )
    try:
        from huggingface_hub import snapshot_download  # optional
    except ImportError:
        raise FileNotFoundError(
            f"{hub_id} not found locally; pip install huggingface_hub to fetch it, or {by_hand}"
        ) from None
    files = ["config.json", "generation_config.json", "model*.safetensors*", SENTENCEPIECE]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # network, permissions, unknown repository: each has its own class
        raise FileNotFoundError(f"could not fetch {hub_id} ({type(error).__name__}); {by_hand}") from None


# ----------------------------------------------------------------------------------------------------
# Faster linear layers  (walkthrough: notebooks/09_speed)
#
# Decoding is memory-bound: each step multiplies one row by every weight, so it takes as long as
# reading the weights. kosmos2.py uses plain nn.Linear; after building the model, the loader
# replaces its layers by these.
# ----------------------------------------------------------------------------------------------------

FEW_ROWS = 16  # with more rows than this, PyTorch's own kernel uses all cores
MANY_WEIGHTS = 2**20  # smaller matrices stay in the cache of one core
MANY_OUTPUTS = 2**14  # packing a matrix with more outputs in one piece takes four times as long


class MultiCoreLinear(nn.Linear):
    """nn.Linear that uses all cores even for a few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return multi_core_linear(x, self.weight, self.bias)


class MultiCoreEmbedding(Embedding):
    """Embedding whose output projection uses all cores even for a few rows."""

    def unembed(self, x: Tensor) -> Tensor:
        return multi_core_linear(x, self.weight)


def multi_core_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in) times weight (out, in) transposed, plus bias (out,).

    For a few rows on a CPU, uses the fastest of three kernels. On some CPUs, F.linear runs a single
    row on one core, which cannot saturate memory bandwidth; a batched matmul over slices of the
    matrix uses all cores.
    """
    n_out, n_in = weight.shape
    rows = x.numel() // n_in
    few_rows = rows <= FEW_ROWS and weight.numel() >= MANY_WEIGHTS
    if not few_rows or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    kernel = fastest_kernel(rows)
    y = kernel(x.reshape(rows, n_in), weight)  # (rows, out)
    y = y.reshape(*x.shape[:-1], n_out)  # (..., out)
    return y if bias is None else y + bias


@lru_cache
def fastest_kernel(rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The fastest kernel for this number of rows. It depends on the CPU, so it is measured, once."""
    x = torch.ones(rows, 2048)
    weight = torch.ones(4096, 2048)
    times: dict[Callable, list[float]] = defaultdict(list)
    for _ in range(4):
        for kernel in (F.linear, slices_times_columns, rows_times_slices):
            started = time.perf_counter()
            kernel(x, weight)
            times[kernel].append(time.perf_counter() - started)
    return min(times, key=lambda kernel: min(times[kernel]))


def slices_times_columns(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) times weight (out, in) transposed, with the weights as the left operand."""
    slices = slice_outputs(weight)  # (slices, out / slices, in)
    columns = x.T.expand(len(slices), -1, -1)  # (slices, in, rows)
    return torch.bmm(slices, columns).flatten(0, 1).T  # (rows, out)


def rows_times_slices(x: Tensor, weight: Tensor) -> Tensor:
    """The same with the weights as the right operand."""
    slices = slice_outputs(weight).transpose(1, 2)  # (slices, in, out / slices)
    rows = x.expand(len(slices), -1, -1)  # (slices, rows, in)
    return torch.bmm(rows, slices).transpose(0, 1).flatten(1)  # (rows, out)


def slice_outputs(weight: Tensor) -> Tensor:
    count = max(n for n in range(1, 65) if len(weight) % n == 0)  # for all cores, yet each still large
    return weight.unflatten(0, (count, -1))  # (slices, out / slices, in)


class PackedLinear(nn.Module):
    """A linear layer with 8- or 16-bit weights, for CPUs; inputs and outputs are float32.

    In int8, the weights of output n are scale[n] * q[n] with q in -127..127. Each row of x is
    rounded the same way, to 127 steps (63 on CPUs without VNNI: see `input_steps`), with a scale of
    its own, so rows are independent of each other; sums are exact. Uses PyTorch's fbgemm kernels
    where they are available. Elsewhere (ARM), plain arithmetic saves memory but not time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None):
        """weight (out, in): float16, or int8 with its scale (out,)."""
        super().__init__()
        self.bias = bias
        self.scale = scale
        self.weight = weight
        self.packed = None
        engines = torch.backends.quantized.supported_engines
        if hasattr(torch.ops.quantized, INT8_KERNEL) and ("x86" in engines or "fbgemm" in engines):
            self.weight = None
            self.packed = pack(weight, bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return self.forward_fp16(x)
        size = absmax(x)  # (..., 1)
        if self.packed is not None:
            y = int8_matmul(x / size, self.packed, input_steps())
        else:
            rounded = (x / size * 127).round() / 127
            y = F.linear(rounded, self.weight.float()) * self.scale
        if self.bias is None:
            return y.mul_(size)
        return torch.addcmul(self.bias, y, size, out=y)

    def forward_fp16(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return F.linear(x, self.weight.float(), self.bias)


class PackedAttention(Attention):
    """Self-attention with one packed matmul for queries, keys and values: faster than three."""

    qkv_proj: PackedLinear

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is not None:
            raise ValueError("PackedAttention is self-attention: queries, keys and values have one input")
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)  # (B, T, D) each
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)


class PackedEmbedding(nn.Module):
    """`Embedding` in 8 or 16 bits: rows for tokens, the whole matrix for the logits."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.parts = nn.ModuleList()  # of the output projection
        for start in range(0, len(weight), MANY_OUTPUTS):
            rows = slice(start, start + MANY_OUTPUTS)
            part_scale = None if scale is None else scale[rows]
            self.parts.append(PackedLinear(weight[rows], None, part_scale))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight[tokens].float()  # (B, T, D)
        return rows if self.scale is None else rows * self.scale[tokens][..., None]

    def unembed(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)  # (..., V)


INT8_KERNEL = "linear_with_input_q_dq_qweight_dq_output_fp32"


def pack(weight: Tensor, bias: Tensor | None, scale: Tensor | None):
    """Weights in the memory layout of PyTorch's kernels; for int8 without the bias."""
    if scale is None:
        return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
    with warnings.catch_warnings(action="ignore"):  # these kernels are deprecated
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
    return torch.ops.quantized.linear_prepack(weight, None)


def int8_matmul(x: Tensor, packed, steps: int) -> Tensor:
    """x (..., in) in -1..1, rounded to `steps` steps on either side of zero, times int8 weights."""
    kernel = getattr(torch.ops.quantized, INT8_KERNEL)
    return kernel(x, 1 / steps, steps + 1, packed)


@lru_cache
def input_steps() -> int:
    """127, or 63 on CPUs without VNNI instructions, which add pairs of products in int16.

    The kernel stores inputs as 1 to 255. Two products of 255 and 127 overflow int16 and saturate
    silently; this checks for it with one small matmul.
    """
    trial = pack(torch.full((16, 64), 127, dtype=torch.int8), None, torch.ones(16))
    products = int8_matmul(torch.ones(1, 64), trial, 127)
    exact = torch.allclose(products, torch.tensor(64.0 * 127))
    return 127 if exact else 63


def absmax(x: Tensor) -> Tensor:
    """The largest absolute value of each row, (..., 1), at least 1e-30.

    (x.abs() would allocate a copy of x.)
    """
    high = x.amax(dim=-1, keepdim=True)
    low = x.amin(dim=-1, keepdim=True)
    return torch.maximum(high, -low).clamp(min=1e-30)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> q, int8 (out, in), and scale (out,), so that scale * q is close to weight."""
    scale = absmax(weight)[:, 0] / 127
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, len(weight), 512):  # parts that stay in the cache
        rows = slice(start, start + 512)
        quantized[rows].copy_((weight[rows] / scale[rows, None]).round_())
    return quantized, scale


def use_multi_core_layers(model: Kosmos2) -> None:
    """Replace the linear layers and the embedding of a model on the meta device.

    The names of its tensors stay the same.
    """
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, MultiCoreLinear(module.in_features, module.out_features))
            elif type(module) is Embedding:
                model.set_submodule(name, MultiCoreEmbedding.from_pretrained(module.weight, freeze=False))


# ----------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------


def read_shards(files: list[Path]) -> dict[str, LazyTensor]:
    """The tensors of all files of a checkpoint, by their stored names."""
    stored: dict[str, LazyTensor] = {}
    for file in files:
        found = read_tensors(file)
        repeated = sorted(found.keys() & stored.keys())
        if repeated:
            raise ValueError(f"{file} repeats tensors of another shard: {listing(repeated)}")
        stored |= found
    for name in stored:
        if not name.isprintable():
            raise ValueError(f"{files[0]} is damaged (a tensor is named {name!r}); download it again")
    return stored


class Checkpoint:
    """The configuration of a checkpoint and its tensors under our names, not read yet.

    Raises FileNotFoundError and ValueError for files that cannot be found or understood; `problems`
    reports missing or unexpected tensors.
    """

    def __init__(self, path: str | Path):
        self.folder, self.files = find_checkpoint(path)
        config_file = self.folder / "config.json"
        self.has_config = config_file.is_file()
        self.config = read_config(config_file) if self.has_config else Kosmos2Config()
        stored = read_shards(self.files)
        self.stored = {}
        for original, name in strip_wrappers(list(stored)).items():
            if name in self.stored:
                raise ValueError(f"{path} has {name} twice, with and without a prefix")
            self.stored[name] = stored[original]
        scaled = [name for name in self.stored if name + SCALE in self.stored]
        self.scales = {name: self.stored.pop(name + SCALE) for name in scaled}  # of int8 matrices
        self.layout = HUGGING_FACE
        for layout, words in FIRST_WORDS.items():
            if any(name.split(".")[0] in words for name in self.stored):
                self.layout = layout
        with torch.device("meta"):
            self.model = Kosmos2(self.config)
        self.names = {ours: rename(ours, self.layout) for ours in self.model.state_dict()}  # ours -> stored
        # Output projections in the file. One of them may be the only copy of the embedding; all
        # others must be equal to it (`check_tied`).
        self.tied = sorted(OUTPUT_PROJECTIONS & self.stored.keys())
        if self.tied and self.names[EMBEDDING] not in self.stored:
            self.names[EMBEDDING] = self.tied.pop()
        known = self.stored.keys() & set(self.names.values())
        if len(known) < len(self.names) / 10:
            found = listing(sorted(stored), most=3) or "no tensors"
            raise ValueError(
                f"{path} looks like the checkpoint of another model, not Kosmos-2: it has {found}"
            )

    def problems(self) -> list[str]:
        """What is wrong with the set of tensors, each by name; empty if nothing is."""
        shapes = {self.names[ours]: tuple(t.shape) for ours, t in self.model.state_dict().items()}
        missing = sorted(shapes.keys() - self.stored.keys())
        unexpected = sorted(self.stored.keys() - shapes.keys() - OUTPUT_PROJECTIONS - UNUSED_BUFFERS)
        wrong_shape = []
        wrong_type = []
        for name, shape in shapes.items():
            tensor = self.stored.get(name)
            if tensor is None:
                continue
            if tensor.shape != shape:
                wrong_shape.append(f"{name}: expected {shape}, got {tensor.shape}")
            scale = self.scales.get(name)
            if scale is not None and scale.shape != shape[:1]:
                wrong_shape.append(f"{name}{SCALE}: expected {shape[:1]}, got {scale.shape}")
            types = FLOATS.values() if scale is None or len(shape) != 2 else ["int8"]
            if tensor.dtype not in types:
                wrong_type.append(f"{name}: {tensor.dtype}")
            if scale is not None and scale.dtype not in FLOATS.values():
                wrong_type.append(f"{name}{SCALE}: {scale.dtype}")
        found = [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", wrong_shape),
            ("with a type that is not floating point (quantized weights without scales?)", wrong_type),
        ]
        problems = []
        for what, names in found:
            if names:
                count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
                problems.append(f"{count} {what}: {listing(names)}")
        if problems and not self.has_config:
            problems.append(
                "there is no config.json next to the weights, so the published sizes were assumed"
            )
        if any("lora_" in name for name in unexpected):
            problems.append("some are LoRA weights: merge the adapter into its base model first")
        return problems

    def notes(self) -> list[str]:
        """Warnings that do not prevent loading."""
        if any((self.folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
            return [f"the LoRA adapter in {self.folder} is not applied; merge it into the weights first"]
        return []

    def numel(self, ours: str) -> int:
        """Number of elements."""
        return math.prod(self.stored[self.names[ours]].shape)

    def tensor(self, ours: str, dtype: torch.dtype, device="cpu", copy: bool = True) -> Tensor:
        """One tensor, read, checked and converted; with copy=False it may keep the file mapped."""
        stored = self.stored[self.names[ours]]
        if self.names[ours] in self.scales:
            return self.dense(self.names[ours]).to(device=device, dtype=dtype)
        tensor = stored.read().to(device=device, dtype=dtype, copy=copy)
        # NaN and infinity survive a sum, which needs no memory of the tensor's size.
        if not math.isfinite(float(tensor.sum(dtype=torch.float32))) and not torch.isfinite(tensor).all():
            where = f"{self.names[ours]} in {self.files[0].parent}"
            if torch.isfinite(stored.read()).all():
                raise ValueError(f"{where} has values too large for {dtype}; load it as fp32 or bf16")
            raise ValueError(f"{where} has NaN or infinite values; the checkpoint is damaged")
        return tensor

    def dense(self, name: str) -> Tensor:
        """A stored tensor as it is, or an int8 one with its scales applied."""
        if name not in self.scales:
            return self.stored[name].read()
        weight, scale = self.read_int8(name)
        return weight * scale[:, None]

    def quantized(self, ours: str) -> tuple[Tensor, Tensor]:
        """A matrix as int8 (out, in) and its scales (out,): as stored, or quantized now."""
        name = self.names[ours]
        if name not in self.scales:
            return quantize(self.tensor(ours, torch.float32, copy=False))
        return self.read_int8(name)

    def read_int8(self, name: str) -> tuple[Tensor, Tensor]:
        """A stored int8 matrix and its scales, checked."""
        scale = self.scales[name].read().float()
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"{name}{SCALE} has NaN, infinite or non-positive values; the checkpoint is damaged"
            )
        return self.stored[name].read(), scale


def choose_device(device: str, precision: str) -> torch.device:
    """A device by name; "auto" is the GPU if there is one, except for int8, which is for CPUs.

    Under torchrun, each process takes its own GPU. ValueError if there is no such device.
    """
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cpu"
        if precision != "int8" and (has_cuda or has_mps):
            device = "cuda" if has_cuda else "mps"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device} is not supported; use cpu, cuda or mps")
    if (chosen.type == "cuda" and not has_cuda) or (chosen.type == "mps" and not has_mps):
        raise ValueError(f"device {device} is not available; use cpu")
    if chosen.type == "cuda" and chosen.index is None and "LOCAL_RANK" in os.environ:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def load_checkpoint(
    path: str | Path,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[Kosmos2, Tokenizer]:
    """Load a checkpoint in any accepted format -> (model in eval mode, tokenizer).

    path: see the module docstring. config.json next to the weights is used if present, otherwise
    the published sizes. The sentencepiece model is taken from next to the weights, or from
    `tokenizer`. precision: fp32 (exact, the default), bf16 (half the memory), fp16 (on a CPU for the
    large matrices only), int8 (for CPUs, the fastest there); independent of the stored dtype. The
    README has the peak memory and the speed of each.

    Raises FileNotFoundError for missing files; ValueError for a checkpoint with tensors that are
    missing, unexpected, of the wrong shape or type, or not finite, each listed by name, and for a
    tokenizer that does not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    on_cpu = torch.device(device).type == "cpu"
    if precision == "int8" and not on_cpu:
        raise ValueError("int8 is for CPUs; use bf16 or fp16 on other devices")
    checkpoint = Checkpoint(path)
    problems = checkpoint.problems()
    if problems:
        raise ValueError(f"{path} is not a complete Kosmos-2 of these sizes: " + "; ".join(problems))
    for note in checkpoint.notes():
        warnings.warn(note, stacklevel=2)
    found_tokenizer = find_tokenizer(checkpoint, tokenizer)
    if precision in PACKED and on_cpu:
        return read_packed(checkpoint, precision).eval(), found_tokenizer
    if precision == "fp32" and on_cpu:
        use_multi_core_layers(checkpoint.model)
    return read_model(checkpoint, PRECISIONS[precision], device).eval(), found_tokenizer


def read_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device = "cpu") -> Kosmos2:
    """All tensors in one dtype.

    The largest come first: a tensor is in memory twice while it is converted.
    """
    largest_first = sorted(checkpoint.names, key=checkpoint.numel, reverse=True)
    state = {name: checkpoint.tensor(name, dtype, device) for name in largest_first}
    check_tied(checkpoint)
    checkpoint.model.load_state_dict(state, strict=True, assign=True)
    return checkpoint.model


def read_packed(checkpoint: Checkpoint, precision: str) -> Kosmos2:
    """The large matrices in 8 or 16 bits, packed as they are read, the rest as float32.

    For inference only.
    """
    model = checkpoint.model
    sources = share_qkv(model)  # a packed module -> the modules whose weights it stacks
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Embedding)):
            sources[name] = [name]

    def read(name: str) -> nn.Module:
        return packed_module(checkpoint, precision, sources[name])

    def size(name: str) -> int:
        return checkpoint.numel(f"{sources[name][0]}.weight")

    largest_first = sorted(sources, key=size, reverse=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, module in zip(largest_first, pool.map(read, largest_first), strict=True):
            model.set_submodule(name, module)
    rest = {name: checkpoint.tensor(name, torch.float32) for name in model.state_dict()}
    model.load_state_dict(rest, strict=True, assign=True)
    return model.requires_grad_(False)


def share_qkv(model: Kosmos2) -> dict[str, list[str]]:
    """Replace the attention of all blocks by PackedAttention.

    Blocks have self-attention, so queries, keys and values share one input. Returns the names
    {qkv_proj: [q_proj, k_proj, v_proj]}.
    """
    sources = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Block):
            with torch.device("meta"):
                attention = PackedAttention(module.attn.out_proj.in_features, module.attn.heads)
            attention.inner_attn_ln = module.attn.inner_attn_ln
            attention.q_proj = attention.k_proj = attention.v_proj = None  # qkv_proj replaces them
            module.attn = attention
            sources[f"{name}.attn.qkv_proj"] = [f"{name}.attn.{part}_proj" for part in "qkv"]
    return sources


def packed_module(checkpoint: Checkpoint, precision: str, sources: list[str]) -> nn.Module:
    """One layer with the stacked weights of these modules, in 8 or 16 bits."""
    weights = []
    scales = []
    for source in sources:
        if precision == "int8":
            weight, scale = checkpoint.quantized(f"{source}.weight")
            scales.append(scale)
        else:
            weight = checkpoint.tensor(f"{source}.weight", torch.float16)
        weights.append(weight)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # (out, in), of all sources
    scale = torch.cat(scales) if scales else None  # (out,)
    if f"{sources[0]}.weight" == EMBEDDING:
        check_tied(checkpoint)
        return PackedEmbedding(weight, scale)
    bias = torch.cat([checkpoint.tensor(f"{source}.bias", torch.float32) for source in sources])
    return PackedLinear(weight, bias, scale)


def check_tied(checkpoint: Checkpoint) -> None:
    """ValueError if a stored output projection differs from the embedding."""
    for name in checkpoint.tied:
        embedding = checkpoint.dense(checkpoint.names[EMBEDDING])
        if not torch.equal(checkpoint.dense(name).to(embedding.dtype), embedding):
            raise ValueError(f"{name} differs from the token embedding; Kosmos-2 uses one matrix for both")


def find_tokenizer(checkpoint: Checkpoint, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer next to a checkpoint, or at `path`; ValueError if its vocabulary does not fit.

    The grid of location tokens follows from the size of the vocabulary.
    """
    model_file = checkpoint.folder if path is None else Path(path)
    if model_file.is_dir():
        model_file /= SENTENCEPIECE
    if not model_file.is_file():
        hint = "" if path else "; pass its path as the tokenizer"
        raise FileNotFoundError(f"no sentencepiece model at {model_file}{hint}")
    others = open_sentencepiece(model_file).vocab_size() + 1 + len(TAGS) + 1  # pieces, <pad>, tags, <mask>
    vocab_size = checkpoint.config.text.vocab_size
    grid = math.isqrt(max(0, vocab_size - others))
    if grid < 1 or others + grid**2 != vocab_size:
        raise ValueError(
            f"{model_file} does not fit: its vocabulary has {others + GRID**2} tokens (with a {GRID} x "
            f"{GRID} grid), the checkpoint {vocab_size}; pass the sentencepiece model of the checkpoint"
        )
    return Tokenizer(model_file, checkpoint.config.latent_query_num, grid)


def listing(names: list[str], most: int = 10) -> str:
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


# ----------------------------------------------------------------------------------------------------
# Saving
# ----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end: no file is left half-written."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_finite(model: nn.Module) -> None:
    """ValueError, naming the parameter, if a value is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} has NaN or infinite values; the model is not saved")


def save_checkpoint(model: Kosmos2, sentencepiece_file: str | Path, folder: str | Path) -> None:
    """Write a model in the published layout, which this loader and transformers both read.

    ValueError for a model in int8, or in fp16 on a CPU: it has only packed weights.
    """
    if isinstance(model.decoder.embed_tokens, PackedEmbedding):
        raise ValueError("a packed model cannot be saved; load it as fp32 or bf16")
    check_finite(model)
    state = {rename(name, HUGGING_FACE): t.detach().cpu() for name, t in model.state_dict().items()}
    dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    config = published_config(model.config) | {"dtype": dtype}
    write_checkpoint(state, config, sentencepiece_file, Path(folder), "model.safetensors")


def save_packed(
    checkpoint: Checkpoint, precision: str, sentencepiece_file: str | Path, folder: str | Path
) -> None:
    """Write a checkpoint in fp16 or int8, in the published layout; loading it in that precision
    gives the same numbers as the original does.

    The matrices that `read_packed` packs are stored in float16, or as int8 with one scale per
    output under NAME_scale; everything else in float32, unless it was float16 already. transformers
    reads fp16, and finds no weights in an int8 folder.
    """
    config = published_config(checkpoint.config)
    if precision == "fp16":
        file_name = "model.safetensors"
        config["dtype"] = "float16"
    else:
        file_name = INT8_FILE
        config["dtype"] = "float32"
        config["quantization_config"] = {"quant_method": "kosmos2_int8", "scales": f"NAME{SCALE}"}
    packed = {
        f"{name}.weight"
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, (nn.Linear, Embedding))
    }
    check_tied(checkpoint)
    state = {}
    for ours in checkpoint.names:
        name = rename(ours, HUGGING_FACE)
        stored_as = checkpoint.stored[checkpoint.names[ours]].dtype
        if ours in packed and precision == "int8":
            state[name], state[name + SCALE] = checkpoint.quantized(ours)
        elif ours in packed or stored_as == "float16":
            state[name] = checkpoint.tensor(ours, torch.float16)
        else:
            state[name] = checkpoint.tensor(ours, torch.float32)
    write_checkpoint(state, config, sentencepiece_file, Path(folder), file_name)


def write_checkpoint(
    state: dict[str, Tensor], config: dict, sentencepiece_file: str | Path, folder: Path, file_name: str
) -> None:
    check_target(folder, file_name)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    # The three files are renamed together, when all of them are complete.
    with (
        replacing(folder / SENTENCEPIECE) as tokenizer_part,
        replacing(folder / file_name) as weights_part,
        replacing(folder / "config.json") as config_part,
    ):
        shutil.copyfile(sentencepiece_file, tokenizer_part)
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            save_file(state, weights_part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {weights_part}: {error}") from None
        weights_part.chmod(0o644)  # safetensors makes files readable only by their owner


def check_target(folder: Path, file_name: str = "model.safetensors") -> None:
    """ValueError if a checkpoint cannot be saved in this folder."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder")
    others = [name for name in WEIGHT_FILES if name != file_name and (folder / name).exists()]
    if others:
        raise ValueError(f"{folder} already has {others[0]}; save to another folder")


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


def report(checkpoint: Checkpoint) -> str:
    """What a checkpoint contains, one line for each part of the model."""
    lines = [f"{len(checkpoint.files)} file(s) in {checkpoint.folder}, {LAYOUTS[checkpoint.layout]} layout"]
    lines.append(f"{'part':<12}{'tensors':>8}{'parameters':>15}  stored as")
    for part in ("vision", "resampler", "decoder"):
        names = [stored for ours, stored in checkpoint.names.items() if ours.startswith(part)]
        tensors = [checkpoint.stored[name] for name in names if name in checkpoint.stored]
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        dtypes = Counter(tensor.dtype for tensor in tensors)
        stored_as = ", ".join(f"{dtype} x {count}" for dtype, count in dtypes.items())
        lines.append(f"{part:<12}{len(tensors):>8}{parameters:>15,}  {stored_as}")
    unused = (OUTPUT_PROJECTIONS | UNUSED_BUFFERS) & checkpoint.stored.keys()
    unused -= set(checkpoint.names.values())
    if unused:
        lines.append(f"not needed: {', '.join(sorted(unused))}")
    return "\n".join(lines + checkpoint.notes())


def stored_precision(checkpoint: Checkpoint) -> str:
    """The precision in which most weights are stored."""
    if checkpoint.scales:
        return "int8"
    dtypes: Counter = Counter()
    for tensor in checkpoint.stored.values():
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    names = {"float16": "fp16", "bfloat16": "bf16"}
    return names.get(dtypes.most_common(1)[0][0], "fp32")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Show what is in a Kosmos-2 checkpoint, or rewrite it.")
    parser.add_argument("checkpoint", help="folder, .safetensors, .bin, .pt or hub id")
    parser.add_argument("--save", metavar="DIR", type=Path, help="write it to DIR in the published layout")
    parser.add_argument("--precision", choices=PRECISIONS, help="precision to save in (default: as stored)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="the sentencepiece model, if it is not next to the weights"
    )
    args = parser.parse_args(argv)
    if args.precision and not args.save:
        parser.error("--precision requires --save")
    try:
        checkpoint = Checkpoint(args.checkpoint)
        print(report(checkpoint))
        problems = checkpoint.problems()
        if problems:
            print("NOT complete: " + "; ".join(problems))
            return 1
        print("complete")
        if args.save:
            precision = args.precision or stored_precision(checkpoint)
            model_file = find_tokenizer(checkpoint, args.tokenizer).model_file
            if precision in PACKED:
                save_packed(checkpoint, precision, model_file, args.save)
            else:
                save_checkpoint(read_model(checkpoint, PRECISIONS[precision]), model_file, args.save)
            print(f"wrote {args.save} in {precision}")
    except (OSError, ValueError) as error:
        print(f"load_weights: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
