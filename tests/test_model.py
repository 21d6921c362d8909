"""The model against itself and against recorded values; no transformers needed."""

import base64
import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, prompt_batch
from PIL import Image, ImageOps

from inference.convert import published_config
from kosmos2 import (
    EOS,
    FIRST_POSITION,
    PAD,
    DecodeState,
    GenerationOptions,
    Kosmos2,
    Kosmos2Config,
    causal_mask,
    decode,
    finish,
    open_image,
    preprocess_image,
    repeated_ngrams,
    sample,
    sinusoidal_positions,
    to_rgb,
    token_positions,
)
from load_weights import read_config

PROMPTS = [
    "<grounding>An image of",
    "<grounding><phrase> the red star left of the blue square</phrase>",
    "An image",
]
GOLDEN = Path(__file__).with_name("golden.json")


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    size = SMALL.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- the forward pass


def test_golden_values(small, small_tokenizer):
    """Logits and ids that transformers computed once with these weights; tests/golden.py records
    them."""
    golden = json.loads(GOLDEN.read_text())
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    with torch.no_grad():
        image_embeds = small.encode_image(pixels(1))
        logits, loss = small(tokens, image_embeds=image_embeds, image_mask=image_mask, labels=tokens)
    torch.testing.assert_close(
        image_embeds[0, 0, :8], torch.tensor(golden["image_embeds"]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(logits[0, -1, :8], torch.tensor(golden["logits"]), rtol=1e-4, atol=1e-4)
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    for name, options in golden["options"].items():
        if "num_beams" in options:
            continue  # test_beam.py
        new = finish(small.prefill(tokens, pixels=pixels(1), image_mask=image_mask, **options))
        assert new[0].ids == golden["ids"][name], name
        assert new[0].probabilities == pytest.approx(golden["probabilities"][name], rel=1e-3)


def test_shapes_and_sizes_of_the_published_model():
    with torch.device("meta"):
        model = Kosmos2(Kosmos2Config())
        parameters = {
            name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
        }
        assert parameters == {"vision": 303_179_776, "resampler": 19_015_680, "decoder": 1_342_289_920}
        tokens = torch.zeros(1, 71, dtype=torch.long)
        assert model.encode_image(torch.zeros(2, 3, 224, 224)).shape == (2, 64, 2048)
        x = model.decoder.embed_tokens(tokens)
        assert model.decoder.unembed(model.decoder(x, tokens)).shape == (1, 71, 65037)


def test_positions_begin_at_two_and_skip_padding():
    pad = torch.tensor([[True, True, False, False], [False, False, False, True]])
    assert token_positions(pad).tolist() == [[1, 1, 2, 3], [2, 3, 4, 4]]
    later = torch.tensor([[7], [9]])  # the first position of each row
    assert token_positions(pad, later).tolist() == [[6, 6, 7, 8], [9, 10, 11, 11]]
    table = sinusoidal_positions(torch.tensor([[2, 5]]), 6)
    assert table.shape == (1, 2, 6)
    assert table[0, 1, 0] == pytest.approx(torch.sin(torch.tensor(5.0)).item())  # sines first …
    assert table[0, 1, 5] == pytest.approx(torch.cos(torch.tensor(5 / 10000)).item())  # … cosines last
    assert sinusoidal_positions(torch.tensor([[3]]), 7).shape == (1, 1, 7)


def test_a_position_sees_only_what_came_before(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    changed = tokens.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        a = small(tokens, pixels=pixels(1), image_mask=image_mask)
        b = small(changed, pixels=pixels(1), image_mask=image_mask)
    assert torch.equal(a[:, :-1], b[:, :-1]) and not torch.equal(a[:, -1], b[:, -1])


def test_causal_mask():
    """Of the last two of four positions, with and without padding; a padding position sees itself."""
    none = torch.zeros(1, 4, dtype=torch.bool)
    assert causal_mask(2, none).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(1, none) is None
    pad_mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    last = [[False, False, True, True], [False, False, False, True]]
    assert causal_mask(1, pad_mask)[:, 0, 0].tolist() == last
    assert causal_mask(2, pad_mask)[1, 0].tolist() == [
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_several_pictures_and_none(small, small_tokenizer):
    """Rows with two images, one and none in one batch are what each row is alone."""
    prompts = ["<image> a star <image> a heart", "<image> a cross", "a red star and"]
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, prompts, [2, 1, 0])
    three = pixels(3)
    with torch.no_grad():
        together = small(tokens, pixels=three, image_mask=image_mask, pad_mask=pad_mask)
        for row, images in enumerate((three[:2], three[2:], None)):
            real = ~pad_mask[row]
            alone = small(
                tokens[row : row + 1, real],
                pixels=images,
                image_mask=image_mask[row : row + 1, real] if images is not None else None,
            )
            torch.testing.assert_close(together[row, real], alone[0], rtol=1e-5, atol=1e-5)


def test_loss_is_shifted_and_ignores(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    labels = torch.full_like(tokens, -100)
    labels[0, -2:] = tokens[0, -2:]
    with torch.no_grad():
        logits, loss = small(tokens, pixels=pixels(1), image_mask=image_mask, labels=labels)
    log_probs = logits[0].log_softmax(-1)
    by_hand = -(log_probs[-3, tokens[0, -2]] + log_probs[-2, tokens[0, -1]]) / 2
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_gradients_reach_every_parameter(small_tokenizer):
    model = Kosmos2(SMALL)
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    model(tokens, pixels=pixels(1), image_mask=image_mask, labels=tokens)[1].backward()
    # A bias of the keys shifts all scores of a query alike, and softmax does not care.
    without = [
        n for n, p in model.named_parameters() if "k_proj.bias" not in n and not p.grad.abs().sum() > 0
    ]
    assert without == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(image_mask=None), r"image_mask marks \[0"),
        (dict(pixels=None), "for each of 0 images"),
        (dict(pixels=torch.zeros(1, 3, 41, 42)), "expected"),
        (dict(pixels=torch.zeros(3, 42, 42)), "expected"),
        (dict(image_embeds=torch.zeros(1, 5, 48)), "not both"),
        (dict(tokens=torch.full((1, 9), 10**6)), "token ids"),
        (dict(tokens=torch.zeros(9, dtype=torch.long)), "tokens: expected"),
        (dict(pixels=None, image_embeds=torch.zeros(1, 5, 96)), "image_embeds: expected"),
        (dict(image_mask=torch.zeros(1, 3, dtype=torch.bool)), "image_mask: expected"),
        (dict(pad_mask=torch.zeros(1, 3, dtype=torch.bool)), "pad_mask: expected"),
        (dict(pad_mask=torch.zeros(1, 11, dtype=torch.long)), "expected bool"),
        (dict(labels=torch.zeros(2, 3, dtype=torch.long)), "batch_size"),
        (dict(tokens=torch.zeros(1, 9)), "tokens: expected int64"),
    ],
)
def test_what_does_not_fit_is_refused(small, small_tokenizer, change, words):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    arguments = dict(tokens=tokens, pixels=pixels(1), image_mask=image_mask) | change
    with pytest.raises(ValueError, match=words):
        small(**arguments)


def test_an_image_slot_cannot_be_padding(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    for call in (small, small.generate):
        with pytest.raises(ValueError, match="same token"):
            call(tokens, pixels=pixels(1), image_mask=image_mask, pad_mask=image_mask)


def test_preprocessing_squashes_and_takes_every_mode():
    gradient = Image.radial_gradient("L").resize((64, 20))
    for mode in ("L", "RGB", "CMYK", "RGBA", "P", "1"):
        assert preprocess_image(gradient.convert(mode), 28).shape == (3, 28, 28)
    white = preprocess_image(Image.new("RGB", (5, 9), "white"), 14)
    torch.testing.assert_close(white[:, 0, 0], torch.tensor([1.93033625, 2.07488384, 2.14589594]))


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("left_padded", [False, True])
def test_the_cache_changes_nothing_at_any_step(small, small_tokenizer, left_padded):
    """Every new token, computed with the cache, is the argmax of a fresh pass over the whole
    sequence."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS[:2] if left_padded else PROMPTS[:1])
    images = pixels(len(tokens))
    state = small.prefill(tokens, pixels=images, image_mask=image_mask, pad_mask=pad_mask, max_new_tokens=12)
    results = finish(state)
    new = [result.ids for result in results]
    grown, grown_mask, grown_pad = tokens, image_mask, pad_mask
    for step in range(12):
        with torch.no_grad():
            logits = small(grown, pixels=images, image_mask=grown_mask, pad_mask=grown_pad)[:, -1]
        assert logits.argmax(-1).tolist() == [row[step] for row in new]
        expected = logits.softmax(-1).amax(-1)
        torch.testing.assert_close(
            torch.tensor([result.probabilities[step] for result in results]), expected, rtol=1e-4, atol=1e-6
        )
        column = torch.tensor([[row[step]] for row in new])
        grown = torch.cat([grown, column], dim=1)
        grown_mask, grown_pad = (
            torch.cat([m, torch.zeros_like(column, dtype=bool)], 1) for m in (grown_mask, grown_pad)
        )


@pytest.mark.parametrize(
    "options",
    [dict(), dict(no_repeat_ngram_size=2), dict(temperature=1.5, top_p=0.9, seed=7),
     dict(temperature=1.0, top_k=20, seed=1)],
)  # fmt: skip
def test_a_row_never_depends_on_the_others(small, small_tokenizer, options):
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    images, rows = pixels(3), []
    together = small.generate(
        tokens, pixels=images, image_mask=image_mask, pad_mask=pad_mask, max_new_tokens=14, **options
    )
    for row in range(3):
        alone, mask, _ = prompt_batch(small_tokenizer, PROMPTS[row : row + 1])
        rows += small.generate(
            alone, pixels=images[row : row + 1], image_mask=mask, max_new_tokens=14, **options
        )
    assert together == rows


def test_rows_that_end_early_leave_the_others_alone(small, small_tokenizer, monkeypatch):
    """A model that ends some rows early and others late."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    arguments = dict(pixels=pixels(3), image_mask=image_mask, pad_mask=pad_mask, max_new_tokens=10)
    arguments |= dict(temperature=1.0, seed=5)
    free = small.generate(tokens, **arguments)
    stop = free[1][2]  # let the token that row 1 draws third be </s>
    assert stop not in free[1][:2] and any(stop not in row for row in free)
    monkeypatch.setattr("kosmos2.EOS", stop)
    stopped = small.generate(tokens, **arguments)
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len(stopped[1]) == 3


def test_lengths(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    arguments = dict(pixels=pixels(1), image_mask=image_mask)
    assert small.generate(tokens, max_new_tokens=0, **arguments) == [[]]
    assert len(small.generate(tokens, max_new_tokens=1, **arguments)[0]) == 1
    hot = dict(temperature=30.0, seed=3, max_new_tokens=400, **arguments)
    free, held = small.generate(tokens, **hot)[0], small.generate(tokens, min_new_tokens=400, **hot)[0]
    assert EOS not in held and len(held) == 400
    assert len(free) <= 400


def test_positions_beyond_training_are_refused(small_tokenizer):
    short = Kosmos2(replace(SMALL, text=replace(SMALL.text, max_positions=20))).eval()
    tokens = torch.full((1, 15), 9)
    assert len(short.generate(tokens, max_new_tokens=5, min_new_tokens=5)[0]) == 5
    with pytest.raises(ValueError, match="shorten one of them"):
        short.generate(tokens, max_new_tokens=6)
    with pytest.raises(ValueError, match="do not fit into the context"):
        short.generate(torch.full((1, 21), 9), max_new_tokens=1)
    with pytest.raises(ValueError, match="21 tokens"):
        short(torch.full((1, 21), 9))
    padded = torch.cat([torch.full((1, 10), 1), tokens], dim=1)  # padding takes no position
    pad_mask = torch.arange(25)[None] < 10
    assert len(short.generate(padded, pad_mask=pad_mask, max_new_tokens=5, min_new_tokens=5)[0]) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens"), (dict(max_new_tokens=2.5), "max_new_tokens"),
        (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens"), (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"), (dict(top_k=0), "top_k"), (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"), (dict(no_repeat_ngram_size=-1), "no_repeat"), (dict(max_new_tokens=5000), "context"),
        (dict(seed=0.5), "seed"), (dict(seed=2**64), "seed"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(small, options, words):
    with pytest.raises(ValueError, match=words):
        small.generate(torch.full((1, 4), 9), **options)


def test_right_padding_is_refused(small):
    with pytest.raises(ValueError, match="left"):
        small.generate(torch.full((1, 4), 9), pad_mask=torch.tensor([[False, False, False, True]]))


# --------------------------------------------------------------------------------------- the decoding state


def random_rows(model, padding=()):
    """Embeddings x (2, 9, D) and pad_mask (2, 9); row 1 begins with padding at these positions."""
    tokens = torch.randint(3, 900, (2, 9), generator=torch.Generator().manual_seed(0))
    pad_mask = torch.zeros(2, 9, dtype=torch.bool)
    pad_mask[1, list(padding)] = True
    return model.decoder.embed_tokens(tokens), pad_mask


@torch.inference_mode()
@pytest.mark.parametrize("padding", [(), (0, 1, 2), (0, 1, 2, 3, 6)])
@pytest.mark.parametrize("pieces", [(4, 5), (1, 1, 7), (8, 1), (1,) * 9])
def test_advancing_in_pieces_equals_one_pass(small, pieces, padding):
    """Also if a piece is all padding for a row, and with padding in the middle, as after a prefix."""
    x, pad_mask = random_rows(small, padding)
    expected = small.decoder(x, token_positions(pad_mask), causal_mask(9, pad_mask))
    state = DecodeState(small, [[], []], GenerationOptions(), capacity=9)
    found = [
        state.advance(part, mask if mask.any() else None)
        for part, mask in zip(x.split(pieces, dim=1), pad_mask.split(pieces, dim=1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(found, dim=1)[~pad_mask], expected[~pad_mask], rtol=1e-4, atol=1e-5)
    assert state.pad_mask.tolist() == pad_mask.tolist()
    assert state.next_position[:, 0].tolist() == [FIRST_POSITION + 9, FIRST_POSITION + 9 - len(padding)]


@torch.inference_mode()
def next_logits(model, *texts):
    """The logits (B, V) after each text, each in its own pass."""
    return torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])


def three_prompts(model, **options):
    """The state of three prompts of different lengths, and the prompts."""
    prompts = [[0, 10, 11, 12], [0, 20], [0, 30, 31]]
    tokens = torch.tensor([[PAD] * (4 - len(prompt)) + prompt for prompt in prompts])
    return model.prefill(tokens, pad_mask=tokens == PAD, **options), prompts


@torch.inference_mode()
@pytest.mark.parametrize("indices", [[1], [2, 0], [2, 1, 0], [1, 1], [0, 2, 0, 1], [0, 1, 2]])
def test_keep_drops_reorders_and_copies(small, indices):
    """What follows is what would follow these prompts alone."""
    state, prompts = three_prompts(small, max_new_tokens=4)
    logits = state.logits
    state.keep(indices)
    assert torch.equal(state.logits, logits[indices])
    assert [row.prompt for row in state.running] == [prompts[i] for i in indices]
    added = [40 + n for n in range(len(indices))]
    state.step(added)
    texts = [[*row.prompt, token] for row, token in zip(state.running, added, strict=True)]
    torch.testing.assert_close(state.logits, next_logits(small, *texts), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_repeated_row_is_a_copy(small):
    """One is the row itself, the others are copies, with caches of their own."""
    state, _ = three_prompts(small, max_new_tokens=4)
    state.keep([1, 1, 1])
    first, second, third = state.running
    assert first is state.rows[1] and second == third == first
    second.ids.append(7)
    second.probabilities.append(0.5)
    assert first.ids == third.ids == [] and first.probabilities == third.probabilities == []
    state.step([50, 60, 70])
    state.step([51, 61, 71])
    texts = [[0, 20, 50, 51], [0, 20, 60, 61], [0, 20, 70, 71]]
    torch.testing.assert_close(state.logits, next_logits(small, *texts), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_step_beyond_the_cache_is_noticed(small):
    """Without a check, PyTorch would drop the one position that has no room, silently."""
    state = small.prefill(torch.full((1, 4), 9), max_new_tokens=1)
    state.step([5])
    with pytest.raises(AssertionError, match="full"):
        state.step([6])


def test_decode_yields_all_rows_at_each_step(small, monkeypatch):
    """Rows that have ended stay in the list, unchanged, at their places."""
    options = dict(max_new_tokens=6, temperature=1.0, seed=5)
    free = [row.ids for row in finish(three_prompts(small, **options)[0])]
    stop = free[1][2]
    assert all(stop not in row for row in (free[0], free[1][:2], free[2]))
    monkeypatch.setattr("kosmos2.EOS", stop)  # row 1 ends after three tokens
    state, prompts = three_prompts(small, **options)
    lengths = []
    for rows in decode(state):
        assert [row.prompt for row in rows] == prompts
        lengths.append([len(row.ids) for row in rows])
    assert lengths == [[n, min(n, 3), n] for n in range(1, 7)]
    assert [row.ids for row in state.rows] == [free[0], free[1][:3], free[2]]
    assert len(state.running) == 2  # ended rows leave the caches
    assert all(len(row.probabilities) == len(row.ids) for row in state.rows)


def test_a_state_is_decoded_once(small):
    """A second decode yields nothing, and a second finish returns the same rows, also after an
    interrupted decode."""
    state, _ = three_prompts(small, max_new_tokens=3, min_new_tokens=3)
    first = [list(row.ids) for row in finish(state)]
    assert [len(ids) for ids in first] == [3, 3, 3]
    assert list(decode(state)) == [] and [row.ids for row in finish(state)] == first
    state, _ = three_prompts(small, max_new_tokens=3, min_new_tokens=3)
    next(decode(state))
    assert list(decode(state)) == [] and [row.ids for row in finish(state)] == [ids[:1] for ids in first]


def test_one_token_passes_few_functions(small):
    """At most twelve of ours from decode to the next logits; Decoder.forward counts as one."""
    state = small.prefill(torch.tensor([[0, 10, 11]]), max_new_tokens=4)
    steps = decode(state)
    next(steps)
    called, inside = [], []

    def count(frame, event, _):
        name = frame.f_code.co_qualname
        if Path(frame.f_code.co_filename).parent != ROOT or "<listcomp>" in name:
            return
        if event == "call" and not inside:
            called.append(name)
        if name == "Decoder.forward" and event == "call":
            inside.append(name)
        elif name == "Decoder.forward" and event == "return":
            inside.pop()

    sys.setprofile(count)
    try:
        next(steps)
    finally:
        sys.setprofile(None)
    assert len(state.rows[0].ids) == 2 and {"decode", "Decoder.forward", "sample"} <= set(called)
    assert len(called) <= 12, called


# ------------------------------------------------------------------------------------------------ sampling


def draw(probabilities, u, **options):
    options = dict(temperature=1.0, top_k=None, top_p=None) | options
    return sample(torch.tensor([probabilities]).log(), uniform=torch.tensor([u]), **options).item()


@pytest.mark.parametrize("temperature", [1e-40, 1, 1e8, 3e38])
def test_the_most_likely_token_is_greedy_at_any_temperature(small, temperature):
    """With top_k=1 or a tiny top_p, also if all probabilities round to the same number."""
    tokens = torch.tensor([[0, 10, 11]])
    greedy = small.generate(tokens, max_new_tokens=8)
    for options in ({"top_k": 1}, {"top_p": 1e-30}):
        assert small.generate(tokens, max_new_tokens=8, temperature=temperature, seed=1, **options) == greedy
    for too_hot in (1e39, 10**400, float("inf")):
        with pytest.raises(ValueError, match="temperature"):
            small.generate(tokens, temperature=too_hot)


def test_sampling_inverts_the_distribution():
    probabilities = [0.1, 0.6, 0.3]  # in order of likelihood: 1 up to 0.6, then 2 up to 0.9, then 0
    assert [draw(probabilities, u) for u in (0.0, 0.59, 0.61, 0.89, 0.91, 0.9999)] == [1, 1, 2, 2, 0, 0]


def test_top_p_keeps_the_token_that_crosses():
    probabilities = [0.1, 0.6, 0.3]
    assert {draw(probabilities, u, top_p=0.7) for u in (0.0, 0.5, 0.9999)} == {1, 2}
    assert {draw(probabilities, u, top_p=1e-9) for u in (0.0, 0.5, 0.9999)} == {1}
    assert {draw(probabilities, u, top_p=1.0) for u in (0.0, 0.7, 0.9999)} == {0, 1, 2}


def test_top_p_at_the_boundary():
    """Tokens that reach p exactly are enough; top_p = 1 removes none of a full vocabulary."""
    probabilities = [0.3, 0.1, 0.1, 0.5]
    assert {draw(probabilities, u / 100, top_p=0.8) for u in range(100)} == {0, 3}
    logits = torch.randn(1, 65037, generator=torch.Generator().manual_seed(0))
    for u in (0.0, 0.5, 0.999, 0.999999):
        uniform = torch.tensor([u])
        assert sample(logits, 1.0, None, 1.0, uniform) == sample(logits, 1.0, None, None, uniform)


def test_top_k():
    probabilities = [0.1, 0.6, 0.3]
    assert {draw(probabilities, u, top_k=1) for u in (0.0, 0.9999)} == {1}
    assert draw(probabilities, 0.9999, top_k=99) == 0  # more than there are
    tied = [0.25, 0.25, 0.25, 0.25]
    assert {draw(tied, u, top_k=2) for u in (0.0, 0.4, 0.6, 0.9999)} == {0, 1}  # exactly two of four equals
    assert (
        draw([0.5, 0.3, 0.2], 0.99, top_k=2, top_p=0.6) == 0
    )  # of the two left, the first already holds 5/8


def test_temperatures():
    logits = torch.tensor([[1.0, 3.0, 3.0]])
    assert sample(logits, 0.0, None, None, torch.zeros(1)).item() == 1  # the first of equals
    assert sample(logits * 1e30, 1e-30, None, None, torch.tensor([0.4])).item() in (1, 2)
    cold = {
        sample(torch.tensor([[1.0, 3.0, 2.0]]), 0.01, None, None, torch.tensor([u])).item()
        for u in (0.0, 0.999)
    }
    assert cold == {1}


def test_seeds(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    arguments = dict(pixels=pixels(1), image_mask=image_mask, temperature=1.0, max_new_tokens=20)
    runs = [small.generate(tokens, seed=seed, **arguments) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert small.generate(tokens, **arguments) != small.generate(tokens, **arguments)


def test_ngram_block():
    assert repeated_ngrams([5, 6, 7, 5, 6], 3) == [7]
    assert repeated_ngrams([5, 6, 7, 8], 3) == []
    assert repeated_ngrams([5, 6], 3) == []
    assert sorted(repeated_ngrams([5, 6, 5], 1)) == [5, 5, 6]
    assert repeated_ngrams([], 2) == []


def test_ngram_block_holds_in_the_output(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    new = small.generate(
        tokens, pixels=pixels(1), image_mask=image_mask, max_new_tokens=60, no_repeat_ngram_size=2
    )
    text = tokens[0].tolist() + new[0]
    pairs = list(zip(text, text[1:], strict=False))
    assert len(set(pairs)) == len(pairs)


def test_weights_that_are_not_finite_are_noticed(small_tokenizer):
    model = Kosmos2(SMALL).eval()
    with torch.no_grad():
        model.decoder.layer_norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.generate(torch.full((1, 4), 9), max_new_tokens=2)


# ------------------------------------------------------------------------------------------- configuration


def write(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(published_config(SMALL) | changes))
    return path


def test_config_round_trip(tmp_path):
    assert read_config(write(tmp_path, unknown=1)) == SMALL
    assert read_config(write(tmp_path, location_grid=8)) == replace(SMALL, location_grid=8)
    (tmp_path / "empty.json").write_text("{}")
    assert read_config(tmp_path / "empty.json") == Kosmos2Config()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="llama"), "model_type"), (dict(latent_query_num=0), "latent_query_num"),
        (dict(latent_query_num="64"), "latent_query_num"), (dict(text_config=[1]), "text_config"),
        (dict(text_config=dict(embed_dim=100, attention_heads=3)), "multiple"),
        (dict(text_config=dict(layers=-1)), "layers"), (dict(text_config=dict(activation_function="relu")), "gelu"),
        (dict(text_config=dict(layer_norm_eps=0.0)), "layer_norm_eps"), (dict(text_config=dict(pad_token_id=5)), "pad"),
        (dict(vision_config=dict(hidden_act="gelu")), "quick_gelu"), (dict(vision_config=dict(patch_size=0)), "patch_size"),
        (dict(vision_config=dict(image_size=8)), "patch_size"),
        (dict(text_config=dict(scale_embedding=False)), "scale_embedding"),
        (dict(text_config=dict(max_position_embeddings=True)), "max_positions"),
        (dict(location_grid=0), "location_grid"), (dict(location_grid=10**9), "location_grid"),
        (dict(text_config=dict(vocab_size=2**40)), "vocab_size"), (dict(vision_config=dict(num_hidden_layers=10**6)), "layers"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        read_config(write(tmp_path, **changes))


def test_config_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "none.json")
    for content in (b"{", b"[1]", b"\xff\xfe\x00"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match="bad.json"):
            read_config(tmp_path / "bad.json")


# ------------------------------------------------------------------------------------------- reading images


def first_pixel(image: Image.Image) -> tuple[int, int, int]:
    return to_rgb(image).getpixel((0, 0))


def test_transparency_is_composited_on_white():
    assert first_pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == (255, 255, 255)
    assert first_pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 51))) == (204, 204, 204)
    assert first_pixel(Image.new("LA", (2, 2), (0, 51))) == (204, 204, 204)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert first_pixel(palette) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert first_pixel(palette) == (255, 255, 255)
    white = preprocess_image(Image.new("RGBA", (5, 9), (0, 0, 0, 0)), 14)
    assert torch.equal(white, preprocess_image(Image.new("RGB", (5, 9), "white"), 14))


def test_deep_images_are_refused(tmp_path):
    """16-bit and float images, whose values Pillow would clip: one line that names file and mode."""
    deep = np.full((2, 2), 128 * 257, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "16-bit.png")
    (tmp_path / "16-bit.pgm").write_bytes(b"P5 2 2 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray((deep / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "32-bit.tif")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"cannot read .*{path.name}: .*mode [IF].* more than 8 bits"):
            open_image(path)
        with Image.open(path) as image, pytest.raises(ValueError, match="more than 8 bits"):
            preprocess_image(image, 14)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    """As ImageOps.exif_transpose, for all eight values; a rational ImageWidth does not matter."""
    image = Image.radial_gradient("L").crop((0, 0, 80, 48)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        expected = ImageOps.exif_transpose(stored)
    assert open_image(tmp_path / "a.png").tobytes() == expected.tobytes()
    rational_width = struct.pack("<HHII", 0x0100, 5, 1, 38)  # 7/2, at offset 38
    entries = struct.pack("<H", 2) + rational_width + struct.pack("<HHII", 0x0112, 3, 1, orientation)
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<III", 0, 7, 2)
    image.save(tmp_path / "b.jpg", exif=block)
    assert open_image(tmp_path / "b.jpg").size == expected.size


def test_published_pixel_values(monkeypatch):
    """Equal to the image processor of transformers for a real photo."""
    transformers = pytest.importorskip("transformers")
    folder = os.environ.get("KOSMOS2_REFERENCE")
    if not folder:
        pytest.skip("KOSMOS2_REFERENCE is not set")
    image = Image.open(Path(folder) / "two_dogs.jpg")
    processor = transformers.CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess_image(image, 224), expected, rtol=0, atol=1e-5)


def test_only_pillow_images_are_preprocessed():
    with pytest.raises(ValueError, match=r"expected a PIL\.Image\.Image, got ndarray"):
        preprocess_image(np.zeros((8, 8, 3), dtype=np.uint8), 14)


def test_urls_of_files_and_data(tmp_path):
    """A file: or data: URL gives the image of the file."""
    path = tmp_path / "a b.png"
    Image.radial_gradient("L").resize((20, 12)).convert("RGBA").save(path)
    expected = open_image(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    for url in (path.as_uri(), f"data:image/png;base64,{encoded}"):
        found = open_image(url)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())
    for url in ((tmp_path / "none.png").as_uri(), tmp_path.as_uri(), "data:image/png;base64,AAAA", "data:x"):
        with pytest.raises((FileNotFoundError, ValueError), match="cannot read|no image file"):
            open_image(url)


def test_addresses_are_not_downloaded(monkeypatch):
    monkeypatch.setattr("kosmos2.urlopen", None)  # must not be called
    for address in ("http://localhost:9/a.png", "https://localhost:9/a.png", "ftp://localhost/a.png"):
        with pytest.raises(FileNotFoundError, match="download it and pass the file"):
            open_image(address)


@pytest.mark.parametrize(
    "name", ["a\0b.png", "x" * 300 + ".png", "y/" * 5000, "", ".", "none.png", "new\nline"]
)
def test_names_that_are_no_files(tmp_path, monkeypatch, name):
    """One short line that can be printed, also for names that no system takes."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no image file at") as raised:
        open_image(name)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 160


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_is_not_waited_for(tmp_path):
    """Opening one would wait for a writer, forever."""
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", (tmp_path / "a.png").as_uri()):
        with pytest.raises(FileNotFoundError, match="no image file"):
            open_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*bad\.png"):
        open_image(tmp_path / "bad.png")


def test_a_truncated_image_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot read .*half"):
        open_image(tmp_path / "half.png")
