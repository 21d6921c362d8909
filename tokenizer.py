"""Tokenizer for grounded text: vocabulary, location tokens, boxes.

Kosmos-2 writes a box as two tokens. The image is divided into a grid of 32 x 32 cells, numbered row
by row, and `<patch_index_0044>` stands for cell 44: row 1, column 12. A box is its top-left and its
bottom-right cell:

    <phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>

so a grounded sentence reads like a hyperlink, `[a snowman](box)` (paper, section 2.2). "Tagged
text" below means a string like this. `Tokenizer` converts it to ids and back, `parse` to a caption
and its entities, `to_markdown` to the hyperlinks of the paper. `Tokenizer.allowed_tokens`
constrains decoding to complete boxes.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

GRID = 32  # cells per side
DELIMITER = "</delimiter_of_multi_objects/>"
IMAGE_OPEN = "<image>"
IMAGE_CLOSE = "</image>"

# In the vocabulary, the tags follow the pieces in this order; the GRID * GRID location tokens
# follow the tags.
TAGS = [
    "</doc>", IMAGE_OPEN, IMAGE_CLOSE, "</chunk>", "</line>", "<phrase>", "</phrase>",
    "<object>", "</object>", DELIMITER, "<grounding>",
]  # fmt: skip
CONTROL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in 0..1 of the image


class Entity(NamedTuple):
    """A phrase of a caption and the boxes it is linked to."""

    phrase: str
    span: tuple[int, int]  # caption[span[0]:span[1]] == phrase; an empty span if the box has no phrase
    boxes: list[Box]
    # The model's confidence in each box, 0..1; None for boxes in the prompt.
    scores: Sequence[float | None] = ()


# ----------------------------------------------------------------------------------------------------
# Boxes
# ----------------------------------------------------------------------------------------------------


def box_to_tokens(box: Box, grid: int = GRID, training: bool = False) -> tuple[int, int]:
    """A box in 0..1 -> the location indices of its top-left and bottom-right cell.

    A bottom-right coordinate exactly on a cell boundary is assigned to the inner cell, or, with
    training=True, to the outer one, as in the original data loader. ValueError for a box that is
    empty, reversed or outside the image.
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):  # also true for NaN
        raise ValueError(
            f"box {tuple(box)}: expected (x1, y1, x2, y2) with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1"
        )
    left = math.floor(x1 * grid)
    top = math.floor(y1 * grid)
    if training:
        right = math.floor(min(x2, 0.99999) * grid)
        bottom = math.floor(min(y2, 0.99999) * grid)
    else:
        right = math.ceil(x2 * grid - 1)
        bottom = math.ceil(y2 * grid - 1)
    # Rounding must not reverse a very thin box.
    return top * grid + left, max(bottom, top) * grid + max(right, left)


def tokens_to_box(ul: int, lr: int, grid: int = GRID) -> Box:
    """The location indices of the top-left and bottom-right cell -> a box in 0..1.

    The corners are the centers of the two cells. If the cells share a row or a column, such a box
    would be empty, so it covers both cells entirely.
    """
    if not (0 <= ul < grid * grid and 0 <= lr < grid * grid):
        raise ValueError(f"location indices {ul}, {lr}: expected 0 to {grid * grid - 1}")
    top, left = divmod(ul, grid)
    bottom, right = divmod(lr, grid)
    if left == right or top == bottom:
        corners = left, top, right + 1, bottom + 1
    else:
        corners = left + 0.5, top + 0.5, right + 0.5, bottom + 0.5
    return tuple(c / grid for c in corners)


def ordered_box(ul: int, lr: int, grid: int = GRID) -> Box:
    """`tokens_to_box` for any two opposite corners: swapped corners are reordered."""
    row1, column1 = divmod(ul, grid)
    row2, column2 = divmod(lr, grid)
    top_left = min(row1, row2) * grid + min(column1, column2)
    bottom_right = max(row1, row2) * grid + max(column1, column2)
    return tokens_to_box(top_left, bottom_right, grid)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in any unit."""
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width = min(ax2, bx2) - max(ax1, bx1)
    height = min(ay2, by2) - max(ay1, by1)
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    area_a = (ax2 - ax1) * (ay2 - ay1)
    area_b = (bx2 - bx1) * (by2 - by1)
    return intersection / (area_a + area_b - intersection)


def box_score(pair: Sequence[float | None]) -> float | None:
    """The geometric mean of the probabilities of a box's two tokens; None if they are unknown."""
    if len(pair) != 2 or None in pair:
        return None
    return math.sqrt(pair[0] * pair[1])


def location_token(index: int, grid: int = GRID) -> str:
    digits = max(4, len(str(grid * grid - 1)))
    return f"<patch_index_{index:0{digits}d}>"


def boxes_to_text(boxes, grid: int = GRID, training: bool = False) -> str:
    """Boxes, each four floats or two location indices -> `<object>...</object>`.

    ValueError for anything else.
    """
    pairs = []
    for box in boxes:
        ul, lr = box_indices(box, grid, training)
        pairs.append(location_token(ul, grid) + location_token(lr, grid))
    return "<object>" + DELIMITER.join(pairs) + "</object>"


def box_indices(box, grid: int, training: bool) -> tuple[int, int]:
    """Four floats or two location indices -> two location indices."""
    try:
        values = tuple(box)
        if len(values) == 4:
            return box_to_tokens(values, grid, training)
    except TypeError:
        values = ()
    if len(values) != 2 or any(type(v) is not int for v in values):
        raise ValueError(f"box: expected four floats in 0..1 or two integer location indices, got {box!r}")
    tokens_to_box(*values, grid)  # raises if they are not on the grid
    return values


def as_boxes(entry) -> list:
    """The boxes of one phrase as a list. An entry may be None, one box, or a list of boxes."""
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)) and (not entry or hasattr(entry[0], "__len__")):
        return list(entry)
    return [entry]


def check_box(box) -> None:
    """ValueError unless a box is four numbers or two location indices."""
    shown = repr(box)
    if isinstance(box, (list, tuple)) and all(type(v) in (int, float) for v in box):
        if len(box) in (2, 4):
            return
        shown = ",".join(map(str, box)) or shown
    raise ValueError(f"box {shown}: expected four numbers or two location indices")


def normalize_box(box, size: tuple[int, int]) -> tuple:
    """A box in 0..1, in pixels of an image of this (width, height), or as two location indices ->
    the box in 0..1, or the indices as they are."""
    check_box(box)
    if len(box) == 2:
        return tuple(box)
    typed = ",".join(str(v) for v in box)
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 and 0 <= y1 < y2):
        raise ValueError(f"box {typed}: expected 0 <= x1 < x2 and 0 <= y1 < y2")
    if max(box) <= 1:
        return tuple(box)
    if any(0 < v < 1 for v in box):
        raise ValueError(f"box {typed} mixes 0..1 and pixels")
    width, height = size
    if x2 > width or y2 > height:
        raise ValueError(f"box {typed} extends beyond the image, which is {width} x {height} pixels")
    return x1 / width, y1 / height, x2 / width, y2 / height


# ----------------------------------------------------------------------------------------------------
# The prompts of the tasks  (paper, sections 3 and 4)
# ----------------------------------------------------------------------------------------------------

# {text} is a phrase, an expression or a question.
PROMPTS = {
    "caption": "<grounding>An image of",
    "detail": "<grounding>Describe this image in detail:",
    "plain": "An image of",
    "ground": "<grounding><phrase> {text}</phrase>",
    "refer": "<grounding><phrase> It</phrase> is",
    "vqa": "<grounding> Question: {text} Answer:",
    "answer": "Question: {text} Answer:",
}
TASKS = [*PROMPTS, "context", "text"]
CONTINUED = {"caption", "plain", "ground", "refer", "text"}  # the answer continues the sentence of the prompt
TAKES_TEXT = {
    "ground": "a phrase",
    "refer": "a referring expression",
    "vqa": "a question",
    "answer": "a question",
    "context": "what to say about each image but the last",
    "text": "the beginning of a text",
}


def task_prompts(task: str, texts: list[str], boxes: list) -> list[str]:
    """The prompts of a task, one for each text.

    ValueError for texts or boxes that the task does not take.
    """
    texts = [text.strip() for text in texts]
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if texts and task not in TAKES_TEXT:
        raise ValueError(f"task {task} takes no text")
    if task == "refer" and not texts and not boxes:
        raise ValueError("task refer needs a box (to describe it) or a text (an expression, to find it)")
    missing = not texts and task != "refer"
    if task in TAKES_TEXT and (missing or "" in texts):
        raise ValueError(f"task {task} needs a non-empty text: {TAKES_TEXT[task]}")
    if texts and boxes and task in ("ground", "refer"):
        raise ValueError(
            f"task {task} takes a text (to find its box) or a box, not both; for both, write a prompt"
        )
    if any("<image>" in text or "</image>" in text for text in texts):
        raise ValueError("a text must not contain <image>; write your own prompt instead")
    if task == "context":
        phrase = PROMPTS["refer"] if boxes else ""
        examples = [f"<image>{phrase} {text}" for text in texts]
        return ["".join(examples) + f"<image>{phrase}"]
    if task == "text":
        return texts
    if task == "refer" and texts:
        task = "ground"
    return [PROMPTS[task].replace("{text}", text) for text in texts or [""]]


# ----------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------


class Tokenizer:
    """The published vocabulary on top of a sentencepiece model.

    ids 0..3 are CONTROL. The pieces of the model follow (id = sentencepiece id + 1, because fairseq
    put <pad> among the control symbols and sentencepiece has none), then <mask>, the TAGS and the
    location tokens. The published sentencepiece model has 64,000 entries, three of them control
    symbols, which makes 65,037 ids; any other number works the same way.
    """

    def __init__(self, model_file: str | Path, num_image_tokens: int = 64, grid: int = GRID):
        self.sp_model = open_sentencepiece(model_file)
        self.model_file = Path(model_file)
        self.num_image_tokens = num_image_tokens
        self.grid = grid
        pieces = [self.sp_model.id_to_piece(i) for i in range(3, self.sp_model.vocab_size())]
        locations = [location_token(i, grid) for i in range(grid * grid)]
        self.id_to_token = [*CONTROL, *pieces, "<mask>", *TAGS, *locations]
        self.vocab_size = len(self.id_to_token)
        end_of_pieces = len(CONTROL) + len(pieces)
        special = [*range(len(CONTROL)), *range(end_of_pieces, self.vocab_size)]
        self.special_ids = {self.id_to_token[i]: i for i in special}  # tokens that are not pieces
        self.special_pattern = re.compile(
            "(" + "|".join(re.escape(token) for token in self.special_ids) + ")"
        )
        self.first_location = self.special_ids[locations[0]]
        self.free_text = self._free_text()
        if grid < 1 or num_image_tokens < 1:
            raise ValueError(f"expected a positive grid and num_image_tokens, got {grid}, {num_image_tokens}")
        if num_image_tokens > len(pieces):
            raise ValueError(
                f"{model_file} has {len(pieces)} pieces; the image slots need at least {num_image_tokens}"
            )

    def _free_text(self) -> np.ndarray:
        """Tokens allowed outside of phrases and boxes, bool (V,)."""
        allowed = np.ones(self.vocab_size, dtype=bool)
        allowed[self.first_location :] = False
        link_tags = ["<phrase>", "</phrase>", "<object>", "</object>", DELIMITER]
        for tag in ["<s>", "<pad>", IMAGE_OPEN, IMAGE_CLOSE, *link_tags]:
            allowed[self.special_ids[tag]] = False
        return allowed

    # ---- text -> ids

    def encode(self, text: str, boxes=None, add_bos: bool = True, add_eos: bool = False) -> list[int]:
        """Tagged text -> ids. `boxes` has one entry for each <phrase>...</phrase>: see
        `insert_boxes`.

        Text between two tags is tokenized separately, as in the original demo and in transformers, so
        "</phrase>." ends in two tokens, a space and the period. The model was trained on texts
        tokenized as a whole (training/data.py), but all published prompts were tokenized this way.
        """
        if boxes is not None:
            text = insert_boxes(text, boxes, self.grid)
        ids = [self.special_ids["<s>"]] if add_bos else []
        for part in self.special_pattern.split(text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += self.encode_words(part)
        if add_eos:
            ids.append(self.special_ids["</s>"])
        return ids

    def encode_words(self, text: str) -> list[int]:
        """Text -> ids of pieces; tags in it are ordinary text."""
        try:
            pieces = self.sp_model.encode(text)
        except RuntimeError:  # a lone surrogate
            raise ValueError(f"text {text[:60]!r} is not valid Unicode") from None
        unknown = self.special_ids["<unk>"]
        return [i + 1 if i else unknown for i in pieces]

    def encode_prompt(self, prompt: str, num_images: int = 1, boxes=None) -> tuple[list[int], list[bool]]:
        """A prompt and its images -> (ids, image_mask), the mask True on the image slots.

        Each `<image>` in the prompt becomes <image>, the slots, </image>; without any, a single
        image goes in front. The slots hold the ids 4, 5, 6, ..., which the image embeddings
        replace. They are all different, so they are not caught by n-gram blocking. ValueError if
        the number of images differs from the number of `<image>`, for nested phrases and for
        location tokens that are not in the vocabulary.
        """
        prompt = self._checked_prompt(prompt)
        tags = prompt.count(IMAGE_OPEN)
        if tags == 0 and num_images == 1:
            prompt = IMAGE_OPEN + prompt
        elif tags != num_images:
            raise ValueError(
                f"the prompt has {tags} {IMAGE_OPEN} tags, but the number of images is {num_images}"
            )
        ids: list[int] = []
        image_mask: list[bool] = []
        for i in self.encode(prompt.strip(), boxes):
            ids.append(i)
            image_mask.append(False)
            if i == self.special_ids[IMAGE_OPEN]:
                ids += [
                    *range(len(CONTROL), len(CONTROL) + self.num_image_tokens),
                    self.special_ids[IMAGE_CLOSE],
                ]
                image_mask += [True] * self.num_image_tokens + [False]
        return ids, image_mask

    def _checked_prompt(self, prompt: str) -> str:
        """The prompt with <patch_index_44> spelled out as <patch_index_0044>.

        ValueError for invalid location tokens, </image>, and phrases inside phrases.
        """
        if IMAGE_CLOSE in prompt:
            raise ValueError(
                f"write {IMAGE_OPEN} where an image belongs; {IMAGE_CLOSE} is added automatically"
            )
        if re.search(r"<phrase>(?:(?!</phrase>).)*<phrase>", prompt, re.DOTALL):
            raise ValueError(
                "the prompt has a <phrase> inside another <phrase>; close the first with </phrase>"
            )

        def full_spelling(match: re.Match) -> str:
            index = match.group(1)
            if not re.fullmatch("[0-9]{1,9}", index) or int(index) >= self.grid**2:
                raise ValueError(
                    f"{match.group()} is not a location token; expected an index below {self.grid**2}"
                )
            return location_token(int(index), self.grid)

        return re.sub(r"<patch_index_([^<>]*)>", full_spelling, prompt)

    # ---- ids -> text

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> tagged text.

        Drops images (<image>, slots, </image>), <s>, </s>, <pad>, <unk> and <mask>.
        """
        ids = [int(i) for i in ids]
        opening = self.special_ids[IMAGE_OPEN]
        closing = self.special_ids[IMAGE_CLOSE]
        kept: list[str] = []
        skip_to = 0
        for at, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i}: expected 0 to {self.vocab_size - 1}")
            end = at + self.num_image_tokens + 1
            if i == opening and end < len(ids) and ids[end] == closing:
                skip_to = end + 1
                kept.append("")  # no text, but the next piece is no longer the first
            if at >= skip_to and i >= len(CONTROL) and self.id_to_token[i] != "<mask>":
                kept.append(self.id_to_token[i].replace("▁", " "))
        if kept:  # strip the leading space of the first piece
            kept[0] = kept[0].removeprefix(" ")
        return "".join(kept)

    def parse(self, tagged_text: str, probabilities: Sequence[float | None] = ()) -> tuple[str, list[Entity]]:
        """`parse` with the grid of this tokenizer."""
        return parse(tagged_text, self.grid, probabilities)

    def parse_output(self, prompt: list[int], new: list[int], probabilities=None) -> tuple[str, list[Entity]]:
        """The caption and entities of a prompt, from its last image on, and its new ids.

        probabilities: of the new ids; with them, each box in `new` gets a score.
        """
        prompt = self.after_images(prompt)
        if probabilities is None:
            probabilities = [None] * len(new)
        locations = [None] * sum(self.location_index(i) is not None for i in prompt)
        for i, probability in zip(new, probabilities, strict=True):
            if self.location_index(i) is not None:
                locations.append(probability)
        text = self.decode([*prompt, *new])
        if len(re.findall(LOCATION, text)) != len(locations):  # a tag was spelled letter by letter
            locations = []
        return self.parse(text, locations)

    def after_images(self, ids: list[int]) -> list[int]:
        """The ids after the last image, where the caption begins."""
        closing = self.special_ids[IMAGE_CLOSE]
        for end in range(len(ids), 0, -1):
            if ids[end - 1] == closing:
                return ids[end:]
        return ids

    def location_index(self, token_id: int) -> int | None:
        """The cell that an id stands for; None for all other tokens."""
        index = token_id - self.first_location
        return index if 0 <= index < self.grid**2 else None

    # ---- constrained decoding

    def allowed_tokens(self, ids: list[int], remaining: int) -> np.ndarray:
        """Which tokens may come next so that the markup stays valid, bool (V,): a constraint for
        generation.

        ids: all tokens so far; remaining: how many more may follow. After <object> comes a location
        token, then one that is neither above nor left of it, then the delimiter or </object>.
        <phrase> and </phrase> alternate, with text in between. No tag is opened unless there is
        room to close it. Has no effect on output that is already valid.
        """
        begin = self.special_ids["<s>"]
        before_last, last = [begin, begin, *ids[-2:]][-2:]  # as if <s> came before
        opens_box = last in (self.special_ids["<object>"], self.special_ids[DELIMITER])
        if opens_box or self.location_index(last) is not None:
            return self._allowed_in_object(before_last, last, remaining)
        if self._inside_phrase(ids):
            return self._allowed_in_phrase(last, remaining)
        allowed = self.free_text.copy()
        allowed[self.special_ids["<phrase>"]] = remaining >= 3  # itself, a word, </phrase>
        allowed[self.special_ids["<object>"]] = remaining >= 4  # itself, two corners, </object>
        return allowed

    def likely_next(self, ids: list[int]) -> list[int]:
        """Ids that probably follow in grounded text: a draft for generation.

        <object> after </phrase>, </object> after the second corner of a box, and " a" after
        <phrase>.
        """
        if ids[-1] == self.special_ids["</phrase>"]:
            return [self.special_ids["<object>"]]
        if ids[-1] == self.special_ids["<phrase>"]:
            return self.encode_words(" a")
        corners = [i for i in ids[-2:] if self.location_index(i) is not None]
        return [self.special_ids["</object>"]] if len(corners) == 2 else []

    def _inside_phrase(self, ids: list[int]) -> bool:
        opening = self.special_ids["<phrase>"]
        closing = self.special_ids["</phrase>"]
        for i in reversed(ids):
            if i in (opening, closing):
                return i == opening
        return False

    def _allowed_in_phrase(self, last: int, remaining: int) -> np.ndarray:
        allowed = np.zeros(self.vocab_size, dtype=bool)
        if remaining > 1:  # </phrase> must fit after it
            pieces = slice(len(CONTROL), self.special_ids["<mask>"])
            allowed[pieces] = self.free_text[pieces]
        allowed[self.special_ids["</phrase>"]] = last != self.special_ids["<phrase>"]
        return allowed

    def _allowed_in_object(self, before_last: int, last: int, remaining: int) -> np.ndarray:
        allowed = np.zeros(self.vocab_size, dtype=bool)
        locations = allowed[self.first_location :]
        corner = self.location_index(last)
        if corner is None:  # the top-left corner comes next
            locations[:] = True
        elif self.location_index(before_last) is None:  # the bottom-right corner comes next
            top, left = divmod(corner, self.grid)
            locations.reshape(self.grid, self.grid)[top:, left:] = True  # a view
        else:
            allowed[self.special_ids["</object>"]] = True
            allowed[self.special_ids[DELIMITER]] = remaining >= 4  # itself, two corners, </object>
        return allowed


def refuse_lfs_pointer(path: str | Path) -> None:
    """ValueError for the file that a clone without Git LFS has instead of a large one."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")


def open_sentencepiece(model_file: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Raise unless this is a sentencepiece model whose first pieces are <unk>, <s>, </s>."""
    if not Path(model_file).is_file():
        raise FileNotFoundError(f"no sentencepiece model at {model_file}")
    refuse_lfs_pointer(model_file)
    try:
        sp_model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (RuntimeError, OSError):
        raise ValueError(f"{model_file} is not a sentencepiece model") from None
    first = [sp_model.id_to_piece(i) for i in range(min(3, sp_model.vocab_size()))]
    if first != ["<unk>", "<s>", "</s>"]:
        raise ValueError(
            f"{model_file} is not a Kosmos-2 vocabulary: expected first pieces <unk> <s> </s>, got {first}"
        )
    return sp_model


def insert_boxes(text: str, boxes, grid: int = GRID) -> str:
    """Insert the boxes of each phrase of a tagged text after it.

    boxes has one entry for each <phrase>...</phrase>: None, two location indices, four floats in
    0..1, or a list of those. ValueError for the wrong number of entries or a wrong entry.
    """
    phrases = list(re.finditer(r"<phrase>.+?</phrase>", text, re.DOTALL))
    if len(phrases) != len(boxes):
        raise ValueError(f"boxes: {len(boxes)}, phrases: {len(phrases)}; pass one entry for each phrase")
    for match, box in reversed(list(zip(phrases, boxes, strict=True))):
        if as_boxes(box):
            objects = boxes_to_text(as_boxes(box), grid)
            text = text[: match.end()] + objects + text[match.end() :]
    return text


# ----------------------------------------------------------------------------------------------------
# Parsing the output
# ----------------------------------------------------------------------------------------------------

LOCATION = r"<patch_index_[0-9]{1,9}>"
PAIR = LOCATION + LOCATION
ANY_TAG = "|".join([*map(re.escape, [*CONTROL, "<mask>", *TAGS]), LOCATION])
WORDS = f"(?:(?!{ANY_TAG}).)+"  # text without tags; a "<" that does not start a tag is text
LINK = re.compile(
    f"(?:<phrase>({WORDS})</phrase>)?<object>({PAIR}(?:{DELIMITER}{PAIR})*)</object>", re.DOTALL
)


def strip_tags(text: str) -> str:
    """Tagged text without its tags.

    (transformers removes everything between any < and >, words included.)
    """
    return re.sub(ANY_TAG, "", text)


def parse(
    tagged_text: str, grid: int = GRID, probabilities: Sequence[float | None] = ()
) -> tuple[str, list[Entity]]:
    """Tagged text -> (caption, entities), with spans in the caption; never raises.

    probabilities: of the location tokens in the text, in order, None for those of the prompt. The
    score of a box is the geometric mean of its two, sqrt(p(top left) p(bottom right)).

    Gives the same result as the published post-processing on well-formed text. Malformed links and
    boxes off the grid are left out; swapped corners are reordered. A box without a phrase becomes an
    entity with an empty span, whose phrase is its two tokens.
    """
    text = tagged_text.rsplit(IMAGE_CLOSE, 1)[-1]  # what precedes the last image is not part of the caption
    offset = len(tagged_text) - len(text)
    caption = strip_tags(text)
    indent = len(caption) - len(caption.lstrip())
    caption = caption.strip()
    entities = []
    for link in LINK.finditer(text):
        phrase, objects = link.groups()
        first = len(re.findall(LOCATION, tagged_text[: offset + link.start(2)]))  # tokens before these
        boxes = read_boxes(objects, grid, probabilities[first:])
        start = len(strip_tags(text[: link.start()])) - indent
        if phrase is None:
            start = min(max(start, 0), len(caption))
            for name, box, score in boxes:
                entities.append(Entity(name, (start, start), [box], [score]))
        elif phrase.strip() and boxes:
            start += len(phrase) - len(phrase.lstrip())
            phrase = phrase.strip()
            span = (start, start + len(phrase))
            scores = [score for _, _, score in boxes]
            entities.append(Entity(phrase, span, [box for _, box, _ in boxes], scores))
    return caption, entities


def read_boxes(
    objects: str, grid: int, probabilities: Sequence[float | None]
) -> list[tuple[str, Box, float | None]]:
    """(name, box, score) of each box inside <object>...</object> that is on the grid."""
    found = []
    for i, pair in enumerate(objects.split(DELIMITER)):
        ul, lr = map(int, re.findall(r"\d+", pair))
        if max(ul, lr) < grid * grid:
            score = box_score(probabilities[2 * i : 2 * i + 2])
            name = f"<patch_index_{ul}><patch_index_{lr}>"  # without leading zeros, as in transformers
            found.append((name, ordered_box(ul, lr, grid), score))
    return found


def to_markdown(tagged_text: str) -> str:
    """Tagged text as the hyperlinks of the paper:

    `[a snowman](<patch_index_0044><patch_index_0863>)`.
    """
    text = tagged_text.rsplit(IMAGE_CLOSE, 1)[-1]
    markdown = ""
    done = 0
    for link in LINK.finditer(text):
        phrase, objects = link.groups(default="")
        space = " " if phrase.startswith(" ") else ""
        boxes = objects.replace(DELIMITER, ", ")
        markdown += strip_tags(text[done : link.start()])
        markdown += f"{space}[{phrase.strip()}]({boxes})"
        done = link.end()
    return (markdown + strip_tags(text[done:])).strip()
