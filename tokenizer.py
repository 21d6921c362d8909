"""Tokenizer for grounded text: vocabulary, location tokens, boxes.

Kosmos-2 writes a box as two tokens. The image is divided into a grid of 32 x 32 cells, numbered row
by row, and `<patch_index_0044>` stands for cell 44: row 1, column 12. A box is its top-left and its
bottom-right cell:

    <phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>

so a grounded sentence reads like a hyperlink, `[a snowman](box)` (paper, section 3.1). "Tagged
text" below means a string like this. `Tokenizer` converts it to ids and back, `parse` to a caption
and its entities.
"""

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

GRID = 32  # cells per side
DELIMITER = "</delimiter_of_multi_objects/>"
IMAGE_OPEN = "<image>"
IMAGE_CLOSE = "</image>"

# In the vocabulary, <mask> follows the pieces, then come these tags in order, then the location tokens.
TAGS = [
    "</doc>", IMAGE_OPEN, IMAGE_CLOSE, "</chunk>", "</line>", "<phrase>", "</phrase>",
    "<object>", "</object>", DELIMITER, "<grounding>",
]  # fmt: skip
CONTROL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3

# Marks a literal "<" in tagged text: "<\0s>" is the text "<s>", not the control token.
LITERAL = "\0"

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in 0..1 of the image


class Entity(NamedTuple):
    """A phrase of a caption and the boxes it is linked to."""

    phrase: str
    span: tuple[int, int]  # caption[span[0]:span[1]] == phrase; an empty span if the box has no phrase
    boxes: list[Box]
    # The model's confidence in each box, 0..1; None for boxes in the prompt.
    scores: Sequence[float | None] = ()


def printable(text: str, most: int = 100) -> str:
    """Text for messages: cut to this many characters, then unprintable ones escaped."""
    if len(text) > most:
        text = f"{text[: most - 40]}...{text[-37:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---- Boxes -----------------------------------------------------------------------------------------

TOLERANCE = 0.01  # boxes may extend beyond the image by this much, from rounding; they are clipped


def clip_box(box: Box) -> Box:
    """A box in 0..1, clipped to the image; ValueError if it is empty, reversed or further outside."""
    values = tuple(float(v) for v in box)
    x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in values)
    on_image = all(-TOLERANCE <= v <= 1 + TOLERANCE for v in values)  # False for NaN
    if not (on_image and x1 < x2 and y1 < y2):
        raise ValueError(
            f"box {values}: expected (x1, y1, x2, y2) with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1"
        )
    return x1, y1, x2, y2


def box_to_tokens(box: Box, grid: int = GRID) -> tuple[int, int]:
    """A box in 0..1 -> the location indices of its top-left and bottom-right cell.

    A bottom-right coordinate exactly on a cell boundary is assigned to the inner cell. (In the
    original training, it was the outer one: `cells` in training/scenes.py.)
    """
    x1, y1, x2, y2 = clip_box(box)
    left = math.floor(x1 * grid)
    top = math.floor(y1 * grid)
    right = max(left, math.ceil(x2 * grid - 1))  # rounding must not reverse a very thin box
    bottom = max(top, math.ceil(y2 * grid - 1))
    return top * grid + left, bottom * grid + right


def tokens_to_box(ul: int, lr: int, grid: int = GRID) -> Box:
    """The location indices of two opposite corners -> a box in 0..1.

    The corners are the centers of the two cells. If the cells share a row or a column, such a box
    would be empty, so it covers both cells entirely. Swapped corners are reordered.
    """
    if not (0 <= ul < grid * grid and 0 <= lr < grid * grid):
        raise ValueError(f"location indices {ul}, {lr}: expected 0 to {grid * grid - 1}")
    top, bottom = sorted((ul // grid, lr // grid))
    left, right = sorted((ul % grid, lr % grid))
    if left == right or top == bottom:
        corners = left, top, right + 1, bottom + 1
    else:
        corners = left + 0.5, top + 0.5, right + 0.5, bottom + 0.5
    return tuple(c / grid for c in corners)


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
    """sqrt(p(top left) p(bottom right)), the probabilities of a box's two tokens; None if unknown."""
    if len(pair) != 2 or None in pair:
        return None
    return math.sqrt(pair[0] * pair[1])


def location_token(index: int, grid: int = GRID) -> str:
    digits = max(4, len(str(grid * grid - 1)))
    return f"<patch_index_{index:0{digits}d}>"


def boxes_to_text(boxes, grid: int = GRID) -> str:
    """Boxes, each four floats or two location indices -> `<object>...</object>`."""
    pairs = []
    for box in boxes:
        check_box(box)
        ul, lr = box if len(box) == 2 else box_to_tokens(box, grid)
        tokens_to_box(ul, lr, grid)  # raises if they are not on the grid
        pairs.append(location_token(ul, grid) + location_token(lr, grid))
    return "<object>" + DELIMITER.join(pairs) + "</object>"


def check_box(box):
    """ValueError unless a box is four numbers or two integer location indices."""
    values = list(box) if isinstance(box, (list, tuple, np.ndarray)) else []
    is_indices = len(values) == 2 and all(isinstance(v, Integral) for v in values)
    is_corners = len(values) == 4 and all(isinstance(v, Real) for v in values)
    if not (is_indices or is_corners) or any(isinstance(v, bool) for v in values):
        raise ValueError(f"box {box!r}: expected four numbers in 0..1 or two integer location indices")


def as_boxes(entry) -> list:
    """The boxes of one phrase as a list. An entry may be None, one box, or a list of boxes."""
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)) and (not entry or hasattr(entry[0], "__len__")):
        return list(entry)
    return [entry]


def insert_boxes(text: str, boxes, grid: int = GRID) -> str:
    """Insert the boxes of each phrase after it: see `Tokenizer.encode`."""
    phrases = list(re.finditer(r"<phrase>.+?</phrase>", text, re.DOTALL))
    if len(phrases) != len(boxes):
        raise ValueError(f"boxes: {len(boxes)}, phrases: {len(phrases)}; pass one entry for each phrase")
    for match, entry in reversed(list(zip(phrases, boxes, strict=True))):
        if as_boxes(entry):
            objects = boxes_to_text(as_boxes(entry), grid)
            text = text[: match.end()] + objects + text[match.end() :]
    return text


# ---- The prompts of the tasks  (paper, sections 3 and 4) -------------------------------------------

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
TAKES_TEXT = {"ground", "refer", "vqa", "answer", "context", "text"}


def as_words(text: str) -> str:
    """Escape text for a prompt, so that tags in it are tokenized as plain text."""
    return strip_literal(text.strip()).replace("<", "<" + LITERAL)


def strip_literal(text: str) -> str:
    return text.replace(LITERAL, "")


def task_prompts(task: str, texts: list[str], boxes: list) -> list[str]:
    """The prompts of a task: one for each of `texts` (context: one for all). Tags in the texts have no effect.

    ValueError for text or boxes that the task does not take.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if texts and task not in TAKES_TEXT:
        raise ValueError(f"task {task} takes no text")
    if task == "refer" and not texts and not boxes:
        raise ValueError("task refer needs a box (to describe it) or text (an expression, to find it)")
    missing = not texts and task != "refer"
    texts = [as_words(text) for text in texts]
    if task in TAKES_TEXT and (missing or "" in texts):
        raise ValueError(f"task {task} needs a non-empty text")
    if texts and boxes and task in ("ground", "refer"):
        raise ValueError(f"task {task} takes text or a box, not both; for both, write a prompt")
    if task == "text":
        return texts
    if task == "context":
        phrase = PROMPTS["refer"] if boxes else ""
        examples = [f"{IMAGE_OPEN}{phrase} {text}" for text in texts]
        return ["".join(examples) + IMAGE_OPEN + phrase]
    if task == "refer" and texts:
        task = "ground"
    return [PROMPTS[task].replace("{text}", text) for text in texts or [""]]


# ---- The tokenizer ---------------------------------------------------------------------------------


def open_sentencepiece(model_file: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Open a sentencepiece model; ValueError unless its first pieces are <unk>, <s>, </s>."""
    if not Path(model_file).is_file():
        raise FileNotFoundError(f"no sentencepiece model at {model_file}")
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


class Tokenizer:
    """The published vocabulary on top of a sentencepiece model.

    ids 0..3 are CONTROL. The pieces of the model follow (id = sentencepiece id + 1, because fairseq
    put <pad> among the control symbols and sentencepiece has none), then <mask>, the TAGS and the
    location tokens: 65,037 ids with the published sentencepiece model.

    num_image_tokens: the checkpoint's latent_query_num. unused: the number of further rows of
    its embedding (padding to a round number, added tokens); they have no text.
    """

    def __init__(self, model_file: str | Path, num_image_tokens: int = 64, grid: int = GRID, unused: int = 0):
        self.sp_model = open_sentencepiece(model_file)
        self.model_file = Path(model_file)
        self.num_image_tokens = num_image_tokens
        self.grid = grid
        pieces = [self.sp_model.id_to_piece(i) for i in range(3, self.sp_model.vocab_size())]
        if grid < 1 or not 1 <= num_image_tokens <= len(pieces):
            raise ValueError(f"a grid of {grid} and {num_image_tokens} image tokens do not fit {model_file}")
        tags_and_locations = ["<mask>", *TAGS, *(location_token(i, grid) for i in range(grid * grid))]
        self.id_to_token = [*CONTROL, *pieces, *tags_and_locations, *["<unused>"] * unused]
        self.vocab_size = len(self.id_to_token)
        self.special_ids = {token: i for i, token in enumerate(CONTROL)}  # tokens that are not pieces
        for i, token in enumerate(tags_and_locations, start=len(CONTROL) + len(pieces)):
            self.special_ids[token] = i
        alternatives = "|".join(map(re.escape, self.special_ids))
        self.special_pattern = re.compile(f"({alternatives})")
        self.first_location = self.special_ids[location_token(0, grid)]
        self.end_of_locations = self.first_location + grid**2
        link_tags = ["<phrase>", "</phrase>", "<object>", "</object>", DELIMITER]
        self.free_text = np.ones(self.vocab_size, dtype=bool)  # tokens allowed outside of phrases and boxes
        self.free_text[self.first_location :] = False
        for tag in ["<s>", "<pad>", IMAGE_OPEN, IMAGE_CLOSE, *link_tags]:
            self.free_text[self.special_ids[tag]] = False

    def encode(self, text: str, boxes=None, add_bos: bool = True, add_eos: bool = False) -> list[int]:
        """Tagged text -> ids.

        boxes has one entry for each <phrase>...</phrase>: None, two location indices, four floats, or a
        list of those. Text between two tags is tokenized separately, as in transformers.
        """
        if boxes is not None:
            text = insert_boxes(text, boxes, self.grid)
        ids = [self.special_ids["<s>"]] if add_bos else []
        for part in self.special_pattern.split(text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += self.encode_words(strip_literal(part))
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
        replace; n-gram blocking counts these ids, too. A misspelled tag is plain text. ValueError
        for a prompt that does not fit.
        """
        if IMAGE_CLOSE in prompt:
            raise ValueError(f"write {IMAGE_OPEN} where an image belongs, without {IMAGE_CLOSE}")
        if re.search(r"<phrase>(?:(?!</phrase>).)*<phrase>", prompt, re.DOTALL):
            raise ValueError("the prompt has a <phrase> inside another; close the first with </phrase>")
        for token in re.findall(r"<patch_index_[^<>]*>", prompt):
            if token not in self.special_ids:
                raise ValueError(f"{token} is not a location token; they have the form {location_token(44)}")
        tags = prompt.count(IMAGE_OPEN)
        if tags == 0 and num_images == 1:
            prompt = IMAGE_OPEN + prompt
        elif tags != num_images:
            raise ValueError(f"the prompt has {tags} {IMAGE_OPEN} tags, but there are {num_images} images")
        slots = range(len(CONTROL), len(CONTROL) + self.num_image_tokens)
        ids = []
        image_mask = []
        for i in self.encode(prompt.strip(), boxes):
            ids.append(i)
            image_mask.append(False)
            if i == self.special_ids[IMAGE_OPEN]:
                ids += [*slots, self.special_ids[IMAGE_CLOSE]]
                image_mask += [True] * len(slots) + [False]
        return ids, image_mask

    def decode(self, ids: Sequence[int]) -> str:
        """ids -> tagged text, without images (<image>, slots, </image>), CONTROL, <mask> and unused ids."""
        return strip_literal(self.decode_literal(ids))

    def decode_literal(self, ids: Sequence[int]) -> str:
        """`decode`, with LITERAL after each "<" that belongs to words: a model may spell out a tag."""
        ids = [int(i) for i in ids]
        opening = self.special_ids[IMAGE_OPEN]
        closing = self.special_ids[IMAGE_CLOSE]
        mask = self.special_ids["<mask>"]
        kept = []
        skip_to = 0
        for at, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i}: expected 0 to {self.vocab_size - 1}")
            end = at + self.num_image_tokens + 1
            if i == opening and end < len(ids) and ids[end] == closing:
                skip_to = end + 1
                kept.append("")  # no text, but the next piece is no longer the first
            is_text = len(CONTROL) <= i < self.end_of_locations and i != mask
            if at < skip_to or not is_text:
                continue
            token = self.id_to_token[i]
            if i < mask:  # a piece
                token = token.replace("▁", " ").replace("<", "<" + LITERAL)
            kept.append(token)
        if kept:  # strip the leading space of the first piece
            kept[0] = kept[0].removeprefix(" ")
        return "".join(kept)

    def parse_output(self, prompt_ids, new_ids, probabilities=None) -> tuple[str, list[Entity]]:
        """The caption and entities of the prompt after its last image, plus the new ids.

        probabilities: of the new ids; they give each new box its score.
        """
        ids = [*self.after_images(prompt_ids), *new_ids]
        if probabilities is None:
            probabilities = [None] * len(new_ids)
        known = [None] * (len(ids) - len(new_ids)) + list(probabilities)
        locations = [p for i, p in zip(ids, known, strict=True) if self.location_index(i) is not None]
        text = self.decode_literal(ids)
        if text.count("<patch_index_") != len(locations):  # some were in an image, which is dropped
            locations = []
        return parse(text, self.grid, locations)

    def after_images(self, ids: list[int]) -> list[int]:
        """The ids after the last image, where the caption begins."""
        closing = self.special_ids[IMAGE_CLOSE]
        for end in range(len(ids), 0, -1):
            if ids[end - 1] == closing:
                return ids[end:]
        return ids

    def location_index(self, token_id: int) -> int | None:
        """The cell that an id stands for; None for all other tokens."""
        if self.first_location <= token_id < self.end_of_locations:
            return token_id - self.first_location
        return None

    def allowed_tokens(self, ids: list[int], remaining: int) -> np.ndarray:
        """Which tokens may come next so that the markup stays valid, bool (V,): a constraint for
        `Kosmos2.generate`. It does not change greedy output that is already valid.

        ids: all tokens so far; remaining: how many more may follow. After <object> come two location
        tokens, top-left then bottom-right; <phrase> and </phrase> alternate, with text in between.
        No tag is opened unless there is room to close it.
        """
        special = self.special_ids
        begin = special["<s>"]
        before_last, last = [begin, begin, *ids[-2:]][-2:]  # as if <s> came before
        corner = self.location_index(last)
        allowed = np.zeros(self.vocab_size, dtype=bool)
        locations = allowed[self.first_location : self.end_of_locations]  # a view
        if last in (special["<object>"], special[DELIMITER]):  # the top-left corner comes next
            locations[:] = True
        elif corner is not None and self.location_index(before_last) is None:  # the bottom-right corner
            top, left = divmod(corner, self.grid)
            locations.reshape(self.grid, self.grid)[top:, left:] = True
        elif corner is not None:  # after a complete box
            allowed[special["</object>"]] = True
            allowed[special[DELIMITER]] = remaining >= 4  # itself, two corners, </object>
        elif self._inside_phrase(ids):
            allowed[len(CONTROL) : special["<mask>"]] = remaining > 1  # </phrase> must fit after a piece
            allowed[special["</phrase>"]] = last != special["<phrase>"]
        else:
            allowed |= self.free_text
            allowed[special["<phrase>"]] = remaining >= 3  # itself, a piece, </phrase>
            allowed[special["<object>"]] = remaining >= 4  # itself, two corners, </object>
        return allowed

    def _inside_phrase(self, ids: list[int]) -> bool:
        opening = self.special_ids["<phrase>"]
        closing = self.special_ids["</phrase>"]
        for i in reversed(ids):
            if i in (opening, closing):
                return i == opening
        return False


# ---- Parsing the output ----------------------------------------------------------------------------

LOCATION = r"<patch_index_[0-9]{1,9}>"
PAIR = LOCATION + LOCATION
ANY_TAG = "|".join([*map(re.escape, [*CONTROL, "<mask>", *TAGS]), LOCATION])
WORDS = f"(?:(?!{ANY_TAG}).)+"  # text without tags; a "<" that does not start a tag is text
LINK = re.compile(
    f"(?:<phrase>({WORDS})</phrase>)?<object>({PAIR}(?:{DELIMITER}{PAIR})*)</object>", re.DOTALL
)


def strip_tags(text: str) -> str:
    """Tagged text without its tags. (transformers also removes the words between any < and >.)"""
    return strip_literal(re.sub(ANY_TAG, "", text))


def parse(tagged_text: str, grid: int = GRID, probabilities=()) -> tuple[str, list[Entity]]:
    """Tagged text -> (caption, entities), with spans in the caption; never raises.

    probabilities: of the location tokens in the text, in order, None for those of the prompt.
    Equal to the published post-processing on well-formed text. Malformed links and boxes off the
    grid are left out; a phrase without a box is plain text. A box without a phrase becomes an entity
    with an empty span, whose phrase is made of its location indices.
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
        found = read_boxes(objects, grid, probabilities[first:])
        start = len(strip_tags(text[: link.start()])) - indent
        if phrase is None:
            start = min(max(start, 0), len(caption))
            for name, box, score in found:
                entities.append(Entity(name, (start, start), [box], [score]))
        elif phrase.strip() and found:
            phrase = strip_tags(phrase)
            start += len(phrase) - len(phrase.lstrip())
            phrase = phrase.strip()
            boxes = [box for _, box, _ in found]
            scores = [score for _, _, score in found]
            entities.append(Entity(phrase, (start, start + len(phrase)), boxes, scores))
    return caption, entities


def read_boxes(objects: str, grid: int, probabilities) -> list[tuple]:
    """(name, box, score) of each box inside <object>...</object> that is on the grid."""
    found = []
    for i, pair in enumerate(objects.split(DELIMITER)):
        ul, lr = map(int, re.findall(r"\d+", pair))
        if max(ul, lr) < grid * grid:
            score = box_score(probabilities[2 * i : 2 * i + 2])
            name = f"<patch_index_{ul}><patch_index_{lr}>"  # without leading zeros, as in transformers
            found.append((name, tokens_to_box(ul, lr, grid), score))
    return found
