"""Training data: images and sequences about them, turned into rows of tokens with the answers marked.

A row is `<s> <image> slots </image>`, usually followed by several sequences. Each of them attends to itself
and to the image, and its positions continue from the image as if it were the only sequence (text alone
ignores the image), so one encoded image can teach many sentences. A sequence may contain a second image.
`Scenes` makes rows from the small world of scenes.py, `Grit` from a GRIT-format file.
"""

import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from inference.progress import Progress
from inference.requests import read_objects
from kosmos2 import EOS, FIRST_POSITION, PAD, Kosmos2Config, open_image, preprocess_image
from tokenizer import GRID, Box, Tokenizer, clip_box, printable
from training.patches import patch_labels
from training.scenes import Example, Scene, objects_text, tasks

# How many examples of each task a scene contributes at most; a fraction is the chance of one more.
MIXTURE = {
    "caption": 1, "detail": 0.8, "plain caption": 0.2, "plain detail": 0.2,
    "ground": 1, "ground several": 2, "ground absent": 0.3, "refer": 1, "refer relation": 1.5, "describe box": 2.5,
    "color": 0.3, "kind": 0.5, "where": 0.3, "relation": 0.5, "count": 0.8, "yes or no": 0.5,
    "color grounded": 0.4, "kind grounded": 0.6, "where grounded": 0.4, "relation grounded": 0.8,
    "count grounded": 0.8, "yes or no grounded": 0.6, "color of box": 0.3, "kind in box": 0.7,
    "example of a box": 0.2, "text alone": 0.3,
}  # fmt: skip


# ---- Captions with boxes to ids, as in the original training ---------------------------------------

MIN_SCORE = 0.65  # boxes with a lower score are dropped, as in the original training


class Span(NamedTuple):
    """A part of a caption and its boxes."""

    start: int
    end: int
    boxes: list[Box]


def read_spans(record: dict, counts: Counter | None = None) -> list[Span]:
    """The phrases of a GRIT record, in order, mostly as the original data loader selects them.

    record: "caption", and "ref_exps" or "noun_chunks" as lists of [start, end, x1, y1, x2, y2, score],
    with start and end in characters of the caption and the box in 0..1. "noun_chunks" are read only if
    "ref_exps" are missing or empty. Boxes scored below MIN_SCORE and expressions inside others are
    dropped; of two overlapping expressions, the first is kept; several boxes of one expression are
    listed together, each once. `counts` counts the boxes kept and dropped. ValueError for a record of
    another form and for boxes that are reversed, in pixels or otherwise not in 0..1.

    The original loader also crops images to a square, drops the boxes of half of the captions, repeats
    a box that is listed twice, and keeps both of two overlapping expressions, with broken markup."""
    caption = record.get("caption")
    if not isinstance(caption, str):
        raise ValueError(f"caption: expected text, got {printable(json.dumps(caption))}")
    counts = Counter() if counts is None else counts
    spans: dict[tuple[int, int], list[Box]] = {}
    for row in box_rows(record):
        start, end, box, score = read_row(row, caption)
        if score < MIN_SCORE:
            counts[f"scored below {MIN_SCORE}"] += 1
            continue
        boxes = spans.setdefault((start, end), [])
        if box in boxes:
            counts["repeated"] += 1
        else:
            counts["kept"] += 1
            boxes.append(box)
    outer = []
    for start, end in sorted(spans):
        others = [span for span in spans if span != (start, end)]
        inside = any(first <= start and end <= last for first, last in others)
        if inside or outer and start < outer[-1].end:
            counts["kept"] -= len(spans[start, end])
            counts["in a nested or overlapping expression"] += len(spans[start, end])
        else:
            outer.append(Span(start, end, spans[start, end]))
    return outer


def box_rows(record: dict) -> list:
    """The rows of "ref_exps", or if there are none, those of "noun_chunks"."""
    found = {name: record[name] for name in ("ref_exps", "noun_chunks") if record.get(name) is not None}
    if not found:
        raise ValueError("not a GRIT record: expected ref_exps or noun_chunks, lists of boxes")
    for name, rows in found.items():
        if not isinstance(rows, list):
            raise ValueError(f"{name}: expected a list, got {printable(json.dumps(rows))}")
    return next((rows for rows in found.values() if rows), [])


def read_row(row, caption: str) -> tuple[int, int, Box, float]:
    """One [start, end, x1, y1, x2, y2, score] of a record, checked; ValueError if a value is wrong."""
    try:
        start, end, x1, y1, x2, y2, score = (float(value) for value in row)
    except (TypeError, ValueError, OverflowError):
        message = f"expected [start, end, x1, y1, x2, y2, score], got {printable(repr(row))}"
        raise ValueError(message) from None
    if start % 1 or end % 1 or not math.isfinite(score):
        raise ValueError(f"expected an integer start and end and a finite score, got {row!r}")
    if not 0 <= start < end <= len(caption):
        length = len(caption)
        raise ValueError(f"span {row[0]}:{row[1]} is outside the caption, which has {length} characters")
    try:
        return int(start), int(end), clip_box((x1, y1, x2, y2)), score
    except ValueError as error:
        hint = "pass corners, not x, y, width, height, and divide pixels by the size of the image"
        raise ValueError(f"{error}; {hint}") from None


def encode_record(tokenizer: Tokenizer, record: dict, counts: Counter | None = None) -> list[int]:
    """A GRIT record -> the ids that the original data loader makes of it, without <s> and </s>.

    The caption is tokenized once, as a whole. The boundaries of a phrase are found by counting the
    pieces of the text before its start and before its end, so a phrase consists of whole pieces: in
    "a 50% sale" the span "a 50" takes the piece "50%". Tags that appear literally in the caption are
    treated as plain text. `counts` counts the boxes kept and dropped."""
    counts = Counter() if counts is None else counts
    spans = read_spans(record, counts)
    caption = record["caption"]
    tags = []
    done = 0
    for span in spans:
        first, end = span_pieces(tokenizer, caption, span)
        first = max(first, done)
        if first >= end:  # all its pieces belong to the previous phrase
            counts["kept"] -= len(span.boxes)
            counts["in a phrase without words of its own"] += len(span.boxes)
            continue
        done = end
        objects = objects_text(span.boxes, tokenizer.grid)
        tags.append((first, "<phrase>"))
        tags.append((end, f"</phrase>{objects}"))
    ids = insert_tags(tokenizer, caption, tags)
    return [tokenizer.special_ids["<grounding>"], *ids] if tags else ids


def span_pieces(tokenizer: Tokenizer, caption: str, span: Span) -> tuple[int, int]:
    """The range of pieces of a span, counted as the original data loader does."""
    before = tokenizer.encode_words(caption[: span.start])
    through = tokenizer.encode_words(caption[: span.end])
    first = len(before)
    while first > 0 and before[:first] != through[:first]:
        first -= 1  # the span begins inside a piece (the original gives up if more than one piece differs)
    return first, len(through)


def insert_tags(tokenizer: Tokenizer, caption: str, tags: list[tuple[int, str]]) -> list[int]:
    """The ids of a caption, with each tag inserted after the given number of pieces. Tags must be in
    order."""
    pieces = tokenizer.encode_words(caption)
    ids: list[int] = []
    done = 0
    for count, tag in tags:
        ids += pieces[done:count] + tokenizer.encode(tag, add_bos=False)
        done = max(done, min(count, len(pieces)))
    return ids + pieces[done:]


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tagged text -> the ids a model emits for it, without <s> and </s>. Unlike in prompts
    (`Tokenizer.encode`), the words are tokenized as one string: "</object>." ends in the plain period."""
    caption = ""
    tags = []
    for part in tokenizer.special_pattern.split(text):
        if part in tokenizer.special_ids:
            tags.append((len(tokenizer.encode_words(caption)), part))
        else:
            caption += part
    return insert_tags(tokenizer, caption, tags)


def grit_to_text(record: dict, grid: int = GRID) -> str:
    """A GRIT record -> tagged text, for display. Without boxes, the caption as it is, without <grounding>."""
    spans = read_spans(record)
    caption = record["caption"]
    text = "<grounding>" if spans else ""
    done = 0
    for span in spans:
        # The space in front of a phrase belongs inside its tags: its first piece includes it.
        opening = span.start
        if opening > done and caption[opening - 1] == " ":
            opening -= 1
        objects = objects_text(span.boxes, grid)
        text += f"{caption[done:opening]}<phrase>{caption[opening : span.end]}</phrase>{objects}"
        done = span.end
    return text + caption[done:]


# ---- Rows ------------------------------------------------------------------------------------------

# A row numbers its sequences: 0 is the image, 1, 2, ... are about it, negative ones have no image.
PADDING = -1_000_000  # the sequence number of padding


class Row:
    """One row of a batch: tokens, position ids, sequence numbers and targets. targets[t] is the token that
    position t should predict, or -100 for no loss."""

    def __init__(self, tokenizer: Tokenizer, pixels: torch.Tensor):
        self.pixels = [pixels]
        self.patch_labels: list[torch.Tensor] = []  # of each image, if they are known
        self.tokens, self.image_mask = tokenizer.encode_prompt("", 1)
        self.prefix = len(self.tokens)
        self.positions = list(range(self.prefix))
        self.sequences = [0] * self.prefix
        self.targets = [-100] * self.prefix

    def add(self, prompt: list[int], answer: list[int], number: int, image_mask=(), pixels=()) -> None:
        """Add a sequence about the image, or without it if its number is negative; only the answer
        contributes to the loss. image_mask and pixels are those of further images in the prompt."""
        ids = prompt + answer
        first = 0 if number < 0 else self.prefix
        self.pixels += pixels
        self.tokens += ids
        self.image_mask += [*image_mask] + [False] * (len(ids) - len(image_mask))
        self.positions += range(first, first + len(ids))
        self.sequences += [number] * len(ids)
        if prompt:
            self.targets += [-100] * (len(prompt) - 1) + answer + [-100]
        else:  # </image> predicts the first token
            self.targets[self.prefix - 1] = answer[0]
            self.targets += [*answer[1:], -100]


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows -> a batch, padded to the longest. Padding is masked and carries no loss."""
    T = max(len(row.tokens) for row in rows)

    def stack(name: str, fill) -> torch.Tensor:
        lists = [getattr(row, name) for row in rows]
        return torch.tensor([values + [fill] * (T - len(values)) for values in lists])

    batch = {
        "pixels": torch.stack([pixels for row in rows for pixels in row.pixels]),
        "image_mask": stack("image_mask", False),
        "tokens": stack("tokens", PAD),
        "positions": stack("positions", 0) + FIRST_POSITION,
        "sequences": stack("sequences", PADDING),
        "targets": stack("targets", -100),
    }
    patch_labels = [labels for row in rows for labels in row.patch_labels]
    if patch_labels:
        batch["patch_labels"] = torch.stack(patch_labels)
    return batch


def check_grid(tokenizer: Tokenizer) -> None:
    """ValueError unless the tokenizer has the grid that the examples of scenes.py are written for."""
    grid = tokenizer.grid
    if grid != GRID:
        raise ValueError(f"scenes: expected a grid of {GRID} x {GRID} cells, got {grid} x {grid}")


class Scenes:
    """Row n: the scene of seed first + n and a random choice of sequences (`MIXTURE`), up to `length` tokens.
    The first `image_rows` rows have none: their only targets are the labels of the patches. With `batch`, the
    number of rows in a step, the images of some steps have another size."""

    def __init__(self, tokenizer, config, length: int, first: int, image_rows=0, stickers=None, batch=None):
        check_grid(tokenizer)
        self.tokenizer = tokenizer
        self.vision = config.vision
        self.length = length
        self.first = first
        self.image_rows = image_rows
        self.stickers = stickers
        self.batch = batch

    def grid(self, n: int) -> int:
        """Patches per side of the images in row n; in one step of ten, not those of the model's image size."""
        if self.batch is None:
            return self.vision.grid
        rng = random.Random(f"grid {n // self.batch}")
        scale = rng.choice([0.75, 1.25, 1.5, 2]) if rng.random() < 0.1 else 1
        return round(scale * self.vision.grid)

    def row(self, n: int) -> Row:
        scene = Scene.random(self.first + n, self.stickers)
        rng = random.Random(self.first + n)
        grid = self.grid(n)
        image_size = grid * self.vision.patch_size
        row = Row(self.tokenizer, preprocess_image(scene.draw(), image_size))
        row.patch_labels.append(patch_labels(scene, grid))
        if n < self.image_rows:
            return row
        room = {task: int(most) + (rng.random() < most % 1) for task, most in MIXTURE.items()}
        found = tasks(scene, rng, two_images=room["example of a box"] > 0)
        for number, example in enumerate(choose(found, room, rng), start=1):
            prompt, image_mask = encode_example(self.tokenizer, example)
            if not example.alone:
                prompt = prompt[row.prefix :]
                image_mask = image_mask[row.prefix :]
            answer = [*encode_answer(self.tokenizer, example.answer), EOS]
            if len(row.tokens) + len(prompt) + len(answer) <= self.length:
                pixels = []
                if example.second is not None:
                    pixels = [preprocess_image(example.second.draw(), image_size)]
                    row.patch_labels.append(patch_labels(example.second, grid))
                row.add(prompt, answer, -number if example.alone else number, image_mask, pixels)
        return row


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[bool]]:
    """The prompt of an example, with its images, as (ids, image_mask)."""
    if example.alone:
        return tokenizer.encode_prompt(example.prompt, 0)
    return tokenizer.encode_prompt(f"<image>{example.prompt}", 1 if example.second is None else 2)


def choose(examples: list[Example], room: dict[str, int], rng: random.Random) -> list[Example]:
    """A random choice of the examples of a scene, up to room[task] of each task; the caption comes first."""
    rng.shuffle(examples)
    chosen = []
    for example in examples:
        if room[example.task] > 0:
            room[example.task] -= 1
            chosen.append(example)
    return sorted(chosen, key=lambda example: example.task != "caption")


class Grit:
    """Row n of an endless, reshuffled reading of GRIT-format files.

    A file has one JSON record per line: "image" (a path, relative to the file), "caption",
    "noun_chunks", "ref_exps". As in the original training, all tokens of the caption contribute to the loss, and
    it follows the image directly. Records whose caption is empty or null are skipped. At the start,
    ValueError names the line of a bad record or a missing image. Images are read during training only: one
    that cannot be read is reported once and replaced by the next one, so row n is the same in every run."""

    def __init__(self, paths: list[Path], tokenizer: Tokenizer, config: Kosmos2Config, seed: int):
        self.names = ", ".join(map(str, paths))
        self.tokenizer = tokenizer
        self.config = config
        self.seed = seed
        self.records: list[tuple[str, Path, list[int]]] = []  # (file and line, image, ids)
        self.counts: Counter = Counter()  # of records
        self.box_counts: Counter = Counter(kept=0)  # of boxes kept and dropped
        for path in paths:
            for where, record in read_objects(path):
                try:
                    self.add(where, record, path.parent)
                except KeyError as error:
                    raise ValueError(f"{where}: no {error} in the record") from None
                except (ValueError, TypeError, OSError, RecursionError) as error:
                    raise ValueError(f"{where}: {error}") from None
        if not self.records:
            raise ValueError(f"no records with a caption in {self.names}")
        self.epoch = -1
        self.order: list[int] = []
        self.unreadable: set[int] = set()  # indices of records

    def add(self, where: str, record: dict, folder: Path) -> None:
        """Check one record and keep its image and ids."""
        self.counts["read"] += 1
        name = record["image"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"image: expected a path, got {printable(json.dumps(name))}")
        caption = record["caption"]
        if caption is None or isinstance(caption, str) and not self.tokenizer.encode_words(caption):
            self.counts["without caption (skipped)"] += 1
            return
        kept = self.box_counts["kept"]
        ids = encode_record(self.tokenizer, record, self.box_counts)
        # The row also has the image and <s>, <image>, </image>, </s>.
        room = self.config.text.max_positions - self.config.latent_query_num - 4
        if len(ids) > room:
            raise ValueError(f"the caption has {len(ids)} tokens; there is room for {room}")
        image = folder / name
        if not os.path.isfile(image):  # (Path.is_file raises an error if the name is too long)
            raise FileNotFoundError(f"no image at {printable(str(image))}")
        if self.box_counts["kept"] == kept:
            self.counts["without boxes"] += 1
        self.records.append((where, image, ids))

    def summary(self) -> str:
        """One line about the records and boxes."""
        parts = []
        for counts in (self.counts, self.box_counts):
            parts.append(", ".join(f"{count} {what}" for what, count in counts.items()))
        return f"{self.names}: records: {parts[0]}; boxes: {parts[1]}"

    def row(self, n: int) -> Row:
        epoch, at = divmod(n, len(self.records))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = list(range(len(self.records)))
            random.Random(f"{self.seed} {epoch}").shuffle(self.order)
        for i in range(at, at + len(self.order)):
            index = self.order[i % len(self.order)]
            if index in self.unreadable:
                continue
            where, image, ids = self.records[index]
            try:
                pixels = preprocess_image(open_image(image), self.config.vision.image_size)
            except (OSError, ValueError) as error:
                self.unreadable.add(index)
                Progress(1).message(f"skipped {where}: {error} ({len(self.unreadable)} unreadable so far)")
                continue
            row = Row(self.tokenizer, pixels)
            row.add([], [*ids, EOS], 1)
            return row
        raise ValueError(f"no image of {self.names} can be read")


class Steps(torch.utils.data.Dataset):
    """Item i: the micro-batches of one process for the i-th step from `first` on. A step's rows are the
    same however many processes and micro-batches share them."""

    def __init__(self, source, first: int, last: int, batch: int, accumulate=1, rank=0, world=1):
        if batch % (accumulate * world):
            parts = f"{world} processes x {accumulate} parts"
            raise ValueError(f"a batch of {batch} does not divide into {parts}")
        self.source = source
        self.first = first
        self.last = last
        self.batch = batch
        self.accumulate = accumulate
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int) -> list[dict[str, torch.Tensor]]:
        start = (self.first + i) * self.batch
        rows = [self.source.row(n) for n in range(start + self.rank, start + self.batch, self.world)]
        size = len(rows) // self.accumulate
        return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]


def read_ahead(steps: Steps) -> torch.utils.data.DataLoader:
    """The items of `steps`, prepared two steps ahead by another process and sent as arrays through a pipe.
    (Tensors would be sent through /dev/shm. Containers limit it to 64 MB, and the loader hangs when it is full.)"""
    options = {"batch_size": None, "num_workers": 1, "prefetch_factor": 2, "collate_fn": as_arrays}
    return torch.utils.data.DataLoader(steps, **options)


def as_arrays(micro_batches: list[dict[str, torch.Tensor]]) -> list[dict[str, np.ndarray]]:
    return [{name: tensor.numpy() for name, tensor in batch.items()} for batch in micro_batches]
