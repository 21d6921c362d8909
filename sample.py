"""Run Kosmos-2 on images: prints the text, saves the image with its boxes drawn.

    python sample.py                                          the bundled image and the bundled small model
    python sample.py photo.jpg --checkpoint microsoft/kosmos-2-patch14-224
    python sample.py tiny/scene.png --task ground --text "a snowman"
    python sample.py tiny/busy.png --task vqa --text "What color is the car?"
    python sample.py tiny/scene.png --task refer --box 140,80,255,295
    python sample.py folder --results captions.jsonl          a folder; --resume continues an interrupted run
    python sample.py folder --output page.html                one page with all images, captions and boxes
    python sample.py --requests requests.jsonl --json         a request per line: image, task, text, prompt

Text and JSON go to stdout, progress, timings and errors to stderr. Exit status: 0 done, 1 something
failed (the other requests are still answered), 2 usage, 130 interrupted. Under torchrun, requests
are split across processes.
"""

import argparse
import base64
import html
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tokenizer import (
    CONTINUED,
    TASKS,
    Entity,
    as_boxes,
    check_box,
    iou,
    normalize_box,
    strip_tags,
    task_prompts,
    tokens_to_box,
)

HERE = Path(__file__).resolve().parent

DEFAULT_NEW_TOKENS = 430  # the original demo's limit after a normal prompt; fewer if the context has no room


# What a line of --json and --results has besides the extra keys of its request.
RESULT_KEYS = ("image", "prompt", "given_boxes", "text", "raw", "entities", "checkpoint")


class Request(NamedTuple):
    """What to ask about some images.

    Requests come from the command line, from folders or from --requests.
    """

    images: tuple[Path, ...]
    prompt: str
    boxes: tuple = ()  # one for each phrase of the prompt, as given by the user
    continued: bool = True  # the prompt is the beginning of the answer
    wants_boxes: bool = False  # the boxes are the answer
    block_ngrams: bool = True
    extra: dict = {}  # copied to the result
    number: int = 0  # its position in the run

    def key(self) -> tuple:
        """What identifies a request in a results file."""
        images = tuple(os.path.realpath(path) for path in self.images)
        extra = {name: value for name, value in self.extra.items() if name not in RESULT_KEYS}
        return images, self.prompt, json.dumps([self.boxes, extra], sort_keys=True)


class Answer(NamedTuple):
    """The answer to a request."""

    text: str
    raw: str  # prompt and answer as tagged text
    entities: list[Entity]


@dataclass
class Row:
    """A request as a row of a batch."""

    request: Request
    ids: list[int]  # the encoded prompt
    image_mask: list[bool]
    image_embeds: "torch.Tensor | None" = None  # (I, Q, D), of all images of the prompt
    answer: Answer | None = None


@dataclass
class Group:
    """Consecutive requests about the same images."""

    requests: list[Request]
    rows: list[Row] = field(default_factory=list)  # the requests that can be answered
    errors: list = field(default_factory=list)  # (requests, exception) for the others
    pixels: list = field(default_factory=list)  # a tensor (3, image_size, image_size) for each image
    size: tuple[int, int] = (1, 1)  # of the last image, which the answers are about
    image: Image.Image | None = None  # the last image, if it will be drawn


# ----------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------

# Decoding options: name, type, help. The library checks their values (kosmos2.GenerationOptions).
DECODING = [
    ("max-new-tokens", int, f"upper limit (default: {DEFAULT_NEW_TOKENS}, or what fits the context)"),
    ("min-new-tokens", int, "do not end before this many tokens"),
    (
        "temperature",
        float,
        "0 (default) takes the most likely token, 1 samples from the model's distribution",
    ),
    ("top-k", int, "sample among the k most likely tokens"),
    ("top-p", float, "sample among the most likely tokens that together reach probability p"),
    ("num-beams", int, "above 1: beam search"),
    (
        "no-repeat-ngram-size",
        int,
        "forbid repeated n-grams (default: the checkpoint's; off for --task context)",
    ),
    ("seed", int, "make sampling repeatable"),
]


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images_help = "files or folders; default: the bundled image"
    p.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help=images_help)

    add = p.add_argument_group("what to ask").add_argument
    add("--task", choices=TASKS, help="use the published prompt of this task (default: caption)")
    text_help = "phrase, referring expression or question; may be repeated (the image is encoded once)"
    add("--text", action="append", help=text_help)
    add("--prompt", help="your own prompt instead of a task; <image> marks where images go")
    box_help = "box of the next <phrase> in the prompt: 0..1, pixels or two location indices; may be repeated"
    add("--box", action="append", type=parse_box, metavar="X1,Y1,X2,Y2", help=box_help)
    add("--top-boxes", type=int, metavar="K", help="the K most likely boxes of a phrase (ground, refer)")
    requests_help = "a request per line: image, task, text, prompt, boxes; - is stdin"
    add("--requests", metavar="JSONL", help=requests_help)

    add = p.add_argument_group("decoding").add_argument
    for name, kind, text in DECODING:
        add(f"--{name}", type=kind, metavar="N", help=text)

    add = p.add_argument_group("the model").add_argument
    add("--checkpoint", default=str(HERE / "tiny"), help="folder, file or hub id (default: bundled model)")
    add("--tokenizer", help="the sentencepiece model, if it is not next to the weights")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    precisions = ["fp32", "bf16", "fp16", "int8"]
    precision_help = "fp32 (default) is exact, int8 is the fastest on a CPU, bf16 is for GPUs"
    add("--precision", choices=precisions, default="fp32", help=precision_help)
    add("--batch-size", type=int, default=8, metavar="N", help="requests per batch (default: 8)")

    add = p.add_argument_group("output").add_argument
    output_help = (
        "draw the boxes: an image file, a folder or page.html (default for one image: STEM.boxes.png)"
    )
    add("--output", type=Path, metavar="PATH", help=output_help)
    add("--json", action="store_true", help="print a JSON object per line instead of the text")
    results_help = "append the results to this file, after each batch"
    add("--results", type=Path, metavar="JSONL", help=results_help)
    resume_help = "continue a --results file: skip the requests it already answers"
    add("--resume", action="store_true", help=resume_help)
    return p


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line; conflicting options exit with status 2."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.prompt is not None and (args.text or args.task):
        p.error("--prompt replaces --task and --text; use one or the other")
    if args.requests and (args.images or args.prompt or args.task or args.text or args.box):
        p.error("--requests replaces IMAGE, --task, --text, --prompt and --box")
    if args.top_boxes is not None and args.top_boxes < 1:
        p.error("--top-boxes must be positive")
    if args.batch_size < 1:
        p.error("--batch-size must be positive")
    if args.resume and args.results is None:
        p.error("--resume requires --results, the file to continue")
    if args.results is not None and args.results.is_dir():
        p.error(f"--results {args.results} is a folder; expected a file")
    if args.task == "text" and (args.images or args.output):
        p.error("--task text takes no IMAGE and no --output")
    if not args.requests and args.prompt is None:
        try:
            task_prompts(args.task or "caption", args.text or [], args.box or [])
        except ValueError as error:
            p.error(str(error))
    named = [args.results, args.output, Path(args.requests) if args.requests else None]
    files = [os.path.realpath(path) for path in named if path is not None]
    if len(set(files)) < len(files):
        p.error("--requests, --results and --output must be different files")
    if args.top_boxes and not args.requests and not (args.text and args.task in ("ground", "refer")):
        p.error("--top-boxes requires --task ground or refer with --text")
    return args


def parse_number(text: str) -> int | float:
    return int(text) if text.strip().isdigit() else float(text)


def parse_box(text: str) -> tuple:
    """ "120,40,380,300" -> a tuple of four numbers or two location indices."""
    try:
        values = tuple(map(parse_number, text.split(",")))
    except ValueError:
        values = ()
    indices = len(values) == 2 and all(type(v) is int for v in values)
    if not indices and (len(values) != 4 or any(v != v for v in values)):
        raise argparse.ArgumentTypeError(
            f"expected x1,y1,x2,y2 (0..1 or pixels) or two location indices, got {text!r}"
        )
    return values


# ----------------------------------------------------------------------------------------------------
# Requests
# ----------------------------------------------------------------------------------------------------


def make_requests(images: tuple[Path, ...], task, texts, prompt, boxes, extra: dict) -> list[Request]:
    """The requests for some images: one, or one for each text."""
    if prompt is not None:
        return [Request(images, prompt, tuple(boxes), extra=extra)]
    task = task or "caption"
    settings = {
        "boxes": tuple(boxes),
        "continued": task in CONTINUED,
        "wants_boxes": task in ("ground", "refer") and bool(texts),
        "block_ngrams": task != "context",
        "extra": extra,
    }
    return [Request(images, task_prompt, **settings) for task_prompt in task_prompts(task, texts, boxes)]


def command_line_requests(args: argparse.Namespace) -> list[Request]:
    """Each image with each prompt; all images together if the prompt has several <image> tags."""
    paths = find_images(args.images) if args.images else [HERE / "tiny" / "scene.png"]
    groups = [(path,) for path in paths]
    if args.task == "context" or (args.prompt or "").count("<image>") > 1:
        groups = [tuple(paths)]
    if args.task == "text":
        groups = [()]
    requests = []
    for images in groups:
        requests += make_requests(images, args.task, args.text or [], args.prompt, args.box or [], {})
    return requests


def read_requests(source: str) -> list[Request]:
    """The requests in a JSONL file, or in stdin for "-"; ValueError names the line."""
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); expected one JSON object per line") from None
    requests = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                requests.append(read_request(json.loads(line), Path(source).parent))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
    if not requests:
        raise ValueError(f"{name} has no requests")
    return requests


def read_request(row, folder: Path) -> Request:
    """One line of a requests file.

    Relative image paths are resolved against the current directory, then against the folder of the file.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {row!r}")
    for key in ("image", "task", "text", "prompt"):
        value = row.get(key)
        values = as_list(value) if key in ("image", "text") else [value]
        if value is not None and not all(isinstance(one, str) for one in values):
            raise ValueError(f"{key}: expected a string, got {value!r}")
    extra = dict(row)
    task = extra.pop("task", None)
    prompt = extra.pop("prompt", None)
    texts = as_list(extra.pop("text", None))
    boxes = as_list(extra.pop("boxes", None))
    if boxes and isinstance(boxes[0], (int, float)):
        boxes = [boxes]
    for entry in boxes:
        for box in as_boxes(entry):
            check_box(box)
    if prompt is not None and (task or texts):
        raise ValueError("prompt replaces task and text; use one or the other")
    if len(texts) > 1 and task != "context":
        raise ValueError("expected one text; write one request for each")
    images = []
    for name in as_list(extra.pop("image", None)):
        if "\0" in name:
            raise ValueError(f"image: {name!r} is not a file name")
        path = text_path(name)
        if not os.path.exists(path) and os.path.exists(folder / path):
            path = folder / path
        images.append(path)
    json.dumps(extra, allow_nan=False)  # raises for what could not be written again
    request = make_requests(tuple(images), task, texts, prompt, boxes, extra)[0]
    if not images and prompt is None and task != "text":
        raise ValueError(f"task {task or 'caption'} needs an image")
    return request


def as_list(value) -> list:
    """A list as it is, a single value as a list of one, None as an empty list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ----------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------

UNREADABLE = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognizes but cannot decode


def image_endings() -> set[str]:
    """The file name endings of all formats Pillow can read."""
    endings = Image.registered_extensions().items()
    return {ending for ending, kind in endings if kind in Image.OPEN and kind not in UNREADABLE}


def find_images(given: list[Path]) -> list[Path]:
    """Files as they are, folders as the images in them, sorted by name.

    ValueError for a folder without images.
    """
    endings = image_endings()
    found = []
    for path in given:
        if not os.path.isdir(path):
            found.append(path)
            continue
        images = []
        skipped: Counter = Counter()
        for file in sorted(path.iterdir()):
            if file.is_dir():
                skipped["folder"] += 1
            elif file.suffix.lower() not in endings:
                skipped[file.suffix or file.name] += 1
            elif not file.name.endswith(".boxes.png"):  # written by an earlier run
                images.append(file)
        if skipped:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in skipped.most_common(8))
            print(f"sample: skipped in {path}: {kinds}", file=sys.stderr)
        if not images:
            raise ValueError(f"no images in folder {path}")
        found += images
    return found


def load_group(requests: list[Request], runner: "Runner", keep_image: bool) -> Group:
    """Read and preprocess the images of requests that share them, and encode their prompts.

    The full image is kept only if it will be drawn: dozens of photos in memory would take
    gigabytes.
    """
    group = Group(requests)
    sizes = []
    for path in requests[0].images:
        try:
            image = kosmos2.open_image(path)
            group.pixels.append(kosmos2.preprocess_image(image, runner.model.config.vision.image_size))
        except Exception as error:  # Pillow's decoders raise many kinds
            group.errors.append((requests, error))
            return group
        sizes.append(image.size)
        group.size = image.size
        group.image = image if keep_image else None
    for request in requests:
        try:
            ids, image_mask = runner.encode_prompt(request, sizes)
            group.rows.append(Row(request, ids, image_mask))
        except (ValueError, TypeError) as error:
            group.errors.append(([request], error))
    return group


def read_ahead(groups: list[list[Request]], load, batch_size: int) -> Iterator[list[Group]]:
    """Batches of about batch_size requests; the next batch loads in the background."""
    with ThreadPoolExecutor(2) as pool:
        loading: list[Future] = []
        for batch in batched(groups, batch_size):
            following = [pool.submit(load, requests) for requests in batch]
            if loading:
                yield [future.result() for future in loading]
            loading = following
        if loading:
            yield [future.result() for future in loading]


def batched(groups: list[list[Request]], batch_size: int) -> Iterator[list[list[Request]]]:
    batch: list[list[Request]] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------
# Running the model
# ----------------------------------------------------------------------------------------------------


def import_model_code() -> None:
    """Import PyTorch and the model.

    Done here and not at the top of the file, so that --help and usage errors do not wait two
    seconds for PyTorch.
    """
    global torch, kosmos2, load_weights
    import torch

    import kosmos2
    import load_weights


class Runner:
    """A model, its tokenizer and the decoding options of this run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.timings = ""
        self.stream = False  # print the text while it is generated
        self.device = load_weights.choose_device(args.device, args.precision)
        self.options = {}
        for name, _, _ in DECODING:
            name = name.replace("-", "_")
            if getattr(args, name) is not None:
                self.options[name] = getattr(args, name)
        self.default_limit = max(DEFAULT_NEW_TOKENS, self.options.get("min_new_tokens", 0))
        limit = {"max_new_tokens": self.default_limit}
        kosmos2.GenerationOptions(**limit | self.options)  # raises before the model is loaded
        self.model, self.tokenizer = load_weights.load_checkpoint(
            args.checkpoint, args.precision, self.device, args.tokenizer
        )
        self.image_ids, self.image_mask = self.tokenizer.encode_prompt("")
        self.context = self.model.config.text.max_positions
        # Leave room for --max-new-tokens if given, otherwise for the fewest tokens of an answer.
        reserved = self.options.get("max_new_tokens", max(1, self.options.get("min_new_tokens", 0)))
        if args.top_boxes:
            reserved = 3  # <object> and the two corners
        self.longest_prompt = self.context - reserved
        if self.longest_prompt < 1:
            raise ValueError(
                f"no room for a prompt: the context holds {self.context} tokens, new ones included"
            )

    def encode_prompt(self, request: Request, sizes: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The ids and image_mask of a request; ValueError if it is too long or not valid."""
        boxes = self.normalize_boxes(request, sizes) if request.boxes else None
        ids, image_mask = self.tokenizer.encode_prompt(request.prompt, len(sizes), boxes)
        if len(ids) > self.longest_prompt:
            new = self.context - self.longest_prompt
            raise ValueError(
                f"the prompt has {len(ids)} tokens; the context holds {self.context}, "
                f"of which {new} are reserved for new tokens"
            )
        return ids, image_mask

    def normalize_boxes(self, request: Request, sizes: list[tuple[int, int]]) -> list:
        """The boxes of a request in 0..1. Boxes in pixels refer to the image before their phrase."""
        starts = [match.start() for match in re.finditer("<phrase>", request.prompt)]
        boxes = []
        for i, box in enumerate(request.boxes):
            before = request.prompt[: starts[i]] if i < len(starts) else ""
            image = max(before.count("<image>") - 1, 0)
            size = sizes[min(image, len(sizes) - 1)] if sizes else (1, 1)
            boxes.append([normalize_box(one, size) for one in as_boxes(box)])
        return boxes

    def answer(self, groups: list[Group]) -> None:
        """Answer all requests of a batch: sets `row.answer`."""
        if not groups:
            return
        self.encode_images(groups)
        together = []
        for group in groups:
            if self.args.top_boxes:
                for row in group.rows:
                    row.answer = self.rank_boxes(row)
            elif len(group.rows) > 1 and all(map(self.begins_with_image, group.rows)):
                prefix = self.prefill_image(group.rows[0].image_embeds)
                for rows in self.parts(group.rows):
                    self.generate(rows, prefix)
            else:
                together += group.rows
        for rows in self.parts(together):
            self.generate(rows)

    def parts(self, rows: list[Row]) -> list[list[Row]]:
        """Batches of at most --batch-size rows that have the same decoding options.

        Few-shot prompts run without n-gram blocking, and a prompt that nearly fills the context has
        a limit of its own.
        """
        same_options = defaultdict(list)
        for row in rows:
            same_options[row.request.block_ngrams, self.limit(row)].append(row)
        size = self.args.batch_size
        batches = []
        for same in same_options.values():
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        return batches

    def limit(self, row: Row) -> int:
        """The limit of new tokens for a row, unless --max-new-tokens gives it."""
        return min(self.default_limit, self.context - len(row.ids))

    def encode_images(self, groups: list[Group]) -> None:
        """Encode the images of all groups as one batch: sets `row.image_embeds`."""
        started = time.perf_counter()
        pixels = [image for group in groups for image in group.pixels]
        if not pixels:
            self.timings = "no image"
            return
        with torch.inference_mode():
            image_embeds = self.model.encode_image(torch.stack(pixels).to(self.device))  # (I, Q, D)
            image_embeds[0, 0, 0].item()  # waits for a GPU
        self.timings = f"vision {(time.perf_counter() - started) * 1000:.0f} ms"
        start = 0
        for group in groups:
            end = start + len(group.pixels)
            for row in group.rows:
                row.image_embeds = image_embeds[start:end]
            start = end

    def begins_with_image(self, row: Row) -> bool:
        """Whether the prompt has one image, followed by text: such prompts can share its prefill."""
        count = len(self.image_ids)
        if row.ids[:count] != self.image_ids or len(row.ids) == count:
            return False
        return not any(row.image_mask[count:])

    def prefill_image(self, image_embeds) -> "kosmos2.DecodeState":
        tokens, image_mask, _ = kosmos2.pad_left([(self.image_ids, self.image_mask)], self.device)
        return self.model.prefill(tokens, image_embeds=image_embeds, image_mask=image_mask, max_new_tokens=0)

    def generate(self, rows: list[Row], prefix: "kosmos2.DecodeState | None" = None) -> None:
        """Generate the answers of some rows as one batch. prefix: the state after their image."""
        started = time.perf_counter()
        past = 0 if prefix is None else len(self.image_ids)
        prompts = [(row.ids[past:], row.image_mask[past:]) for row in rows]
        tokens, image_mask, pad_mask = kosmos2.pad_left(prompts, self.device)
        embeds = [row.image_embeds for row in rows if row.image_embeds is not None]
        image_embeds = None
        if embeds and prefix is None:
            image_embeds = torch.cat(embeds)  # (I, Q, D)
        options = self.decoding_options(rows[0])
        state = self.model.prefill(tokens, None, image_embeds, image_mask, pad_mask, prefix, **options)
        if state.options.num_beams > 1:
            results = kosmos2.finish(state)
        else:
            results = self.decode(state, rows[0], started)
        for row, result in zip(rows, results, strict=True):
            raw = self.tokenizer.decode(row.ids + result.ids)
            prompt = self.answer_ids(row)
            text, entities = self.tokenizer.parse_output(prompt, result.ids, result.probabilities)
            row.answer = Answer(text, raw.strip(), entities)

    def decoding_options(self, row: Row) -> dict:
        """The decoding options of a row (`parts`); the command line overrides the defaults."""
        defaults = {
            "constraint": self.tokenizer.allowed_tokens,
            "draft": self.tokenizer.likely_next,
            "max_new_tokens": self.limit(row),
        }
        if row.request.block_ngrams:
            defaults["no_repeat_ngram_size"] = self.model.config.text.no_repeat_ngram_size
        return defaults | self.options

    def decode(self, state, row: Row, started: float) -> list:
        """Generate to the end; prints the text of the row on the way if self.stream is set."""
        times = []
        tokens = 0  # after the first of each row
        printed = 0

        def print_new_text() -> int:
            ids = self.answer_ids(row) + state.results[0].ids
            text = strip_tags(self.tokenizer.decode(ids)).lstrip()
            print(text[printed:], end="", flush=True)
            return len(text)

        for new_ids in kosmos2.decode(state):
            times.append(time.perf_counter())
            if len(times) > 1:
                tokens += sum(token is not None for token in new_ids)
            if self.stream:
                printed = print_new_text()
        if self.stream:
            print_new_text()
            print(flush=True)
        if times:
            self.timings += f", first token {(times[0] - started) * 1000:.0f} ms"
        if len(times) > 1:
            seconds = times[-1] - times[0]
            self.timings += f", then {tokens / seconds:.0f} tokens/s"
        return state.results

    def answer_ids(self, row: Row) -> list[int]:
        """The ids of the prompt that belong to the answer: those that the answer continues."""
        return self.tokenizer.after_images(row.ids) if row.request.continued else []

    def rank_boxes(self, row: Row) -> Answer:
        """The most likely boxes for the phrase that a prompt ends with, best first."""
        prefix = self.prefill_image(row.image_embeds)
        ids = row.ids[len(self.image_ids) :]
        ids.append(self.tokenizer.special_ids["<object>"])
        tokens = torch.tensor([ids], device=self.device)
        state = self.model.prefill(tokens, prefix=prefix, max_new_tokens=2)
        ranked = kosmos2.rank_boxes(state, self.tokenizer, self.args.top_boxes)
        boxes = [tokens_to_box(ul, lr, self.tokenizer.grid) for _, ul, lr in ranked]
        scores = [score for score, _, _ in ranked]
        self.timings += f", ranked {len(boxes)} boxes"
        raw = self.tokenizer.decode(row.ids)
        text, _ = self.tokenizer.parse(raw)
        entity = Entity(text, (0, len(text)), boxes, scores)
        return Answer(text, raw.strip(), [entity])


# ----------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------


class Results:
    """The --results file: one line per answer, written after each batch.

    Each torchrun process writes its own file, NAME.RANK.jsonl; --resume reads all of them.
    """

    def __init__(self, args: argparse.Namespace, requests: list[Request], rank: int, world: int):
        path = args.results
        checkpoint = Path(args.checkpoint)  # a path, or the name of a model on the hub
        self.checkpoint = str(checkpoint.resolve()) if checkpoint.exists() else args.checkpoint
        self.path = rank_file(path, rank, world)
        for file in (path, self.path):
            if file.exists() and file.stat().st_size > 0 and not args.resume:
                raise ValueError(f"{file} already exists; pass --resume to continue it, or another name")
        make_folder(self.path.parent)
        prompts = {request.prompt for request in requests}
        self.done: Counter = Counter()
        others = {rank_file(path, other, world) for other in range(world) if other != rank}
        for file in existing_files(path) if args.resume else []:
            length = self.read(file, prompts)
            if file == self.path or (rank == 0 and file not in others):
                os.truncate(file, length)  # drops a line that was cut off
        self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def read(self, file: Path, prompts: set[str]) -> int:
        """Count the finished requests in a file; returns the bytes up to its last complete line."""
        length = 0
        for line in file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            length += len(line)
            try:
                row = json.loads(line)
                images = tuple(map(text_path, as_list(row["image"])))
                request = Request(images, row["prompt"], tuple(row["given_boxes"]), extra=row)
                checkpoint = row["checkpoint"]
                known = request.prompt in prompts
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{file} is not a results file: {line[:60]!r}") from None
            if not known:
                raise ValueError(
                    f"{file} has answers to a different prompt, {request.prompt!r}; "
                    f"use another --results file"
                )
            if checkpoint != self.checkpoint:
                raise ValueError(
                    f"{file} has answers of a different checkpoint, {checkpoint}; use another --results file"
                )
            self.done[request.key()] += 1
        return length

    def remaining(self, groups: list[list[Request]], rank: int, world: int) -> list[list[Request]]:
        """The requests of this process that are not in the files yet; each line answers one request."""
        left = []
        for number, group in enumerate(groups):
            requests = []
            for request in group:
                if self.done[request.key()] > 0:
                    self.done[request.key()] -= 1
                else:
                    requests.append(request)
            if requests and number % world == rank:
                left.append(requests)
        return left

    def write(self, rows: list[dict]) -> None:
        lines = [json.dumps(row | {"checkpoint": self.checkpoint}, ensure_ascii=False) for row in rows]
        self.file.write("".join(line + "\n" for line in lines))
        self.file.flush()


def existing_files(path: Path) -> list[Path]:
    """A results file and those of the torchrun processes (`rank_file`), as far as they exist."""
    pattern = re.compile(re.escape(path.stem) + r"(\.\d+)?" + re.escape(path.suffix))
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def as_json(row: Row, size: tuple[int, int]) -> dict:
    """A line of --json and --results. Boxes are in 0..1, and in pixels of the upright image."""
    width, height = size
    entities = []
    for entity in row.answer.entities:
        pixel_boxes = []
        for x1, y1, x2, y2 in entity.boxes:
            pixel_boxes.append([x1 * width, y1 * height, x2 * width, y2 * height])
        entities.append(entity._asdict() | {"pixel_boxes": pixel_boxes})
    images = [path_text(path) for path in row.request.images]
    image = None
    if images:
        image = images[0] if len(images) == 1 else images
    return row.request.extra | {
        "image": image,
        "prompt": row.request.prompt,
        "given_boxes": row.request.boxes,
        "text": row.answer.text,
        "raw": row.answer.raw,
        "entities": entities,
    }


def path_text(path: Path) -> str:
    """A path as text, also in a locale that is not UTF-8; bytes that are not UTF-8 stay escaped."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def text_path(text: str) -> Path:
    """The inverse of `path_text`."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))


def rank_file(path: Path, rank: int, world: int) -> Path:
    """The file of one torchrun process: NAME.RANK.jsonl for NAME.jsonl."""
    return path.with_suffix(f".{rank}{path.suffix}") if world > 1 else path


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create folder {folder}: {error.strerror}") from None


def print_lines(lines: list[dict]) -> None:
    for line in lines:
        print(json.dumps(line, ensure_ascii=False), flush=True)


def print_answers(group: Group, with_names: bool) -> None:
    """The texts; where boxes are the answer, also the boxes in pixels with their scores."""
    for row in group.rows:
        name = ""
        if with_names and row.request.images:
            name = f"{path_text(row.request.images[-1])}: "
        print(name + row.answer.text, flush=True)
        if not row.request.wants_boxes:
            continue
        for entity in as_json(row, group.size)["entities"]:
            for box, score in zip(entity["pixel_boxes"], entity["scores"], strict=True):
                shown = "  -  " if score is None else f"{score:.3f}"
                corners = ",".join(f"{value:.0f}" for value in box)
                print(f"  {shown}  {corners}", flush=True)


# ----------------------------------------------------------------------------------------------------
# Annotated images and the HTML page
# ----------------------------------------------------------------------------------------------------

# Dark enough to read as text on white and under white text.
PALETTE = ["#c62828", "#1565c0", "#2e7d32", "#8e24aa", "#b85a00", "#00798a", "#ad1457", "#4e5d00"]


def draw_answers(image: Image.Image, answers: list[Answer]) -> Image.Image:
    """The image with a box and a label for every entity, one color for each."""
    scale = max(1.0, 480 / max(image.size))  # a thumbnail has no room for text
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (max(width, 240), height), "white")  # wide enough for labels
    canvas.paste(image.resize((width, height), Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(13, round(min(width, 1600) / 40)))
    line = max(2, round(font.size) // 6)
    entities = [entity for answer in answers for entity in answer.entities]
    labels = []
    for i, entity in enumerate(entities):
        color = PALETTE[i % len(PALETTE)]
        for x1, y1, x2, y2 in entity.boxes:
            left = x1 * width
            top = y1 * height
            right = max(left, x2 * width - 1)
            bottom = max(top, y2 * height - 1)
            pen.rectangle([left - 2, top - 2, right + 2, bottom + 2], outline="white", width=line + 4)
            pen.rectangle([left, top, right, bottom], outline=color, width=line)
            if entity.span[0] != entity.span[1]:
                labels.append((entity.phrase, color, (left, top, right, bottom)))
    placed: list[tuple] = []
    for phrase, color, box in labels:
        placed.append(draw_label(pen, font, phrase, color, box, placed))
    return canvas


def draw_label(pen, font, phrase: str, color: str, box: tuple, placed: list[tuple]) -> tuple:
    """Draw a phrase above its box, or inside or below it if another label is in the way.

    Returns the rectangle that the label occupies.
    """
    canvas_width, canvas_height = pen.im.size
    while pen.textlength(phrase, font=font) + 8 > canvas_width and len(phrase) > 2:
        phrase = phrase.removesuffix("…")[:-1] + "…"
    width = pen.textlength(phrase, font=font) + 8
    height = round(font.size * 1.35)
    left, top, _, bottom = box
    x = min(max(left, 0), max(canvas_width - width, 0))
    lowest = max(canvas_height - height, 0)
    rectangles = []
    for y in (top - height, top, bottom - height, bottom):
        y = min(max(y, 0), lowest)
        rectangles.append((x, y, x + width, y + height))
    free = [one for one in rectangles if all(iou(one, other) == 0 for other in placed)]
    rectangle = free[0] if free else rectangles[0]
    pen.rectangle(rectangle, fill=color)
    middle = rectangle[1] + height / 2
    pen.text((x + 4, middle), phrase, fill="white", font=font, anchor="lm")
    return rectangle


HTML_HEAD = """<!DOCTYPE html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Kosmos-2</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem; display: grid; gap: 1.5rem;
       grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0 } .kosmos2-image { position: relative; display: inline-block }
.kosmos2-image img { display: block; max-width: 100%; height: auto }
.kosmos2-image div { position: absolute; box-sizing: border-box; border: 3px solid var(--c);
                     border-radius: 3px; box-shadow: 0 0 0 1px #fffa }
figcaption p { margin: .4rem 0; overflow-wrap: anywhere } figcaption small { opacity: .7 }
a.kosmos2 { color: inherit; text-decoration: underline 3px var(--c); cursor: pointer }
.kosmos2-on { background: color-mix(in srgb, var(--c) 30%, transparent) }
</style>
<script>
function highlight(event) {
  const entity = event.target.closest && event.target.closest("[data-entity]");
  if (!entity) return;
  const on = /over|in$/.test(event.type);
  for (const other of entity.closest("figure").querySelectorAll("[data-entity]"))
    other.classList.toggle("kosmos2-on", on && other.dataset.entity === entity.dataset.entity);
}
for (const type of ["mouseover", "mouseout", "focusin", "focusout"])
  document.addEventListener(type, highlight);
</script>
"""


def html_figure(image: Image.Image | None, answers: list[Answer], title: str = "") -> str:
    """An image with its boxes and the captions that link to them, as HTML.

    Needs HTML_HEAD once per page.
    """
    boxes = ""
    captions = ""
    count = 0  # of the entities so far
    for answer in answers:
        captions += f"<p>{html_caption(answer, count)}</p>"
        for entity in answer.entities:
            boxes += html_boxes(entity, count)
            count += 1
    captions += f"<small>{html.escape(title)}</small>"
    shown = ""
    if image is not None:
        source = base64.b64encode(encode_jpeg(image)).decode()
        shown = f'<div class="kosmos2-image"><img alt="" src="data:image/jpeg;base64,{source}">{boxes}</div>'
    return f"<figure>{shown}<figcaption>{captions}</figcaption></figure>\n"


def html_caption(answer: Answer, first: int) -> str:
    """The text with its phrases as links, and their scores. first: the number of its first entity."""
    caption = ""
    done = 0
    for number, entity in enumerate(answer.entities, first):
        start, end = entity.span
        if start < done:  # inside another phrase
            continue
        phrase = html.escape(answer.text[start:end] or "▢")
        scores = [f"{score:.0%}" for score in entity.scores if score is not None]
        caption += html.escape(answer.text[done:start])
        caption += f'<a class="kosmos2" tabindex="0" {html_entity(number)}>{phrase}</a>'
        caption += f"<small> {' '.join(scores)}</small>"
        done = end
    return caption + html.escape(answer.text[done:])


def html_boxes(entity: Entity, number: int) -> str:
    boxes = ""
    for x1, y1, x2, y2 in entity.boxes:
        place = f" left: {x1:.2%}; top: {y1:.2%}; width: {x2 - x1:.2%}; height: {y2 - y1:.2%}"
        boxes += f'<div {html_entity(number, place)} title="{html.escape(entity.phrase)}"></div>'
    return boxes


def html_entity(number: int, style: str = "") -> str:
    """The attributes that a phrase and its boxes share."""
    return f'data-entity="{number}" style="--c: {PALETTE[number % len(PALETTE)]};{style}"'


def encode_jpeg(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((1024, 1024))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def choose_output(args: argparse.Namespace, groups: list[list[Request]]) -> Path | None:
    """--output, or STEM.boxes.png for a single image on the command line."""
    if args.output or args.json or args.results or args.requests:
        return args.output
    if len(groups) > 1 or not groups[0][0].images:
        return None
    return Path(drawing_name(groups[0][0].images[-1]))


def drawing_name(image: Path, number: int = 1) -> str:
    """STEM.boxes.png or STEM-2.boxes.png; a long stem is cut, so that the name is not too long."""
    stem = os.fsdecode(os.fsencode(image.stem)[:200])
    if number > 1:
        stem += f"-{number}"
    return f"{stem}.boxes.png"


def check_output(path: Path, groups: list[list[Request]]) -> None:
    """ValueError if the annotated images of these requests cannot go there."""
    images = [path for group in groups for path in group[0].images]
    if not images:
        raise ValueError(f"--output {path}: no request has an image")
    if is_folder(path):
        return
    if os.path.realpath(path) in map(os.path.realpath, images):
        raise ValueError(f"--output {path} is one of the images; use another name")
    if is_page(path):
        return
    if len(groups) > 1:
        raise ValueError(f"--output {path} is one file for {len(groups)} images; pass a folder or page.html")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output {path}: cannot write images of type {path.suffix}")


def is_folder(path: Path) -> bool:
    return path.is_dir() or not path.suffix


def is_page(path: Path) -> bool:
    return path.suffix.lower() in (".html", ".htm")


class Output:
    """Where annotated images go: one file, a folder or an HTML page.

    Each torchrun process writes its own page, NAME.RANK.html.
    """

    def __init__(self, path: Path, groups: list[list[Request]], resume: bool, rank: int, world: int):
        """groups: those to draw, of all processes."""
        self.files: dict[int, Path] = {}  # number of a request -> its file
        self.page: Path | None = None
        if is_folder(path):
            make_folder(path)
            self.name_files(path, groups, keep=resume and world == 1)
        elif is_page(path):
            self.page = rank_file(path, rank, world)
            make_folder(self.page.parent)
            self.length = complete_page(self.page) if resume else 0
        else:
            self.files = {request.number: path for group in groups for request in group}

    def name_files(self, folder: Path, groups: list[list[Request]], keep: bool) -> None:
        """Choose a file for every image; images of the same name get numbers.

        The names follow from the list of all requests, so they are the same in all processes.
        keep: also keep the files that are there already, those of the run that is resumed.
        """
        used = {os.path.realpath(path) for group in groups for path in group[0].images}
        for group in groups:
            number = 1
            file = folder / drawing_name(group[0].images[-1])
            while os.path.realpath(file) in used or (keep and file.exists()):
                number += 1
                file = folder / drawing_name(group[0].images[-1], number)
            used.add(os.path.realpath(file))
            for request in group:
                self.files[request.number] = file

    def write(self, group: Group) -> Path | None:
        """Write the annotated image of a group, or add it to the page; returns a file that is complete.

        ValueError, naming the file, if it cannot be written.
        """
        if group.image is None:
            return None
        request = group.rows[0].request
        answers = [row.answer for row in group.rows]
        file = self.page or self.files[request.number]
        try:
            if self.page is not None:
                title = path_text(Path(request.images[-1].name))
                self.append_to_page(html_figure(group.image, answers, title))
                return None
            kind = Image.registered_extensions()[file.suffix.lower()]
            with load_weights.replacing(file) as part:
                draw_answers(group.image, answers).save(part, format=kind)
            return file
        except Exception as error:  # Pillow's encoders raise many kinds
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"cannot write {file}: {reason}") from None

    def append_to_page(self, figure: str) -> None:
        """Add a figure after the complete ones: what an interrupted write left behind is dropped."""
        head = HTML_HEAD if self.length == 0 else ""
        content = (head + figure).encode("utf-8", "backslashreplace")
        with open(self.page, "r+b" if self.length else "wb") as page:
            page.seek(self.length)
            page.truncate()
            page.write(content)
        self.length += len(content)


def complete_page(page: Path) -> int:
    """The length of a page up to its last complete figure, in bytes; 0 if there is none."""
    if not page.exists():
        return 0
    before, end, _ = page.read_bytes().rpartition(b"</figure>\n")
    return len(before) + len(end)


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


def progress_bar(done: int, total: int, note: str = "") -> str:
    filled = 30 * done // max(total, 1)
    bar = "#" * filled + "." * (30 - filled)
    return f"[{bar}] {done}/{total}  {note}"


class Progress:
    """Progress and messages on stderr; on a terminal, the bar stays on one line."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.started = time.perf_counter()
        self.in_place = sys.stderr.isatty()

    def clear(self) -> None:
        """Remove the bar, before anything else is printed."""
        if self.in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def message(self, text: str, end: str = "\n") -> None:
        self.clear()
        print(text, end=end, file=sys.stderr, flush=True)

    def update(self, count: int, timings: str) -> None:
        """After a batch of `count` requests: the bar, or its timings if it is the only batch."""
        self.done += count
        finished = self.done == self.total
        if finished and count == self.total:
            if timings:
                self.message(timings)
            return
        per_minute = 60 * self.done / (time.perf_counter() - self.started)
        minutes = (self.total - self.done) / per_minute
        bar = progress_bar(self.done, self.total, f"{per_minute:.0f} per minute, {minutes:.1f} min left")
        self.message(bar, end="\n" if finished or not self.in_place else "")


def run(args: argparse.Namespace) -> int:
    """Load the model, answer all requests, write the results; returns the exit status."""
    started = time.perf_counter()
    requests = read_requests(args.requests) if args.requests else command_line_requests(args)
    requests = [request._replace(number=i) for i, request in enumerate(requests)]
    if args.top_boxes and not all(request.wants_boxes for request in requests):
        raise ValueError("--top-boxes requires --task ground or refer with a text in every request")
    import_model_code()
    groups = [list(group) for _, group in groupby(requests, key=lambda request: request.images)]
    if len(groups) == 1:
        for path in groups[0][0].images:
            kosmos2.open_image(path)  # fail on a bad path before loading the model
    if not args.temperature and (args.top_k or args.top_p or args.seed is not None):
        print("sample: --top-k, --top-p and --seed have no effect at --temperature 0", file=sys.stderr)
    rank, world = torchrun_rank()
    results = Results(args, requests, rank, world) if args.results else None
    mine = results.remaining(groups, rank, world) if results else groups[rank::world]
    output = None
    path = choose_output(args, groups)
    if path is not None:
        check_output(path, groups)
        output = Output(path, mine if world == 1 else groups, args.resume, rank, world)
    runner = Runner(args)
    print(f"loaded {args.checkpoint} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    failed = answer_groups(mine, runner, output, results, with_names=len(groups) > 1)
    total = sum(map(len, mine))
    if failed and total > 1:
        summary = f"sample: {len(failed)} of {total} failed"
        paths = [str(path) for request in failed for path in request.images]
        if paths:
            summary += f": {', '.join(dict.fromkeys(paths))}"
        print(summary, file=sys.stderr)
    return 1 if failed else 0


def torchrun_rank() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) without torchrun."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    if not rank.isdecimal() or not world.isdecimal() or int(rank) >= int(world):
        raise ValueError(
            f"RANK {rank} and WORLD_SIZE {world}: expected what torchrun sets, 0 <= RANK < WORLD_SIZE"
        )
    return int(rank), int(world)


def answer_groups(
    groups: list[list[Request]],
    runner: Runner,
    output: Output | None,
    results: Results | None,
    with_names: bool,
) -> list[Request]:
    """Answer all requests, batch by batch, and write the results; returns the requests that failed."""
    args = runner.args
    progress = Progress(sum(map(len, groups)))
    print_text = not args.json and results is None
    runner.stream = print_text and progress.total == 1 and can_stream(args, groups[0][0])
    failed = []

    def load(requests: list[Request]) -> Group:
        return load_group(requests, runner, keep_image=output is not None)

    def fail(requests: list[Request], error: Exception) -> None:
        progress.message(f"sample: {describe_error(error, requests)}")
        failed.extend(requests)

    for batch in read_ahead(groups, load, args.batch_size):
        for group in batch:
            for requests, error in group.errors:
                fail(requests, error)
        answered = [group for group in batch if group.rows]
        try:
            runner.answer(answered)
        except (RuntimeError, ValueError, MemoryError) as error:  # such as a GPU without enough memory
            requests = [row.request for group in answered for row in group.rows]
            fail(requests, error)
            answered = []
        for group in answered:
            lines = [as_json(row, group.size) for row in group.rows]
            written = None
            try:
                if output is not None:
                    written = output.write(group)
                if results is not None:  # after the drawing, so a listed image is complete
                    results.write(lines)
            except ValueError as error:
                fail([row.request for row in group.rows], error)
            progress.clear()
            if args.json:
                print_lines(lines)
            elif print_text and not runner.stream:
                print_answers(group, with_names)
            if written:
                progress.message(f"wrote {written}")
        progress.update(sum(len(group.requests) for group in batch), runner.timings)
    return failed


def can_stream(args: argparse.Namespace, request: Request) -> bool:
    """Whether the answer can be printed while it is generated: text alone, on a terminal."""
    beam_search = args.num_beams is not None and args.num_beams > 1
    return sys.stdout.isatty() and not beam_search and not request.wants_boxes


def describe_error(error: Exception, requests: list[Request]) -> str:
    """One line that names the images."""
    paths = [str(path) for request in requests for path in request.images]
    names = ", ".join(dict.fromkeys(paths))
    text = str(error).split("\n")[0] or type(error).__name__
    if names not in text:
        text = f"{names}: {text}"
    return text.replace("\n", "\\n")  # of a file name


def main(argv=None) -> int:
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    # UTF-8 whatever the locale; file names that are not valid text are escaped.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8-sig")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    warnings.showwarning = lambda message, *_, **__: print(f"sample: {message}", file=sys.stderr)
    args = parse_arguments(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("sample: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # stdout was closed early, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if args.results else 0
    except (OSError, ValueError, RuntimeError) as error:
        print(f"sample: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
