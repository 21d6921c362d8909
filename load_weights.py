"""Checkpoints of Kosmos-2 in every form they come in -> a model of kosmos2.py, every tensor accounted for.

    python load_weights.py CHECKPOINT               says what is in it and whether it is complete
    python load_weights.py CHECKPOINT --save DIR    rewrites it in the published layout

CHECKPOINT is a folder in the published layout (config.json, sentencepiece.bpe.model, and model.safetensors
or shards with an index), a .safetensors file, a Hugging Face pytorch_model.bin, the original kosmos-2.pt
of fairseq, or a hub id such as microsoft/kosmos-2-patch14-224.

Three names for one tensor: NAMES is the whole map. Nothing is transposed, split or joined between them.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kosmos2 import Attention, Embedding, Kosmos2, Kosmos2Config, Linear, PackedEmbedding, PackedLinear, quantize
from tokenizer import Tokenizer

HUB_ID = "microsoft/kosmos-2-patch14-224"
SENTENCEPIECE = "sentencepiece.bpe.model"

# What a precision means: the type of all weights and activations. On a CPU fp16 and int8 are only how the
# large matrices are kept (PackedLinear): everything else is float32 there.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
PACKED = ("fp16", "int8")

# ----------------------------------------------------------------------------------------------------
# The names
# ----------------------------------------------------------------------------------------------------

# Beginnings of names: here, in the published (Hugging Face) layout, in the original (fairseq) one. {} is a
# layer's number. The first line that fits counts; what follows the beginning is the same in all three.
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
]  # fmt: skip
EMBEDDING = "decoder.embed_tokens.weight"
TIED = {"text_model.lm_head.weight", "gpt_model.decoder.output_projection.weight"}  # EMBEDDING once more
LEFTOVERS = {  # buffers that older versions stored and nothing reads
    "text_model.model.embed_positions.weights",
    "vision_model.model.embeddings.position_ids",
    "gpt_model.decoder.embed_positions._float_tensor",
    "gpt_model.decoder.self_attn_sope.scale",
}


def rename(name: str, column: int) -> str | None:
    """The name of one of our tensors in another layout: 1 is the published one, 2 the original."""
    for row in NAMES:
        match = re.match(re.escape(row[0]).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return row[column].format(*match.groups()) + name[match.end() :]
    return None


# ----------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor in a file: what is known without reading it, and how to read it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file; ValueError if it is damaged.

    The file is mapped anew for every tensor: pages of a mapping count as the process's memory until it is
    taken down, and one mapping of the whole file would in the end hold all of it beside the copy.
    """

    def reader(name):
        def read():
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return read

    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {n: Stored(tuple(p.get_shape()), p.get_dtype().lower(), reader(n)) for n, p in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); download it again") from None


class _Inert:
    """Stands in for every object a checkpoint pickles beside its tensors (fairseq: argparse, omegaconf, …).

    Whatever the pickle wants done with it, nothing happens.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs): ...
    def __setstate__(self, state): ...
    def __setitem__(self, key, value): ...
    def append(self, item): ...
    def extend(self, items): ...
    def add(self, item): ...
    def __call__(self, *args, **kwargs):
        return self


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    size: int


class _StridedTensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Reads what torch.save wrote without running any of it.

    A pickle is a program: it names functions and has them called. This one gets nothing but descriptions of
    tensors and `_Inert`, whatever it names, so that no code of the file or of this machine can run.
    """

    STORAGES = {
        f"{name}Storage": dtype
        for name, dtype in [
            ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16), ("Double", torch.float64),
            ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8),
            ("Byte", torch.uint8), ("Bool", torch.bool),
        ]
    }  # fmt: skip

    def find_class(self, module, name):
        if module == "torch" and name in self.STORAGES:
            return self.STORAGES[name]
        return {
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: _StridedTensor(
                storage, offset, tuple(shape), tuple(stride)
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
        }.get((module, name), _Inert)

    def persistent_load(self, reference):
        _, dtype, key, _, size = reference
        return _Storage(str(key), dtype, size)


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a file written by torch.save: pytorch_model.bin or fairseq's kosmos-2.pt.

    ValueError if it is damaged, or in the format from before PyTorch 1.6 with objects that are not tensors.
    """
    if not zipfile.is_zipfile(path):
        return _read_legacy_torch(path)
    try:
        archive = zipfile.ZipFile(path)
        index = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(index) as file:
            content = _TensorUnpickler(file).load()
    except StopIteration:
        raise ValueError(f"{path} is a zip file, but not one that torch.save wrote") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); download it again") from None
    folder = index.removesuffix("data.pkl")

    def reader(tensor: _StridedTensor):
        def read():
            try:
                data = bytearray(archive.read(f"{folder}data/{tensor.storage.key}"))
                flat = torch.frombuffer(data, dtype=tensor.storage.dtype)
                return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
            except (KeyError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}); download it again") from None

        return read

    return {
        name: Stored(t.shape, str(t.storage.dtype).removeprefix("torch."), reader(t))
        for name, t in _state_dict(content, path).items()
        if isinstance(t, _StridedTensor)
    }


def _read_legacy_torch(path: Path) -> dict[str, Stored]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely ({type(error).__name__}); "
            "if it is a good one from an old PyTorch, load it there and torch.save its state dict again"
        ) from None
    return {
        name: Stored(tuple(t.shape), str(t.dtype).removeprefix("torch."), lambda t=t: t.detach())
        for name, t in _state_dict(content, path).items()
        if isinstance(t, Tensor)
    }


def _state_dict(content, path: Path) -> dict:
    """fairseq keeps the weights under "model", Hugging Face at the top."""
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict")
    return {name: value for name, value in content.items() if isinstance(name, str)}


def find_checkpoint(path: str | Path) -> tuple[Path, list[Path]]:
    """A folder, file or hub id -> (the folder it lies in, the files with its weights).

    FileNotFoundError where there is none, saying what was looked for or how to get it.
    """
    given, path = str(path), Path(path)
    if not path.exists():
        is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given) and not Path(given.split("/")[0]).exists()
        if not is_hub_id or path.suffix in (".safetensors", ".bin", ".pt", ".json"):
            raise FileNotFoundError(f"there is no checkpoint at {given}")
        path = _download(given)
    if path.is_file():
        if path.name.endswith(".index.json"):
            return path.parent, _shards(path)
        return path.parent, [path]
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
                 "kosmos-2.pt"):  # fmt: skip
        if (path / name).is_file():
            return path, _shards(path / name) if name.endswith(".json") else [path / name]
    raise FileNotFoundError(f"{path} holds no model.safetensors, pytorch_model.bin, index of shards or kosmos-2.pt")


def _shards(index: Path) -> list[Path]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in files]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of shards; download it again") from None
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, not there; download the missing shards")
    return shards


def _download(hub_id: str) -> Path:
    by_hand = (
        f"get config.json, model.safetensors and {SENTENCEPIECE} from the page of {hub_id} on the Hugging Face hub, "
        "put them into one folder and give that folder"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"there is no {hub_id} here; pip install huggingface_hub to fetch it, or {by_hand}") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "model*.safetensors*", SENTENCEPIECE]))
    except Exception as error:  # network, permissions, unknown repository: the library has a kind for each
        raise FileNotFoundError(f"could not fetch {hub_id} ({type(error).__name__}); {by_hand}") from None


# ----------------------------------------------------------------------------------------------------
# From the files to a model
# ----------------------------------------------------------------------------------------------------


class Checkpoint:
    """What a path holds: its configuration, and its tensors under our names, not yet read.

    Raises FileNotFoundError and ValueError for what cannot be found or understood; whether it is complete,
    `problems` tells.
    """

    def __init__(self, path: str | Path):
        self.folder, self.files = find_checkpoint(path)
        config = self.folder / "config.json"
        self.config = Kosmos2Config.from_json(config) if config.is_file() else Kosmos2Config()
        self.stored: dict[str, Stored] = {}
        for file in self.files:
            found = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
            if twice := sorted(found.keys() & self.stored.keys()):
                raise ValueError(f"{file} holds tensors that another shard holds too: {listing(twice)}")
            self.stored |= found
        with torch.device("meta"):
            self.model = Kosmos2(self.config)
        self.layout = 2 if any(name.startswith(("gpt_model.", "img_model.")) for name in self.stored) else 1
        wanted = {ours: rename(ours, self.layout) for ours in self.model.state_dict()}
        self.tied = sorted(TIED & self.stored.keys())
        if self.tied and wanted[EMBEDDING] not in self.stored:
            wanted[EMBEDDING] = self.tied.pop()
        self.names = wanted  # ours -> the file's
        if odd := [name for name in self.stored if not name.isprintable()]:
            raise ValueError(f"{self.files[0]} is damaged (a tensor has the name {odd[0]!r}); download it again")
        if len(self.stored.keys() & set(wanted.values())) < len(wanted) / 10:
            found = listing(sorted(self.stored), most=3)
            raise ValueError(f"{path} looks like the checkpoint of another model, not Kosmos-2: it holds {found or 'nothing'}")

    def problems(self) -> list[str]:
        """Nothing, or what is wrong with the set of tensors, each by name."""
        shapes = {self.names[ours]: tuple(t.shape) for ours, t in self.model.state_dict().items()}
        missing = sorted(shapes.keys() - self.stored.keys())
        unexpected = sorted(self.stored.keys() - shapes.keys() - TIED - LEFTOVERS)
        misshaped = [
            f"{name} {self.stored[name].shape}, wanted {shape}"
            for name, shape in shapes.items()
            if name in self.stored and self.stored[name].shape != shape
        ]
        found = [("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshaped)]
        return [f"{len(names)} {what}: {listing(names)}" for what, names in found if names]

    def size(self, ours: str) -> int:
        """How many numbers a tensor has."""
        return math.prod(self.stored[self.names[ours]].shape)

    def tensor(self, ours: str, dtype: torch.dtype, device="cpu", copy: bool = True) -> Tensor:
        """One tensor, read, checked and converted; as a copy, or it may keep the file mapped."""
        stored = self.stored[self.names[ours]]
        tensor = stored.read().to(device=device, dtype=dtype, copy=copy)
        # NaN and infinity survive a sum, which needs no memory of the tensor's size.
        if not math.isfinite(float(tensor.sum(dtype=torch.float32))):
            where = f"{self.names[ours]} in {self.files[0].parent}"
            if torch.isfinite(stored.read()).all():
                raise ValueError(f"{where} has values too large for {dtype}; load it as fp32 or bf16")
            raise ValueError(f"{where} holds NaN or infinite values; the checkpoint is damaged")
        return tensor


def load_checkpoint(
    path: str | Path, precision: str = "fp32", device: str | torch.device = "cpu", tokenizer: str | Path | None = None
) -> tuple[Kosmos2, Tokenizer]:
    """Read a checkpoint in any of the accepted forms -> (model in eval mode, tokenizer).

    path: see the top of this file. config.json is read from beside the weights where there is one, else the
    published sizes are meant. The sentencepiece model is taken from beside the weights, or from `tokenizer`.
    precision: fp32 (exact, the default), bf16 (half the memory), fp16 (for GPUs; on a CPU for the weights
    only, twice as fast), int8 (for CPUs, faster still); independent of the dtype the weights are stored in.
    Needs little more memory than the weights themselves, in that precision; int8 half as much again.

    Raises FileNotFoundError for files that are not there, ValueError for a checkpoint with tensors missing,
    unexpected, of the wrong shape or not finite, each listed by name, and for a tokenizer that does not fit.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "int8" and torch.device(device).type != "cpu":
        raise ValueError("int8 is for CPUs; use bf16 or fp16 on other devices")
    checkpoint = Checkpoint(path)
    if problems := checkpoint.problems():
        raise ValueError(f"{path} is not a complete Kosmos-2 of these sizes; tensors " + "; ".join(problems))
    words = find_tokenizer(checkpoint, tokenizer)
    if precision in PACKED and torch.device(device).type == "cpu":
        return read_packed(checkpoint, precision).eval(), words
    return read_model(checkpoint, PRECISIONS[precision], device).eval(), words


def read_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device = "cpu") -> Kosmos2:
    """All tensors in one type, the largest first: while a tensor is converted it is in memory twice."""
    largest_first = sorted(checkpoint.names, key=checkpoint.size, reverse=True)
    state = {name: checkpoint.tensor(name, dtype, device) for name in largest_first}
    check_tied(checkpoint, state[EMBEDDING])
    checkpoint.model.load_state_dict(state, strict=True, assign=True)
    return checkpoint.model


def read_packed(checkpoint: Checkpoint, precision: str) -> Kosmos2:
    """The large matrices in 8 or 16 bits, packed as they are read, the rest as float32; not to be trained."""
    model = checkpoint.model
    sources = {name: [name] for name, module in model.named_modules() if isinstance(module, (Linear, Embedding))}
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module is not model.resampler.x_attn:  # the rest has one input for all three
            sources[f"{name}.qkv_proj"] = [f"{name}.{part}_proj" for part in "qkv"]
            for part in "qkv":
                del sources[f"{name}.{part}_proj"]
                setattr(module, f"{part}_proj", None)

    def pack(name: str) -> torch.nn.Module:
        half = precision == "fp16"  # then the weight itself is kept, and must not hold on to the file
        weights = [checkpoint.tensor(f"{n}.weight", torch.float16 if half else torch.float32, copy=half) for n in sources[name]]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        packed, scale = (weight, None) if half else quantize(weight)
        if name + ".weight" == EMBEDDING:
            check_tied(checkpoint, weight)
            return PackedEmbedding(packed, scale)
        bias = torch.cat([checkpoint.tensor(f"{n}.bias", torch.float32) for n in sources[name]])
        return PackedLinear(packed, bias, scale)

    largest_first = sorted(sources, key=lambda name: checkpoint.size(f"{sources[name][0]}.weight"), reverse=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, module in zip(largest_first, pool.map(pack, largest_first), strict=True):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)
    rest = {name: checkpoint.tensor(name, torch.float32) for name in model.state_dict()}
    model.load_state_dict(rest, strict=True, assign=True)
    return model.requires_grad_(False)  # packed weights have no gradients, so neither has the rest


def check_tied(checkpoint: Checkpoint, embedding: Tensor) -> None:
    """ValueError where a file stores the output projection, too, and it is not the embedding."""
    for name in checkpoint.tied:
        if not torch.equal(checkpoint.stored[name].read().to(embedding), embedding):
            raise ValueError(f"{name} differs from the token embedding, which a Kosmos-2 uses for both")


def find_tokenizer(checkpoint: Checkpoint, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer beside a checkpoint, or at `path`; ValueError if the vocabulary is another one's."""
    model_file = Path(path) if path is not None else checkpoint.folder / SENTENCEPIECE
    if model_file.is_dir():
        model_file /= SENTENCEPIECE
    if not model_file.is_file():
        raise FileNotFoundError(f"there is no {SENTENCEPIECE} at {model_file}; give the path of one as the tokenizer")
    tokenizer = Tokenizer(model_file, checkpoint.config.latent_query_num)
    if tokenizer.vocab_size != checkpoint.config.text.vocab_size:
        raise ValueError(
            f"{model_file} makes a vocabulary of {tokenizer.vocab_size} "
            f"(with locations in a {tokenizer.grid} x {tokenizer.grid} grid), but the checkpoint "
            f"has embeddings for {checkpoint.config.text.vocab_size}; give the sentencepiece model it was trained with"
        )
    return tokenizer


def listing(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_checkpoint(model: Kosmos2, sentencepiece_file: str | Path, folder: str | Path) -> None:
    """Write a model in the published layout, which this loader and transformers both read.

    Every file is written beside its place and then moved there, so that none is ever half written.
    ValueError for a model in int8, or in fp16 on a CPU: its weights are not at hand any more.
    """
    if isinstance(model.decoder.embed_tokens, PackedEmbedding):
        raise ValueError("a packed model cannot be saved; load it as fp32 or bf16")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {rename(name, 1): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = model.config.to_published() | {"dtype": str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")}

    def write(name, how):
        part = folder / f"{name}.part"
        try:
            how(part)
            part.chmod(0o644)  # safetensors writes files that only their owner can read
            os.replace(part, folder / name)
        except SafetensorError as error:
            raise OSError(f"cannot write {part}: {error}") from None
        finally:
            part.unlink(missing_ok=True)

    if not (folder / SENTENCEPIECE).exists() or not os.path.samefile(sentencepiece_file, folder / SENTENCEPIECE):
        write(SENTENCEPIECE, lambda part: shutil.copyfile(sentencepiece_file, part))
    write("model.safetensors", lambda part: save_file(state, part, metadata={"format": "pt"}))
    write("config.json", lambda part: part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


def report(checkpoint: Checkpoint) -> str:
    """What a checkpoint holds, a line for each part of the model."""
    lines = [f"{'part':<12}{'tensors':>8}{'parameters':>15}  stored as"]
    for part in ("vision", "resampler", "decoder"):
        names = [theirs for ours, theirs in checkpoint.names.items() if ours.startswith(part)]
        stored = [checkpoint.stored[name] for name in names if name in checkpoint.stored]
        count = sum(math.prod(s.shape) for s in stored)
        types = ", ".join(f"{dtype} x {n}" for dtype, n in Counter(s.dtype for s in stored).items())
        lines.append(f"{part:<12}{len(stored):>8}{count:>15,}  {types}")
    extra = sorted((TIED | LEFTOVERS) & checkpoint.stored.keys() - set(checkpoint.names.values()))
    if extra:
        lines.append(f"not needed: {', '.join(extra)}")
    layout = "the original (fairseq)" if checkpoint.layout == 2 else "the published (Hugging Face)"
    files = f"{len(checkpoint.files)} file{'s' if len(checkpoint.files) > 1 else ''}"
    return "\n".join([f"{files} in {checkpoint.folder}, names of {layout} layout", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what is in a Kosmos-2 checkpoint, or rewrite it.")
    parser.add_argument("checkpoint", help="folder, .safetensors, .bin, .pt or hub id")
    parser.add_argument("--save", metavar="DIR", type=Path, help="write it to DIR in the published layout")
    parser.add_argument("--tokenizer", metavar="FILE", help="the sentencepiece model, if it is not beside the weights")
    args = parser.parse_args()
    try:
        checkpoint = Checkpoint(args.checkpoint)
        print(report(checkpoint))
        problems = checkpoint.problems()
        print("complete" if not problems else "NOT complete: tensors " + "; ".join(problems))
        if problems:
            return 1
        if args.save:
            dtypes = Counter(s.dtype for s in checkpoint.stored.values())
            kept = {"float16": "fp16", "f16": "fp16", "bfloat16": "bf16", "bf16": "bf16"}
            dtype = PRECISIONS[kept.get(dtypes.most_common(1)[0][0], "fp32")]
            words = find_tokenizer(checkpoint, args.tokenizer).model_file
            save_checkpoint(read_model(checkpoint, dtype), words, args.save)
            print(f"wrote {args.save}")
    except (OSError, ValueError) as error:
        print(f"load_weights: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
