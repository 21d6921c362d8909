"""Properties that hold for any input, tested on random inputs by hypothesis.

200 inputs each; 10,000 with KOSMOS2_THOROUGH.
"""

import os
import string

import pytest

pytest.importorskip("hypothesis")

import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.page import to_markdown
from load_weights import SENTENCEPIECE
from tokenizer import TAGS, TOLERANCE, Tokenizer, box_to_tokens, location_token, parse, tokens_to_box
from training.data import encode_answer

settings.register_profile(
    "kosmos2", max_examples=10_000 if os.environ.get("KOSMOS2_THOROUGH") else 200, deadline=None
)
settings.load_profile("kosmos2")

TOKENIZER = Tokenizer(TINY / SENTENCEPIECE, 4)
PIECES = ["<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>", "<s>",
          "<patch_index_0044>", "<patch_index_0863>", "<patch_index_99999999999>", "<image>", "</image>", "<", ">", " "]  # fmt: skip


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=20).map("".join))
def test_parsing_never_fails(text):
    """Spans index the caption; boxes lie in the image with their corners in order."""
    caption, entities = parse(text)
    for phrase, (start, end), boxes, scores in entities:
        assert len(scores) == len(boxes)
        assert 0 <= start <= end <= len(caption)
        assert start == end or caption[start:end] == phrase
        assert boxes and all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in boxes)
    to_markdown(text)


@given(st.lists(st.integers(-5, TOKENIZER.vocab_size + 5), max_size=40))
def test_ids_are_decoded_or_raise(ids):
    if all(0 <= i < TOKENIZER.vocab_size for i in ids):
        parse(TOKENIZER.decode(ids))
        TOKENIZER.parse_output(ids[:3], ids[3:])
    else:
        with pytest.raises(ValueError, match="expected 0 to"):
            TOKENIZER.decode(ids)


word = st.text(sorted(set(string.printable) - set(string.whitespace + "<")), min_size=1, max_size=6)
tag = st.sampled_from([t for t in TAGS if "image" not in t] + [location_token(7), location_token(1023)])


@given(st.lists(st.one_of(word.map(" {}".format), tag), max_size=12).map("".join))
def test_text_comes_back(text):
    """Words with a space in front, and tags, survive a round trip, except for the first space."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text.removeprefix(" ")


@given(st.text(max_size=30))
def test_any_text_is_encoded(text):
    for ids in (TOKENIZER.encode(text), encode_answer(TOKENIZER, text)):
        assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


corner = st.floats(0, 1, allow_subnormal=False)


@given(corner, corner, corner, corner)
def test_boxes_come_back_within_a_cell(a, b, c, d):
    """A round trip through two tokens moves each side of a box by at most one grid cell."""
    box = (*map(min, (a, b), (c, d)), *map(max, (a, b), (c, d)))
    if box[0] == box[2] or box[1] == box[3]:
        with pytest.raises(ValueError):
            box_to_tokens(box)
        return
    ul, lr = box_to_tokens(box)
    assert 0 <= ul <= lr < 1024 and ul % 32 <= lr % 32
    assert all(abs(x - y) <= 1 / 32 for x, y in zip(box, tokens_to_box(ul, lr), strict=True))


near = st.floats(-2 * TOLERANCE, 1 + 2 * TOLERANCE, allow_subnormal=False)


@given(near, near, near, near)
def test_boxes_that_overshoot_a_little_are_clipped(a, b, c, d):
    """A box up to TOLERANCE outside of the image has the tokens of the clipped one; further out, none."""
    box = (*map(min, (a, b), (c, d)), *map(max, (a, b), (c, d)))
    clipped = tuple(min(max(value, 0.0), 1.0) for value in box)
    if max(abs(x - y) for x, y in zip(box, clipped, strict=True)) > TOLERANCE * (1 + 1e-9):
        with pytest.raises(ValueError, match="expected"):
            box_to_tokens(box)
    elif clipped[0] < clipped[2] and clipped[1] < clipped[3]:
        assert box_to_tokens(box) == box_to_tokens(clipped)


@given(st.integers(0, 1023), st.integers(0, 1023))
def test_any_two_corners_make_a_box(ul, lr):
    """Opposite corners in any order: the same box, in order and not empty."""
    x1, y1, x2, y2 = tokens_to_box(ul, lr)
    assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
    mirrored = ul // 32 * 32 + lr % 32, lr // 32 * 32 + ul % 32  # the other diagonal
    assert (x1, y1, x2, y2) == tokens_to_box(lr, ul) == tokens_to_box(*mirrored)


@given(st.integers(1, 24), st.integers(0, 2**31))
def test_markup_is_whole_under_any_logits(length, seed):
    """Tokens sampled from those that `allowed_tokens` allows: no box is incomplete or reversed."""
    generator, ids = torch.Generator().manual_seed(seed), []
    for left in range(length, 0, -1):
        allowed = torch.from_numpy(TOKENIZER.allowed_tokens(ids, left)).float()
        allowed[: TOKENIZER.special_ids["<mask>"]] *= 0.05  # more markup than words
        ids.append(int(torch.multinomial(allowed, 1, generator=generator)))
    text = TOKENIZER.decode(ids)
    boxes = [box for entity in parse(text)[1] for box in entity.boxes]
    assert text.count("<object>") == text.count("</object>") and text.count("<phrase>") == text.count(
        "</phrase>"
    )
    assert 2 * len(boxes) == sum(TOKENIZER.location_index(i) is not None for i in ids)
