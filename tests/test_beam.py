"""Beam search and ranked boxes (inference/beam.py)."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, prompt_batch
from PIL import Image
from test_grounding import check_probabilities
from test_model import GOLDEN, PROMPTS, pixels

from inference.beam import beam_search, best_candidates, finish_beams, rank_boxes
from kosmos2 import EOS, PAD, DecodeState, GenerationOptions, finish, preprocess_image
from notebooks.demo import demo_scenes
from tokenizer import iou

# ------------------------------------------------------------------------------------------- sequences


def test_golden_beams(small, small_tokenizer):
    """The ids that transformers found with these weights; tests/golden.py records them."""
    golden = json.loads(GOLDEN.read_text())
    tokens, image_mask, _ = prompt_batch(small_tokenizer, PROMPTS[:1])
    found = beam_search(small, tokens, pixels(1), None, image_mask, **golden["options"]["beams"])
    assert found == [golden["ids"]["beams"]]


def test_one_beam_is_greedy(small, small_tokenizer):
    """With all options that both have."""
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    inputs = (tokens, pixels(3), None, image_mask, pad_mask)
    for options in (dict(), dict(no_repeat_ngram_size=2), dict(constraint=small_tokenizer.allowed_tokens)):
        options |= dict(max_new_tokens=12, min_new_tokens=3)
        assert beam_search(small, *inputs, num_beams=1, **options) == small.generate(*inputs, **options)


CLOSING = 20  # stands for a closing tag


def only_closing(model, at: int):
    """A constraint: with `at` tokens left, only CLOSING fits."""

    def constraint(ids, left):
        allowed = np.ones(model.config.text.vocab_size, dtype=bool)
        if left == at:
            allowed[:] = False
            allowed[CLOSING] = True
        return allowed

    return constraint


def test_only_the_end_may_follow_cut_markup(small):
    """As in greedy decoding."""
    options = dict(max_new_tokens=6, constraint=only_closing(small, at=3))
    greedy = small.generate(torch.tensor([[0, 5]]), **options)
    assert greedy[0][3:] == [CLOSING, EOS]
    for num_beams in (1, 3):
        found = beam_search(small, torch.tensor([[0, 5]]), num_beams=num_beams, **options)
        assert found[0][3:] == [CLOSING, EOS]


def test_a_row_never_depends_on_the_others(small, small_tokenizer):
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    images, alone = pixels(3), []
    together = beam_search(small, tokens, images, None, image_mask, pad_mask, 3, max_new_tokens=14)
    for row in range(3):
        one, mask, _ = prompt_batch(small_tokenizer, PROMPTS[row : row + 1])
        alone += beam_search(small, one, images[row : row + 1], None, mask, num_beams=3, max_new_tokens=14)
    assert together == alone


def test_probabilities_equal_a_forward_pass(small, small_tokenizer):
    tokens, image_mask, pad_mask = prompt_batch(small_tokenizer, PROMPTS)
    state = small.prefill(tokens, pixels(3), None, image_mask, pad_mask, max_new_tokens=9)
    check_probabilities(small, finish_beams(state, 3), image_mask, pad_mask)


def test_lengths(small):
    tokens = torch.tensor([[0, 5], [0, 6]])
    assert beam_search(small, tokens, max_new_tokens=0) == [[], []]
    assert [len(row) for row in beam_search(small, tokens, num_beams=2, max_new_tokens=1)] == [1, 1]
    held = beam_search(small, tokens, num_beams=2, max_new_tokens=5, min_new_tokens=5)
    assert [len(row) for row in held] == [5, 5] and EOS not in held[0] + held[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_beams=0), "num_beams"),
        (dict(num_beams=2.0), "num_beams"),
        (dict(temperature=1.0), "does not sample"),
        (dict(max_new_tokens=5000), "context"),
    ],
)
def test_impossible_options_are_refused(small, options, words):
    with pytest.raises(ValueError, match=words):
        beam_search(small, torch.full((1, 4), 9), **options)


def test_padding_is_never_generated(small):
    """Not even if it is the most likely token."""
    for complete in (finish, lambda state: finish_beams(state, 1), lambda state: finish_beams(state, 2)):
        state = small.prefill(torch.tensor([[0, 5]]), max_new_tokens=1)
        expected = int(state.logits.argmax())
        state.logits = state.logits.clone()
        state.logits[:, PAD] = state.logits.max() + 5
        assert expected != PAD and complete(state)[0].ids == [expected]


def test_beams_keep_to_a_constraint(small):
    """With one allowed sequence there is nothing to search, and no step is spent on sequences that broke
    the rule."""
    path, seen = [10, 11, 12, EOS], []

    def constraint(ids, left):
        seen.append(ids[2:])
        allowed = np.zeros(small.config.text.vocab_size, dtype=bool)
        allowed[path[len(ids) - 2]] = True
        return allowed

    options = dict(num_beams=3, max_new_tokens=20, constraint=constraint)
    assert beam_search(small, torch.tensor([[0, 5]]), **options) == [path]
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

    def step(self, tokens):
        self.logits = torch.full((len(self.running), small.config.text.vocab_size), -1e9)
        for i, row in enumerate(self.running):
            for token, p in table[row.ids[-1] if row.ids else None].items():
                self.logits[i, token] = math.log(p)

    def start():
        state = small.prefill(torch.tensor([[0, 5]]), max_new_tokens=6)
        step(state, None)
        return state

    monkeypatch.setattr(DecodeState, "step", step)
    found = finish_beams(start(), 2)[0]
    assert found.ids == [b, c, d, EOS] and math.prod(found.probabilities) == pytest.approx(0.4 * 0.95**3)
    assert finish(start())[0].ids == [a, EOS]


def test_beams_that_the_length_limit_makes_equal_count_once(small):
    """At the limit, several tokens of a beam may be replaced by the same closing tag."""
    constraint = only_closing(small, at=1)
    state = small.prefill(torch.tensor([[0, 5]]), max_new_tokens=1, constraint=constraint)
    scores = state.logits.log_softmax(dim=-1)
    running, ended = best_candidates(state, scores, [0], num_beams=4, remaining=1)
    assert running == [] and [(beam, token) for _, beam, token, _ in ended] == [(0, CLOSING)]
    assert ended[0][0] == scores.max()
    assert finish_beams(state, 4)[0].ids == [CLOSING]


def test_a_state_is_searched_once(small):
    """A second search returns the same rows, as does finish; a state that is decoded is not searched."""
    state = small.prefill(torch.tensor([[0, 5], [0, 6]]), max_new_tokens=3)
    first = finish_beams(state, 2)
    ids = [list(row.ids) for row in first]
    assert all(ids) and finish_beams(state, 3) is first and finish(state) is first is state.rows
    assert [row.ids for row in first] == ids
    state = small.prefill(torch.tensor([[0, 5]]), max_new_tokens=3)
    greedy = finish(state)
    assert finish_beams(state, 2) is greedy


# ------------------------------------------------------------------------------- beam search, exhaustively


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

        def step(self, tokens, fake=fake):
            self.logits = torch.stack([fake.logits(row.all_ids) for row in self.running])

        monkeypatch.setattr(DecodeState, "step", step)
        prompts = [[0, 3], [3, 2]]
        options = GenerationOptions(max_new_tokens=limit, min_new_tokens=least)
        state = DecodeState(small, prompts, options, capacity=0)
        step(state, None)
        for row, prompt in zip(finish_beams(state, num_beams), prompts, strict=True):
            assert row.ids == plain_beam_search(fake, prompt, num_beams, limit, least), seed


# ------------------------------------------------------------------------------------------- ranked boxes


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


@torch.inference_mode()
def test_ranked_boxes_are_the_best_of_all(small, small_tokenizer):
    """Against all boxes one by one: with all top-left corners, the first has the highest score."""
    tokens = torch.tensor([[0, 10, 11]])
    grid, first = small_tokenizer.grid, small_tokenizer.first_location
    start = small(tokens)[0, -1].softmax(-1)
    corners = torch.arange(first, first + grid**2)[:, None]
    after = small(torch.cat([tokens.expand(len(corners), -1), corners], dim=1))[:, -1].softmax(-1)
    best = (0.0, 0, 0)
    for ul in range(grid**2):
        lr = torch.arange(grid**2).view(grid, grid)[ul // grid :, ul % grid :].flatten()
        p, at = (start[first + ul] * after[ul, first + lr]).max(dim=0)
        best = max(best, (p.sqrt().item(), ul, int(lr[at])))
    state = small.prefill(tokens, max_new_tokens=2)
    score, *box = rank_boxes(state, small_tokenizer, 1, beam=grid**2)[0]
    assert box == list(best[1:]) and score == pytest.approx(best[0], rel=1e-4)


def test_corners_of_ranked_boxes_are_in_order(small, small_tokenizer):
    """A random model would put many bottom-right corners above or left of the top-left ones."""
    state = small.prefill(torch.tensor([[0, 10, 11]]), max_new_tokens=2)
    boxes = rank_boxes(state, small_tokenizer, 30)
    grid = small_tokenizer.grid
    assert len(boxes) == 30
    assert all(ul // grid <= lr // grid and ul % grid <= lr % grid for _, ul, lr in boxes)


def test_ranking_requires_one_prompt_and_two_new_tokens(small, small_tokenizer):
    for rows, length, count in ((1, 1, 2), (2, 5, 2), (1, 5, 0)):
        state = small.prefill(torch.full((rows, 4), 9), max_new_tokens=length)
        with pytest.raises(ValueError, match="one prompt"):
            rank_boxes(state, small_tokenizer, count)


def test_a_used_state_is_not_ranked(small, small_tokenizer):
    """Neither after new tokens nor a second time."""
    for use in (finish, lambda state: rank_boxes(state, small_tokenizer, 1)):
        state = small.prefill(torch.tensor([[0, 10, 11]]), max_new_tokens=3)
        use(state)
        with pytest.raises(ValueError, match="no new tokens"):
            rank_boxes(state, small_tokenizer, 1)


def cells(ul, lr, grid=32):
    """The box that two corner cells cover, in cells."""
    return ul % grid, ul // grid, lr % grid + 1, lr // grid + 1


def test_overlaps():
    assert iou(cells(0, 33), cells(0, 33)) == 1.0
    assert iou(cells(0, 33), cells(1, 34)) == pytest.approx(2 / 6)
    assert iou(cells(0, 0), cells(1023, 1023)) == 0.0
    assert iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)) == 0.0  # touching is not overlapping
