"""Training data: pictures and texts about them -> rows of tokens with the answers marked.

A row is `<s> <image> slots </image>`, then one or several texts. Each text sees the picture and itself, and
its positions continue those of the picture, as if it stood alone; so a picture that is encoded once can
teach many sentences. A text may hold a second picture. `Scenes` makes rows from the small world of scenes.py,
`Grit` from any GRIT-format file.
"""

import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageOps
from scenes import Example, Scene, tasks

from kosmos2 import EOS, FIRST_POSITION, PAD, Kosmos2Config, preprocess_image
from tokenizer import Tokenizer, grit_to_text

# How many examples of each task a scene contributes at most; a fraction is a chance of one more.
MIXTURE = {
    "caption": 1, "detail": 0.8, "plain caption": 0.3, "plain detail": 0.2,
    "ground": 1.5, "ground several": 2, "refer": 2, "refer relation": 2, "describe box": 2,
    "color": 0.5, "shape": 0.7, "where": 0.5, "relation": 0.5, "count": 0.7, "yes or no": 0.7,
    "color grounded": 0.5, "shape grounded": 0.7, "where grounded": 0.5, "relation grounded": 0.8,
    "count grounded": 0.7, "yes or no grounded": 0.7, "color of box": 0.5, "shape in box": 0.8,
    "example of a box": 0.25, "example of a picture": 0.1, "text alone": 0.3,
}  # fmt: skip

ALONE, EMPTY = -1, -2  # numbers of texts: 0 is the picture, 1, 2, … what is said about it


class Row:
    """Tokens, positions, text numbers and targets of one row, growing text by text.

    targets[t] is what position t should predict, -100 where nothing is asked.
    """

    def __init__(self, tokenizer: Tokenizer, pixels: torch.Tensor):
        self.pixels = [pixels]
        self.tokens, self.image_mask = tokenizer.encode_prompt("", 1)
        self.prefix = len(self.tokens)
        self.positions = list(range(self.prefix))
        self.texts, self.targets = [0] * self.prefix, [-100] * self.prefix

    def add(self, prompt: list[int], answer: list[int], number: int, image_mask=(), pixels=()) -> None:
        """A text about the picture, or ALONE; only what follows the prompt is asked for.

        image_mask marks the slots of further pictures in the prompt.
        """
        text, first = prompt + answer, 0 if number == ALONE else self.prefix
        self.pixels += pixels
        self.tokens += text
        self.image_mask += [*image_mask] + [False] * (len(text) - len(image_mask))
        self.positions += range(first, first + len(text))
        self.texts += [number] * len(text)
        if not prompt:  # the picture itself asks for the first token
            self.targets[self.prefix - 1] = answer[0]
            self.targets += [*answer[1:], -100]
        else:
            self.targets += [-100] * (len(prompt) - 1) + answer + [-100]


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows -> a batch, filled up to the longest with padding that nothing sees and nothing is asked of."""
    T = max(len(row.tokens) for row in rows)

    def stack(name, fill):
        return torch.tensor([getattr(row, name) + [fill] * (T - len(row.tokens)) for row in rows])

    return {
        "pixels": torch.stack([picture for row in rows for picture in row.pixels]),
        "image_mask": stack("image_mask", False),
        "tokens": stack("tokens", PAD),
        "positions": stack("positions", 0) + FIRST_POSITION,
        "texts": stack("texts", EMPTY),
        "targets": stack("targets", -100),
    }


class Scenes:
    """Row n: the scene of seed first + n, with as many texts as fit into `length` tokens."""

    def __init__(self, tokenizer: Tokenizer, config: Kosmos2Config, length: int, first: int):
        self.tokenizer, self.size, self.length, self.first = tokenizer, config.vision.image_size, length, first

    def row(self, n: int) -> Row:
        scene, rng = Scene.random(self.first + n), random.Random(self.first + n)
        row = Row(self.tokenizer, preprocess_image(scene.draw(), self.size))
        for number, example in enumerate(choose(tasks(scene, rng), rng), start=1):
            prompt, image_mask = encode_example(self.tokenizer, example)
            if not example.alone:
                prompt, image_mask = prompt[row.prefix :], image_mask[row.prefix :]
            answer = [*self.tokenizer.encode_caption(example.answer), EOS]
            if len(row.tokens) + len(prompt) + len(answer) <= self.length:
                others = [preprocess_image(example.second.draw(), self.size)] if example.second else []
                row.add(prompt, answer, ALONE if example.alone else number, image_mask, others)
        return row


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[bool]]:
    """Its prompt, the picture in front, as (ids, image_mask)."""
    if example.alone:
        return tokenizer.encode_prompt(example.prompt, 0)
    return tokenizer.encode_prompt(f"<image>{example.prompt}", 1 if example.second is None else 2)


def choose(examples: list[Example], rng: random.Random) -> list[Example]:
    """A draw from everything that can be said about a scene, in the proportions of MIXTURE."""
    rng.shuffle(examples)
    room = {task: int(most) + (rng.random() < most % 1) for task, most in MIXTURE.items()}
    chosen = []
    for example in examples:
        if room[example.task] > 0:
            room[example.task] -= 1
            chosen.append(example)
    return chosen


class Grit:
    """Row n of an endless, reshuffled reading of a GRIT-format file.

    The file has one JSON record a line: "image" (a path, relative to the file), "caption", "noun_chunks",
    "ref_exps". As in the original training, all tokens of the text carry loss and the picture is followed
    by the text at once; the picture is squashed to a square, as everywhere here.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, config: Kosmos2Config, seed: int):
        self.tokenizer, self.config, self.seed, self.folder = tokenizer, config, seed, path.parent
        if not path.is_file():
            raise FileNotFoundError(f"there is no training data at {path}")
        self.records = []
        room = config.text.max_positions - config.latent_query_num - 4  # <s>, <image>, </image>, </s>
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    ids = tokenizer.encode_caption(grit_to_text(record))
                    self.records.append((self.folder / record["image"], ids))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: not a GRIT record with an image ({error})") from None
                if len(ids) > room:
                    raise ValueError(f"{path}, line {number}: a text of {len(ids)} tokens; there is room for {room}")
        if not self.records:
            raise ValueError(f"{path} holds no records")
        self.epoch, self.order = -1, []

    def row(self, n: int) -> Row:
        epoch, at = divmod(n, len(self.records))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(len(self.records)))
            random.Random(f"{self.seed} {epoch}").shuffle(self.order)
        path, ids = self.records[self.order[at]]
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            row = Row(self.tokenizer, preprocess_image(picture, self.config.vision.image_size))
        row.add([], [*ids, EOS], 1)
        return row


class Steps(torch.utils.data.Dataset):
    """Item i: the micro-batches of one process for the i-th step from `first` on.

    A step's rows are the same however many processes and micro-batches share them.
    """

    def __init__(self, source, first: int, last: int, batch: int, accumulate: int = 1, rank: int = 0, world: int = 1):
        if batch % (accumulate * world):
            raise ValueError(f"a batch of {batch} does not divide into {world} processes x {accumulate} parts")
        self.source, self.first, self.last, self.batch = source, first, last, batch
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int) -> list[dict[str, torch.Tensor]]:
        start = (self.first + i) * self.batch
        rows = [self.source.row(n) for n in range(start + self.rank, start + self.batch, self.world)]
        size = len(rows) // self.accumulate
        return [collate(rows[at : at + size]) for at in range(0, len(rows), size)]
