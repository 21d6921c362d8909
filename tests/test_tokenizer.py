"""Vocabulary, location tokens and grounded text; compared with the official tokenizer if
available."""

import random

import pytest
from compare_tokenizer import compare, official_processor, prompts
from conftest import TINY, needs_transformers
from data import encode_answer, encode_record, grit_to_text, read_spans

from load_weights import SENTENCEPIECE
from tokenizer import (
    Entity,
    Tokenizer,
    box_to_tokens,
    parse,
    to_markdown,
    tokens_to_box,
)  # fmt: skip

SNOWMAN = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming "
    "himself by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>."
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY / SENTENCEPIECE, 32)


@pytest.fixture
def official(official_model_file):
    return Tokenizer(official_model_file)


# -------------------------------------------------------------------------------------------- location tokens


def test_boxes_and_tokens():
    assert tokens_to_box(44, 863) == (0.390625, 0.046875, 0.984375, 0.828125)  # centers of the corner cells
    assert tokens_to_box(0, 1023) == (0.015625, 0.015625, 0.984375, 0.984375)
    assert tokens_to_box(5, 5) == (5 / 32, 0, 6 / 32, 1 / 32)  # one cell: all of it
    assert tokens_to_box(5, 37) == (5 / 32, 0, 6 / 32, 2 / 32)  # one column
    assert tokens_to_box(5, 7) == (5 / 32, 0, 8 / 32, 1 / 32)  # one row
    assert box_to_tokens((0.25, 0.25, 0.5, 0.5)) == (264, 495)
    assert box_to_tokens((0.25, 0.25, 0.5, 0.5), training=True) == (264, 528)
    assert box_to_tokens((0, 0, 1, 1)) == box_to_tokens((0, 0, 1, 1), training=True) == (0, 1023)
    assert box_to_tokens((0.1, 0.1, 0.9, 0.9), grid=4) == (0, 15)


def test_encoding_undoes_decoding():
    """On all 278,784 pairs of cells of which the first is not right of or below the second."""
    pairs = [
        (y1 * 32 + x1, y2 * 32 + x2)
        for y1 in range(32)
        for y2 in range(y1, 32)
        for x1 in range(32)
        for x2 in range(x1, 32)
    ]
    assert len(pairs) == 278_784
    assert all(box_to_tokens(tokens_to_box(*pair)) == pair for pair in pairs)


@pytest.mark.parametrize(
    "box",
    [(0.5, 0.1, 0.4, 0.9), (0.1, 0.9, 0.4, 0.5), (0.1, 0.1, 0.1, 0.2), (-0.1, 0, 1, 1), (0, 0, 1, 1.01),
     (float("nan"), 0, 1, 1), (0, 0, float("inf"), 1)],
)  # fmt: skip
def test_invalid_boxes_raise(box):
    with pytest.raises(ValueError, match="expected"):
        box_to_tokens(box)


def test_locations_off_the_grid_raise():
    for pair in ((0, 1024), (-1, 5)):
        with pytest.raises(ValueError, match="1023"):
            tokens_to_box(*pair)


# ----------------------------------------------------------------------------------------------- text and ids


def test_the_layout_of_the_official_vocabulary(official):
    assert official.vocab_size == 65037
    ids = {"<s>": 0, "</s>": 2, "<mask>": 64001, "<image>": 64003, "</delimiter_of_multi_objects/>": 64011,
           "<grounding>": 64012, "<patch_index_0000>": 64013, "<patch_index_1023>": 65036}  # fmt: skip
    assert {token: official.special_ids[token] for token in ids} == ids
    assert official.id_to_token[4] == "." and official.id_to_token[64000] == "⟨"


@pytest.mark.parametrize(
    ("text", "boxes", "ids"),
    [
        ("<grounding> Two puppies sit in a field of grass.", None, "64012 1264 17772 1357 12 10 770 9 4464 4"),
        ("<grounding> <phrase> Two puppies </phrase> sit in a field of <phrase> grass </phrase> .",
         [[(79, 1016), (135, 1008)], (480, 1023)],
         "64012 64007 1264 17772 64008 64009 64092 65029 64011 64148 65021 64010 1357 12 10 770 9 64007 4464 64008 "
         "64009 64493 65036 64010 106 4"),
        ("An image of", None, "712 1648 9"),
        ("Describe this image in detail:", None, "34645 247 38 1648 12 3391 55"),
        ("<grounding><phrase> It</phrase> is", [(44, 863)], "64012 64007 67 64008 64009 64057 64876 64010 17"),
        ("<grounding> Question: Where is<phrase> the fire</phrase> next to? Answer:", [(5, 911)],
         "64012 14895 55 3220 17 64007 5 646 64008 64009 64018 64924 64010 197 7 93 20032 55"),
    ],
)  # fmt: skip
def test_published_ids(official, text, boxes, ids):
    assert official.encode(text, boxes, add_eos=True) == [0, *map(int, ids.split()), 2]


def test_a_prompt_with_an_image(official, tokenizer):
    ids, mask = official.encode_prompt("<grounding>An image of")
    assert ids == [0, 64003, *range(4, 68), 64004, 64012, 712, 1648, 9]
    assert len(ids) == 71 and mask == [False] * 2 + [True] * 64 + [False] * 5
    ids, mask = tokenizer.encode_prompt("a <image> b <image> c", num_images=2)
    assert sum(mask) == 64 and ids.count(tokenizer.special_ids["<image>"]) == 2
    assert tokenizer.decode(ids) == "a b c"
    assert sum(tokenizer.encode_prompt("no image", num_images=0)[1]) == 0


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("<image> a", 2, "2 images were given"),
        ("<image><image>", 1, "2 <image> tags"),
        ("a", 2, "0 <image> tags"),
        ("<image>a</image>", 1, "added"),
        ("<phrase> a <phrase> b</phrase>", 1, "inside another"),
        ("<phrase> a</phrase><object><patch_index_1024><patch_index_0001></object>", 1, "not a location"),
        ("<patch_index_x>", 1, "not a location"),
    ],
)
def test_invalid_prompts_raise(tokenizer, prompt, images, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.encode_prompt(prompt, images)


@pytest.mark.parametrize(
    "boxes",
    [[(0, 1)], [(0, 1)] * 3, [(0.5, 1), None], [(0, 0, 1, 1, 1), None], [(0, 5000), None], [(True, False), None],
     [("a", "b"), None], [(0.2, 0.2, 0.1, 0.3), None]],
)  # fmt: skip
def test_invalid_box_arguments_raise(tokenizer, boxes):
    with pytest.raises((ValueError), match=r"box|phrase|location"):
        tokenizer.encode("<phrase> a</phrase> and <phrase> b</phrase>", boxes)


def test_box_arguments(tokenizer):
    text = "<phrase> a</phrase>,<phrase> b</phrase>"
    spelled = "<phrase> a</phrase><object><patch_index_0000><patch_index_1023></object>,<phrase> b</phrase>"
    assert tokenizer.encode(text, [(0.0, 0.0, 1.0, 1.0), None]) == tokenizer.encode(spelled)
    assert tokenizer.encode(text, [[(0, 1023)], []]) == tokenizer.encode(spelled)


def test_the_example_of_the_documentation(official):
    """From the published ids to the processed text, the caption and the entities."""
    prompt, _ = official.encode_prompt("<grounding>An image of")
    generated = [64007, 10, 43867, 64008, 64009, 64057, 64876, 64010, 5950, 597, 32, 64007, 10, 646, 64008, 64009,
                 64018, 64924, 64010, 4, 2]  # fmt: skip
    text = official.decode(prompt + generated)
    assert text == SNOWMAN
    caption, entities = parse(text)
    assert caption == "An image of a snowman warming himself by a fire."
    assert [e[:3] for e in entities] == [
        ("a snowman", (12, 21), [(0.390625, 0.046875, 0.984375, 0.828125)]),
        ("a fire", (41, 47), [(0.171875, 0.015625, 0.484375, 0.890625)]),
    ]
    assert encode_answer(official, text) == [64012, 712, 1648, 9, *generated[:-1]]


def test_training_ids_are_what_a_model_emits(tokenizer):
    """The words are tokenized as one text, so there is no separate space before the period."""
    text = "<grounding> There is<phrase> a red star</phrase><object><patch_index_0044><patch_index_0863></object>."
    ids = encode_answer(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.id_to_token[i] for i in ids][-2:] == ["</object>", "."]
    assert [tokenizer.id_to_token[i] for i in tokenizer.encode(text)][-3:] == ["</object>", "▁", "."]


def test_decoding_drops_images_and_control_tokens_only(tokenizer):
    special = tokenizer.special_ids
    assert (
        tokenizer.decode([0, 1, special["<phrase>"], 2, 3, special["<mask>"], special["</object>"]])
        == "<phrase></object>"
    )
    assert tokenizer.decode([special["<image>"], 5, 6]).startswith(
        "<image>"
    )  # not an image: written by the model
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="expected 0 to"):
        tokenizer.decode([10**6])


@needs_transformers
def test_equal_to_the_official_tokenizer(official):
    """A few hundred of the prompts of compare_tokenizer.py, which tries 10,000."""
    assert compare(official, official_processor(official.model_file), prompts(300, seed=1)) == []


def test_unicode_is_normalized_as_in_the_training_of_the_vocabulary(official):
    """NFKC, which transformers 5.23 loses: there, these characters are unknown."""
    for written, normalized in (
        ("ＡＢＣ １２", "ABC 12"),
        ("wait…", "wait..."),
        ("cafe\u0301", "café"),
        ("x²", "x2"),
        ("ﬁne", "fine"),
    ):
        assert official.encode(written) == official.encode(normalized) and 3 not in official.encode(written)


def test_files_that_are_not_a_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.model"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="slots"):
        Tokenizer(TINY / SENTENCEPIECE, num_image_tokens=10_000)


# ---------------------------------------------------------------------------------------------------- parsing


def test_several_boxes_and_boxes_without_phrase():
    pair = "<patch_index_0000><patch_index_0033>"
    text = f"<phrase> two dogs</phrase><object>{pair}</delimiter_of_multi_objects/>{pair}</object> run <object>{pair}</object>"
    box = tokens_to_box(0, 33)
    caption, entities = parse(text)
    assert caption == "two dogs run"
    assert entities == [
        Entity("two dogs", (0, 8), [box, box], [None, None]),
        Entity("<patch_index_0><patch_index_33>", (12, 12), [box], [None]),
    ]


@needs_transformers
def test_equal_to_the_published_parsing():
    from transformers.models.kosmos2.processing_kosmos2 import clean_text_and_extract_entities_with_bboxes

    rng = random.Random(0)
    for _ in range(500):
        parts = []
        for _ in range(rng.randint(1, 5)):
            boxes = []
            for _ in range(rng.randint(1, 3)):
                x1, y1 = rng.randrange(32), rng.randrange(32)
                boxes.append(
                    f"<patch_index_{y1 * 32 + x1:04d}><patch_index_{rng.randrange(y1, 32) * 32 + rng.randrange(x1, 32):04d}>"
                )
            words = rng.choice([" a snowman", "a fire ", " two  cats", "é 你好"])
            tail = rng.choice([" and", ".", ", ", "", "  then "])
            phrase = rng.choice([f"<phrase>{words}</phrase>", words])
            link = f"<object>{'</delimiter_of_multi_objects/>'.join(boxes)}</object>"
            parts.append(phrase + rng.choice([link, link, ""]) + tail)
        text = rng.choice(["<grounding>", "", " "]) + rng.choice([" An image of", ""]) + "".join(parts)
        caption, entities = clean_text_and_extract_entities_with_bboxes(text)
        # The published span of a box without a phrase can lie behind the end of the stripped
        # caption.
        entities = [(p, tuple(min(at, len(caption)) for at in span), boxes) for p, span, boxes in entities]
        assert parse(text)[0] == caption and [e[:3] for e in parse(text)[1]] == entities, text


@pytest.mark.parametrize(
    ("text", "caption", "boxes"),
    [
        ("a < b and c > d", "a < b and c > d", []),  # a "<" that begins no tag is text
        (
            "<phrase> x < y</phrase><object><patch_index_0000><patch_index_0033></object>",
            "x < y",
            [[tokens_to_box(0, 33)]],
        ),
        (
            "<phrase> a</phrase><object><patch_index_0863><patch_index_0044></object>",
            "a",
            [[tokens_to_box(44, 863)]],
        ),
        ("<phrase> a</phrase><object><patch_index_0000><patch_index_9999></object>", "a", []),
        ("<phrase> a</phrase><object><patch_index_0000></object> b", "a b", []),
        ("<phrase> a</phrase><object><patch_index_0000><patch_index_0033>", "a", []),
        ("</phrase></object><phrase><object>", "", []),
        (
            "<phrase> a</phrase> <object><patch_index_0000><patch_index_0033></object>",
            "a",
            [[tokens_to_box(0, 33)]],
        ),
    ],
)
def test_what_is_not_well_formed(text, caption, boxes):
    found, entities = parse(text)
    assert found == caption and [e.boxes for e in entities] == boxes


def test_markdown():
    assert to_markdown(SNOWMAN) == (
        "An image of [a snowman](<patch_index_0044><patch_index_0863>) warming himself by "
        "[a fire](<patch_index_0005><patch_index_0911>)."
    )


# ------------------------------------------------------------------------------------------------------- GRIT


def test_grit_records():
    record = {
        "caption": "A dog and two cats on a sofa.",
        "noun_chunks": [[0, 5, 0.1, 0.1, 0.3, 0.4, 0.9]],
        "ref_exps": [
            [22, 28, 0.0, 0.5, 1.0, 1.0, 0.7],  # nested in the expression below: dropped
            [10, 28, 0.5, 0.2, 0.6, 0.4, 0.8],
            [10, 28, 0.7, 0.2, 0.8, 0.4, 0.8],
            [0, 5, 0.1, 0.1, 0.3, 0.4, 0.99],
            [0, 5, 0.2, 0.1, 0.3, 0.4, 0.5],  # scored too low
        ],
    }
    first, second = (f"{6 * 32 + x:04d}" for x in (16, 22))
    assert grit_to_text(record) == (
        "<grounding><phrase>A dog</phrase><object><patch_index_0099><patch_index_0393></object> and"
        f"<phrase> two cats on a sofa</phrase><object><patch_index_{first}><patch_index_0403>"
        f"</delimiter_of_multi_objects/><patch_index_{second}><patch_index_0409></object>."
    )
    unsure = {"caption": "A dog.", "ref_exps": [[0, 5, 0.1, 0.1, 0.3, 0.4, 0.6]]}
    assert grit_to_text(unsure) == "A dog."
    assert grit_to_text(record, key="noun_chunks").count("<phrase>") == 1
    for broken in (
        {},
        {"caption": "a"},
        {"caption": "a", "ref_exps": [[1]]},
        {"caption": "a", "ref_exps": [[0, 9, 0, 0, 1, 1, 1]]},
    ):
        with pytest.raises(ValueError):
            grit_to_text(broken)


def original_ids(tokenizer: Tokenizer, caption: str, spans: list[tuple[int, int]], pair: tuple[int, int]):
    """What the original data loader makes of a caption with one box for each span; None if it gives
    up."""
    pieces = tokenizer.encode_words(caption)
    ranges = []
    for start, end in spans:
        before, through = tokenizer.encode_words(caption[:start]), tokenizer.encode_words(caption[:end])
        if before == through[: len(before)]:
            ranges.append((len(before), len(through)))
        elif before[:-1] == through[: len(before) - 1]:
            ranges.append((len(before) - 1, len(through)))
        else:
            return None
    if any(end > len(pieces) for _, end in ranges):
        return None  # it would never close the phrase
    special = tokenizer.special_ids
    objects = [special["<object>"], *(tokenizer.first_location + i for i in pair), special["</object>"]]
    ids = [special["<grounding>"]]
    for i, piece in enumerate(pieces):
        if i in [first for first, _ in ranges]:
            ids.append(special["<phrase>"])
        ids.append(piece)
        if i + 1 in [end for _, end in ranges]:
            ids += [special["</phrase>"], *objects]
    return ids


def test_training_ids_of_the_original_loader(official):
    """Hundreds of captions full of numbers and punctuation."""
    words = [
        "a",
        "the",
        "dog",
        "50%",
        "sale",
        "#1",
        "shirt",
        "10:30",
        "at",
        "(two)",
        "it's",
        "e-mail",
        "$5",
        "3.14",
        "red,",
        "big!",
        "C++",
        "naïve",
        "1,024",
        "x/y",
    ]
    rng = random.Random(0)
    compared = 0
    for _ in range(600):
        caption = " ".join(rng.choice(words) for _ in range(rng.randint(2, 8)))
        start = rng.choice([0, *(i + 1 for i, c in enumerate(caption) if c == " ")])
        end = rng.randint(start + 1, len(caption))
        record = {"caption": caption, "ref_exps": [[start, end, 0.1, 0.1, 0.5, 0.5, 1.0]]}
        expected = original_ids(
            official, caption, [(start, end)], box_to_tokens((0.1, 0.1, 0.5, 0.5), training=True)
        )
        if expected is not None:
            compared += 1
            assert encode_record(official, record) == expected, (caption, caption[start:end])
    assert compared > 500


@pytest.mark.parametrize(
    ("caption", "span", "inside"),
    [
        ("a 50% sale", "a 50", "a 50%"),
        ("at 10:30 a dog", "10", "10:30"),
        ("shirt #1", "shirt #", "shirt #1"),
    ],
)
def test_a_phrase_consists_of_whole_pieces(official, caption, span, inside):
    start = caption.index(span)
    record = {"caption": caption, "ref_exps": [[start, start + len(span), 0.1, 0.1, 0.5, 0.5, 1.0]]}
    text = official.decode(encode_record(official, record))
    phrase = text.split("<phrase>")[1].split("</phrase>")[0].strip()
    assert phrase and inside.startswith(phrase) and len(phrase) >= len(span)


def test_tags_in_a_caption_stay_text(tokenizer):
    record = {"caption": "the <image> of a dog </s>", "ref_exps": [[15, 20, 0.1, 0.1, 0.5, 0.5, 1.0]]}
    ids = encode_record(tokenizer, record)
    assert tokenizer.special_ids["<image>"] not in ids and tokenizer.special_ids["</s>"] not in ids
    assert "<image> of" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 600, 500),
        (0.5, 0.5, 0.2, 0.2),
        (0.9, 0.1, 0.2, 0.5),
        (float("nan"), 0, 1, 1),
        (0, 0, 1.02, 1),
        (-0.02, 0, 1, 1),
    ],
)
def test_boxes_in_the_wrong_unit_raise(box):
    with pytest.raises(ValueError, match="box"):
        read_spans({"caption": "a dog", "ref_exps": [[0, 5, *box, 1.0]]})
    assert read_spans({"caption": "a dog", "ref_exps": [[0, 5, -0.005, 0, 1.009, 1, 1.0]]})[0].boxes == [
        (0, 0, 1, 1)
    ]


def test_printed_entity_names_can_be_used_in_prompts(official):
    _, entities = parse("<object><patch_index_0044><patch_index_0863></object>")
    prompt = f"<phrase> It</phrase><object>{entities[0].phrase}</object> is"
    spelled = "<phrase> It</phrase><object><patch_index_0044><patch_index_0863></object> is"
    assert official.encode_prompt(prompt) == official.encode_prompt(spelled)


def test_another_grid(tmp_path):
    """Boxes are written and read with the grid of the tokenizer."""
    coarse = Tokenizer(TINY / SENTENCEPIECE, 32, grid=16)
    box = (0.25, 0.25, 0.75, 0.75)
    ids, _ = coarse.encode_prompt("<phrase> It</phrase> is", boxes=[box])
    _, entities = coarse.parse_output(ids, [])
    assert entities[0].boxes[0] == pytest.approx(box, abs=0.5 / 16)
    assert coarse.allowed_tokens(coarse.encode("<object>"), 9).sum() == 256
