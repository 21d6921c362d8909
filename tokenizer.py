"""Text with boxes <-> token ids: the vocabulary of Kosmos-2, its location tokens, and grounded text.

Kosmos-2 writes a box as two tokens. The picture is a grid of 32 x 32 cells, numbered row by row, and
`<patch_index_0044>` means cell 44: column 12 of row 1. A box is its upper left and its lower right cell:

    <phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>

so that a grounded sentence reads like a hyperlink, `[a snowman](box)` (paper, section 2.2).

Tagged text in this file is always such a string. `Tokenizer` turns it into ids and back, `parse` into a
caption and its entities, `to_markdown` into the paper's hyperlinks, and `grit_to_text` makes it from a
record of GRIT, the data set the model was trained on. `Tokenizer.well_formed` and `Tokenizer.rank_boxes` say what
the structure of a box means for generation: which tokens may come next, and which boxes are likeliest.
"""

import math
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

GRID = 32  # cells a side
DELIMITER = "</delimiter_of_multi_objects/>"
IMAGE_OPEN, IMAGE_CLOSE = "<image>", "</image>"

# The tags follow the words in the vocabulary in this order; the GRID * GRID location tokens follow them.
TAGS = [
    "</doc>", IMAGE_OPEN, IMAGE_CLOSE, "</chunk>", "</line>", "<phrase>", "</phrase>",
    "<object>", "</object>", DELIMITER, "<grounding>",
]  # fmt: skip
CONTROL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in 0..1 of the picture


class Entity(NamedTuple):
    """A phrase of a caption and the boxes it is linked to."""

    phrase: str
    span: tuple[int, int]  # caption[span[0]:span[1]] == phrase; empty for a box without a phrase
    boxes: list[Box]
    scores: Sequence[float | None] = ()  # how sure the model was of each box, 0..1; None for boxes it was given


# ----------------------------------------------------------------------------------------------------
# Boxes
# ----------------------------------------------------------------------------------------------------


def box_to_tokens(box: Box, grid: int = GRID, training: bool = False) -> tuple[int, int]:
    """A box in 0..1 -> the indices of its upper left and lower right cell.

    A side that lies exactly on a line between two cells belongs, for the lower right corner, to the cell
    inside the box. The original data loader (training=True) took the cell outside; elsewhere the two
    agree. ValueError for a box that is empty, reversed or outside the picture.
    """
    x1, y1, x2, y2 = (float(v) for v in box)
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):  # false for NaN, too
        raise ValueError(f"box {tuple(box)} must be (x1, y1, x2, y2) with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1")
    left, top = math.floor(x1 * grid), math.floor(y1 * grid)
    if training:
        right, bottom = (math.floor(min(v, 0.99999) * grid) for v in (x2, y2))
    else:
        right, bottom = math.ceil(x2 * grid - 1), math.ceil(y2 * grid - 1)
    # A box thinner than a float's rounding must not come out reversed.
    return top * grid + left, max(bottom, top) * grid + max(right, left)


def tokens_to_box(ul: int, lr: int, grid: int = GRID) -> Box:
    """The upper left and lower right cell -> a box in 0..1.

    The corners are the centres of the two cells, unless these share a row or a column: then the box is
    all of both cells, since one from centre to centre would be empty.
    """
    if not (0 <= ul < grid * grid and 0 <= lr < grid * grid):
        raise ValueError(f"location indices {ul}, {lr} must lie in 0..{grid * grid - 1}")
    (top, left), (bottom, right) = divmod(ul, grid), divmod(lr, grid)
    if left == right or top == bottom:
        corners = left, top, right + 1, bottom + 1
    else:
        corners = left + 0.5, top + 0.5, right + 0.5, bottom + 0.5
    return tuple(c / grid for c in corners)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in any unit."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return width * height / (area(a) + area(b) - width * height)


def location_token(index: int, grid: int = GRID) -> str:
    """The spelling of a cell's token."""
    return f"<patch_index_{index:0{max(4, len(str(grid * grid - 1)))}d}>"


def boxes_to_text(boxes, grid: int = GRID, training: bool = False) -> str:
    """Boxes, each two location indices or four floats -> `<object>…</object>`; ValueError for anything else."""
    pairs = []
    for box in boxes:
        try:
            box = box_to_tokens(box, grid, training) if len(box) == 4 else tuple(box)
            wrong = len(box) != 2 or any(type(i) is not int for i in box)
        except TypeError:
            wrong = True
        if wrong:
            raise ValueError(f"a box is four floats in 0..1 or a pair of whole location indices, not {box!r}")
        tokens_to_box(*box, grid)  # refuses indices that are not on the grid
        pairs.append(location_token(box[0], grid) + location_token(box[1], grid))
    return "<object>" + DELIMITER.join(pairs) + "</object>"


# ----------------------------------------------------------------------------------------------------
# The tokenizer
# ----------------------------------------------------------------------------------------------------


class Tokenizer:
    """The published vocabulary on top of a sentencepiece model.

    ids 0..3 are CONTROL; the pieces of the model follow (its id plus one: fairseq put <pad> among the
    control symbols, sentencepiece has none), then <mask>, the TAGS, and the location tokens. The
    published model has 64,000 pieces, hence 65,037 ids; any other number works alike.
    """

    def __init__(self, model_file: str | Path, num_image_tokens: int = 64, grid: int = GRID):
        if not Path(model_file).is_file():
            raise FileNotFoundError(f"there is no sentencepiece model at {model_file}")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError):
            raise ValueError(f"{model_file} is not a sentencepiece model") from None
        self.model_file, self.num_image_tokens, self.grid = Path(model_file), num_image_tokens, grid
        words = [self.pieces.id_to_piece(i) for i in range(3, self.pieces.vocab_size())]
        locations = [location_token(i, grid) for i in range(grid * grid)]
        self.tokens = [*CONTROL, *words, "<mask>", *TAGS, *locations]
        self.vocab_size = len(self.tokens)
        first_tag = len(CONTROL) + len(words)
        special = [*range(len(CONTROL)), *range(first_tag, self.vocab_size)]
        self.special = {self.tokens[i]: i for i in special}  # what is not spelled out of pieces
        self.first_location = self.special[locations[0]]
        self.free_text = np.ones(self.vocab_size, dtype=bool)  # what is not markup
        self.free_text[self.first_location :] = False
        markup = ["<s>", "<pad>", IMAGE_OPEN, IMAGE_CLOSE, "<phrase>", "</phrase>", "<object>", "</object>", DELIMITER]
        self.free_text[[self.special[tag] for tag in markup]] = False
        self.split = re.compile("(" + "|".join(re.escape(t) for t in self.special) + ")")
        if num_image_tokens > len(words):
            raise ValueError(
                f"{num_image_tokens} image slots need as many words, but {model_file} has only {len(words)} pieces"
            )

    def encode(self, text: str, boxes=None, add_bos: bool = True, add_eos: bool = False) -> list[int]:
        """Tagged text -> ids. `boxes` has one entry for every <phrase>…</phrase>: see `insert_boxes`.

        Text between two tags is tokenized by itself, as the original demo did and the reference does, so
        that "</phrase>." ends in two tokens, a lone space and the full stop. The model was not trained on
        that (see `encode_caption`), but every published prompt was made so.
        """
        if boxes is not None:
            text = insert_boxes(text, boxes, self.grid)
        ids = [self.special["<s>"]] if add_bos else []
        for part in self.split.split(text):
            ids += [self.special[part]] if part in self.special else self._encode_words(part)
        return ids + ([self.special["</s>"]] if add_eos else [])

    def _encode_words(self, text: str) -> list[int]:
        return [i + 1 if i else self.special["<unk>"] for i in self.pieces.encode(text)]

    def encode_prompt(self, prompt: str, num_images: int = 1, boxes=None) -> tuple[list[int], list[bool]]:
        """A prompt and its pictures -> (ids, image_mask), the mask True on the image slots.

        Every `<image>` in the prompt becomes <image>, the slots, </image>; if it has none, its one picture
        goes in front. The slots hold ids 4, 5, 6, …, which the picture's embeddings will replace: being
        all different, they do not trip the 3-gram block as a repeated token would.
        ValueError where pictures and `<image>` do not match.
        """
        placeholders = prompt.count(IMAGE_OPEN)
        if IMAGE_CLOSE in prompt:
            raise ValueError(f"write {IMAGE_OPEN} where a picture belongs; {IMAGE_CLOSE} is added for you")
        if placeholders == 0 and num_images == 1:
            prompt = IMAGE_OPEN + prompt
        elif placeholders != num_images:
            raise ValueError(
                f"the prompt wants pictures at {placeholders} places ({IMAGE_OPEN}), but is given {num_images}; give one for each"
            )
        ids, image_mask = [], []
        for i in self.encode(prompt.strip(), boxes):
            ids.append(i)
            image_mask.append(False)
            if i == self.special[IMAGE_OPEN]:
                ids += [*range(len(CONTROL), len(CONTROL) + self.num_image_tokens), self.special[IMAGE_CLOSE]]
                image_mask += [True] * self.num_image_tokens + [False]
        return ids, image_mask

    def encode_caption(self, text: str) -> list[int]:
        """Tagged text -> the ids a model emits for it, without <s> and </s>; for training.

        Unlike `encode`, the words are tokenized as one text and the tags are put between the pieces, as
        the original data loader did: "</object>." ends in the plain full stop.
        """
        parts = self.split.split(text)
        words = self._encode_words("".join(part for part in parts if part not in self.special))
        ids, done, before = [], 0, ""
        for part in parts:
            if part in self.special:
                # A tag stands after the pieces that the text before it shares with the whole text.
                shared = takewhile(lambda pair: pair[0] == pair[1], zip(words, self._encode_words(before), strict=False))
                ahead = max(done, len(list(shared)))
                ids += [*words[done:ahead], self.special[part]]
                done = ahead
            else:
                before += part
        return ids + words[done:]

    def decode(self, ids) -> str:
        """ids -> tagged text. Pictures (<image>, slots, </image>), <s>, </s>, <pad>, <unk>, <mask> are dropped."""
        ids, kept, skip_to = [int(i) for i in ids], [], 0
        opening, closing = self.special[IMAGE_OPEN], self.special[IMAGE_CLOSE]
        for at, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary (0..{self.vocab_size - 1})")
            end = at + self.num_image_tokens + 1
            if i == opening and end < len(ids) and ids[end] == closing:
                skip_to = end + 1
                kept.append("")  # no words, but what follows is no longer the beginning
            if at >= skip_to and i >= len(CONTROL) and self.tokens[i] != "<mask>":
                kept.append(self.tokens[i].replace("▁", " "))
        if kept:  # a sequence that begins with a word begins without its space
            kept[0] = kept[0].removeprefix(" ")
        return "".join(kept)

    def well_formed(self, ids: list[int], left: int) -> np.ndarray:
        """Which tokens may come next if the markup is to stay valid: bool (V,), for `GenerationOptions`.

        ids: all tokens so far; left: how many may still come. After <object> comes a location, then one that
        is neither above nor left of it, then the delimiter or </object>; <phrase> and </phrase> alternate,
        with words between them; nothing is opened that could not be closed in time. Outside of markup any
        word may come: a model that is well-formed by itself writes what it would write anyway.
        """
        tag, locations = self.special, slice(self.first_location, None)
        before, last = ([tag["<s>"]] * 2 + list(ids))[-2:]
        cell, first = self.location_index(last), self.location_index(before) is None
        if last in (tag["<object>"], tag[DELIMITER]) or cell is not None:
            allowed = np.zeros(self.vocab_size, dtype=bool)
            if cell is None:
                allowed[locations] = True
            elif first:
                rows, columns = np.divmod(np.arange(self.grid**2), self.grid)
                allowed[locations] = (rows >= cell // self.grid) & (columns >= cell % self.grid)
            else:
                allowed[tag["</object>"]] = True
                allowed[tag[DELIMITER]] = left >= 4  # itself, two corners, </object>
            return allowed
        allowed = self.free_text.copy()
        inside = next((i == tag["<phrase>"] for i in reversed(ids) if i in (tag["<phrase>"], tag["</phrase>"])), False)
        if inside:
            allowed[: len(CONTROL)], allowed[tag["<mask>"] :] = False, False  # a phrase is made of words
            allowed &= left > 1
            allowed[tag["</phrase>"]] = last != tag["<phrase>"]
        else:
            allowed[tag["<phrase>"]] = left >= 3  # itself, a word, </phrase>
            allowed[tag["<object>"]] = left >= 4
        return allowed

    def read(self, prompt: list[int], new: list[int]) -> tuple[str, list["Entity"]]:
        """`parse` of a prompt and its continuation, with scores where `new` knows its probabilities."""
        known = [None] * len(prompt) + list(getattr(new, "probabilities", [None] * len(new)))
        ids = [*prompt, *new]
        of_locations = [p for i, p in zip(ids, known, strict=True) if self.location_index(i) is not None]
        return parse(self.decode(ids), self.grid, of_locations)

    def location_index(self, token_id: int) -> int | None:
        """The cell that an id stands for; None for every other token."""
        index = token_id - self.first_location
        return index if 0 <= index < self.grid * self.grid else None


    @torch.inference_mode()
    def rank_boxes(self, state, count: int, beam: int = 32) -> list[tuple[float, int, int]]:
        """The likeliest different boxes for a prompt that ends in <object>: (score, upper left, lower right).

        A beam search over the two tokens of a box, with `beam` upper left corners; of boxes that overlap by half
        or more only the likeliest counts. The score is the geometric mean of the two probabilities.
        state: a `Generation` of one row with at least two tokens to go, which is used up.
        """
        if len(state.rows) != 1 or state.left < 2 or count < 1:
            raise ValueError("boxes are ranked for one prompt at a time, with max_new_tokens of at least 2 and a count above 0")
        grid, cells = self.grid, torch.arange(self.grid**2)
        first = state.logits[0].softmax(dim=-1)[self.first_location :].cpu()  # (grid²,)
        p, ul = first.topk(min(beam, len(cells)))
        parents = [0] * len(ul)
        state.advance(parents, state.grow(parents, (ul + self.first_location).tolist()))
        second = state.logits.softmax(dim=-1)[:, self.first_location :].cpu()  # (beam, grid²)
        ordered = (cells // grid >= ul[:, None] // grid) & (cells % grid >= ul[:, None] % grid)
        joint = (p[:, None] * second * ordered).flatten()  # (beam * grid²,)
        found, places = [], []
        for probability, at in zip(*(t.tolist() for t in joint.topk(min(CANDIDATES, len(joint)))), strict=True):
            box = int(ul[at // len(cells)]), at % len(cells)
            place = box[0] % grid, box[0] // grid, box[1] % grid + 1, box[1] // grid + 1  # whole cells
            if probability > 0 and all(iou(place, other) < 0.5 for other in places):
                found.append((math.sqrt(probability), *box))
                places.append(place)
            if len(found) == count:
                break
        return found


CANDIDATES = 2000  # boxes that rank_boxes looks at: neighbours of one another, mostly


def insert_boxes(text: str, boxes, grid: int = GRID) -> str:
    """Put boxes behind the phrases of a tagged text.

    boxes has one entry for every <phrase>…</phrase>: None, a pair of location indices, four floats in
    0..1, or a list of such pairs and floats. ValueError if their number or form is another.
    """
    phrases = list(re.finditer(r"<phrase>.+?</phrase>", text, re.DOTALL))
    if len(phrases) != len(boxes):
        raise ValueError(f"phrases in <phrase>…</phrase>: {len(phrases)}, boxes for them: {len(boxes)}; give one entry for each")
    for match, box in reversed(list(zip(phrases, boxes, strict=True))):
        if box is None or (isinstance(box, (list, tuple)) and not box):
            continue
        one = not isinstance(box, (list, tuple)) or isinstance(box[0], (int, float))
        several = [box] if one else box
        text = text[: match.end()] + boxes_to_text(several, grid) + text[match.end() :]
    return text


# ----------------------------------------------------------------------------------------------------
# Reading what the model wrote
# ----------------------------------------------------------------------------------------------------

LOCATION = r"<patch_index_[0-9]{1,9}>"
PAIR = LOCATION + LOCATION
ANY_TAG = "|".join([*map(re.escape, [*CONTROL, "<mask>", *TAGS]), LOCATION])
WORDS = f"(?:(?!{ANY_TAG}).)+"  # text without tags; a "<" that begins none is text
LINK = re.compile(f"(?:<phrase>({WORDS})</phrase>)?<object>({PAIR}(?:{DELIMITER}{PAIR})*)</object>", re.DOTALL)


def plain(text: str) -> str:
    """Tagged text without its tags. transformers removes whatever stands between any < and >, words too."""
    return re.sub(ANY_TAG, "", text)


def parse(tagged_text: str, grid: int = GRID, probabilities=()) -> tuple[str, list[Entity]]:
    """Tagged text -> (caption, entities), spans counted in the caption; never raises.

    probabilities: those of the text's location tokens, in order, None for given ones; a box's score is the
    geometric mean of its two, sqrt(p(upper left) p(lower right)).

    Equal to the published post-processing on well-formed text. Links that are not well-formed are left
    out, boxes off the grid too; corners in the wrong order are put right. A box without a phrase is an
    entity of its own, with an empty span and its two tokens for a name.
    """
    # A picture's block is not part of the sentence.
    text = tagged_text.rsplit(IMAGE_CLOSE, 1)[-1]
    offset = len(tagged_text) - len(text)
    caption = plain(text)
    indent = len(caption) - len(caption.lstrip())
    caption = caption.strip()
    entities = []
    for link in LINK.finditer(text):
        phrase, tokens = link.groups()
        pairs = [tuple(map(int, re.findall(r"\d+", pair))) for pair in tokens.split(DELIMITER)]
        at = len(re.findall(LOCATION, tagged_text[: offset + link.start(2)]))
        scores = [geometric_mean(probabilities[at + i : at + i + 2]) for i in range(0, 2 * len(pairs), 2)]
        good = [i for i, pair in enumerate(pairs) if max(pair) < grid * grid]
        boxes, scores = [ordered_box(*pairs[i], grid) for i in good], [scores[i] for i in good]
        start = len(plain(text[: link.start()])) - indent
        if phrase is None:
            start = min(max(start, 0), len(caption))
            for i, box, score in zip(good, boxes, scores, strict=True):
                name = "<patch_index_{}><patch_index_{}>".format(*pairs[i])
                entities.append(Entity(name, (start, start), [box], [score]))
        elif phrase.strip() and boxes:
            start += len(phrase) - len(phrase.lstrip())
            phrase = phrase.strip()
            entities.append(Entity(phrase, (start, start + len(phrase)), boxes, scores))
    return caption, entities


def geometric_mean(pair) -> float | None:
    """sqrt(p q) of two probabilities; None where one is not known."""
    return math.sqrt(pair[0] * pair[1]) if len(pair) == 2 and None not in pair else None


def ordered_box(ul: int, lr: int, grid: int = GRID) -> Box:
    """`tokens_to_box` of two cells that may be any two corners of the box."""
    (top, left), (bottom, right) = divmod(ul, grid), divmod(lr, grid)
    top, bottom = sorted((top, bottom))
    left, right = sorted((left, right))
    return tokens_to_box(top * grid + left, bottom * grid + right, grid)


def to_markdown(tagged_text: str) -> str:
    """Tagged text as the paper's hyperlinks: `[a snowman](<patch_index_0044><patch_index_0863>)`."""

    def link(match):
        phrase, tokens = match.groups()
        space = " " if (phrase or "").startswith(" ") else ""
        return f"{space}[{(phrase or '').strip()}]({tokens.replace(DELIMITER, ', ')})"

    text = LINK.sub(lambda m: link(m).replace("<patch", "\0"), tagged_text.rsplit(IMAGE_CLOSE, 1)[-1])
    return plain(text).replace("\0", "<patch").strip()


# ----------------------------------------------------------------------------------------------------
# Training data
# ----------------------------------------------------------------------------------------------------


def grit_to_text(record: dict, min_score: float = 0.65, key: str = "ref_exps", grid: int = GRID) -> str:
    """A GRIT record -> tagged text for training, by the rules of the original data loader.

    record: "caption", and "ref_exps" or "noun_chunks" as lists of [start, end, x1, y1, x2, y2, score],
    start and end counted in the caption's characters, coordinates in 0..1. Boxes scored below min_score
    are dropped; an expression inside a longer one gives way to it; several boxes of one expression are
    listed together. Without any box the caption comes back as it is, without <grounding>.
    ValueError for a record of another form.
    """
    try:
        caption, chunks = record["caption"], record[key] if key in record else record["noun_chunks"]
        rows = [(int(s), int(e), tuple(map(float, box)), float(p)) for s, e, *box, p in chunks]
        if not isinstance(caption, str) or any(len(box) != 4 for _, _, box, _ in rows):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"not a GRIT record: wanted are caption and {key}, rows of start, end, box, score") from None
    spans: dict[tuple[int, int], list[Box]] = {}
    for start, end, box, score in rows:
        if not 0 <= start < end <= len(caption):
            raise ValueError(f"the span {start}:{end} lies outside the caption of {len(caption)} characters")
        clipped = tuple(min(max(v, 0.0), 1.0) for v in box)
        if score >= min_score and clipped[0] < clipped[2] and clipped[1] < clipped[3]:
            spans.setdefault((start, end), []).append(clipped)
    outer = [s for s in spans if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)]
    pieces, at = [], 0
    for start, end in sorted(outer):
        if start < at:  # overlaps the one before without lying inside it
            continue
        # The space before a phrase belongs inside its tags: that is where its first token has it.
        opening = start - 1 if start and caption[start - 1] == " " else start
        tokens = boxes_to_text(spans[start, end], grid, training=True)
        pieces += [caption[at:opening], f"<phrase>{caption[opening:end]}</phrase>{tokens}"]
        at = end
    return ("<grounding>" if pieces else "") + "".join(pieces) + caption[at:]
