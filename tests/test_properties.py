"""Properties that hold for whatever comes in, tried on many random inputs by hypothesis."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from tokenizer import box_to_tokens, parse, to_markdown, tokens_to_box

PIECES = ["<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>", "<s>",
          "<patch_index_0044>", "<patch_index_0863>", "<patch_index_99999999999>", "<image>", "</image>", "<", ">", " "]  # fmt: skip


@given(
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=20).map(
        "".join
    )
)
def test_parsing_never_fails(text):
    caption, entities = parse(text)
    for phrase, (start, end), boxes, scores in entities:
        assert len(scores) == len(boxes)
        assert 0 <= start <= end <= len(caption)
        assert start == end or caption[start:end] == phrase
        assert boxes and all(
            0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in boxes
        )
    to_markdown(text)


corner = st.floats(0, 1, allow_subnormal=False)


@given(corner, corner, corner, corner)
def test_boxes_come_back_within_a_cell(a, b, c, d):
    """A box through its two tokens: every side moves by at most one cell of the grid."""
    box = (*map(min, (a, b), (c, d)), *map(max, (a, b), (c, d)))
    if box[0] == box[2] or box[1] == box[3]:
        with pytest.raises(ValueError):
            box_to_tokens(box)
        return
    ul, lr = box_to_tokens(box)
    assert 0 <= ul <= lr < 1024 and ul % 32 <= lr % 32
    assert all(
        abs(x - y) <= 1 / 32 for x, y in zip(box, tokens_to_box(ul, lr), strict=True)
    )
