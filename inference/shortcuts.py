"""Two ways to run less through the decoder, with the same result.

- Several questions about one image share the prefill of the image: `prefill_image`, `prefill_after`.
- Guesses of the next tokens are run together with the last one: `with_drafts`. Each correct one saves a
  pass. (Tokens are chosen or sampled first and then compared with the guesses: the result is the same.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kosmos2 import DecodeState, GenerationOptions, Kosmos2
from tokenizer import Tokenizer

# ---- The shared beginning of several prompts -------------------------------------------------------


@torch.inference_mode()
def prefill_image(model: Kosmos2, tokenizer: Tokenizer, image_embeds: Tensor) -> DecodeState:
    """The state after <s> and one image: image_embeds (1, Q, D)."""
    ids, mask = tokenizer.encode_prompt("")
    tokens = torch.tensor([ids], device=image_embeds.device)
    image_mask = torch.tensor([mask], device=image_embeds.device)
    return model.prefill(tokens, None, image_embeds, image_mask, max_new_tokens=0)


@torch.inference_mode()
def prefill_after(
    prefix: DecodeState, tokens: Tensor, pad_mask: Tensor | None = None, **options
) -> DecodeState:
    """`Kosmos2.prefill` for prompts that all begin as `prefix` does.

    prefix: the state of one prompt without padding and without new tokens. tokens (B, T): what
    follows it in each prompt, padded on the left where pad_mask (B, T) is True.
    """
    model = prefix.model
    if len(prefix.running) != 1 or prefix.running[0].ids or prefix.pad_mask.any():
        raise ValueError("prefix: expected one row, without padding and without new tokens")
    checked = GenerationOptions(**options)
    x = model.embed(tokens, pad_mask=pad_mask)  # (B, T, D)
    if pad_mask is None:
        pad_mask = torch.zeros_like(tokens, dtype=torch.bool)
    if pad_mask[:, -1].any():
        raise ValueError("generation needs left padding, but pad_mask is True at the end of a row")
    B, T = tokens.shape
    past = prefix.caches[0].length
    beginning = prefix.running[0].prompt
    prompts = [beginning + row[~padding].tolist() for row, padding in zip(tokens, pad_mask, strict=True)]
    model.check_length([len(prompt) for prompt in prompts], checked.max_new_tokens)
    state = DecodeState(model, prompts, checked, capacity=past + T + checked.max_new_tokens)
    for cache, shared in zip(state.caches, prefix.caches, strict=True):
        cache.append(shared.keys[:, :, :past], shared.values[:, :, :past])  # the same for all rows
    state.next_position = prefix.next_position.expand(B, 1)
    state.pad_mask = prefix.pad_mask.expand(B, past)
    x = state.advance(x, pad_mask)  # (B, T, D)
    state.logits = model.next_logits(x[:, -1])
    return state


# ---- Drafts ----------------------------------------------------------------------------------------


def likely_next(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids that probably follow in grounded text.

    <object> after </phrase>, </object> after the second corner of a box, and " a" after <phrase>.
    """
    if ids[-1] == tokenizer.special_ids["</phrase>"]:
        return [tokenizer.special_ids["<object>"]]
    if ids[-1] == tokenizer.special_ids["<phrase>"]:
        return tokenizer.encode_words(" a")
    corners = [i for i in ids[-2:] if tokenizer.location_index(i) is not None]
    return [tokenizer.special_ids["</object>"]] if len(corners) == 2 else []


def with_drafts(state: DecodeState, tokenizer: Tokenizer) -> DecodeState:
    """A state to decode instead of this one; faster if it has one row.

    (In a batch, the drafts of the rows would have different lengths.)
    """
    if len(state.running) != 1 or state.pad_mask.any():
        return state
    return DraftState(state, lambda ids: likely_next(tokenizer, ids))


class DraftState(DecodeState):
    """A state of one row whose `step` also runs a draft of the ids that follow."""

    def __init__(self, state: DecodeState, draft: Callable[[list[int]], list[int]]):
        """draft: all ids so far -> ids that probably follow."""
        vars(self).update(vars(state))
        self.draft = draft
        # The guesses that have been run: each id, and the logits (1, V) of what follows it.
        self.guesses: list[tuple[int, Tensor]] = []

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        if self.guesses and self.guesses[0][0] == tokens[0]:  # a correct guess: its logits are there
            self.logits = self.guesses.pop(0)[1]
            return
        self.drop_guesses()
        cache = self.caches[0]
        room = cache.keys.shape[2] - cache.length - 1
        draft = self.draft(self.running[0].all_ids)[:room]
        ids = torch.tensor([[*tokens, *draft]], device=self.pad_mask.device)  # (1, T)
        x = self.advance(self.model.decoder.embed_tokens(ids))  # (1, T, D)
        logits = self.model.next_logits(x)  # (1, T, V)
        self.logits = logits[:, 0]
        self.guesses = [(token, logits[:, i]) for i, token in enumerate(draft, start=1)]

    def drop_guesses(self) -> None:
        """Take back the positions of wrong guesses."""
        count = len(self.guesses)
        for cache in self.caches:
            cache.length -= count
        self.next_position = self.next_position - count
        self.pad_mask = self.pad_mask[:, : self.pad_mask.shape[1] - count]
        self.guesses = []
