"""Built on top of generation: scores of boxes, ranked boxes, valid markup, prefixes, recordings."""

import math
import re

import pytest
import torch
from conftest import SMALL, TINY, VOCAB, needs_transformers, prompt_batch, rough
from data import encode_answer
from PIL import Image
from recording import record
from scenes import demo_scenes
from test_model import PROMPTS, pixels

from kosmos2 import EOS, Kosmos2, causal_mask, finish, pad_left, preprocess_image, rank_boxes
from load_weights import SENTENCEPIECE, load_checkpoint
from tokenizer import iou

LINK = "<phrase>(?:(?!</?phrase>|<object>).)+</phrase>|<object>(?:P(?:</delimiter_of_multi_objects/>P)*)</object>".replace(
    "P", r"<patch_index_\d{4}><patch_index_\d{4}>"
)


def is_well_formed(text: str) -> bool:
    """Whether no tag remains once complete phrases and boxes are removed, and all corners are in order."""
    for ul, lr in re.findall(r"<patch_index_(\d{4})><patch_index_(\d{4})>", text):
        (y1, x1), (y2, x2) = divmod(int(ul), 32), divmod(int(lr), 32)
        if y2 < y1 or x2 < x1:
            return False
    rest = re.sub(LINK, "", text)
    return not re.search(r"</?phrase>|</?object>|<patch_index|delimiter|</?image>", rest)


# ------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("options", [dict(), dict(temperature=2.0, top_k=9, seed=4), dict(num_beams=3)])
def test_probabilities_equal_a_forward_pass(small, small_tokenizer, options):
    """However a token was chosen, its probability is that of a plain forward pass over the text."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    results = finish(
        small.prefill(tokens, pixels(3), None, image_mask, pad_mask, max_new_tokens=9, **options)
    )
    for row in range(3):
        real = ~pad_mask[row]
        new = results[row].ids
        text = torch.cat([tokens[row, real], torch.tensor(new)])[None]
        mask = torch.cat([image_mask[row, real], torch.zeros(len(new), dtype=torch.bool)])[None]
        with torch.no_grad():
            expected = small(text, pixels=pixels(3)[row : row + 1], image_mask=mask)[0].softmax(-1)
        at = int(real.sum()) - 1
        for i, (token, probability) in enumerate(zip(new, results[row].probabilities, strict=True)):
            assert probability == pytest.approx(expected[at + i, token].item(), rel=1e-4)


def test_scores_belong_to_their_boxes(tiny):
    """A box is scored by the geometric mean of its two tokens' probabilities; boxes in the prompt have
    no score."""
    _, tokenizer = tiny
    prompt = tokenizer.encode(
        "<phrase> a star</phrase><object><patch_index_0001><patch_index_0034></object> and"
    )
    new = "<phrase> a moon</phrase><object><patch_index_0002><patch_index_9999><patch_index_0003></object>"
    new = new.replace(
        "<patch_index_9999>", "<patch_index_0035></delimiter_of_multi_objects/><patch_index_0004>"
    )
    ids = encode_answer(tokenizer, new + new.replace("0004><patch_index_0003", "0100><patch_index_0036"))
    probabilities = [(i + 1) / 100 for i in range(len(ids))]
    caption, entities = tokenizer.parse_output(prompt, ids, probabilities)
    assert caption == "a star and a moon a moon" and [e.phrase for e in entities] == [
        "a star",
        "a moon",
        "a moon",
    ]
    assert entities[0].scores == [None]
    for entity, shift in ((entities[1], 0), (entities[2], len(ids) // 2)):
        first = next(i for i, t in enumerate(ids) if tokenizer.location_index(t) is not None) + shift
        expected = [math.sqrt((first + 1) * (first + 2)) / 100, math.sqrt((first + 4) * (first + 5)) / 100]
        assert entity.scores == pytest.approx(expected)


# --------------------------------------------------------------------------------------------- valid markup


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 12, 40, 200])
def test_markup_is_valid_under_random_logits(small, small_tokenizer, length):
    """A random model at a high temperature that samples tags as often as words."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    tags = [
        small_tokenizer.special_ids[t] for t in ("<phrase>", "</phrase>", "<object>", "</object>", "</s>")
    ]

    def constraint(ids, remaining):
        allowed = small_tokenizer.allowed_tokens(ids, remaining)
        if len(ids) % 3 and allowed[tags].any():  # make tags likely
            allowed[[i for i in range(len(allowed)) if i not in tags]] = False
        return allowed

    inputs = (tokens, pixels(3), None, image_mask, pad_mask)
    for seed in range(6):
        for rule in (constraint, small_tokenizer.allowed_tokens):
            hot = dict(max_new_tokens=length, temperature=9.0, seed=seed, no_repeat_ngram_size=seed % 3)
            new = small.generate(*inputs, constraint=rule, **hot)
            for prompt, row in zip(PROMPTS, new, strict=True):
                text = small_tokenizer.decode(row)
                assert is_well_formed(text), (prompt, text)
        free = small.generate(*inputs, max_new_tokens=length, temperature=9.0, seed=seed)
    if length >= 12:  # without the constraint, some markup is not valid
        assert not all(is_well_formed(small_tokenizer.decode(row)) for row in free)


def test_valid_output_is_not_changed(tiny):
    """The constraint does not change the output of the bundled model, which is valid without it."""
    model, tokenizer = tiny
    image = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)
    prompts = [
        "<grounding>An image of",
        "<grounding>Describe this image in detail:",
        "<grounding><phrase> a fire</phrase>",
    ]
    tokens, image_mask, pad_mask = prompt_batch(tokenizer, prompts)
    inputs = (tokens, image.repeat(3, 1, 1, 1), None, image_mask, pad_mask)
    free = model.generate(*inputs)
    assert all(row[-1] == EOS and is_well_formed(tokenizer.decode(row)) for row in free)
    assert model.generate(*inputs, constraint=tokenizer.allowed_tokens) == free
    for length in range(1, 20):  # at any length limit, all boxes are complete
        rows = model.generate(*inputs, max_new_tokens=length, constraint=tokenizer.allowed_tokens)
        for prompt, row in zip(prompts, rows, strict=True):
            assert is_well_formed(prompt.replace("<grounding>", "") + tokenizer.decode(row))


# --------------------------------------------------------------------------------------------- ranked boxes


def test_ranked_boxes(tiny):
    model, tokenizer = tiny
    image = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)[None]
    tokens, image_mask, _ = prompt_batch(tokenizer, ["<grounding><phrase> a fire</phrase><object>"])
    boxes = rank_boxes(model.prefill(tokens, image, None, image_mask, max_new_tokens=2), tokenizer, 5)
    scores = [score for score, *_ in boxes]
    assert 1 < len(boxes) <= 5 and scores == sorted(scores, reverse=True) and 0 < scores[0] <= 1
    areas = [cells(*box) for _, *box in boxes]
    assert all(iou(a, b) < 0.5 for a in areas for b in areas if a is not b)
    fire = next(thing for thing in demo_scenes()["scene.png"].things if thing.kind == "fire")
    assert iou([32 * value for value in fire.box], areas[0]) > 0.5
    # Without the constraint, which leaves no token within this length limit.
    state = model.prefill(tokens, image, None, image_mask, max_new_tokens=2)
    greedy = finish(state)[0]
    assert all(tokenizer.location_index(i) is not None for i in greedy.ids)
    assert scores[0] >= math.sqrt(math.prod(greedy.probabilities)) * (1 - 1e-5)


def test_ranking_requires_one_prompt_and_two_new_tokens(small, small_tokenizer):
    for rows, length, count in ((1, 1, 2), (2, 5, 2), (1, 5, 0)):
        with pytest.raises(ValueError, match="one prompt"):
            state = small.prefill(torch.full((rows, 4), 9), max_new_tokens=length)
            rank_boxes(state, small_tokenizer, count)


def cells(ul, lr, grid=32):
    """The box that two corner cells cover, in cells."""
    return ul % grid, ul // grid, lr % grid + 1, lr // grid + 1


def test_overlaps():
    assert iou(cells(0, 33), cells(0, 33)) == 1.0
    assert iou(cells(0, 33), cells(1, 34)) == pytest.approx(2 / 6)
    assert iou(cells(0, 0), cells(1023, 1023)) == 0.0
    assert iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)) == 0.0  # touching is not overlapping


# ------------------------------------------------------------------------------- several questions, one image


def test_a_shared_prefix_does_not_change_the_answers(small, small_tokenizer, monkeypatch):
    """Three questions after one prefill of their image get the same answers as three separate runs."""
    questions = [
        "Question: What color is the star? Answer:",
        "<grounding> Question: Where is it? Answer:",
        "An image of",
    ]
    alone = []
    for question in questions:
        tokens, image_mask, _ = prompt_batch(small_tokenizer, [question])
        alone += small.generate(
            tokens, pixels(1), None, image_mask, max_new_tokens=12, no_repeat_ngram_size=3
        )
    ids, mask = small_tokenizer.encode_prompt("", 1)
    past = small.prefill(torch.tensor([ids]), pixels(1), None, torch.tensor([mask]), max_new_tokens=0)
    monkeypatch.setattr(Kosmos2, "encode_image", None)  # must not be called again
    tokens, _, pad_mask = pad_left([(small_tokenizer.encode(q, add_bos=False), []) for q in questions])
    for _ in range(2):  # the prefix can be used several times
        options = dict(max_new_tokens=12, no_repeat_ngram_size=3)
        state = small.prefill(tokens, pad_mask=pad_mask, prefix=past, **options)
        assert [result.ids for result in finish(state)] == alone


def test_states_of_another_kind_are_refused(small, small_tokenizer):
    """A prefix of another model, and ranked boxes after new tokens."""
    tokens = torch.tensor([[0, 10, 11]])
    prefix = rough(Kosmos2(small.config), seed=5).prefill(tokens, max_new_tokens=0)
    with pytest.raises(ValueError, match="of this model"):
        small.prefill(tokens, prefix=prefix)
    state = small.prefill(tokens, max_new_tokens=3)
    finish(state)
    with pytest.raises(ValueError, match="no new tokens"):
        rank_boxes(state, small_tokenizer, 1)


def test_scores_never_move_to_another_box(small_tokenizer):
    """Also if new ids contain an image, which is not part of the text, or a tag spelled with letters."""
    special = small_tokenizer.special_ids
    first = small_tokenizer.first_location
    link = [special["<object>"], first, first + 40, special["</object>"]]
    image = [special["<image>"], first, first + 1, 5, 6, 7, special["</image>"]]
    assert len(image) == small_tokenizer.num_image_tokens + 2
    for extra in (image, small_tokenizer.encode_words("<patch_index_0001>")):
        new = [*extra, *link]
        probabilities = [0.01] * len(extra) + [0.25] * len(link)
        _, entities = small_tokenizer.parse_output([0], new, probabilities)
        assert [entity.scores for entity in entities] == [[None]]


def test_a_prefix_with_new_tokens_is_refused(small):
    past = small.prefill(torch.full((1, 4), 9), max_new_tokens=2)
    finish(past)
    with pytest.raises(ValueError, match="without new tokens"):
        small.prefill(torch.full((1, 4), 9), prefix=past)


def test_a_state_is_decoded_once(small):
    """A second call of finish returns the same results."""
    state = small.prefill(torch.full((1, 4), 9), max_new_tokens=3, min_new_tokens=3)
    first = list(finish(state)[0].ids)
    assert len(first) == 3 and finish(state)[0].ids == first


def test_a_constraint_that_allows_no_token_is_skipped(small, small_tokenizer):
    """An open phrase cannot be completed with one token; a piece is generated nevertheless."""
    ids = small_tokenizer.encode("<phrase>", add_bos=True)
    assert not small_tokenizer.allowed_tokens(ids, 1).any()
    new = small.generate(torch.tensor([ids]), max_new_tokens=1, constraint=small_tokenizer.allowed_tokens)[0]
    assert len(new) == 1 and small_tokenizer.free_text[new[0]]


# ------------------------------------------------------------------------------------------- recordings


def test_recordings(small, small_tokenizer):
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    with record(small) as seen:
        new = small.generate(
            tokens, pixels(3), None, image_mask, pad_mask, max_new_tokens=3, min_new_tokens=3
        )
    assert len(new[0]) == 3
    N, Q, T = SMALL.vision.positions, SMALL.latent_query_num, tokens.shape[1]
    assert seen["resampler.x_attn"][0].shape == (3, 3, Q, N + Q)
    assert [w.shape[-2:] for w in seen["decoder.layers.2.attn"]] == [(T, T), (1, T + 1), (1, T + 2)]
    assert seen["decoder.layers.0"][0].shape == (3, T, 48) and seen["vision.layers.1"][0].shape == (3, N, 40)
    for name, values in seen.items():
        if name.endswith("attn"):
            assert all((w.sum(-1) - 1).abs().max() < 1e-5 for w in values)
    assert (seen["decoder.layers.1.attn"][1][2, :, 0, : T + 1][:, pad_mask[2].tolist() + [False]] == 0).all()
    weights = seen["decoder.layers.0.attn"][0]
    assert (weights.triu(1) == 0).all()
    with record(small) as seen:  # these are the weights that the forward pass used
        x = torch.randn(2, 6, 48)
        attn = small.decoder.layers[0].attn
        values = attn.split_heads(attn.v_proj(x))
        attn_out = attn(x)
        attn(x, mask=causal_mask(6, 6))
    by_hand = attn.out_proj(
        attn.inner_attn_ln((seen["decoder.layers.0.attn"][0] @ values).transpose(1, 2).flatten(2))
    )
    torch.testing.assert_close(by_hand, attn_out)
    assert (seen["decoder.layers.0.attn"][1].triu(1) == 0).all()  # also for a mask given as a keyword
    assert not small.decoder.layers[0]._forward_hooks


# ---------------------------------------------------------------------------------------------- larger images


@needs_transformers
@pytest.mark.parametrize("size", [(56, 42), (70, 70), (42, 42), (100, 31)])
def test_interpolated_positions_equal_the_reference(size, tmp_path):
    """transformers' Kosmos2Model interpolates; its class for generation ignores the option."""
    from transformers import Kosmos2Config as ReferenceConfig
    from transformers import Kosmos2ForConditionalGeneration

    sizes = dict(
        latent_query_num=5,
        text_config=dict(vocab_size=VOCAB, embed_dim=48, layers=1, ffn_dim=88, attention_heads=3),
        vision_config=dict(
            hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=5, image_size=42
        ),
    )
    full = rough(Kosmos2ForConditionalGeneration(ReferenceConfig(**sizes)), seed=2).eval()
    full.save_pretrained(tmp_path)
    from transformers import Kosmos2Model

    reference = Kosmos2Model.from_pretrained(tmp_path).eval()
    model, tokenizer = load_checkpoint(tmp_path, tokenizer=TINY / SENTENCEPIECE)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    tokens, image_mask, _ = prompt_batch(tokenizer, PROMPTS[:1])
    with torch.no_grad():
        theirs = reference(
            pixel_values=image, input_ids=tokens, image_embeds_position_mask=image_mask.long(),
            interpolate_pos_encoding=True,
        ).image_embeds  # fmt: skip
        ours = model.encode_image(image, interpolate=True)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 2e-5
    with pytest.raises(ValueError, match="at least 14"):
        model.encode_image(torch.zeros(1, 3, 13, 42), interpolate=True)
