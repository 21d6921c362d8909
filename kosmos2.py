"""Kosmos-2 in one file: a picture goes in, a sentence comes out whose phrases are linked to boxes.

Kosmos-2 (Peng et al. 2023, "Grounding Multimodal Large Language Models to the World", arXiv 2306.14824)
is a decoder-only language model with two additions. It *sees*: a ViT turns the picture into a grid of
features, a resampler condenses them into a few dozen vectors, and these take the place of token
embeddings in the prompt. It *points*: the vocabulary has one token for each of 32 x 32 cells of the
picture, and a box is spelled as two of them, so that grounding is ordinary next-token prediction:

    <phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>

Data flow, with the sizes of the published model:

    picture ─ preprocess_image ─> pixels        (B, 3, 224, 224)
            ─ VisionTransformer ─> features     (B, N=257, E=1024)  unit length, [CLS] + 16 x 16 patches
            ─ Resampler ────────> image_embeds  (B, Q=64, D=2048)
    tokens  ─ embed ────────────> x             (B, T, D)           image_embeds stand in the image slots
            ─ Decoder ──────────> x             (B, T, D)           24 causal blocks
            ─ unembed ──────────> logits        (B, T, V=65037)     the embedding matrix once more
            ─ generate ─────────> new token ids, one list per row

One legend everywhere:
    B batch    T tokens            S tokens seen, the cache included    V vocabulary
    D width    H heads             hd = D / H head width
    E vision width    N image positions    Q latent queries    I images of a batch

What differs from the textbook transformer is explained where it happens; the main things are sub-LN (`Block`),
features of unit length (`VisionTransformer`), latents that are among their own keys (`Resampler`), positions that
begin at 2 and have all sines before all cosines (`token_positions`, `sinusoidal_positions`). notebooks/03_decoder
has the whole list, and what breaks without each. The file goes from the configuration through picture, decoder
and whole model to generation. Its last section, Speed, is there for nothing else and may be left for later: until
then read `Linear` as nn.Linear.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

BOS, PAD, EOS = 0, 1, 2  # the first ids of every vocabulary in the published layout

# ----------------------------------------------------------------------------------------------------
# Configuration  (walkthrough: notebooks/06_weights)
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """The ViT; the defaults are CLIP's ViT-L/14."""

    image_size: int = 224  # pixels a side
    patch_size: int = 14  # pixels a side
    width: int = 1024  # E
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """N: the patches and [CLS]."""
        return self.grid**2 + 1


@dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    vocab_size: int = 65037  # V
    width: int = 2048  # D
    layers: int = 24
    heads: int = 32
    mlp_width: int = 8192
    max_positions: int = 2048  # the longest sequence seen in training
    layer_norm_eps: float = 1e-5
    no_repeat_ngram_size: int = 3  # what the checkpoint asks of whoever generates with it


@dataclass(frozen=True)
class Kosmos2Config:
    """All sizes of a Kosmos-2; the defaults are the published model (1.66 B parameters)."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    latent_query_num: int = 64  # Q

    def __post_init__(self):
        """Refuse sizes no model can have, with a ValueError that names the field."""
        for part, config in (("vision", self.vision), ("text", self.text), ("config", self)):
            for f in fields(config):
                value, zero_ok = getattr(config, f.name), f.name == "no_repeat_ngram_size"
                if f.type is int and (type(value) is not int or value < (0 if zero_ok else 1)):
                    raise ValueError(f"{part} {f.name} is {value!r}; it must be a whole number{'' if zero_ok else ' above zero'}")
                if f.type is float and not (isinstance(value, (int, float)) and 0 < value < 1):
                    raise ValueError(f"{part} {f.name} is {value!r}; it must lie between 0 and 1")
            if part != "config" and config.width % config.heads:
                raise ValueError(f"{part} width {config.width} is not a multiple of its {config.heads} heads")
        if self.vision.image_size < self.vision.patch_size:
            raise ValueError(
                f"vision image_size {self.vision.image_size} is smaller than one patch ({self.vision.patch_size})"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> "Kosmos2Config":
        """Read a published config.json. Unknown keys are ignored, missing ones mean the published value.

        Raises FileNotFoundError where there is no such file, ValueError for a file that is not JSON,
        belongs to another architecture, or holds values this code would compute wrongly.
        """
        try:
            published = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # not UTF-8 or not JSON
            raise ValueError(f"{path} is not valid JSON ({error})") from None
        if not isinstance(published, dict):
            raise ValueError(f"{path} must hold a JSON object, not a {type(published).__name__}")
        parts = {name: published.get(name) or {} for name in ("vision_config", "text_config")}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise ValueError(f"{path}: {name} must be a JSON object, not {part!r}")
        for where, key, supported in FIXED:
            value = (parts[where] if where else published).get(key, supported)
            if value != supported:
                raise ValueError(f"{path}: {key} is {value!r}; a Kosmos-2 has {supported!r}, and only that is built")

        def read(part, names):
            return {ours: part[key] for ours, key in names.items() if key in part}

        try:
            return cls(
                vision=VisionConfig(**read(parts["vision_config"], VISION_KEYS)),
                text=TextConfig(**read(parts["text_config"], TEXT_KEYS)),
                **read(published, {"latent_query_num": "latent_query_num"}),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_published(self) -> dict:
        """The same configuration under the names of a published config.json."""
        published = {"model_type": "kosmos-2", "architectures": ["Kosmos2ForConditionalGeneration"]}
        published["latent_query_num"] = self.latent_query_num
        published["vision_config"] = {key: getattr(self.vision, ours) for ours, key in VISION_KEYS.items()}
        published["text_config"] = {key: getattr(self.text, ours) for ours, key in TEXT_KEYS.items()}
        for where, key, value in FIXED:
            (published[where] if where else published)[key] = value
        return published


# Our field -> its key in a published config.json.
VISION_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
}
TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "width": "embed_dim",
    "layers": "layers",
    "heads": "attention_heads",
    "mlp_width": "ffn_dim",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
# What every Kosmos-2 has in common and this file therefore writes down as code: (part, key, value).
FIXED = [
    ("", "model_type", "kosmos-2"),
    ("vision_config", "hidden_act", "quick_gelu"),
    ("vision_config", "num_channels", 3),
    ("text_config", "activation_function", "gelu"),
    ("text_config", "scale_embedding", True),
    ("text_config", "add_cross_attention", False),
    ("text_config", "bos_token_id", BOS),
    ("text_config", "pad_token_id", PAD),
    ("text_config", "eos_token_id", EOS),
]

# ----------------------------------------------------------------------------------------------------
# Parts that the vision transformer, the resampler and the decoder share
# ----------------------------------------------------------------------------------------------------


# Random weights to begin a training with. Uniform ones: for normal ones on the "meta" device, where checkpoints are
# planned, PyTorch imports its compiler, which takes a second. (`Decoder` avoids those of nn.Embedding for that reason.)
def random_parameter(*shape: int, size: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-size, size))


class KVCache:
    """The keys and values one attention layer has computed so far, in memory taken once.

    A new token attends to all earlier ones, and their keys and values never change: keeping them turns
    the cost of a token from a pass over the whole sequence into a pass over one position.
    """

    def __init__(self, rows: int, heads: int, capacity: int, head_width: int, like: Tensor):
        self.keys = like.new_empty(rows, heads, capacity, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the (B, H, T, hd) of new positions; returns those of all positions, (B, H, S, hd)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def view(self, rows: slice) -> "KVCache":
        """Some rows, in the same memory."""
        part = copy(self)
        part.keys, part.values = self.keys[rows], self.values[rows]
        return part

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order: rows that finished go, beams that won are copied."""
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)


class Attention(nn.Module):
    """Multi-head attention with biases on all four projections.

    Differs from the textbook in `sub_ln`: MAGNETO (arXiv 2210.06423) normalises the concatenated heads
    once more before the output projection, which keeps deep decoders stable.
    """

    def __init__(self, width: int, heads: int, sub_ln: bool = False, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.qkv_proj: PackedLinear | None = None  # instead of these three, in self-attention with packed weights
        self.out_proj = Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps) if sub_ln else nn.Identity()

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Queries from x (B, T, D); keys and values from context (B, S, D), by default x itself.

        mask: bool, broadcast to (B, H, T, S), True where a query may look.
        """
        B, T, D = x.shape
        q, k, v = self.project(x, context)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, hd), S now with all earlier positions
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # softmax(q·kᵀ / √hd)·v, (B, H, T, hd)
        x = x.transpose(1, 2).reshape(B, T, D)  # (B, T, D)
        return self.out_proj(self.inner_attn_ln(x))

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, hd), keys and values (B, H, S, hd)."""
        if self.qkv_proj is not None:  # one long product reads memory faster than three short ones
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        else:
            context = x if context is None else context
            q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        return x.view(B, T, self.heads, D // self.heads).transpose(1, 2)  # (B, H, T, hd)

    def weights(self, x: Tensor, context=None, mask=None, cache: KVCache | None = None) -> Tensor:
        """Where the queries of the `forward` just run with these arguments looked, (B, H, T, S).

        For looking at only: the kernel that `forward` uses never writes the weights down.
        """
        q, k, _ = self.project(x, context)  # (B, H, T, hd), (B, H, S, hd)
        k = k if cache is None else cache.keys[:, :, : cache.length]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
        return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(dim=-1)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's cheap approximation of GELU; the decoder uses the exact one."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers around an activation; `sub_ln` normalises between the activation and the second."""

    def __init__(self, width: int, mlp_width: int, activation, sub_ln: bool, eps: float):
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(width, mlp_width)
        self.fc2 = Linear(mlp_width, width)
        self.ffn_layernorm = nn.LayerNorm(mlp_width, eps) if sub_ln else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(self.activation(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm transformer block: the ViT's as it is, the decoder's with sub-LN.

    Pre-norm alone lets the size of what each layer adds drift with depth. Sub-LN (MAGNETO, arXiv
    2210.06423, section 2) adds a LayerNorm before the last projection of attention and of MLP, so that
    both always project inputs of one scale.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, activation, sub_ln: bool, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, sub_ln, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_width, activation, sub_ln, eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask, cache=cache)
        x = x + self.mlp(self.norm2(x))
        return x


# ----------------------------------------------------------------------------------------------------
# From a picture to image embeddings  (walkthrough: notebooks/01_vision, notebooks/02_resampler)
# ----------------------------------------------------------------------------------------------------

# CLIP's statistics of its training pictures, RGB.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess_image(image: Image.Image, image_size: int) -> Tensor:
    """A picture of any size and mode -> pixels (3, image_size, image_size), float32.

    The whole picture is squashed to a square (its aspect is not kept), so that a box in 0..1 of the
    square is the same box in 0..1 of the picture.
    """
    image = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255  # (S, S, 3)
    pixels = (pixels - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, S, S)


class VisionTransformer(nn.Module):
    """CLIP's ViT (arXiv 2103.00020), all N positions of its last layer, each scaled to length one.

    Differs from CLIP's use of it: [CLS] is not singled out but handed on with the patches, there is no
    projection into CLIP's joint space, and the features are normalised position by position.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        E, eps = config.width, config.layer_norm_eps
        self.class_embedding = random_parameter(E, size=E**-0.5)
        self.patch_embedding = nn.Conv2d(3, E, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = random_parameter(config.positions, E, size=E**-0.5)
        self.pre_layernorm = nn.LayerNorm(E, eps)
        self.layers = nn.ModuleList(
            Block(E, config.heads, config.mlp_width, quick_gelu, sub_ln=False, eps=eps) for _ in range(config.layers)
        )
        self.post_layernorm = nn.LayerNorm(E, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> features (B, N, E)."""
        patches = self.patch_embedding(pixels)  # (B, E, grid, grid)
        places = self.place_embedding(*patches.shape[2:])  # (N, E)
        patches = patches.flatten(2).transpose(1, 2)  # (B, N-1, E), row by row from the upper left
        cls = self.class_embedding.expand(len(pixels), 1, -1)  # (B, 1, E)
        x = torch.cat([cls, patches], dim=1)  # (B, N, E)
        x = self.pre_layernorm(x + places)
        for layer in self.layers:
            x = layer(x)
        return F.normalize(self.post_layernorm(x), dim=-1)

    def place_embedding(self, rows: int, columns: int) -> Tensor:
        """The learned positions (N, E); for another grid than the trained one, bicubically interpolated."""
        grid = math.isqrt(len(self.position_embedding) - 1)
        if rows == columns == grid:
            return self.position_embedding
        cls, patches = self.position_embedding[:1], self.position_embedding[1:]
        patches = patches.T.reshape(1, -1, grid, grid)  # (1, E, grid, grid)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic")  # (1, E, rows, columns)
        return torch.cat([cls, patches.flatten(2)[0].T])  # (1 + rows * columns, E)


class Resampler(nn.Module):
    """N features of the ViT -> Q embeddings of the decoder, by one cross-attention.

    Q learned queries look at the picture, so its cost in the decoder does not grow with its patches.
    Differs from a textbook attention layer: the queries are themselves appended to the keys and values
    (as in Flamingo's resampler, arXiv 2204.14198, section 3.1.1), and there is no LayerNorm, no residual,
    no MLP. The queries carry the order; the keys know their place only from the ViT's positions.
    """

    def __init__(self, config: Kosmos2Config):
        super().__init__()
        D = config.text.width
        self.dense = Linear(config.vision.width, D)
        self.latent_query = random_parameter(config.latent_query_num, D, size=1.0)
        self.x_attn = Attention(D, config.text.heads)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, N, E) -> image_embeds (B, Q, D)."""
        features = self.dense(features)  # (B, N, D)
        latents = self.latent_query.expand(len(features), -1, -1)  # (B, Q, D)
        return self.x_attn(latents, torch.cat([features, latents], dim=1))  # (B, Q, D)


# ----------------------------------------------------------------------------------------------------
# The decoder  (walkthrough: notebooks/03_decoder)
# ----------------------------------------------------------------------------------------------------


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """positions (B, T), whole numbers -> their encodings (B, T, width), float32.

    Differs from "Attention Is All You Need" (3.5): all sines come first, then all cosines, instead of the
    two in turn, and the longest wavelength is reached at the last frequency exactly.
    """
    half = width // 2
    step = math.log(10000) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=positions.device) * -step)
    angles = positions[..., None].float() * frequencies  # (B, T, half)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, T, 2 half)
    return F.pad(table, (0, width % 2))  # (B, T, width): an odd width ends in a zero


FIRST_POSITION = 2  # inherited from fairseq: there, position 1 belongs to padding and 0 to nothing


def token_positions(tokens: Tensor, pad_mask: Tensor | None = None) -> Tensor:
    """The position of every token (B, T): 2, 3, 4, ... counted over the tokens that are not padding."""
    check_mask("pad_mask", pad_mask, tokens)
    real = torch.ones_like(tokens) if pad_mask is None else (~pad_mask).long()
    return real.cumsum(dim=1) + FIRST_POSITION - 1


def check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """ValueError for a mask that is not bool (B, T) like the tokens it speaks of."""
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
        raise ValueError(f"{name} is {mask.dtype} {tuple(mask.shape)}; wanted is bool {tuple(tokens.shape)}")


def causal_mask(T: int, S: int, pad_mask: Tensor | None = None, device=None) -> Tensor | None:
    """Which of S positions the last T of them may look at: bool, (T, S), or (B, 1, T, S) with padding.

    None where all may look at all. pad_mask (B, S) is True on padding. A padding position looks at
    itself: a softmax over nothing would be NaN, and nobody reads its output.
    """
    if T == 1 and pad_mask is None:
        return None
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if pad_mask is None:
        return mask
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - T :]
    return (mask & ~pad_mask[:, None, :] | itself)[:, None]  # (B, 1, T, S)


class Embedding(nn.Embedding):
    """Token embeddings that are also the output projection."""

    def unembed(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)."""
        return linear(x, self.weight)


class Decoder(nn.Module):
    """A causal transformer; its embedding matrix is also its output projection (tied)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        D, eps = config.width, config.layer_norm_eps
        self.embed_tokens = Embedding.from_pretrained(random_parameter(config.vocab_size, D, size=D**-0.5), freeze=False)
        self.layers = nn.ModuleList(
            Block(D, config.heads, config.mlp_width, F.gelu, sub_ln=True, eps=eps) for _ in range(config.layers)
        )
        self.layer_norm = nn.LayerNorm(D, eps)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """x (B, T, D) as it comes from the embedding, positions (B, T) -> x (B, T, D) after the last norm.

        The sqrt(D) makes embeddings of length about one as large as the position table; image
        embeddings are scaled and given positions like any word, because they were put in before.
        """
        x = x * math.sqrt(x.shape[-1]) + sinusoidal_positions(positions, x.shape[-1]).to(x.dtype)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, mask, cache)
        return self.layer_norm(x)

    def unembed(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)."""
        return self.embed_tokens.unembed(x)


# ----------------------------------------------------------------------------------------------------
# The whole model  (walkthrough: notebooks/00_overview)
# ----------------------------------------------------------------------------------------------------


class Kosmos2(nn.Module):
    """The grounded vision-language model: see the top of this file for the data flow.

    A batch may mix rows with no picture, one or several: `pixels` or `image_embeds` hold the pictures of
    all rows in reading order, and `image_mask` marks the Q slots of each.
    """

    def __init__(self, config: Kosmos2Config):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.resampler = Resampler(config)
        self.decoder = Decoder(config.text)

    def encode_image(self, pixels: Tensor, interpolate: bool = False) -> Tensor:
        """pixels (B, 3, S, S) -> image_embeds (B, Q, D).

        interpolate: take pictures of any height and width of at least a patch, by interpolating the ViT's
        positions; without it ValueError for another size than the trained one.
        """
        size, patch = self.config.vision.image_size, self.config.vision.patch_size
        fits = pixels.dim() == 4 and pixels.shape[1] == 3
        if not fits or (min(pixels.shape[2:]) < patch if interpolate else pixels.shape[2:] != (size, size)):
            wanted = f"height and width of at least {patch}" if interpolate else f"(B, 3, {size}, {size})"
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; this model wants {wanted}")
        pixels = pixels.to(self.vision.class_embedding.dtype)
        parts = pixels.split(rows_at_a_time(pixels, self.config.vision.positions * self.config.vision.mlp_width))
        return torch.cat([self.resampler(self.vision(part)) for part in parts])

    def embed(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> x (B, T, D), with the image embeddings in place of those of the image slots.

        ValueError where pictures and slots do not match.
        """
        self._check_tokens(tokens)
        x = self.decoder.embed_tokens(tokens)  # (B, T, D)
        if pixels is not None and image_embeds is not None:
            raise ValueError("give pixels or image_embeds, not both")
        if pixels is not None:
            image_embeds = self.encode_image(pixels)
        Q, D = self.config.latent_query_num, self.config.text.width
        if image_embeds is not None and tuple(image_embeds.shape[1:]) != (Q, D):
            raise ValueError(f"image_embeds have shape {tuple(image_embeds.shape)}; this model wants (I, {Q}, {D})")
        check_mask("image_mask", image_mask, tokens)
        slots = torch.zeros(len(tokens), dtype=torch.long) if image_mask is None else image_mask.sum(dim=1)  # (B,)
        filled = 0 if image_embeds is None else len(image_embeds) * Q
        if int(slots.sum()) != filled or (slots % Q).any():
            raise ValueError(f"image_mask marks {slots.tolist()} slots in its rows, but the pictures fill {filled} ({Q} each)")
        if filled:
            x = x.masked_scatter(image_mask[..., None], image_embeds.to(x.dtype))
        return x

    def forward(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        pad_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token after every position, and with labels also the loss.

        tokens      (B, T) ids
        pixels      (I, 3, S, S) or image_embeds (I, Q, D): all pictures of the batch, in reading order
        image_mask  (B, T) bool, True on the I x Q image slots
        pad_mask    (B, T) bool, True on padding, on either side
        labels      (B, T) ids, shifted by one in here; -100 is ignored
        Returns logits (B, T, V), or (logits, mean cross-entropy).
        Raises ValueError for shapes that do not fit and rows longer than the trained positions.
        """
        x = self.embed(tokens, pixels, image_embeds, image_mask)
        T = tokens.shape[1]
        positions = token_positions(tokens, pad_mask)
        self._check_length(positions)
        x = self.decoder(x, positions, causal_mask(T, T, pad_mask, tokens.device))
        logits = self.decoder.unembed(x)
        if labels is None:
            return logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return logits, loss

    def _check_tokens(self, tokens: Tensor) -> None:
        V = self.config.text.vocab_size
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; wanted are rows of at least one id, (B, T)")
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < V):
            raise ValueError(f"token ids must lie in 0..{V - 1}; is this the tokenizer of another checkpoint?")

    def _check_length(self, positions: Tensor, new_tokens: int = 0) -> None:
        if not positions.numel():
            return
        length, limit = int(positions.max()) - FIRST_POSITION + 1, self.config.text.max_positions
        if length + new_tokens > limit:
            plus = f" and {new_tokens} new ones were asked for" if new_tokens else ""
            raise ValueError(
                f"the prompt has {length} tokens{plus}, but the model was trained on {limit} positions; "
                + (f"ask for at most {limit - length}" if new_tokens and length < limit else "shorten the prompt")
            )

    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        pad_mask: Tensor | None = None,
        **options,
    ) -> "list[NewTokens]":
        """Continue every row; returns the new ids of each, ending with </s> or at max_new_tokens.

        Inputs as in `forward`; rows of different length go in padded on the left. Options are the fields
        of `GenerationOptions`, by name. A row's result depends neither on the other rows nor on its
        padding: transformers 5.23 shifts the positions of padded rows when decoding begins. Each row is a
        `NewTokens`, a list of ids that also knows their probabilities.
        Raises ValueError for options out of range and prompts that leave no room in the trained positions.
        """
        state = self.start(tokens, pixels, image_embeds, image_mask, pad_mask, **options)
        return beam_search(state) if state.options.num_beams > 1 else state.finish()

    def stream(self, *inputs, **options) -> Iterator[list[int | None]]:
        """`generate`, one step at a time: yields the next id of every row, None for a row that has ended."""
        yield from self.start(*inputs, **options)

    @torch.inference_mode()
    def start(
        self, tokens, pixels=None, image_embeds=None, image_mask=None, pad_mask=None, past=None, **options
    ) -> "Generation":
        """Read the prompts of `generate` and stop there: the Generation yields what `stream` yields.

        past: a Generation of one row that has read what comes before all of these prompts, and generated
        nothing. So many questions about one picture cost one reading of it:

            past = model.start(picture_tokens, pixels, image_mask=image_mask, max_new_tokens=0)
            answers = model.start(questions, pad_mask=pad_mask, past=past).finish()
        """
        options = GenerationOptions(**options)
        return Generation(self, tokens, pixels, image_embeds, image_mask, pad_mask, options, past)


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what happens inside while the model runs: hidden states and attention, by module name.

        with record(model) as seen:
            model.encode_image(pixels)
        seen["vision.layers.3"][0]    what block 3 put out, (B, N, E)
        seen["resampler.x_attn"][0]   where the latents looked, (B, H, Q, N + Q)

    Every run adds an entry to the lists: of a generation the first is the prompt's, then one a token. (A large batch
    on a CPU runs in parts, `rows_at_a_time`, and adds one for each.)
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(module, inputs, options, output, name):
        value = module.weights(*inputs, **options) if isinstance(module, Attention) else output
        seen.setdefault(name, []).append(value.detach())

    watched = [(name, module) for name, module in model.named_modules() if isinstance(module, (Block, Attention))]
    hooks = [module.register_forward_hook(partial(keep, name=name), with_kwargs=True) for name, module in watched]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------------------
# Generation  (walkthrough: notebooks/05_sampling)
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a text. ValueError for a value out of its range."""

    max_new_tokens: int = 128  # at most so many; prompt and new tokens must fit the trained positions
    min_new_tokens: int = 0  # </s> is forbidden before
    temperature: float = 0.0  # 0 takes the likeliest token, 1 samples from the model's distribution
    top_k: int | None = None  # sample among the k likeliest only
    top_p: float | None = None  # sample among the fewest likeliest tokens whose probabilities reach p
    num_beams: int = 1  # above 1: beam search, which does not sample
    # n: no n tokens in a row, the prompt's and the ids in its image slots included, come twice. The published model is used with 3
    # (config.text.no_repeat_ngram_size); transformers 5.23 loses that setting while it loads.
    no_repeat_ngram_size: int = 0
    seed: int | None = None  # repeatable sampling: every row draws the same numbers, those it would draw alone
    # (ids so far, tokens left) -> bool (V,), True where a token may come next; None where any may. Such as
    # Tokenizer.well_formed, which keeps boxes whole.
    constraint: Callable[[list[int], int], np.ndarray | None] | None = None

    def __post_init__(self):
        least = dict(max_new_tokens=0, min_new_tokens=0, no_repeat_ngram_size=0, num_beams=1)
        least |= dict(top_k=1) if self.top_k is not None else {}
        for name, value in least.items():
            given = getattr(self, name)
            if type(given) is not int or given < value:
                raise ValueError(f"{name} is {given!r}; it must be a whole number, at least {value}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens})")
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1")
        if self.seed is not None and (type(self.seed) is not int or not -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number of at most 64 bits")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search does not sample; use temperature 0 or num_beams 1")


class NewTokens(list):
    """The new ids of a row, and in `probabilities` what the model gave each of them.

    These are the model's own, before temperature, blocks and constraints.
    """

    def __init__(self, ids=(), probabilities=()):
        super().__init__(ids)
        self.probabilities = list(probabilities)

    def __getitem__(self, at):
        found = super().__getitem__(at)
        return NewTokens(found, self.probabilities[at]) if isinstance(at, slice) else found

    def plus(self, token: int, probability: float) -> "NewTokens":
        return NewTokens([*self, token], [*self.probabilities, probability])


class Generation:
    """A batch in the middle of being generated: the running texts, their caches and their next logits.

    Iterating yields at every step the next id of every row, None for a row that has ended. `results` holds
    what every row has got so far; `texts` the same for the texts still running, of which a beam search
    has several for a row and others none.
    """

    def __init__(self, model, tokens, pixels, image_embeds, image_mask, pad_mask, options, past=None):
        check_mask("pad_mask", pad_mask, tokens)
        if pad_mask is not None and not pad_mask.any():
            pad_mask = None
        if pad_mask is not None and pad_mask[:, -1].any():
            raise ValueError("to generate, rows must be padded on the left: pad_mask is True at the end of a row")
        if past is not None and (len(past.rows) != 1 or past.pad_mask is not None or past.texts[0]):
            raise ValueError("past must be one row without padding that has generated nothing")
        x = model.embed(tokens, pixels, image_embeds, image_mask)  # (B, T, D)
        B, T, _ = x.shape
        P = 0 if past is None else past.caches[0].length  # positions read before
        self.model, self.options, self.left = model, options, options.max_new_tokens
        self.rows = list(range(B))  # the row of `tokens` that each running text continues
        self.results = [NewTokens() for _ in self.rows]
        self.texts = list(self.results)
        pads = torch.zeros_like(tokens, dtype=torch.bool) if pad_mask is None else pad_mask
        before = [] if past is None else past.prompts[0]
        self.prompts = [before + row[~pad].tolist() for row, pad in zip(tokens, pads, strict=True)]
        self.random = None if options.seed is None else torch.Generator().manual_seed(options.seed)
        positions = token_positions(tokens, pad_mask) + P
        model._check_length(positions, options.max_new_tokens)
        self.next_position = positions[:, -1:] + 1  # (B, 1)
        text = model.config.text
        capacity = P + T + max(options.max_new_tokens - 1, 0)
        self.caches = [KVCache(B, text.heads, capacity, text.width // text.heads, like=x) for _ in range(text.layers)]
        if past is not None:
            for cache, old in zip(self.caches, past.caches, strict=True):
                cache.append(*(kv[:, :, :P].expand(B, -1, -1, -1) for kv in (old.keys, old.values)))
        self.pad_mask = None if pad_mask is None else F.pad(pad_mask, (P, 0), value=False)  # (B, P + T)
        self.predict(x, positions, causal_mask(T, P + T, self.pad_mask, x.device))

    def predict(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        """Run new positions x (B, T, D) through the decoder, some rows at a time, and ask the last one what is next."""
        B, T, _ = x.shape
        step, last = rows_at_a_time(x, T * self.model.config.text.mlp_width), []
        for start in range(0, max(B, 1), step):
            rows = slice(start, start + step)
            seen = mask if mask is None or mask.dim() == 2 else mask[rows]
            caches = [cache.view(rows) for cache in self.caches]
            last.append(self.model.decoder(x[rows], positions[rows], seen, caches)[:, -1])  # (step or fewer, D)
        for cache in self.caches:
            cache.length += T
        self.logits = self.model.decoder.unembed(torch.cat(last)).float()  # (B, V)
        if not torch.isfinite(self.logits.sum()):
            raise ValueError("the logits are not finite: the weights are damaged, or too large for this precision")

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[int | None]]:
        if self.options.num_beams > 1:
            raise ValueError("a beam search knows its text only at the end; stream with num_beams=1")
        while self.rows and self.left:
            chosen = self.draw()
            grown = self.grow(range(len(chosen)), chosen)
            step: list[int | None] = [None] * len(self.results)
            for row, token, text in zip(self.rows, chosen, grown, strict=True):
                step[row], self.results[row] = token, text
            yield step
            going = [i for i, token in enumerate(chosen) if token != EOS]
            self.advance(going, [grown[i] for i in going])

    def finish(self) -> list[NewTokens]:
        """Generate to the end."""
        for _ in self:
            pass
        return self.results

    def forbid(self, scores: Tensor) -> Tensor:
        """Next logits or log-probabilities (B, V), with -inf where a token may not come.

        A rule that would leave a text nothing to go on with is dropped, the later ones first.
        """
        scores, o = scores.clone(), self.options
        scores[:, PAD] = -math.inf  # no text contains it; the original forbids it, transformers does not
        for i, (row, new) in enumerate(zip(self.rows, self.texts, strict=True)):
            text, rules = self.prompts[row] + new, []
            if len(new) < o.min_new_tokens:
                rules.append([EOS])
            if o.constraint is not None:
                allowed = o.constraint(text, o.max_new_tokens - len(new))
                rules += [] if allowed is None else [~torch.from_numpy(allowed).to(scores.device)]
            if o.no_repeat_ngram_size:
                rules.append(repeated_ngrams(text, o.no_repeat_ngram_size))
            for rule in rules:
                ruled = scores[i].clone()
                ruled[rule] = -math.inf
                scores[i] = ruled if ruled.max() > -math.inf else scores[i]
        return scores

    def draw(self) -> list[int]:
        """The next token of every running text, greedily or by sampling."""
        logits, o = self.forbid(self.logits), self.options
        u = torch.rand(len(self.rows) if self.random is None else 1, generator=self.random).to(logits.device)
        return sample(logits, o.temperature, o.top_k, o.top_p, u).tolist()

    def grow(self, parents, tokens: list[int]) -> list[NewTokens]:
        """Each of these running texts with one more token."""
        chosen = self.logits[list(parents), tokens]  # (len(parents),)
        probabilities = (chosen - self.logits.logsumexp(dim=-1)[list(parents)]).exp().tolist()
        return [self.texts[i].plus(t, p) for i, t, p in zip(parents, tokens, probabilities, strict=True)]

    def advance(self, parents: list[int], texts: list[NewTokens]) -> None:
        """Go on with these texts, grown from those of `parents` (several from one, maybe); the others end here."""
        if parents != list(range(len(self.rows))):
            index = torch.tensor(parents, dtype=torch.long, device=self.next_position.device)
            for cache in self.caches:
                cache.select(index)
            self.next_position = self.next_position[index]
            self.pad_mask = None if self.pad_mask is None else self.pad_mask[index]
        self.texts, self.rows, self.left = texts, [self.rows[i] for i in parents], self.left - 1
        if not self.rows or not self.left:  # nobody will ask what follows the last token
            return
        if self.pad_mask is not None:
            self.pad_mask = F.pad(self.pad_mask, (0, 1), value=False)  # (B, S)
        tokens = torch.tensor([[text[-1]] for text in texts], device=self.next_position.device)
        x = self.model.decoder.embed_tokens(tokens)  # (B, 1, D)
        self.predict(x, self.next_position, causal_mask(1, self.caches[0].length + 1, self.pad_mask, x.device))
        self.next_position = self.next_position + 1


def pad_left(rows: list[tuple[list[int], list[bool]]], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """[(ids, image_mask)] of any lengths -> tokens, image_mask, pad_mask, each (B, T), for `generate`."""
    T = max(len(ids) for ids, _ in rows)
    tokens = [[PAD] * (T - len(ids)) + list(ids) for ids, _ in rows]
    image_mask = [[False] * (T - len(mask)) + list(mask) for _, mask in rows]
    pad_mask = [[True] * (T - len(ids)) + [False] * len(ids) for ids, _ in rows]
    return tuple(torch.tensor(t, device=device) for t in (tokens, image_mask, pad_mask))


def repeated_ngrams(tokens: list[int], n: int) -> list[int]:
    """The ids that would complete a run of n tokens which `tokens` already contains."""
    tail = tokens[len(tokens) - n + 1 :]
    return [tokens[i + n - 1] for i in range(len(tokens) - n + 1) if tokens[i : i + n - 1] == tail]


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, u: Tensor) -> Tensor:
    """logits (B, V), uniform numbers u (B,) or (1,) -> token ids (B,).

    Drawn by inverting the cumulative distribution over tokens sorted by probability, which needs one
    uniform number a token and no more.
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature must not overflow
    probs, ids = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_k is not None:
        probs[:, top_k:] = 0
        probs /= probs.sum(dim=-1, keepdim=True)
    if top_p is not None:
        ahead = probs.cumsum(dim=-1) - probs  # the mass of all likelier tokens
        ahead[:, 0] = 0
        probs[ahead >= top_p] = 0  # the token that crosses p stays
    cdf = probs.cumsum(dim=-1)
    drawn = (cdf < u[:, None] * cdf[:, -1:]).sum(dim=-1, keepdim=True)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]


@torch.inference_mode()
def beam_search(state: Generation) -> list[NewTokens]:
    """Keep the num_beams likeliest texts of every row at every step; returns the best finished one of each.

    A finished text's score is the mean log-probability of its new tokens. A row stops when it has num_beams
    finished texts and its best running one scores no better than the worst of them.
    """
    K, limit = state.options.num_beams, state.options.max_new_tokens
    totals = torch.zeros(len(state.rows))  # summed log-probability of every running text, blocks applied
    finished: list[list[tuple[float, NewTokens]]] = [[] for _ in state.rows]
    for length in range(1, limit + 1):
        if not state.rows:
            break
        scores = state.forbid(state.logits.log_softmax(dim=-1)).cpu() + totals[:, None]  # (texts, V)
        kept = []
        for row in dict.fromkeys(state.rows):
            beams = [i for i, r in enumerate(state.rows) if r == row]
            running, ended = best_continuations(scores, beams, K, last=length == limit)
            texts = state.grow([i for _, i, _ in ended], [token for _, _, token in ended])
            finished[row] += [(score / length, text) for (score, _, _), text in zip(ended, texts, strict=True)]
            finished[row] = sorted(finished[row], key=lambda text: -text[0])[:K]
            full = len(finished[row]) == K
            if running and not (full and running[0][0] / length <= finished[row][-1][0]):
                kept += running
        totals = torch.tensor([score for score, _, _ in kept])
        parents = [i for _, i, _ in kept]
        state.advance(parents, state.grow(parents, [token for _, _, token in kept]))
    return [texts[0][1] if texts else NewTokens() for texts in finished]


def best_continuations(scores: Tensor, beams: list[int], K: int, last: bool):
    """Of one row's candidates (score, text, token): the K best that go on, and those of the K best that end.

    A text ends in at most one way, by </s>, so among 2 K candidates there are always K that go on.
    """
    V = scores.shape[1]
    best, where = scores[beams].flatten().topk(min(2 * K, len(beams) * V))
    candidates = [(s, beams[at // V], at % V) for s, at in zip(best.tolist(), where.tolist(), strict=True)]
    running = [c for c in candidates if not last and c[2] != EOS and c[0] > -math.inf]
    ended = [c for c in candidates[:K] if (last or c[2] == EOS) and c[0] > -math.inf]
    return running[:K], ended


# ----------------------------------------------------------------------------------------------------
# Speed: the same numbers sooner, or nearly the same much sooner  (walkthrough: notebooks/09_speed)
# ----------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """nn.Linear that uses all cores even for a few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


FEW_ROWS, MANY_WEIGHTS = 16, 2**20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., K) times weight (N, K) transposed, plus bias (N,).

    A step of decoding multiplies a single row with each weight once, so it takes as long as reading them
    all. PyTorch's CPU kernel gives such a product to one core, which cannot read as fast as the memory
    delivers. As a batch of products with slices of the matrix it goes to all cores: twice as fast on two.
    """
    rows, (N, K) = x.numel() // x.shape[-1], weight.shape
    if rows > FEW_ROWS or N * K < MANY_WEIGHTS or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    slices = max(n for n in range(1, 65) if N % n == 0)  # enough for all cores, and still long
    columns = x.reshape(rows, K).T.expand(slices, K, rows)
    y = torch.bmm(weight.view(slices, N // slices, K), columns)  # (slices, N / slices, rows)
    y = y.reshape(N, rows).T.reshape(*x.shape[:-1], N)
    return y if bias is None else y + bias


class PackedLinear(nn.Module):
    """A linear layer with weights of 8 or 16 bits, for CPUs; what goes in and comes out is float32.

    Decoding takes as long as reading the weights, so narrower ones decode faster: float16 twice, int8 four
    times. In int8 the weights of output n are scale[n] * q[n], q from -127 to 127; each row of x is rounded
    in the same way by a scale of its own, so that it does not depend on its neighbours; sums are exact.
    PyTorch's fbgemm kernels do it where they are built in. Elsewhere (ARM) plain arithmetic gives the same numbers;
    that saves memory, but no time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None):
        """weight (N, K): float16; or int8, and then with its scale (N,)."""
        super().__init__()
        self.bias, self.scale, self.weight, self.packed = bias, scale, weight, None
        if hasattr(torch.ops.quantized, KERNEL) and {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines):
            self.weight, self.packed = None, pack(weight, bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            if self.packed is not None:
                return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
            return F.linear(x, self.weight.float(), self.bias)
        size = largest(x)  # (..., 1)
        if self.packed is not None:
            y = multiply(x / size, self.packed, input_steps())
        else:
            y = F.linear((x / size * 127).round() / 127, self.weight.float()) * self.scale
        return y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y, size, out=y)


class PackedEmbedding(nn.Module):
    """`Embedding` in 8 or 16 bits: a row for a token, and the whole of it as a PackedLinear for the logits."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.weight, self.scale, self.unembed = weight, scale, PackedLinear(weight, None, scale)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight[tokens].float()
        return rows if self.scale is None else rows * self.scale[tokens][..., None]


KERNEL = "linear_with_input_q_dq_qweight_dq_output_fp32"


def pack(weight: Tensor, bias: Tensor | None, scale: Tensor | None):
    """Weights in the order in which PyTorch's kernels read them; for int8 without the bias."""
    if scale is None:
        return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
    with warnings.catch_warnings(action="ignore"):  # PyTorch means to replace these kernels one day
        zero = torch.zeros(len(scale), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(weight, None)


def multiply(x: Tensor, packed, steps: int) -> Tensor:
    """x (..., K) in -1..1, rounded to `steps` steps on either side of zero, times packed int8 weights."""
    return getattr(torch.ops.quantized, KERNEL)(x, 1 / steps, steps + 1, packed)


@lru_cache
def input_steps() -> int:
    """127 steps, or 63 on CPUs without VNNI instructions: there pairs of products are added in 16 bits.

    The kernel stores inputs as 1 to 255. Two products of 255 and 127 do not fit 16 bits, and are cut off without a
    word; this trial sees whether they are.
    """
    trial = pack(torch.full((16, 64), 127, dtype=torch.int8), None, torch.ones(16))
    return 127 if torch.allclose(multiply(torch.ones(1, 64), trial, 127), torch.tensor(64.0 * 127)) else 63


def largest(x: Tensor) -> Tensor:
    """The largest absolute value of each row, (..., 1), not zero; faster than x.abs().amax(), which writes x anew."""
    return torch.maximum(x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True)).clamp(min=1e-30)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and scale (N,) such that scale * int8 approximates weight."""
    scale = largest(weight)[:, 0] / 127
    q = torch.empty(weight.shape, dtype=torch.int8)
    for part, rows, step in zip(q.split(512), weight.split(512), scale[:, None].split(512), strict=True):
        part.copy_((rows / step).round_())  # in parts that stay in the cache
    return q, scale


CACHE = 2**22  # activations, 16 MiB of float32: what may stay in a CPU's cache from one operation to the next


def rows_at_a_time(batch: Tensor, activations: int) -> int:
    """How many rows of a batch to compute together, each with so many activations in its widest layer.

    What does not fit the cache is written to memory and read again by every operation: 16 pictures of the
    published size take the ViT nearly twice as long at once as three at a time.
    """
    return max(1, CACHE // activations) if batch.device.type == "cpu" else max(1, len(batch))
