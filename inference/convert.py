"""Write a checkpoint in the published layout.

    python -m inference.convert CHECKPOINT DIR                       any accepted format, precision as stored
    python -m inference.convert CHECKPOINT DIR --precision int8      a quarter of the size of fp32

`save_checkpoint` saves a model from Python, for example after training.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import load_weights
from inference.fast import PACKED, PRECISIONS, SCALE, PackableCheckpoint, PackedEmbedding
from kosmos2 import Embedding, Kosmos2, Kosmos2Config
from load_weights import (
    HARD_CODED,
    HUGGING_FACE,
    INT8_FILE,
    SENTENCEPIECE,
    TEXT_KEYS,
    VISION_KEYS,
    WEIGHT_FILES,
    check_checkpoint,
    read_model,
    rename,
    report,
)
from sample import CommandParser, report_error, run_command


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
    checkpoint: PackableCheckpoint, precision: str, sentencepiece_file: str | Path, folder: str | Path
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
    checkpoint.check_tied()
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
    others = [name for name in [*WEIGHT_FILES, INT8_FILE] if name != file_name and (folder / name).exists()]
    if others:
        raise ValueError(f"{folder} already has {others[0]}; save to another folder")


def published_config(config: Kosmos2Config) -> dict:
    """The content of a published config.json."""
    published = {"model_type": "kosmos-2", "architectures": ["Kosmos2ForConditionalGeneration"]}
    published["latent_query_num"] = config.latent_query_num
    if config.location_grid != Kosmos2Config.location_grid:
        published["location_grid"] = config.location_grid
    published["vision_config"] = {key: getattr(config.vision, ours) for ours, key in VISION_KEYS.items()}
    published["text_config"] = {key: getattr(config.text, ours) for ours, key in TEXT_KEYS.items()}
    for part, key, value in HARD_CODED:
        if part:
            published[part][key] = value
    return published


def stored_precision(checkpoint: PackableCheckpoint) -> str:
    """The precision in which most weights are stored."""
    if checkpoint.int8:
        return "int8"
    dtypes: Counter = Counter()
    for ours, stored in checkpoint.names.items():
        dtypes[checkpoint.stored[stored].dtype] += checkpoint.numel(ours)
    names = {"float16": "fp16", "bfloat16": "bf16"}
    return names.get(dtypes.most_common(1)[0][0], "fp32")


def main(argv=None) -> int:
    parser = CommandParser("inference.convert", __doc__)
    parser.add_argument("checkpoint", help="folder, .safetensors, .bin, .pt or hub id")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write it")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: as stored")
    tokenizer_help = "the sentencepiece model, if it is not next to the weights"
    parser.add_argument("--tokenizer", metavar="FILE", help=tokenizer_help)
    args = parser.parse_args(argv)
    try:
        return convert(args)
    except (OSError, ValueError) as error:
        return report_error("convert", error)


def convert(args) -> int:
    checkpoint = PackableCheckpoint(args.checkpoint)
    print(report(checkpoint))
    model_file = check_checkpoint(checkpoint, args.tokenizer).model_file
    precision = args.precision or stored_precision(checkpoint)
    if precision in PACKED:
        save_packed(checkpoint, precision, model_file, args.folder)
    else:
        model = read_model(checkpoint, load_weights.PRECISIONS[precision])
        save_checkpoint(model, model_file, args.folder)
    print(f"wrote {args.folder} in {precision}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("convert", main))
