"""Built on top of generation: probabilities, scores of boxes, valid markup, recordings."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, prompt_batch
from PIL import Image
from recording import record
from test_model import PROMPTS, pixels

from kosmos2 import EOS, causal_mask, finish, preprocess_image
from training.data import encode_answer

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


@pytest.mark.parametrize("options", [dict(), dict(temperature=2.0, top_k=9, seed=4)])
def test_probabilities_equal_a_forward_pass(small, small_tokenizer, options):
    """However a token was chosen, its probability is that of a plain forward pass over the text."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    rows = finish(small.prefill(tokens, pixels(3), None, image_mask, pad_mask, max_new_tokens=9, **options))
    check_probabilities(small, rows, image_mask, pad_mask)


def check_probabilities(model, rows, image_mask, pad_mask):
    """The probabilities of these rows are those of a plain forward pass over each with its image."""
    for i, row in enumerate(rows):
        mask = torch.cat([image_mask[i, ~pad_mask[i]], torch.zeros(len(row.ids), dtype=torch.bool)])[None]
        with torch.no_grad():
            logits = model(torch.tensor([row.all_ids]), pixels=pixels(3)[i : i + 1], image_mask=mask)
        expected = logits[0].softmax(-1)[range(len(row.prompt) - 1, len(row.all_ids) - 1), row.ids]
        assert row.ids and row.probabilities == pytest.approx(expected.tolist(), rel=1e-4)


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


def test_scores_never_move_to_another_box(small_tokenizer):
    """Also after a tag spelled in letters, which is text, and after an image, which is none."""
    special = small_tokenizer.special_ids
    first = small_tokenizer.first_location
    link = [special["<object>"], first, first + 40, special["</object>"]]
    image = [special["<image>"], first, first + 1, 5, 6, 7, special["</image>"]]
    assert len(image) == small_tokenizer.num_image_tokens + 2
    for extra in (image, small_tokenizer.encode_words("<patch_index_0001>")):
        probabilities = [0.01] * len(extra) + [0.25] * len(link)
        _, entities = small_tokenizer.parse_output([0], [*extra, *link], probabilities)
        assert len(entities) == 1 and entities[0].scores in ([None], [0.25])


def test_a_constraint_that_allows_no_token_is_skipped(small, small_tokenizer):
    """An open phrase cannot be completed with one token; a piece is generated nevertheless."""
    ids = small_tokenizer.encode("<phrase>", add_bos=True)
    assert not small_tokenizer.allowed_tokens(ids, 1).any()
    new = small.generate(torch.tensor([ids]), max_new_tokens=1, constraint=small_tokenizer.allowed_tokens)[0]
    assert len(new) == 1 and small_tokenizer.free_text[new[0]]


def test_only_the_end_follows_a_cut(small):
    """Once the length limit has closed a tag, no further text begins, even before min_new_tokens."""
    closing = 20

    def constraint(ids, remaining):
        allowed = np.full(small.config.text.vocab_size, remaining != 2)
        allowed[closing] = True  # the only token that fits when two may follow
        return allowed

    options = dict(max_new_tokens=3, min_new_tokens=3, constraint=constraint)
    assert small.generate(torch.tensor([[0, 5]]), **options)[0][1:] == [closing, EOS]


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
        attn(x, mask=causal_mask(6, torch.zeros(2, 6, dtype=torch.bool)))
    by_hand = attn.out_proj(
        attn.inner_attn_ln((seen["decoder.layers.0.attn"][0] @ values).transpose(1, 2).flatten(2))
    )
    torch.testing.assert_close(by_hand, attn_out)
    assert (seen["decoder.layers.0.attn"][1].triu(1) == 0).all()  # also for a mask given as a keyword
    assert not small.decoder.layers[0]._forward_hooks
