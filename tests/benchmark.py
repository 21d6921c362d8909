"""Measure the speed next to transformers or OpenVINO, and relative to memory bandwidth.

    python tests/benchmark.py CHECKPOINT [--rounds 3]    transformers: the README's table
    python tests/benchmark.py CHECKPOINT --openvino      OpenVINO with 8- and 4-bit weights

CHECKPOINT is a folder in the published layout with the published sizes: the real weights, or random
ones, `save_checkpoint(Kosmos2(Kosmos2Config()), "sentencepiece.bpe.model", FOLDER)`. The
implementations alternate in one process, each warmed up, and the table has the medians of all
rounds; ratios are reliable, single times only on an idle machine. Takes about 15 minutes and 16 GB
of memory; needs transformers, or for --openvino the packages openvino and nncf (openvino_peer.py).
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import load_weights  # noqa: E402
from inference.fast import load_checkpoint  # noqa: E402
from inference.shortcuts import with_drafts  # noqa: E402
from kosmos2 import Kosmos2, finish, pad_left  # noqa: E402

TOKENS, BATCH, BATCH_TOKENS = 64, 16, 32


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def machine() -> str:
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} cores ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"


NUMBERS = torch.ones(2**28)  # 1 GiB


def memory_bandwidth() -> float:
    """Memory bandwidth of all cores in bytes per second: the best of several sums."""
    return NUMBERS.numel() * 4 / min(seconds(NUMBERS.sum) for _ in range(5))


def decoder_weights(model: Kosmos2) -> int:
    """The number of weights read per new token: all blocks and the output projection."""
    text = model.config.text
    return text.layers * (4 * text.width**2 + 2 * text.width * text.mlp_width) + text.vocab_size * text.width


class Ours:
    def __init__(self, checkpoint: str, precision: str):
        self.name = f"this, {precision}"
        self.model, self.tokenizer = load_checkpoint(checkpoint, precision)

    def caption(self, pixels: torch.Tensor, count: int) -> list[list[int]]:
        tokens, image_mask, pad_mask = pad_left(
            [self.tokenizer.encode_prompt("<grounding>An image of")] * len(pixels)
        )
        return self.model.generate(
            tokens, pixels, None, image_mask, pad_mask, max_new_tokens=count, min_new_tokens=count
        )


class Reference:
    name = "transformers, fp32"

    def __init__(self, checkpoint: str, tokenizer):
        from transformers import Kosmos2ForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = Kosmos2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, count: int) -> list[list[int]]:
        tokens, image_mask, _ = pad_left(
            [self.tokenizer.encode_prompt("<grounding>An image of")] * len(pixels)
        )
        new = self.model.generate(
            pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(),
            attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        )  # fmt: skip
        return new[:, tokens.shape[1] :].tolist()


def measure(sides: list, rounds: int, times: dict) -> None:
    """Time one image on each side, alternating: until the first token, and until the last."""
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, *[sides[-1].model.config.vision.image_size] * 2)
    ids = {}
    for turn in range(rounds + 1):
        for side in sides:
            side.caption(pixels, 1)  # warm up: its weights have not been used for half a minute
            first = seconds(lambda side=side: side.caption(pixels, 1))
            start = time.perf_counter()
            ids[side.name] = side.caption(pixels, TOKENS)[0]
            whole = time.perf_counter() - start
            if turn:  # round 0 is a warm-up
                times[side.name, "bandwidth"].append(memory_bandwidth())
                times[side.name, "first token"].append(first)
                times[side.name, "whole"].append(whole)
                times[side.name, "step"].append((whole - first) / (TOKENS - 1))
            print(
                f"{side.name}: first token {first:.2f} s, {TOKENS} tokens {whole:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    print("same ids" if len(set(map(tuple, ids.values()))) == 1 else "ids differ", file=sys.stderr)


# The published caption of the official demo image, "An image of a snowman warming himself by a fire."
CAPTION = [64007, 10, 43867, 64008, 64009, 64057, 64876, 64010, 5950, 597, 32,
           64007, 10, 646, 64008, 64009, 64018, 64924, 64010, 4, 2]  # fmt: skip


def measure_draft(side: Ours, rounds: int) -> str:
    """The time for CAPTION, which a constraint forces, without and with drafts (inference/shortcuts.py)."""
    model, tokenizer = side.model, side.tokenizer
    ids, mask = tokenizer.encode_prompt("<grounding>An image of")
    tokens, image_mask, _ = pad_left([(ids, mask)])
    image = torch.zeros(1, model.config.latent_query_num, model.config.text.width)
    steps: list[int] = []
    hook = model.decoder.register_forward_hook(lambda *_: steps.append(1))

    def force(so_far: list[int], remaining: int) -> np.ndarray:
        return np.arange(tokenizer.vocab_size) == CAPTION[len(so_far) - len(ids)]

    times = defaultdict(list)
    counts = {}
    for _ in range(rounds + 1):
        for draft in (False, True):
            options = {"max_new_tokens": len(CAPTION), "constraint": force}
            state = model.prefill(tokens, image_embeds=image, image_mask=image_mask, **options)
            if draft:
                state = with_drafts(state, tokenizer)
            steps.clear()
            times[draft].append(seconds(lambda state=state: finish(state)))
            counts[draft] = len(steps)
    hook.remove()
    before, after = (statistics.median(times[draft][1:]) for draft in times)
    without, with_draft = counts.values()
    return (
        f"the published caption, {side.name}, after the first token: {before:.2f} s in {without} steps, "
        f"with a draft {after:.2f} s in {with_draft} steps ({before / after:.2f}x)"
    )


def measure_batch(side: Ours, reference: Reference) -> str:
    """The time for a batch of images."""
    pixels = torch.randn(BATCH, 3, *[side.model.config.vision.image_size] * 2)
    times = defaultdict(list)
    for _ in range(2):
        for s in (side, reference):
            times[s.name].append(seconds(lambda s=s: s.caption(pixels, BATCH_TOKENS)))
    ours = statistics.median(times[side.name])
    theirs = statistics.median(times[reference.name])
    return (
        f"{BATCH} images, {BATCH_TOKENS} tokens each: {reference.name} {theirs:.1f} s; "
        f"{side.name} {ours:.1f} s ({theirs / ours:.1f}x)"
    )


@torch.inference_mode()
def logits_error(reference: Reference, side: Ours) -> float:
    """Relative error of the next-token logits at every position of a prompt."""
    pixels = torch.randn(
        1, 3, *[side.model.config.vision.image_size] * 2, generator=torch.Generator().manual_seed(1)
    )
    tokens, mask, _ = pad_left([side.tokenizer.encode_prompt("<grounding>Describe this image in detail:")])
    expected = reference.model(
        pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=mask.long()
    ).logits
    return float((side.model(tokens, pixels, None, mask) - expected).norm() / expected.norm())


def whole_process(*arguments: str) -> tuple[float, float]:
    """(seconds, peak GB) of a Python process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tempfile.gettempdir(),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} failed")
    units = 1e9 if sys.platform == "darwin" else 1e9 / 1024  # ru_maxrss is in bytes or KiB
    return time.perf_counter() - start, usage.ru_maxrss / units


def print_table(sides: dict[str, float], times: dict, weights: int) -> None:
    """A row for each side: medians, how much faster than the first side, and achieved bandwidth.

    sides: the bytes per weight of each.
    """
    median = {key: statistics.median(values) for key, values in times.items()}
    speeds = [speed for (_, what), found in times.items() if what == "bandwidth" for speed in found]
    print(f"{machine()}; memory bandwidth {min(speeds) / 1e9:.0f} to {max(speeds) / 1e9:.0f} GB/s\n")
    base = next(iter(sides))
    print(f"| | first token | {TOKENS} tokens | per token | GB/s | fraction of memory bandwidth |")
    print("|---|---|---|---|---|---|")
    for name, bytes_per_weight in sides.items():
        cells = [name]
        for what in ("first token", "whole", "step"):
            value = median[name, what]
            shown = f"{value * 1000:.0f} ms" if what == "step" else f"{value:.2f} s"
            if name != base:
                shown += f" ({median[base, what] / value:.1f}x)"
            cells.append(shown)
        achieved = weights * bytes_per_weight / median[name, "step"]
        cells += [f"{achieved / 1e9:.0f}", f"{achieved / median[name, 'bandwidth']:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def measure_start(checkpoint: str) -> list[str]:
    """Whole runs of the script: from its start to the first token, and their memory."""
    script = str(ROOT / "sample.py")
    imports = statistics.median(whole_process("-c", "import torch")[0] for _ in range(3))
    bundled = statistics.median(whole_process(script)[0] for _ in range(3))
    stored = load_weights.Checkpoint(checkpoint).stored.values()
    read = min(
        seconds(lambda: [float(s.read().sum()) for s in stored]) for _ in range(2)
    )  # from the page cache
    one_token = ["--json", "--max-new-tokens", "1", "--precision"]
    memory = []
    for precision in ("fp32", "bf16", "fp16", "int8"):
        start, peak = whole_process(script, "--checkpoint", checkpoint, *one_token, precision)
        memory.append(f"{precision} {peak:.1f} GB")
    with tempfile.TemporaryDirectory(dir=Path(checkpoint).parent) as folder:
        whole_process("-m", "inference.convert", checkpoint, folder, "--precision", "int8")
        start_int8, peak = whole_process(script, "--checkpoint", folder, *one_token, "int8")
    return [
        f"peak memory of sample.py: {', '.join(memory)}, from an int8 checkpoint {peak:.1f} GB",
        f"a complete int8 run of sample.py: first token after {start:.1f} s, "
        f"of which reading the weights once {read:.1f} s, importing torch {imports:.1f} s; "
        f"from an int8 checkpoint after {start_int8:.1f} s",
        f"python sample.py with the bundled model: {bundled:.1f} s",
    ]


def compare_with_transformers(checkpoint: str, rounds: int) -> None:
    notes = measure_start(checkpoint)
    times: dict = defaultdict(list)
    sides = {Reference.name: 4.0}
    reference = None
    errors = []
    for precision, bytes_per_weight in (("fp32", 4), ("fp16", 2), ("int8", 1)):
        side = Ours(checkpoint, precision)
        sides[side.name] = bytes_per_weight
        if reference is None:
            reference = Reference(checkpoint, side.tokenizer)
        measure([reference, side], rounds, times)
        errors.append(f"{precision} {logits_error(reference, side):.1e}")
        notes.append(measure_draft(side, rounds))
    errors.append(f"bf16 {logits_error(reference, Ours(checkpoint, 'bf16')):.1e}")
    notes.append(f"relative error of the logits: {', '.join(errors)}")
    notes.append(measure_batch(side, reference))
    print_table(sides, times, decoder_weights(side.model))
    print("", *notes, sep="\n")


def compare_with_openvino(checkpoint: str, rounds: int) -> None:
    from openvino_peer import OpenVino, convert

    side = Ours(checkpoint, "int8")
    model, tokenizer = load_weights.load_checkpoint(checkpoint)  # plain layers, which can be traced
    times: dict = defaultdict(list)
    sides = {}
    for bits in (8, 4):
        name = f"OpenVINO, int{bits}"
        graphs = convert(model, bits)
        # Without dynamic quantization, the first token is later and the others are faster.
        peers = [
            OpenVino(name, model, tokenizer, graphs),
            OpenVino(f"{name}, group size 0", model, tokenizer, graphs, DYNAMIC_QUANTIZATION_GROUP_SIZE=0),
        ]
        sides |= {peer.name: bits / 8 for peer in peers}
        measure([*peers, side], rounds, times)
    sides[side.name] = 1
    print_table(sides, times, decoder_weights(side.model))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--openvino", action="store_true", help="compare with OpenVINO")
    args = parser.parse_args()
    checkpoint = str(Path(args.checkpoint).resolve())
    if args.openvino:
        compare_with_openvino(checkpoint, args.rounds)
    else:
        compare_with_transformers(checkpoint, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
