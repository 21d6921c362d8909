"""Beam search, for captions and for boxes, on the decoding state of kosmos2.py.

Like `kosmos2.decode`, both choose tokens, `keep` the chosen rows and `step`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kosmos2 import EOS, DecodeState, Kosmos2, Row, check_integer, cut_markup, mask_logits
from tokenizer import Tokenizer, iou


def beam_search(
    model: Kosmos2,
    tokens: Tensor,
    pixels=None,
    image_embeds=None,
    image_mask=None,
    pad_mask=None,
    num_beams: int = 4,
    **options,
) -> list[list[int]]:
    """`Kosmos2.generate` by beam search: the new ids of the best sequence of every prompt."""
    state = model.prefill(tokens, pixels, image_embeds, image_mask, pad_mask, **options)
    return [row.ids for row in finish_beams(state, num_beams)]


class Candidate(NamedTuple):
    """A running row with one more token."""

    score: float  # summed log-probability of its new tokens
    parent: int  # the row it extends
    token: int
    cut: bool  # as in `Row`


@torch.inference_mode()
def finish_beams(state: DecodeState, num_beams: int) -> list[Row]:
    """Keep the num_beams most likely sequences of every prompt at each step; returns the best
    finished one of each.

    The score of a finished sequence is the mean log-probability of its new tokens. Where `cut_markup`
    replaced a token, the probability of the original one counts. A prompt is done when it has num_beams
    finished sequences and its best running one scores no better than the worst of them. As with
    `decode`, a state can be searched only once; `state.rows` keeps the result.
    """
    check_integer("num_beams", num_beams)
    if state.options.temperature > 0:
        raise ValueError("beam search does not sample; use temperature 0")
    if any(row.ids for row in state.rows):
        return state.rows
    limit = state.options.max_new_tokens
    prompt_of = list(range(len(state.rows)))  # of each running row
    totals = torch.zeros(len(state.running))  # summed log-probability of each running row
    finished: list[list[tuple[float, Row]]] = [[] for _ in state.rows]
    for length in range(1, limit + 1):
        log_probabilities = state.logits.log_softmax(dim=-1)  # (B, V)
        scores = mask_logits(log_probabilities, state).cpu() + totals[:, None]  # (B, V)
        kept: list[Candidate] = []
        for prompt in dict.fromkeys(prompt_of):
            beams = [i for i, p in enumerate(prompt_of) if p == prompt]
            running, ended = best_candidates(state, scores, beams, num_beams, remaining=limit - length + 1)
            for candidate in ended:
                row = extended(state, candidate, log_probabilities)
                finished[prompt].append((candidate.score / length, row))
            finished[prompt] = sorted(finished[prompt], key=lambda found: -found[0])[:num_beams]
            best = running[0].score / length if running else -math.inf
            if len(finished[prompt]) < num_beams or best > finished[prompt][-1][0]:
                kept += running
        if not kept:
            break
        rows = [extended(state, candidate, log_probabilities) for candidate in kept]
        totals = torch.tensor([candidate.score for candidate in kept])
        prompt_of = [prompt_of[candidate.parent] for candidate in kept]
        state.keep([candidate.parent for candidate in kept])
        state.running = rows
        state.step([candidate.token for candidate in kept])
    state.rows = [found[0][1] if found else row for found, row in zip(finished, state.rows, strict=True)]
    return state.rows


def extended(state: DecodeState, candidate: Candidate, log_probabilities: Tensor) -> Row:
    """A copy of the row that a candidate extends, with its token."""
    row = state.running[candidate.parent]
    probability = math.exp(log_probabilities[candidate.parent, candidate.token])
    ids = [*row.ids, candidate.token]
    return replace(row, ids=ids, probabilities=[*row.probabilities, probability], cut=candidate.cut)


def best_candidates(
    state: DecodeState, scores: Tensor, beams: list[int], num_beams: int, remaining: int
) -> tuple[list[Candidate], list[Candidate]]:
    """The best continuations of one prompt: up to num_beams that continue, and those among the num_beams
    best that end.

    scores (B, V): summed log-probabilities; beams: the running rows of this prompt.

    A sequence ends in only one way, by </s>, so of 2 * num_beams candidates at least num_beams continue,
    unless the length limit ends them, too. Where `cut_markup` replaces several tokens of a beam with
    the same one, only the most likely of these candidates counts.
    """
    V = scores.shape[1]
    count = min(2 * num_beams, len(beams) * V)
    best, flat_index = scores[beams].flatten().topk(count)  # (count,), most likely first
    running = []
    ended = []
    seen = set()
    for score, index in zip(best.tolist(), flat_index.tolist(), strict=True):
        if score == -math.inf:
            break
        beam = beams[index // V]
        row = state.running[beam]
        chosen = index % V
        token = EOS if row.cut else cut_markup(state.options.constraint, row.all_ids, chosen, remaining)
        if (beam, token) in seen:
            continue
        seen.add((beam, token))
        candidate = Candidate(score, beam, token, row.cut or token != chosen)
        if token != EOS and remaining > 1:
            running.append(candidate)
        elif len(seen) <= num_beams:
            ended.append(candidate)
    return running[:num_beams], ended


MOST_CANDIDATES = 2000  # boxes that `rank_boxes` considers; most overlap one another


@torch.inference_mode()
def rank_boxes(
    state: DecodeState, tokenizer: Tokenizer, count: int, beam: int = 32
) -> list[tuple[float, int, int]]:
    """The most likely distinct boxes for one prompt that ends in <object>: (score, top-left index,
    bottom-right index).

    A beam search over the two tokens of a box, with `beam` top-left corners; of boxes that overlap
    with IoU >= 0.5, only the most likely is kept. The score is the geometric mean of the two
    probabilities. Uses up `state`, which needs max_new_tokens >= 2.
    """
    is_new = len(state.running) == 1 and not state.running[0].ids
    if not is_new or state.options.max_new_tokens < 2 or count < 1:
        raise ValueError("rank_boxes: expected one prompt, no new tokens, max_new_tokens >= 2, count >= 1")
    grid = tokenizer.grid
    locations = slice(tokenizer.first_location, tokenizer.end_of_locations)
    cells = torch.arange(grid**2)
    first = state.logits[0].softmax(dim=-1)[locations].cpu()  # (grid²,)
    p_first, top_left = first.topk(min(beam, len(cells)))  # (beam,)
    state.keep([0] * len(top_left))
    state.step((top_left + tokenizer.first_location).tolist())
    p_second = state.logits.softmax(dim=-1)[:, locations].cpu()  # (beam, grid²)
    below = cells // grid >= top_left[:, None] // grid
    right = cells % grid >= top_left[:, None] % grid
    joint = (p_first[:, None] * p_second * (below & right)).flatten()  # (beam * grid²,)
    best, flat_index = joint.topk(min(MOST_CANDIDATES, len(joint)))
    corners = [(int(top_left[i // len(cells)]), int(i % len(cells))) for i in flat_index]
    return distinct_boxes(best.sqrt().tolist(), corners, grid, count)


def distinct_boxes(
    scores: list[float], corners: Sequence[tuple[int, int]], grid: int, count: int
) -> list[tuple[float, int, int]]:
    """The first `count` boxes, best first, without those that overlap a better one."""
    found: list[tuple[float, int, int]] = []
    kept: list[tuple[int, int, int, int]] = []
    for score, (ul, lr) in zip(scores, corners, strict=True):
        box = (ul % grid, ul // grid, lr % grid + 1, lr // grid + 1)  # in whole cells
        if score > 0 and all(iou(box, other) < 0.5 for other in kept):
            found.append((score, ul, lr))
            kept.append(box)
        if len(found) == count:
            break
    return found
