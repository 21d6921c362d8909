"""Vocabulary, location tokens and grounded text; compared with the official tokenizer if
available."""

import math
import random
from collections import Counter

import pytest
from compare_tokenizer import compare, official_processor, prompts
from conftest import TINY, needs_transformers

from load_weights import SENTENCEPIECE
from tokenizer import (
    CONTROL,
    DELIMITER,
    LITERAL,
    PROMPTS,
    TAGS,
    TASKS,
    Entity,
    Tokenizer,
    as_words,
    box_to_tokens,
    clip_box,
    parse,
    printable,
    strip_literal,
    task_prompts,
    tokens_to_box,
)
from training.data import encode_answer, encode_record, grit_to_text, read_spans

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
    assert box_to_tokens((0, 0, 1, 1)) == (0, 1023)
    assert box_to_tokens((0.1, 0.1, 0.9, 0.9), grid=4) == (0, 15)


def test_encoding_undoes_decoding():
    """All 278,784 pairs whose first cell is neither right of nor below the second."""
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
    [(0.5, 0.1, 0.4, 0.9), (0.1, 0.9, 0.4, 0.5), (0.1, 0.1, 0.1, 0.2), (-0.1, 0, 1, 1), (0, 0, 1, 1.011),
     (float("nan"), 0, 1, 1), (0, 0, float("inf"), 1), (1.001, 0, 1.002, 1), (0, -0.005, 1, -0.001), (0, 0, 640, 480)],
)  # fmt: skip
def test_invalid_boxes_raise(box):
    """Reversed, empty, too far beyond an edge, not a number, completely outside, pixels."""
    for function in (box_to_tokens, clip_box):
        with pytest.raises(ValueError, match="expected"):
            function(box)


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ((0, 0, 1.000001, 1), (0, 0, 1, 1)),  # YOLO's six digits
        ((-1e-7, 0.25, 0.5, 0.75), (0, 0.25, 0.5, 0.75)),
        ((0.3, 0.2, 640.01 / 640, 480.4 / 480), (0.3, 0.2, 1, 1)),  # COCO's x + width
        ((-0.009, -0.009, 1.009, 1.009), (0, 0, 1, 1)),
        ((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ],
)
def test_boxes_that_overshoot_by_rounding_are_clipped(tokenizer, box, clipped):
    assert clip_box(box) == clipped
    assert box_to_tokens(box) == box_to_tokens(clipped)
    text = "<phrase> a</phrase>"
    assert tokenizer.encode(text, [box]) == tokenizer.encode(text, [clipped])


def test_swapped_corners_are_reordered():
    """Any two opposite corners give the box between them."""
    expected = tokens_to_box(44, 863)
    for pair in ((863, 44), (1 * 32 + 31, 26 * 32 + 12), (26 * 32 + 12, 1 * 32 + 31)):
        assert tokens_to_box(*pair) == expected
    assert tokens_to_box(7, 5) == tokens_to_box(5, 7) and tokens_to_box(37, 5) == tokens_to_box(5, 37)


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


ONE_PHRASE = "<grounding> <phrase> Two puppies </phrase> sit in a field of grass."
TWO_PHRASES = "<grounding> <phrase> Two puppies </phrase> sit in a field of <phrase> grass </phrase>."
FIRST_BOXES_IN_TEXT = TWO_PHRASES.replace(
    " sit",
    " <object> <patch_index_0079> <patch_index_1016> </delimiter_of_multi_objects/> "
    "<patch_index_0135> <patch_index_1008> </object> sit",
)
PAIR, OTHER_PAIR, GRASS = (79, 1016), (135, 1008), (480, 1023)
NO_BOX = "64007 1264 17772 64008"
ONE_BOX = NO_BOX + " 64009 64092 65029 64010"
TWO_BOXES = NO_BOX + " 64009 64092 65029 64011 64148 65021 64010"
SIT = " 1357 12 10 770 9 "


@pytest.mark.parametrize(
    ("text", "boxes", "ids"),
    [
        ("<grounding> Two puppies sit in a field of grass.", [], "1264 17772" + SIT + "4464 4"),
        (ONE_PHRASE, None, NO_BOX + SIT + "4464 4"),
        (ONE_PHRASE, [None], NO_BOX + SIT + "4464 4"),
        (ONE_PHRASE, [[]], NO_BOX + SIT + "4464 4"),
        (ONE_PHRASE, [PAIR], ONE_BOX + SIT + "4464 4"),
        (ONE_PHRASE, [[PAIR]], ONE_BOX + SIT + "4464 4"),
        (ONE_PHRASE, [[PAIR, OTHER_PAIR]], TWO_BOXES + SIT + "4464 4"),
        (TWO_PHRASES, [[PAIR, OTHER_PAIR], None], TWO_BOXES + SIT + "64007 4464 64008 106 4"),
        (TWO_PHRASES, [[PAIR, OTHER_PAIR], []], TWO_BOXES + SIT + "64007 4464 64008 106 4"),
        (TWO_PHRASES, [[PAIR, OTHER_PAIR], GRASS], TWO_BOXES + SIT + "64007 4464 64008 64009 64493 65036 64010 106 4"),
        (TWO_PHRASES, [[PAIR, OTHER_PAIR], [GRASS]], TWO_BOXES + SIT + "64007 4464 64008 64009 64493 65036 64010 106 4"),
        (FIRST_BOXES_IN_TEXT, [None, [GRASS]], TWO_BOXES + SIT + "64007 4464 64008 64009 64493 65036 64010 106 4"),
    ],
)  # fmt: skip
def test_published_forms_of_boxes(official, text, boxes, ids):
    """Every combination of text and boxes in the published test of the processor."""
    assert official.encode(text, boxes, add_eos=True) == [0, 64012, *map(int, ids.split()), 2]


@pytest.mark.parametrize("boxes", [[[None]], [[PAIR, None]], [[[PAIR]]], [[[PAIR], PAIR]]])
def test_forms_of_boxes_that_are_refused(official, boxes):
    """A list of boxes contains boxes only. (The published processor refuses these as well.)"""
    with pytest.raises(ValueError, match="box"):
        official.encode(ONE_PHRASE, boxes)


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
        ("<image> a", 2, "but there are 2 images"),
        ("<image><image>", 1, "2 <image> tags"),
        ("a", 2, "0 <image> tags"),
        ("<image>a</image>", 1, "without </image>"),
        ("<phrase> a <phrase> b</phrase>", 1, "inside another"),
        ("<phrase> a</phrase><object><patch_index_1024><patch_index_0001></object>", 1, "not a location"),
        ("<patch_index_x>", 1, "not a location"),
        ("<phrase> a</phrase><object><patch_index_44><patch_index_0863></object>", 1, "<patch_index_0044>"),
        ("<patch_index_00044>", 1, "not a location"),
    ],
)
def test_invalid_prompts_raise(tokenizer, prompt, images, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.encode_prompt(prompt, images)


@pytest.mark.parametrize(
    "boxes",
    [[(0, 1)], [(0, 1)] * 3, [(0.5, 1), None], [(0, 0, 1, 1, 1), None], [(0, 5000), None],
     [("a", "b"), None], [(0.2, 0.2, 0.1, 0.3), None]],
)  # fmt: skip
def test_invalid_box_arguments_raise(tokenizer, boxes):
    with pytest.raises((ValueError), match=r"box|phrase|location"):
        tokenizer.encode("<phrase> a</phrase> and <phrase> b</phrase>", boxes)


def test_truth_values_are_no_box(tokenizer):
    with pytest.raises(ValueError, match="box"):
        tokenizer.encode("<phrase> a</phrase>", [(True, True)])


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


def test_answers_are_tokenized_as_one_text(tokenizer):
    """In training there is no separate space piece before the period; in prompts there is."""
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
    )  # not an image: generated by the model
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="expected 0 to"):
        tokenizer.decode([10**6])


@needs_transformers
def test_equal_to_the_official_tokenizer(official):
    """300 prompts; compare_tokenizer.py tries 10,000."""
    assert compare(official, official_processor(official.model_file), prompts(300, seed=1)) == []


def test_unicode_is_normalized_as_in_the_training_of_the_vocabulary(official):
    """With NFKC, by sentencepiece itself."""
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
    with pytest.raises(ValueError, match="10000 image tokens do not fit"):
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
        # In the reference, the span of a box without a phrase can lie beyond the end of the caption.
        entities = [(p, tuple(min(at, len(caption)) for at in span), boxes) for p, span, boxes in entities]
        assert parse(text)[0] == caption and [e[:3] for e in parse(text)[1]] == entities, text


@pytest.mark.parametrize(
    ("text", "caption", "boxes"),
    [
        ("a < b and c > d", "a < b and c > d", []),  # a "<" that does not start a tag is text
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
        (f"a{DELIMITER}b", "ab", []),
        (
            "<phrase> a</phrase> <object><patch_index_0000><patch_index_0033></object>",
            "a",
            [[tokens_to_box(0, 33)]],
        ),
    ],
)
def test_malformed_text_is_parsed_as_far_as_possible(text, caption, boxes):
    found, entities = parse(text)
    assert found == caption and [e.boxes for e in entities] == boxes


# ---------------------------------------------------------------------------------------- words that look like tags

LOCATION_TAGS = ["<patch_index_0000>", "<patch_index_1023>"]
BRINGS_A_BOX = "fire</phrase><object><patch_index_0000><patch_index_1023></object>"


@pytest.mark.parametrize("tag", [*CONTROL, "<mask>", *TAGS, *LOCATION_TAGS])
@pytest.mark.parametrize("task", sorted(set(PROMPTS) - {"caption", "detail", "plain"}) + ["context", "text"])
def test_a_text_is_words_whatever_tags_it_has(tokenizer, task, tag):
    """No control id, no lost word: the tokens of the words, between those of the prompt."""
    if task == "text":
        with_tag, with_word = (tokenizer.encode(task_prompts(task, [f"a {w} b"], [])[0]) for w in (tag, "x"))
    else:
        images = 2 if task == "context" else 1
        prompts = [task_prompts(task, [f"a {word} b"], [])[0] for word in (tag, "x")]
        with_tag, with_word = (tokenizer.encode_prompt(prompt, images)[0] for prompt in prompts)
    specials = set(tokenizer.special_ids.values()) - {tokenizer.special_ids["<unk>"]}
    assert [i for i in with_tag if i in specials] == [i for i in with_word if i in specials]
    words = tokenizer.encode_words(f" a {tag} b")
    assert any(with_tag[at : at + len(words)] == words for at in range(len(with_tag)))


@pytest.mark.parametrize(
    "text", ["Is x<y and <s> a tag?", "<3 <<<s>> </s", "a <image> of </image>", "<\0s>", BRINGS_A_BOX]
)
def test_a_question_is_encoded_as_it_is_written(official, text):
    """The published prompt around the ids that the vocabulary has for the text."""
    ids, mask = official.encode_prompt(task_prompts("vqa", [text], [])[0])
    words = f" Question: {strip_literal(text)} Answer:"
    assert ids[67:] == [official.special_ids["<grounding>"], *official.encode_words(words)]
    assert sum(mask) == 64


@pytest.mark.parametrize("text", ["a fire</phrase>", "<phrase>fire", "a </phrase> b", "<s>", BRINGS_A_BOX])
def test_the_phrase_of_a_task_stays_whole(official, text):
    """With its box, and without a box that the text spells."""
    ids, _ = official.encode_prompt(task_prompts("ground", [text], [])[0])
    new = official.encode("<object><patch_index_0044><patch_index_0863></object>", add_bos=False)
    caption, entities = official.parse_output(ids, new, [0.25] * len(new))
    assert caption == text
    assert entities == [Entity(text, (0, len(text)), [tokens_to_box(44, 863)], [0.25])]
    assert official.parse_output(ids, []) == (text, [])


def test_a_text_spells_no_box_of_its_own(tokenizer):
    """In any task, and in the published demo's form."""
    for task in ("ground", "vqa", "answer", "refer"):
        ids, _ = tokenizer.encode_prompt(task_prompts(task, [BRINGS_A_BOX], [])[0])
        assert all(tokenizer.location_index(i) is None for i in ids)
        assert tokenizer.parse_output(ids, [])[1] == []


def test_boxes_of_a_question_belong_to_its_phrases(tokenizer):
    """A spelled <phrase> in a text takes no box; one in the task's own markup does."""
    ids, _ = tokenizer.encode_prompt(task_prompts("refer", [], [(5, 911)])[0], boxes=[(5, 911)])
    assert [i for i in map(tokenizer.location_index, ids) if i is not None] == [5, 911]
    with pytest.raises(ValueError, match="boxes: 1, phrases: 0"):
        tokenizer.encode_prompt(task_prompts("vqa", ["<phrase> it</phrase>"], [])[0], boxes=[(5, 911)])


@pytest.mark.parametrize(
    "text",
    [BRINGS_A_BOX, "<phrase> a</phrase><object><patch_index_0001><patch_index_0034></object>", "</s>", "<"],
)
def test_a_model_that_spells_tags_gets_no_box(official, text):
    """Tags in letters are words of the caption, in front of a box made of tokens, and scores stay with it."""
    words = official.encode_words(text)
    assert official.parse_output([0], words, [0.5] * len(words)) == (text, [])
    link = official.encode(
        "<phrase> b</phrase><object><patch_index_0005><patch_index_0911></object>", add_bos=False
    )
    caption, entities = official.parse_output([0], words + link, [0.5] * len(words) + [0.25] * len(link))
    assert caption == f"{text} b"
    assert entities == [Entity("b", (len(caption) - 1, len(caption)), [tokens_to_box(5, 911)], [0.25])]


def test_decoding_marks_words_only_inside(tokenizer):
    """`decode` has no marks; `decode_literal` tells a spelled tag from a token."""
    ids = [*tokenizer.encode_words("x <s>"), tokenizer.special_ids["<phrase>"], *tokenizer.encode_words("a")]
    assert tokenizer.decode(ids) == "x <s><phrase> a"
    assert tokenizer.decode_literal(ids) == f"x <{LITERAL}s><phrase> a"
    assert tokenizer.encode(tokenizer.decode_literal(ids), add_bos=False) == ids


def test_as_words():
    assert as_words("  a <s> ") == f"a <{LITERAL}s>"
    assert as_words(as_words("<s> < <")) == as_words("<s> < <")  # twice is the same
    assert strip_literal(as_words("x<y </phrase>")) == "x<y </phrase>"


# ---------------------------------------------------------------------------------------------------- the tasks


@pytest.mark.parametrize(
    ("task", "texts", "boxes", "prompts"),
    [
        ("caption", [], [], ["<grounding>An image of"]),
        ("detail", [], [], ["<grounding>Describe this image in detail:"]),
        ("plain", [], [], ["An image of"]),
        ("ground", ["a fire", " two  cats "], [], ["<grounding><phrase> a fire</phrase>", "<grounding><phrase> two  cats</phrase>"]),
        ("refer", [], [(5, 911)], ["<grounding><phrase> It</phrase> is"]),
        ("refer", ["the left one"], [], ["<grounding><phrase> the left one</phrase>"]),
        ("vqa", ["Why?"], [], ["<grounding> Question: Why? Answer:"]),
        ("answer", ["Why?"], [], ["Question: Why? Answer:"]),
        ("text", ["Once"], [], ["Once"]),
        ("context", ["a cat", "a dog"], [], ["<image> a cat<image> a dog<image>"]),
    ],
)  # fmt: skip
def test_prompts_of_the_tasks(task, texts, boxes, prompts):
    assert task_prompts(task, texts, boxes) == prompts


@pytest.mark.parametrize(
    ("task", "texts", "boxes", "words"),
    [
        ("caption", ["a"], [], "takes no text"), ("ground", [], [], "non-empty text"), ("vqa", [" "], [], "non-empty"),
        ("ground", [LITERAL], [], "non-empty"), ("refer", [], [], "needs a box"), ("ground", ["a"], [(5, 9)], "not both"),
        ("draw", [], [], "expected one of caption"),
    ],
)  # fmt: skip
def test_tasks_that_do_not_fit(task, texts, boxes, words):
    with pytest.raises(ValueError, match=words):
        task_prompts(task, texts, boxes)
    assert len(TASKS) == 9


# ------------------------------------------------------------------------------------------------- unused ids


@pytest.mark.parametrize("unused", [1, 28, 64, 499])
def test_unused_ids_stand_for_nothing(tokenizer, unused):
    """They follow the location tokens: no text, no box, never allowed."""
    more = Tokenizer(TINY / SENTENCEPIECE, 32, unused=unused)
    first = tokenizer.vocab_size
    assert more.vocab_size == first + unused and more.special_ids == tokenizer.special_ids
    assert more.decode([first, 5, first + unused - 1]) == tokenizer.decode([5])
    assert more.location_index(first) is None and more.parse_output([], [first])[1] == []
    for prompt in (
        "",
        "a",
        "<phrase>",
        "<phrase> a",
        "<object>",
        "<object><patch_index_0000>",
        "<object>" + "".join(LOCATION_TAGS),
    ):
        allowed = more.allowed_tokens(more.encode(prompt), 99)
        assert allowed.any() and not allowed[first:].any()
        assert (allowed[:first] == tokenizer.allowed_tokens(tokenizer.encode(prompt), 99)).all()
    assert more.encode("<unused>") == tokenizer.encode("<unused>")  # not a tag
    with pytest.raises(ValueError, match="expected 0 to"):
        more.decode([first + unused])


def test_text_for_messages():
    assert printable("a\nb\x1b[31m\t\u202e") == r"a\nb\x1b[31m\t\u202e"
    assert printable("é 東京 🐶") == "é 東京 🐶"
    shown = printable("data:image/png;base64," + "A" * 23_000 + "end")
    assert (
        len(shown) == 100 and shown.startswith("data:image/png") and shown.endswith("Aend") and "..." in shown
    )


# ------------------------------------------------------------------------------------------------------- GRIT


def test_corners_on_a_cell_boundary():
    """The original data loader took the outer cell, the published processor takes the inner one."""
    box = (0.25, 0.25, 0.5, 0.5)
    record = {"caption": "a dog", "ref_exps": [[0, 5, *box, 1.0]]}
    assert "<patch_index_0264><patch_index_0528>" in grit_to_text(record)
    assert box_to_tokens(box) == (264, 495)
    record["ref_exps"] = [[0, 5, 0, 0, 1, 1, 1.0]]
    assert "<patch_index_0000><patch_index_1023>" in grit_to_text(record)


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
    assert grit_to_text(record | {"ref_exps": []}).count("<phrase>") == 1
    for broken in (
        {},
        {"caption": "a"},
        {"caption": "a", "ref_exps": [[1]]},
        {"caption": "a", "ref_exps": [[0, 9, 0, 0, 1, 1, 1]]},
    ):
        with pytest.raises(ValueError):
            grit_to_text(broken)


Span = tuple[int, int]


def reference_spans(rows: list[list]) -> dict[Span, list[tuple]]:
    """The spans that the original data loader keeps, with their boxes, in order.

    Written from its description, independently of training/data.py.
    """
    confident = [row for row in rows if row[6] >= 0.65]
    spans = [(row[0], row[1]) for row in confident]
    kept: dict[Span, list[tuple]] = {}
    for start, end in sorted(set(spans)):
        nested = False
        for other_start, other_end in spans:
            if (other_start, other_end) != (start, end) and other_start <= start and end <= other_end:
                nested = True
        if not nested:
            kept[start, end] = [tuple(row[2:6]) for row in confident if (row[0], row[1]) == (start, end)]
    return kept


def reference_ids(tokenizer: Tokenizer, record: dict) -> list[int] | None:
    """The ids that the original data loader makes of a record.

    None where it raises an error, leaves a phrase open or nests phrases: if spans end inside a word,
    the pieces counted for them can lie beyond the end of the caption or overlap.
    """
    caption = record["caption"]
    pieces = tokenizer.encode_words(caption)
    special = tokenizer.special_ids
    before_piece: dict[int, list[int]] = {}
    after_piece: dict[int, list[int]] = {}
    spans = reference_spans(record["ref_exps"])
    done = 0
    for (start, end), boxes in spans.items():
        before = tokenizer.encode_words(caption[:start])
        through = tokenizer.encode_words(caption[:end])
        if through[: len(before)] == before:
            first = len(before)
        elif through[: len(before) - 1] == before[:-1]:
            first = len(before) - 1
        else:
            return None
        if first < done or len(through) > len(pieces):
            return None
        done = len(through)
        pairs = []
        for box in boxes:
            x1, y1, x2, y2 = (math.floor(min(value, 0.99999) * 32) for value in box)
            pair = y1 * 32 + x1, y2 * 32 + x2
            pairs += [special["</delimiter_of_multi_objects/>"]] * bool(pairs)
            pairs += [tokenizer.first_location + index for index in pair]
        before_piece[first] = [special["<phrase>"]]
        after_piece[done - 1] = [
            special["</phrase>"], special["<object>"], *pairs, special["</object>"]
        ]  # fmt: skip
    ids = [special["<grounding>"]] if spans else []
    for i, piece in enumerate(pieces):
        ids += before_piece.get(i, []) + [piece] + after_piece.get(i, [])
    return ids


CAPTION_WORDS = [
    "a", "the", "dog", "50%", "sale", "#1", "shirt", "10:30", "at", "(two)", "it's", "e-mail", "$5", "3.14", "red,",
    "big!", "C++", "naïve", "1,024", "x/y", "dogs.", "--", "&", "'90s", "猫",
]  # fmt: skip


def random_record(rng: random.Random) -> dict:
    """A caption full of numbers and punctuation, with boxes at disjoint, nested and identical spans.

    Most spans begin and end at a word, as in GRIT; some end inside a word.
    """
    caption = " ".join(rng.choice(CAPTION_WORDS) for _ in range(rng.randint(2, 10)))
    starts = [0, *(i + 1 for i, character in enumerate(caption) if character == " ")]
    ends = [*(i for i, character in enumerate(caption) if character == " "), len(caption)]
    spans = []
    at = 0
    while at < len(starts) and len(spans) < 3:
        first = rng.randint(at, len(starts) - 1)
        last = min(first + rng.randint(0, 2), len(starts) - 1)
        end = ends[last]
        if rng.random() < 0.3:
            end = rng.randint(starts[last] + 1, end)
        spans.append((starts[first], end))
        if rng.random() < 0.3:
            spans.append((starts[last], end))  # nested, or identical if the span is one word
        at = last + 1
    rows = []
    for start, end in spans:
        for _ in range(rng.choice([1, 1, 2])):
            x, y = rng.random() * 0.7, rng.random() * 0.7
            score = rng.choice([0.3, 0.64, 0.65, 0.8, 1.0, 1.0])
            box = [x, y, x + 0.01 + rng.random() * 0.28, y + 0.01 + rng.random() * 0.28]
            if rng.random() < 0.3:  # corners on the boundaries of cells
                box = [
                    math.floor(x * 32) / 32,
                    math.floor(y * 32) / 32,
                    *(math.ceil(v * 32) / 32 for v in box[2:]),
                ]
            rows.append([start, end, *box, score])
    rng.shuffle(rows)
    return {"caption": caption, "ref_exps": rows}


def test_training_ids_equal_the_original_data_loader(official):
    rng = random.Random(0)
    compared = Counter()
    for _ in range(1000):
        record = random_record(rng)
        expected = reference_ids(official, record)
        if expected is not None:
            assert encode_record(official, record) == expected, record
            compared[len(reference_spans(record["ref_exps"]))] += 1
    assert compared.total() > 900 and min(compared[count] for count in (0, 1, 2, 3)) > 20, compared


@pytest.mark.parametrize(
    ("caption", "span", "phrase"),
    [
        ("a 50% sale", "a 50", "a 50%"),
        ("at 10:30 a dog", "10", "10:30"),
        ("shirt #1", "shirt #", "shirt #1"),
        ("a big dog.", "a big dog", "a big dog"),
    ],
)
def test_a_phrase_consists_of_complete_pieces(official, caption, span, phrase):
    start = caption.index(span)
    record = {"caption": caption, "ref_exps": [[start, start + len(span), 0.1, 0.1, 0.5, 0.5, 1.0]]}
    text, entities = parse(official.decode(encode_record(official, record)))
    assert text == caption and [entity.phrase for entity in entities] == [phrase]


def test_a_phrase_without_pieces_of_its_own_is_left_out(official):
    """The second span is inside the last piece of the first: no <phrase></phrase> without words."""
    rows = [[start, end, 0.1, 0.1, 0.5, 0.5, 1.0] for start, end in ((0, 4), (4, 5))]
    ids = encode_record(official, {"caption": "a 50% sale", "ref_exps": rows})
    text, entities = parse(official.decode(ids))
    assert text == "a 50% sale" and [entity.phrase for entity in entities] == ["a 50%"]
    assert ids.count(official.special_ids["<phrase>"]) == 1


def test_tags_in_a_caption_stay_text(official, tokenizer):
    """Both `<image>` in front of a phrase and `</s>` inside one."""
    caption = "the <image> of a dog </s> here"
    record = {"caption": caption, "ref_exps": [[15, 25, 0.1, 0.1, 0.5, 0.5, 1.0]]}
    for one in (official, tokenizer):
        ids = encode_record(one, record)
        inserted = [
            one.special_ids[tag] for tag in ("<grounding>", "<phrase>", "</phrase>", "<object>", "</object>")
        ]
        words = [i for i in ids if i not in inserted and one.location_index(i) is None]
        assert words == one.encode_words(caption)
        assert not {one.special_ids["<image>"], one.special_ids["</s>"]} & set(ids)
    text = official.decode(encode_record(official, record))
    assert text.split("<phrase>")[1].startswith(" a dog </s></phrase><object>")


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
    """Pixels; reversed corners; x, y, width, height; NaN; too far beyond an edge."""
    with pytest.raises(ValueError, match="box"):
        read_spans({"caption": "a dog", "ref_exps": [[0, 5, *box, 1.0]]})


def test_boxes_slightly_beyond_an_edge_are_clipped():
    record = {"caption": "a dog", "ref_exps": [[0, 5, -0.005, 0, 1.009, 1, 1.0]]}
    assert read_spans(record)[0].boxes == [(0, 0, 1, 1)]


def test_spans_outside_of_the_caption_raise():
    for span in ((0, 6), (-1, 3), (3, 3), (4, 2)):
        with pytest.raises(ValueError, match="outside the caption"):
            read_spans({"caption": "a dog", "ref_exps": [[*span, 0.1, 0.1, 0.5, 0.5, 1.0]]})


def test_the_caption_begins_after_the_last_image(official):
    """In a prompt with several images, as for tagged text."""
    prompt = "<image><grounding><phrase> It</phrase> is red.<image><grounding><phrase> It</phrase> is"
    ids, _ = official.encode_prompt(prompt, 2, [(0.1, 0.2, 0.5, 0.6), (0.3, 0.3, 0.9, 0.9)])
    new = official.encode("blue.", add_bos=False)
    caption, entities = official.parse_output(ids, new)
    assert caption == "It is blue." and len(entities) == 1
    expected = tokens_to_box(*box_to_tokens((0.3, 0.3, 0.9, 0.9)))
    assert entities[0].boxes == [expected] and official.parse_output(ids, new)[1] == entities


def test_another_grid():
    """Boxes are written and read with the grid of the tokenizer."""
    coarse = Tokenizer(TINY / SENTENCEPIECE, 32, grid=16)
    box = (0.25, 0.25, 0.75, 0.75)
    ids, _ = coarse.encode_prompt("<phrase> It</phrase> is", boxes=[box])
    _, entities = coarse.parse_output(ids, [])
    assert entities[0].boxes[0] == pytest.approx(box, abs=0.5 / 16)
    assert coarse.allowed_tokens(coarse.encode("<object>"), 9).sum() == 256
