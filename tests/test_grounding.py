"""What is built on top of generation: probabilities of boxes, ranked boxes, whole boxes, prefixes,
recordings."""

import math
import re

import pytest
import torch
from conftest import SMALL, TINY, VOCAB, needs_transformers, prompt_batch, rough
from data import encode_answer
from PIL import Image
from test_model import PROMPTS, pixels

from kosmos2 import EOS, Kosmos2, causal_mask, finish, pad_left, preprocess_image, rank_boxes, record
from load_weights import SENTENCEPIECE, load_checkpoint
from tokenizer import iou

LINK = "<phrase>(?:(?!</?phrase>|<object>).)+</phrase>|<object>(?:P(?:</delimiter_of_multi_objects/>P)*)</object>".replace(
    "P", r"<patch_index_\d{4}><patch_index_\d{4}>"
)


def is_well_formed(text: str) -> bool:
    """No tag left over once whole phrases and boxes are taken away, and no corner out of order."""
    for ul, lr in re.findall(r"<patch_index_(\d{4})><patch_index_(\d{4})>", text):
        (y1, x1), (y2, x2) = divmod(int(ul), 32), divmod(int(lr), 32)
        if y2 < y1 or x2 < x1:
            return False
    rest = re.sub(LINK, "", text)
    return not re.search(r"</?phrase>|</?object>|<patch_index|delimiter|</?image>", rest)


# ------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("options", [dict(), dict(temperature=2.0, top_k=9, seed=4), dict(num_beams=3)])
def test_probabilities_are_the_models_own(small, small_tokenizer, options):
    """Whatever way a token was chosen, its probability is that of a plain pass over the whole
    text."""
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
            wanted = small(text, pixels=pixels(3)[row : row + 1], image_mask=mask)[0].softmax(-1)
        at = int(real.sum()) - 1
        for i, (token, probability) in enumerate(zip(new, results[row].probabilities, strict=True)):
            assert probability == pytest.approx(wanted[at + i, token].item(), rel=1e-4)


def test_scores_belong_to_their_boxes(tiny):
    """An entity's score is the geometric mean of its two tokens' probabilities; boxes of the prompt
    have none."""
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
        wanted = [math.sqrt((first + 1) * (first + 2)) / 100, math.sqrt((first + 4) * (first + 5)) / 100]
        assert entity.scores == pytest.approx(wanted)


# ---------------------------------------------------------------------------------------------- whole boxes


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 12, 40, 200])
def test_markup_is_whole_under_random_logits(small, small_tokenizer, length):
    """A random model at a high temperature, drawing tags as often as words."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    tags = [
        small_tokenizer.special_ids[t] for t in ("<phrase>", "</phrase>", "<object>", "</object>", "</s>")
    ]

    def constraint(ids, left):
        allowed = small_tokenizer.allowed_tokens(ids, left)
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
    assert length < 12 or not all(is_well_formed(small_tokenizer.decode(row)) for row in free)  # it is needed


def test_a_well_formed_model_is_left_alone(tiny):
    model, tokenizer = tiny
    picture = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)[None].repeat(
        3, 1, 1, 1
    )
    prompts = [
        "<grounding>An image of",
        "<grounding>Describe this image in detail:",
        "<grounding><phrase> a star</phrase>",
    ]
    tokens, image_mask, pad_mask = prompt_batch(tokenizer, prompts)
    inputs = (tokens, picture, None, image_mask, pad_mask)
    free = model.generate(*inputs)
    assert all(row[-1] == EOS and is_well_formed(tokenizer.decode(row)) for row in free)
    assert model.generate(*inputs, constraint=tokenizer.allowed_tokens) == free
    for length in range(1, 20):  # cut off anywhere, no box is left half open
        for prompt, row in zip(
            prompts,
            model.generate(*inputs, max_new_tokens=length, constraint=tokenizer.allowed_tokens),
            strict=True,
        ):
            assert is_well_formed(prompt.replace("<grounding>", "") + tokenizer.decode(row))


# --------------------------------------------------------------------------------------------- ranked boxes


def test_ranked_boxes(tiny):
    model, tokenizer = tiny
    picture = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)[None]
    tokens, image_mask, _ = prompt_batch(tokenizer, ["<grounding><phrase> a star</phrase><object>"])
    boxes = rank_boxes(model.prefill(tokens, picture, None, image_mask, max_new_tokens=2), tokenizer, 5)
    scores = [score for score, *_ in boxes]
    assert 1 <= len(boxes) <= 5 and scores == sorted(scores, reverse=True) and 0 < scores[0] <= 1
    places = [whole_cells(*box) for _, *box in boxes]
    assert all(iou(a, b) < 0.5 for a in places for b in places if a is not b)
    # Locations only, without the limit's rule that a box must be closed.
    state = model.prefill(tokens, picture, None, image_mask, max_new_tokens=2)
    greedy = finish(state)[0]
    assert all(tokenizer.location_index(i) is not None for i in greedy.ids)
    assert scores[0] >= math.sqrt(math.prod(greedy.probabilities)) * (1 - 1e-5)


def test_ranking_wants_room_and_one_row(small, small_tokenizer):
    for rows, length, count in ((1, 1, 2), (2, 5, 2), (1, 5, 0)):
        with pytest.raises(ValueError, match="one prompt"):
            state = small.prefill(torch.full((rows, 4), 9), max_new_tokens=length)
            rank_boxes(state, small_tokenizer, count)


def whole_cells(ul, lr, grid=32):
    return ul % grid, ul // grid, lr % grid + 1, lr // grid + 1


def test_overlaps():
    assert iou(whole_cells(0, 33), whole_cells(0, 33)) == 1.0
    assert iou(whole_cells(0, 33), whole_cells(1, 34)) == pytest.approx(2 / 6)
    assert iou(whole_cells(0, 0), whole_cells(1023, 1023)) == 0.0
    assert iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)) == 0.0  # touching is not overlapping


# ---------------------------------------------------------------------------------- one picture, many questions


def test_a_prefix_read_once_changes_nothing(small, small_tokenizer, monkeypatch):
    """Three questions after one reading of the picture get the answers they get alone, and it is
    read once."""
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
    monkeypatch.setattr(Kosmos2, "encode_image", None)
    tokens, _, pad_mask = pad_left([(small_tokenizer.encode(q, add_bos=False), []) for q in questions])
    for _ in range(2):  # and can be used again
        options = dict(max_new_tokens=12, no_repeat_ngram_size=3)
        state = small.prefill(tokens, pad_mask=pad_mask, prefix=past, **options)
        assert [result.ids for result in finish(state)] == alone


# ---------------------------------------------------------------------------------------- looking inside


def test_a_past_that_went_on_is_refused(small):
    past = small.prefill(torch.full((1, 4), 9), max_new_tokens=2)
    finish(past)
    with pytest.raises(ValueError, match="without new tokens"):
        small.prefill(torch.full((1, 4), 9), prefix=past)


def test_a_state_is_decoded_once(small):
    state = small.prefill(torch.full((1, 4), 9), max_new_tokens=3, min_new_tokens=3)
    assert len(finish(state)[0].ids) == len(finish(state)[0].ids) == 3


def test_a_rule_that_leaves_no_token_is_skipped(small, small_tokenizer):
    """An open phrase cannot be completed with one token; a piece comes nevertheless."""
    ids = small_tokenizer.encode("<phrase>", add_bos=True)
    assert not small_tokenizer.allowed_tokens(ids, 1).any()
    new = small.generate(torch.tensor([ids]), max_new_tokens=1, constraint=small_tokenizer.allowed_tokens)[0]
    assert len(new) == 1 and small_tokenizer.free_text[new[0]]


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
    with record(small) as seen:  # the weights are those that the forward pass used
        x = torch.randn(2, 6, 48)
        attn = small.decoder.layers[0].attn
        values = attn.split_heads(attn.v_proj(x))
        attn_out = attn(x)
        attn(x, mask=causal_mask(6, 6))
    by_hand = attn.out_proj(
        attn.inner_attn_ln((seen["decoder.layers.0.attn"][0] @ values).transpose(1, 2).flatten(2))
    )
    torch.testing.assert_close(by_hand, attn_out)
    assert (seen["decoder.layers.0.attn"][1].triu(1) == 0).all()  # a mask given by name counts as well
    assert not small.decoder.layers[0]._forward_hooks


# -------------------------------------------------------------------------------------------- larger pictures


@needs_transformers
@pytest.mark.parametrize("size", [(56, 42), (70, 70), (42, 42), (100, 31)])
def test_interpolated_positions_equal_the_reference(size, tmp_path):
    """transformers' Kosmos2Model can, its generating class ignores the request."""
    from transformers import Kosmos2Config as ReferenceConfig
    from transformers import Kosmos2ForConditionalGeneration

    sizes = dict(
        latent_query_num=5,
        text_config=dict(vocab_size=VOCAB, embed_dim=48, layers=1, ffn_dim=88, attention_heads=3),
        vision_config=dict(
            hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=5, image_size=42
        ),
    )
    whole = rough(Kosmos2ForConditionalGeneration(ReferenceConfig(**sizes)), seed=2).eval()
    whole.save_pretrained(tmp_path)
    from transformers import Kosmos2Model

    reference = Kosmos2Model.from_pretrained(tmp_path).eval()
    model, tokenizer = load_checkpoint(tmp_path, tokenizer=TINY / SENTENCEPIECE)
    picture = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    tokens, image_mask, _ = prompt_batch(tokenizer, PROMPTS[:1])
    with torch.no_grad():
        theirs = reference(
            pixel_values=picture, input_ids=tokens, image_embeds_position_mask=image_mask.long(),
            interpolate_pos_encoding=True,
        ).image_embeds  # fmt: skip
        ours = model.encode_image(picture, interpolate=True)
    assert (ours - theirs).abs().max() / theirs.abs().max() < 2e-5
    with pytest.raises(ValueError, match="at least 14"):
        model.encode_image(torch.zeros(1, 3, 13, 42), interpolate=True)
