"""Shared prefixes and drafts (inference/shortcuts.py): fewer passes, the same result."""

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, prompt_batch
from PIL import Image
from test_model import pixels

from inference.beam import beam_search, finish_beams
from inference.shortcuts import DraftState, likely_next, prefill_after, prefill_image, with_drafts
from kosmos2 import EOS, PAD, Kosmos2, decode, finish, pad_left, preprocess_image

# ------------------------------------------------------------------------------- several questions, one image

QUESTIONS = [
    "Question: What color is the star? Answer:",
    "<grounding> Question: Where is it? Answer:",
    "An image of",
]


def questions(tokenizer):
    """tokens and pad_mask of the questions, padded on the left."""
    tokens, _, pad_mask = pad_left([(tokenizer.encode(q, add_bos=False), []) for q in QUESTIONS])
    return tokens, pad_mask


@pytest.mark.parametrize("options", [dict(no_repeat_ngram_size=3), dict(temperature=1.0, seed=3)])
def test_a_shared_prefix_does_not_change_the_answers(small, small_tokenizer, monkeypatch, options):
    """Three questions after one prefill of their image get the same answers as three separate runs."""
    options |= dict(max_new_tokens=12)
    alone = []
    for question in QUESTIONS:
        tokens, image_mask, _ = prompt_batch(small_tokenizer, [question])
        alone += finish(small.prefill(tokens, pixels(1), None, image_mask, **options))
    prefix = prefill_image(small, small_tokenizer, small.encode_image(pixels(1)))
    monkeypatch.setattr(Kosmos2, "encode_image", None)  # must not be called again
    for _ in range(2):  # the prefix can be used several times
        together = finish(prefill_after(prefix, *questions(small_tokenizer), **options))
        assert [(row.prompt, row.ids) for row in together] == [(row.prompt, row.ids) for row in alone]
        for a, b in zip(together, alone, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, rel=1e-3)


def test_beams_after_a_prefix(small, small_tokenizer):
    """The answers of separate prompts; padding lies between the prefix and the question."""
    alone = []
    for question in QUESTIONS:
        tokens, image_mask, _ = prompt_batch(small_tokenizer, [question])
        alone += beam_search(small, tokens, pixels(1), None, image_mask, num_beams=3, max_new_tokens=8)
    prefix = prefill_image(small, small_tokenizer, small.encode_image(pixels(1)))
    state = prefill_after(prefix, *questions(small_tokenizer), max_new_tokens=8)
    assert [row.ids for row in finish_beams(state, 3)] == alone


def test_decoding_leaves_the_prefix_alone(small, small_tokenizer):
    prefix = prefill_image(small, small_tokenizer, small.encode_image(pixels(1)))
    length = prefix.caches[0].length
    before = [(cache.keys.clone(), cache.values.clone()) for cache in prefix.caches]
    finish(prefill_after(prefix, *questions(small_tokenizer), max_new_tokens=4))
    assert length == SMALL.latent_query_num + 3 == prefix.pad_mask.shape[1]
    for cache, (keys, values) in zip(prefix.caches, before, strict=True):
        assert cache.length == length
        assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)
    assert prefix.rows[0].ids == [] and len(prefix.running) == 1


def test_other_prefixes_are_refused(small):
    """Those with new tokens, with padding, and of several rows."""
    used = small.prefill(torch.full((1, 4), 9), max_new_tokens=2)
    finish(used)
    padded = small.prefill(torch.tensor([[PAD, 9, 9]]), pad_mask=torch.tensor([[True, False, False]]))
    several = small.prefill(torch.full((2, 4), 9), max_new_tokens=0)
    for prefix in (used, padded, several):
        with pytest.raises(ValueError, match="prefix: expected one row"):
            prefill_after(prefix, torch.full((1, 4), 9))


def test_right_padding_after_a_prefix_is_refused(small):
    prefix = small.prefill(torch.full((1, 4), 9), max_new_tokens=0)
    with pytest.raises(ValueError, match="left"):
        prefill_after(prefix, torch.full((1, 2), 9), torch.tensor([[False, True]]))


def test_a_prefix_counts_for_the_context(small):
    """The prefix, the question and the new tokens have to fit, padding does not."""
    limit = SMALL.text.max_positions
    prefix = small.prefill(torch.full((1, limit - 6), 9), max_new_tokens=0)
    tokens = torch.full((2, 4), 9)
    pad_mask = torch.tensor([[True, True, False, False]] * 2)
    assert [
        len(row.ids)
        for row in finish(prefill_after(prefix, tokens, pad_mask, max_new_tokens=4, min_new_tokens=4))
    ] == [4, 4]
    with pytest.raises(ValueError, match="do not fit"):
        prefill_after(prefix, tokens, max_new_tokens=3)


# ---------------------------------------------------------------------------------------------- drafts


@torch.inference_mode()
def test_wrong_drafts_are_taken_back(small):
    """Positions, caches and mask are those of a state that has never drafted."""
    prompt = torch.tensor([[0, 10, 11]])
    plain = small.prefill(prompt, max_new_tokens=8)
    drafting = DraftState(small.prefill(prompt, max_new_tokens=8), lambda ids: [60, 61, 62])
    plain.step([40])
    drafting.step([40])
    assert drafting.caches[0].length == 7 and len(drafting.guesses) == 3
    plain.step([60])
    drafting.step([60])  # right, without a pass
    assert drafting.caches[0].length == 7 and len(drafting.guesses) == 2
    plain.step([99])
    drafting.step([99])  # wrong: the two that are left go, and three new ones come
    assert drafting.caches[0].length == 9
    torch.testing.assert_close(drafting.logits, plain.logits, rtol=1e-4, atol=1e-4)
    drafting.drop_guesses()
    assert drafting.guesses == [] and drafting.next_position.tolist() == plain.next_position.tolist()
    assert drafting.pad_mask.tolist() == plain.pad_mask.tolist()
    for ours, theirs in zip(drafting.caches, plain.caches, strict=True):
        assert ours.length == theirs.length == 6
        torch.testing.assert_close(ours.keys[:, :, :6], theirs.keys[:, :, :6], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values[:, :, :6], theirs.values[:, :, :6], rtol=1e-4, atol=1e-4)


def test_drafts_stay_within_the_cache(small):
    """Even a draft that is longer than the rest of the text."""
    prompt = torch.tensor([[0, 10, 11]])
    options = dict(max_new_tokens=5, min_new_tokens=5)
    state = DraftState(small.prefill(prompt, **options), lambda ids: [60] * 100)
    capacity = state.caches[0].keys.shape[2]
    for _ in decode(state):
        assert state.caches[0].length <= capacity == 8
    assert [row.ids for row in state.rows] == small.generate(prompt, **options)


def test_only_one_row_without_padding_drafts(small, small_tokenizer):
    """Any other state is returned as it is."""
    tokens = torch.full((2, 3), 9)
    pad_mask = torch.tensor([[True, False, False]])
    assert isinstance(with_drafts(small.prefill(tokens[:1]), small_tokenizer), DraftState)
    for state in (small.prefill(tokens), small.prefill(tokens[:1], pad_mask=pad_mask)):
        assert with_drafts(state, small_tokenizer) is state


def test_drafts_of_the_bundled_model(tiny):
    """On the bundled image, after a prefix: the same row with at least one pass less for each box."""
    model, tokenizer = tiny
    image = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)[None]
    prefix = prefill_image(model, tokenizer, model.encode_image(image))
    tokens = torch.tensor([tokenizer.encode("<grounding>An image of", add_bos=False)])
    passes = []
    hook = model.decoder.register_forward_hook(lambda *_: passes.append(1))
    plain = finish(prefill_after(prefix, tokens))[0]
    without = len(passes)
    drafted = finish(with_drafts(prefill_after(prefix, tokens), tokenizer))[0]
    hook.remove()
    assert drafted.ids == plain.ids and plain.ids[-1] == EOS
    assert drafted.probabilities == pytest.approx(plain.probabilities, rel=1e-3)
    boxes = plain.ids.count(tokenizer.special_ids["</object>"])
    assert boxes and len(passes) - without <= without - boxes


def compare_drafts(small, cases) -> int:
    """Generate with random drafts and without; returns the number of decoder passes that drafts saved."""
    rng = np.random.default_rng(0)
    vocab = small.config.text.vocab_size
    passes = []
    hook = small.decoder.register_forward_hook(lambda *_: passes.append(1))
    saved = 0
    for case in range(cases):
        prompts = torch.from_numpy(rng.integers(3, vocab, (1, int(rng.integers(1, 6)))))
        options = {
            "max_new_tokens": int(rng.integers(1, 12)),
            "temperature": float(rng.choice([0.0, 0.7])),
            "top_k": 5,
            "no_repeat_ngram_size": int(rng.choice([0, 2])),
            "seed": case,
        }
        expected = finish(small.prefill(prompts, **options))
        without = len(passes)
        answer = prompts[0].tolist() + expected[0].ids

        def draft(ids, answer=answer):
            count = int(rng.integers(0, 4))
            right = answer[len(ids) : len(ids) + count]
            return right if rng.random() < 0.6 else [*right[:-1], *rng.integers(3, vocab, 2).tolist()]

        passes.clear()
        found = finish(DraftState(small.prefill(prompts, **options), draft))
        assert [r.ids for r in found] == [r.ids for r in expected], case
        for a, b in zip(found, expected, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, rel=1e-3, abs=1e-6)
        saved += without - len(passes)
        passes.clear()
    hook.remove()
    return saved


def test_drafts_change_nothing_but_the_number_of_passes(small):
    assert compare_drafts(small, cases=80) > 80


def test_likely_next(small_tokenizer):
    """The draft of every token of a grounded text, at the places where the markup decides."""
    ids = small_tokenizer.encode(
        "<grounding> An image of<phrase> a cat</phrase><object><patch_index_0001><patch_index_0034></object>."
    )
    right = wrong = 0
    for end in range(1, len(ids)):
        for guess in likely_next(small_tokenizer, ids[:end]):
            right += guess == ids[end]
            wrong += guess != ids[end]
    assert (right, wrong) == (3, 0)
    assert likely_next(small_tokenizer, [small_tokenizer.first_location]) == []
