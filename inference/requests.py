"""The requests of a run: from image files and folders, or one JSON object per line."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sample import Request, make_requests
from tokenizer import as_boxes, check_box, printable


class Job(NamedTuple):
    """A request and what belongs to its result."""

    request: Request
    extra: dict = {}  # other keys of the request, copied to the result
    where: str = ""  # its file and line, for error messages


# What a line of a results file has besides the extra keys of its request.
RESULT_KEYS = ("image", "prompt", "given_boxes", "text", "raw", "entities", "checkpoint")

UNREADABLE = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognizes but cannot decode


def find_images(given: list[str]) -> list[str]:
    """Files as they are, folders as the images in them, sorted by name.

    ValueError for a folder without images.
    """
    formats = Image.registered_extensions().items()
    endings = {ending for ending, kind in formats if kind in Image.OPEN and kind not in UNREADABLE}
    found = []
    for name in given:
        if not os.path.isdir(name):
            found.append(name)
            continue
        images = []
        skipped: Counter = Counter()
        for file in sorted(Path(name).iterdir()):
            if file.is_dir():
                skipped["folder"] += 1
            elif file.suffix.lower() not in endings:
                skipped[file.suffix or file.name] += 1
            elif not file.name.endswith(".boxes.png"):  # drawn by sample.py
                images.append(str(file))
        if skipped:
            kinds = ", ".join(f"{count} x {printable(kind)}" for kind, count in skipped.most_common(8))
            print(f"batch: skipped in {printable(name)}: {kinds}", file=sys.stderr)
        if not images:
            raise ValueError(f"no images in folder {name}")
        found += images
    return found


def image_jobs(args) -> list[Job]:
    """Each image with each prompt; all images together if the prompt has several <image> tags."""
    names = [absolute(name) for name in find_images(args.images)]
    groups = [(name,) for name in names]
    if args.task == "context" or (args.prompt or "").count("<image>") > 1:
        groups = [tuple(names)]
    if args.task == "text":
        groups = [()]
    requests = []
    for images in groups:
        requests += make_requests(images, args.task, args.text, args.prompt, args.box)
    return [Job(request) for request in requests]


def read_jobs(source: str) -> list[Job]:
    """The requests in a JSONL file, or in stdin for "-"; ValueError names the line."""
    jobs = []
    for where, row in read_objects(source):
        try:
            jobs.append(read_job(row, Path(source).parent)._replace(where=where))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
    if not jobs:
        raise ValueError(f"{'stdin' if source == '-' else source} has no requests")
    return jobs


def read_objects(source: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file (stdin for "-"), each with its file and line; ValueError for other lines."""
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); expected one JSON object per line") from None
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{name}, line {number}: expected one JSON object per line, got {line[:60]!r}")
        yield f"{name}, line {number}", row


def read_job(row: dict, folder: Path) -> Job:
    """One line of a requests file.

    Relative image paths are resolved against the current directory, then against the folder of the file.
    """
    for key in ("image", "task", "text", "prompt"):
        value = row.get(key)
        values = as_list(value) if key in ("image", "text") else [value]
        if value is not None and not all(isinstance(one, str) and (one or key != "image") for one in values):
            raise ValueError(f"{key}: expected a string, got {value!r}")
    extra = dict(row)
    task = extra.pop("task", None)
    prompt = extra.pop("prompt", None)
    texts = as_list(extra.pop("text", None))
    if "box" in extra and "boxes" in extra:
        raise ValueError("expected box or boxes, not both")
    boxes = as_list(extra.pop("boxes", extra.pop("box", None)))
    if boxes and isinstance(boxes[0], (int, float)):
        boxes = [boxes]
    for entry in boxes:
        for box in as_boxes(entry):
            check_box(box)
    if len(texts) > 1 and task != "context":
        raise ValueError("text: expected one string; write one request for each")
    images = []
    for name in as_list(extra.pop("image", None)):
        if not os.path.exists(absolute(name)) and os.path.exists(folder / name):
            name = str(folder / name)
        images.append(absolute(name))
    for key, value in extra.items():
        if key in RESULT_KEYS:
            raise ValueError(f"{key} is a key of the result; use another name")
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError(f"{key}: NaN and infinity are not JSON, got {value!r}") from None
    request = make_requests(tuple(images), task, texts, prompt, boxes)[0]
    if not images and prompt is None and task != "text":
        raise ValueError(f"task {task or 'caption'} needs an image")
    return Job(request, extra)


def as_list(value) -> list:
    """A list as it is, a single value as a list of one, None as an empty list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def absolute(name: str) -> str:
    """An absolute path: links in the folder are resolved, the file's own name is kept. URLs stay as they are."""
    if name.startswith(("data:", "file:", "http:", "https:")):
        return name
    folder, file = os.path.split(name)
    return os.path.join(os.path.realpath(folder), file)
