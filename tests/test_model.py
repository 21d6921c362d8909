"""The model against itself and against recorded values; no transformers needed."""

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, prompt_batch
from PIL import Image, ImageOps

from kosmos2 import (
    EOS,
    PAD,
    DecodeState,
    GenerationOptions,
    Kosmos2,
    Kosmos2Config,
    best_continuations,
    causal_mask,
    finish,
    open_image,
    preprocess_image,
    repeated_ngrams,
    sample,
    sinusoidal_positions,
    to_rgb,
    token_positions,
)  # fmt: skip
from load_weights import published_config

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
        new = finish(small.prefill(tokens, pixels=pixels(1), image_mask=image_mask, **options))
        assert new[0].ids == golden["ids"][name], name
        if name in golden["probabilities"]:
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
    assert token_positions(torch.zeros(2, 4, dtype=torch.long), pad).tolist() == [[1, 1, 2, 3], [2, 3, 4, 4]]
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
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


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
        (dict(pixels=None), "images: 0"),
        (dict(pixels=torch.zeros(1, 3, 41, 42)), "expected"),
        (dict(pixels=torch.zeros(3, 42, 42)), "expected"),
        (dict(image_embeds=torch.zeros(1, 5, 48)), "not both"),
        (dict(tokens=torch.full((1, 9), 10**6)), "token ids"),
        (dict(tokens=torch.zeros(9, dtype=torch.long)), "tokens: expected"),
        (dict(pixels=None, image_embeds=torch.zeros(1, 5, 96)), "image_embeds: expected"),
        (dict(image_mask=torch.zeros(1, 3, dtype=torch.bool)), "image_mask: expected"),
        (dict(pad_mask=torch.zeros(1, 3, dtype=torch.bool)), "pad_mask: expected"),
        (dict(pad_mask=torch.zeros(1, 11, dtype=torch.long)), "expected bool"),
        (dict(labels=torch.zeros(2, 3, dtype=torch.long)), "labels: expected"),
        (dict(tokens=torch.zeros(1, 9)), "tokens: expected int64"),
    ],
)
def test_what_does_not_fit_is_refused(small, small_tokenizer, change, words):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    arguments = dict(tokens=tokens, pixels=pixels(1), image_mask=image_mask) | change
    with pytest.raises(ValueError, match=words):
        small(**arguments)


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
    [dict(), dict(no_repeat_ngram_size=2), dict(num_beams=3), dict(temperature=1.5, top_p=0.9, seed=7),
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


def test_streaming_yields_what_generate_returns(small, small_tokenizer):
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    arguments = dict(pixels=pixels(3), image_mask=image_mask, pad_mask=pad_mask, max_new_tokens=6)
    steps = list(small.stream(tokens, **arguments))
    assert [list(column) for column in zip(*steps, strict=True)] == small.generate(tokens, **arguments)


def test_lengths(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    arguments = dict(pixels=pixels(1), image_mask=image_mask)
    assert small.generate(tokens, max_new_tokens=0, **arguments) == [[]]
    assert len(small.generate(tokens, max_new_tokens=1, **arguments)[0]) == 1
    assert small.generate(tokens, max_new_tokens=1, num_beams=2, **arguments)[0]
    hot = dict(temperature=30.0, seed=3, max_new_tokens=400, **arguments)
    free, held = small.generate(tokens, **hot)[0], small.generate(tokens, min_new_tokens=400, **hot)[0]
    assert EOS not in held and len(held) == 400
    assert len(free) <= 400


def test_positions_beyond_training_are_refused(small_tokenizer):
    short = Kosmos2(replace(SMALL, text=replace(SMALL.text, max_positions=20))).eval()
    tokens = torch.full((1, 15), 9)
    assert len(short.generate(tokens, max_new_tokens=5, min_new_tokens=5)[0]) == 5
    with pytest.raises(ValueError, match="at most 5"):
        short.generate(tokens, max_new_tokens=6)
    with pytest.raises(ValueError, match="shorten the prompt"):
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
        (dict(top_p=1.5), "top_p"), (dict(no_repeat_ngram_size=-1), "no_repeat"), (dict(num_beams=0), "num_beams"),
        (dict(num_beams=2, temperature=1.0), "does not sample"), (dict(num_beams=2.0), "num_beams"), (dict(max_new_tokens=5000), "context"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(small, options, words):
    with pytest.raises(ValueError, match=words):
        small.generate(torch.full((1, 4), 9), **options)


def test_right_padding_is_refused(small):
    with pytest.raises(ValueError, match="left"):
        small.generate(torch.full((1, 4), 9), pad_mask=torch.tensor([[False, False, False, True]]))


# ------------------------------------------------------------------------------------------------ sampling


def draw(probabilities, u, **options):
    options = dict(temperature=1.0, top_k=None, top_p=None) | options
    return sample(torch.tensor([probabilities]).log(), uniform=torch.tensor([u]), **options).item()


def test_an_image_slot_cannot_be_padding(small, small_tokenizer):
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    for call in (small, small.generate):
        with pytest.raises(ValueError, match="same token"):
            call(tokens, pixels=pixels(1), image_mask=image_mask, pad_mask=image_mask)


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
    assert Kosmos2Config.from_json(write(tmp_path, unknown=1)) == SMALL
    (tmp_path / "empty.json").write_text("{}")
    assert Kosmos2Config.from_json(tmp_path / "empty.json") == Kosmos2Config()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="llama"), "model_type"), (dict(latent_query_num=0), "latent_query_num"),
        (dict(latent_query_num="64"), "latent_query_num"), (dict(text_config=[1]), "text_config"),
        (dict(text_config=dict(embed_dim=100, attention_heads=3)), "multiple"),
        (dict(text_config=dict(layers=-1)), "layers"), (dict(text_config=dict(activation_function="relu")), "gelu"),
        (dict(text_config=dict(layer_norm_eps=0.0)), "layer_norm_eps"), (dict(text_config=dict(pad_token_id=5)), "pad"),
        (dict(vision_config=dict(hidden_act="gelu")), "quick_gelu"), (dict(vision_config=dict(image_size=7)), "patch"),
        (dict(text_config=dict(scale_embedding=False)), "scale_embedding"),
        (dict(text_config=dict(max_position_embeddings=True)), "max_positions"),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        Kosmos2Config.from_json(write(tmp_path, **changes))


def test_config_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        Kosmos2Config.from_json(tmp_path / "none.json")
    for content in (b"{", b"[1]", b"\xff\xfe\x00"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match="bad.json"):
            Kosmos2Config.from_json(tmp_path / "bad.json")


# ---------------------------------------------------------------------------------------- beams


@pytest.mark.parametrize("num_beams", [1, 2])
def test_padding_is_never_generated(small, num_beams):
    """Not even if it is the most likely token."""
    state = small.prefill(torch.tensor([[0, 5]]), max_new_tokens=1, num_beams=num_beams)
    expected = int(state.logits.argmax())
    state.logits = state.logits.clone()
    state.logits[:, PAD] = state.logits.max() + 5
    assert expected != PAD and finish(state)[0].ids == [expected]


def test_beams_keep_to_a_constraint(small):
    """With one allowed text there is nothing to search, and no step is spent on texts that broke
    the rule."""
    path, seen = [10, 11, 12, EOS], []

    def constraint(ids, left):
        seen.append(ids[2:])
        allowed = np.zeros(small.config.text.vocab_size, dtype=bool)
        allowed[path[len(ids) - 2]] = True
        return allowed

    assert (
        small.generate(torch.tensor([[0, 5]]), num_beams=3, max_new_tokens=20, constraint=constraint)[0]
        == path
    )
    assert {tuple(ids) for ids in seen} == {tuple(path[:n]) for n in range(4)}


def test_a_beam_search_compares_means(small, monkeypatch):
    """Of a short text of probability 0.36 and a long one of 0.34 the long one wins: its tokens are
    likelier on average."""
    a, b, c, d = 10, 11, 12, 13
    table = {
        None: {a: 0.6, b: 0.4},
        a: {EOS: 0.6, c: 0.4},
        b: {c: 0.95, EOS: 0.05},
        c: {d: 0.95, EOS: 0.05},
        d: {EOS: 0.95, c: 0.05},
    }

    def step(self, parents, sequences):
        self.rows = [self.rows[i] for i in parents]
        self.sequences = sequences
        self.logits = torch.full((len(sequences), small.config.text.vocab_size), -1e9)
        for row, sequence in enumerate(sequences):
            for token, p in table[sequence.ids[-1] if sequence.ids else None].items():
                self.logits[row, token] = math.log(p)

    def start(**options):
        state = small.prefill(torch.tensor([[0, 5]]), max_new_tokens=6, **options)
        step(state, [0], state.sequences)
        return state

    monkeypatch.setattr(DecodeState, "step", step)
    found = finish(start(num_beams=2))[0]
    assert found.ids == [b, c, d, EOS] and math.prod(found.probabilities) == pytest.approx(0.4 * 0.95**3)
    assert finish(start())[0].ids == [a, EOS]


def test_beams_that_the_length_limit_makes_equal_count_once(small):
    """At the limit, several tokens of a beam may be replaced by the same closing tag."""
    closing = 20

    def constraint(ids, left):
        allowed = np.ones(small.config.text.vocab_size, dtype=bool)
        if left == 1:  # only the closing tag fits
            allowed[:] = False
            allowed[closing] = True
        return allowed

    state = small.prefill(torch.tensor([[0, 5]]), num_beams=4, max_new_tokens=1, constraint=constraint)
    scores = state.logits.log_softmax(dim=-1)
    running, ended = best_continuations(state, scores, [0], remaining=1)
    assert running == [] and [(beam, token) for _, beam, token in ended] == [(0, closing)]
    assert ended[0][0] == scores.max()
    assert finish(state)[0].ids == [closing]


def test_a_second_beam_search_returns_the_same_results(small):
    state = small.prefill(torch.tensor([[0, 5]]), num_beams=2, max_new_tokens=3)
    first = finish(state)
    assert first[0].ids and finish(state) == first


# ------------------------------------------------------------------------------------------- reading images


def first_pixel(image: Image.Image) -> tuple[int, int, int]:
    return to_rgb(image).getpixel((0, 0))


def test_transparency_is_composited_on_white():
    assert first_pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 0))) == (255, 255, 255)
    assert first_pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 51))) == (204, 204, 204)
    assert first_pixel(Image.new("LA", (2, 2), (0, 51))) == (204, 204, 204)
    assert first_pixel(Image.new("LA", (2, 2), (0, 0)).convert("La")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert first_pixel(palette) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert first_pixel(palette) == (255, 255, 255)
    white = preprocess_image(Image.new("RGBA", (5, 9), (0, 0, 0, 0)), 14)
    assert torch.equal(white, preprocess_image(Image.new("RGB", (5, 9), "white"), 14))


@pytest.mark.parametrize("level", [64, 128])
def test_deep_images_keep_their_brightness(tmp_path, level):
    """16-bit PNG and PGM files, and all modes of Pillow with more than 8 bits."""
    deep = np.full((2, 2), level * 257, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 2 65535\n" + deep.astype(">u2").tobytes())
    for name in ("deep.png", "deep.pgm"):
        assert open_image(tmp_path / name).getpixel((0, 0)) == (level,) * 3
    for image in (
        Image.fromarray(deep.astype(np.int32)),
        Image.fromarray((deep / 65535).astype(np.float32)),
        Image.fromarray(np.full((2, 2), level, dtype=np.float32)),
    ):
        assert first_pixel(image) == (level,) * 3


def test_transparency_of_deep_images(tmp_path):
    """A 16-bit PNG can declare one gray value transparent."""
    deep = np.array([[1000, 2000], [2000, 1000]], dtype=np.uint16)
    image = Image.fromarray(deep)
    image.info["transparency"] = 1000
    image.save(tmp_path / "deep.png", transparency=1000)
    pixels = np.asarray(open_image(tmp_path / "deep.png"))[:, :, 0]
    assert pixels.tolist() == [[255, 8], [8, 255]]


@pytest.mark.parametrize("value", [-1.0, 256.5, float("nan")])
def test_images_of_unknown_brightness_raise(value):
    with pytest.raises(ValueError, match="mode F"):
        to_rgb(Image.fromarray(np.array([[1.0, value]], dtype=np.float32)))
    with pytest.raises(ValueError, match="mode I"):
        to_rgb(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)))


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


# ------------------------------------------------------------------------------------- beam search, exhaustively


class FakeModel:
    """Next-token logits that depend on the last two tokens, with a likely </s>."""

    def __init__(self, vocab: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(vocab, vocab, vocab, generator=generator)
        self.table[:, :, EOS] += 1.0
        self.table[:, :, 1] = -1e9  # <pad>

    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.table[ids[-2], ids[-1]]


def plain_beam_search(model: FakeModel, prompt: list[int], num_beams: int, limit: int, least: int):
    """An independent implementation, one candidate at a time."""
    running, finished = [(0.0, [])], []
    for length in range(1, limit + 1):
        candidates = []
        for total, ids in running:
            log_probs = model.logits(prompt + ids).log_softmax(-1)
            for token, value in enumerate(log_probs.tolist()):
                if token == 1 or (token == EOS and length <= least):
                    continue
                candidates.append((total + value, [*ids, token]))
        candidates.sort(key=lambda candidate: -candidate[0])
        running = []
        for rank, (total, ids) in enumerate(candidates[: 2 * num_beams]):
            if ids[-1] == EOS or length == limit:
                if rank < num_beams:
                    finished.append((total / length, ids))
            elif len(running) < num_beams:
                running.append((total, ids))
        finished = sorted(finished, key=lambda found: -found[0])[:num_beams]
        if not running or (len(finished) == num_beams and running[0][0] / length <= finished[-1][0]):
            break
    return finished[0][1]


def test_beam_search_on_hundreds_of_random_models(small, monkeypatch):
    """Early ends, several beams and least lengths: the same sequences as an independent
    implementation."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        vocab, num_beams = int(rng.integers(4, 9)), int(rng.integers(2, 6))
        limit = int(rng.integers(1, 9))
        least = int(rng.integers(0, limit + 1)) if seed % 3 == 0 else 0
        fake = FakeModel(vocab, seed)

        def next_logits(state, fake=fake):
            rows = [
                fake.logits(state.prompts[r] + s.ids)
                for r, s in zip(state.rows, state.sequences, strict=True)
            ]
            return torch.stack(rows) if rows else torch.empty(0, len(fake.table))

        def step(self, parents, sequences, next_logits=next_logits):
            self.rows = [self.rows[i] for i in parents]
            self.sequences = sequences
            self.logits = next_logits(self)

        monkeypatch.setattr(DecodeState, "step", step)
        prompts = torch.tensor([[0, 3], [3, 2]])
        options = dict(max_new_tokens=limit, min_new_tokens=least, num_beams=num_beams)
        checked = GenerationOptions(**options)
        state = DecodeState(small, checked, prompts.tolist(), [], torch.zeros(2, 1), None, torch.empty(0))
        state.logits = next_logits(state)
        for result, prompt in zip(finish(state), prompts.tolist(), strict=True):
            assert result.ids == plain_beam_search(fake, prompt, num_beams, limit, least), seed


def compare_drafts(small, cases) -> int:
    """Generate with random drafts and without; returns the number of decoder passes that drafts saved."""
    rng = np.random.default_rng(0)
    vocab = small.config.text.vocab_size
    passes = []
    hook = small.decoder.register_forward_hook(lambda *_: passes.append(1))
    saved = 0
    for case in range(cases):
        prompts = torch.from_numpy(rng.integers(3, vocab, (int(rng.integers(1, 3)), int(rng.integers(1, 6)))))
        options = {
            "max_new_tokens": int(rng.integers(1, 12)),
            "temperature": float(rng.choice([0.0, 0.7])),
            "top_k": 5,
            "no_repeat_ngram_size": int(rng.choice([0, 2])),
            "seed": case,
        }
        expected = finish(small.prefill(prompts, **options))
        without = len(passes)
        answer = prompts[0].tolist() + expected[0].ids  # of the only row, if there is one

        def draft(ids, answer=answer):
            count = int(rng.integers(0, 4))
            right = answer[len(ids) : len(ids) + count]
            return right if rng.random() < 0.6 else [*right[:-1], *rng.integers(3, vocab, 2).tolist()]

        passes.clear()
        found = finish(small.prefill(prompts, draft=draft, **options))
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
        for guess in small_tokenizer.likely_next(ids[:end]):
            right += guess == ids[end]
            wrong += guess != ids[end]
    assert (right, wrong) == (3, 0)
    assert small_tokenizer.likely_next([small_tokenizer.first_location]) == []
