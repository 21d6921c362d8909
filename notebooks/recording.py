"""Record what happens inside the model: block outputs and attention weights, by module name."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from kosmos2 import Attention, Block, KVCache


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record block outputs and attention weights during a forward pass, by module name.

        with record(model) as seen:
            model.encode_image(pixels)
        seen["vision.layers.3"][0]    output of block 3, (B, N, E)
        seen["resampler.x_attn"][0]   attention weights of the latents, (B, H, Q, N + Q)

    Every forward pass adds an entry: during generation, one for the prompt, then one per token.
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(module, inputs, options, output, name):
        if isinstance(module, Attention):
            output = attention_weights(module, *inputs, **options)
        seen.setdefault(name, []).append(output.detach())

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (Block, Attention)):
            hooks.append(module.register_forward_hook(partial(keep, name=name), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(
    attention: Attention,
    x: Tensor,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Attention weights (B, H, T, S) of the forward pass just run with these arguments.

    They are computed again: the kernel that `Attention.forward` uses never stores them.
    """
    q, k, _ = attention.project(x, context)  # (B, H, T, hd), (B, H, S, hd)
    if cache is not None:
        k = cache.keys[:, :, : cache.length]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)
