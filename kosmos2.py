"""Kosmos-2 in one file: image in, grounded caption out.

Kosmos-2 (Peng et al. 2023, "Grounding Multimodal Large Language Models to the World", arXiv
2306.14824) is a decoder-only language model with two additions:

- Images: a ViT turns the image into a grid of features, a resampler condenses them into a few
  dozen vectors, and these replace the placeholder token embeddings in the prompt.
- Boxes: the vocabulary has one location token for each cell of a 32 x 32 grid over the image,
  and a box is written as two of them, so grounding is ordinary next-token prediction:

    <phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>

Data flow, with the sizes of the published model:

    image  ─ preprocess_image ──> pixels        (I, 3, 224, 224)
           ─ VisionTransformer ─> features      (I, N=257, E=1024)  unit length, [CLS] + 16 x 16 patches
           ─ Resampler ─────────> image_embeds  (I, Q=64, D=2048)
    tokens ─ embed ─────────────> x             (B, T, D)  image_embeds in the image slots
           ─ Decoder ───────────> x             (B, T, D)  24 causal blocks
           ─ unembed ───────────> logits        (B, T, V=65037)  tied to the embedding matrix
           ─ generate ──────────> new token ids, one list per row

Dimension legend:
    B batch           T tokens           S keys, including the cache    V vocabulary
    D width           H heads            hd = D / H head width
    E vision width    N image positions  Q latent queries               I images in a batch

Where it differs most from a textbook transformer (notebooks/10_departures has the whole list):
- sub-LN: a second LayerNorm inside attention and MLP (`Block`)
- ViT features of unit length (`VisionTransformer`)
- latents appended to the keys and values (`Resampler`)
- position ids that start at 2; sinusoids stored as [sin | cos] (`token_positions`, `sinusoidal_positions`)

Order: config, shared layers, vision, decoder, model, generation. Reading and writing checkpoints,
and the faster linear layers that replace nn.Linear on a CPU, are in load_weights.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor, nn

from tokenizer import Tokenizer, iou

BOS, PAD, EOS = 0, 1, 2  # the first ids of every published vocabulary

# ----------------------------------------------------------------------------------------------------
# Configuration  (walkthrough: notebooks/06_weights)
# ----------------------------------------------------------------------------------------------------


def check_integers(where: str, minimum: int = 1, **values) -> None:
    """Raise ValueError, naming the field, unless all values are integers of at least `minimum`."""
    for name, value in values.items():
        if type(value) is not int or value < minimum:
            raise ValueError(f"{where} {name}: expected an integer of at least {minimum}, got {value!r}")


def check_sizes(where: str, **values) -> None:
    """`check_integers` for a configuration, with a limit far above any model."""
    check_integers(where, **values)
    for name, value in values.items():
        limit = 1000 if name == "layers" else 2**24
        if value > limit:
            raise ValueError(f"{where} {name}: expected at most {limit}, got {value}")


def check_eps(where: str, value) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{where} layer_norm_eps: expected a number between 0 and 1, got {value!r}")


@dataclass(frozen=True)
class VisionConfig:
    """The ViT. Defaults: CLIP's ViT-L/14."""

    image_size: int = 224  # pixels per side
    patch_size: int = 14  # pixels per side
    width: int = 1024  # E
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_sizes("vision", image_size=self.image_size, patch_size=self.patch_size, width=self.width)
        check_sizes("vision", layers=self.layers, heads=self.heads, mlp_width=self.mlp_width)
        check_eps("vision", self.layer_norm_eps)
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches per side."""
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
    max_positions: int = 2048  # context length in training
    layer_norm_eps: float = 1e-5
    no_repeat_ngram_size: int = 3  # the checkpoint's default for generation; 0 for no n-gram blocking

    def __post_init__(self):
        check_sizes(
            "text", vocab_size=self.vocab_size, width=self.width, layers=self.layers, heads=self.heads
        )
        check_sizes("text", mlp_width=self.mlp_width, max_positions=self.max_positions)
        check_integers("text", minimum=0, no_repeat_ngram_size=self.no_repeat_ngram_size)
        check_eps("text", self.layer_norm_eps)
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class Kosmos2Config:
    """All sizes of a Kosmos-2. Defaults: the published model (1.66 B parameters)."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    latent_query_num: int = 64  # Q, under its published name

    def __post_init__(self):
        check_sizes("config", latent_query_num=self.latent_query_num)

    @classmethod
    def from_json(cls, path: str | Path) -> "Kosmos2Config":
        """Read a published config.json: see `load_weights.read_config`."""
        from load_weights import read_config  # load_weights imports this file

        return read_config(path)


# ----------------------------------------------------------------------------------------------------
# Layers shared by the ViT, the resampler and the decoder
# ----------------------------------------------------------------------------------------------------


def random_parameter(*shape: int, bound: float) -> nn.Parameter:
    """Initial weights. (Uniform, because on the meta device, where the loader builds models,
    normal_() makes PyTorch import its compiler, which takes about a second.)"""
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class KVCache:
    """The keys and values of one attention layer for all positions so far, in a fixed buffer.

    A new token attends to all earlier ones, and their keys and values never change. With a cache, a
    decoding step runs one position through the model instead of the whole sequence.
    """

    def __init__(self, batch: int, heads: int, capacity: int, head_width: int, like: Tensor):
        self.keys = like.new_empty(batch, heads, capacity, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, hd) of new positions; returns those of all, (B, H, S, hd)."""
        start = self.length
        self.length += k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may repeat."""
        self.keys = self._reordered(self.keys, rows)
        self.values = self._reordered(self.values, rows)

    def _reordered(self, old: Tensor, rows: Tensor) -> Tensor:
        new = old.new_empty(len(rows), *old.shape[1:])
        new[:, :, : self.length] = old[rows, :, : self.length]  # not the unused part
        return new


class Attention(nn.Module):
    """Multi-head attention with biases on all four projections.

    Differs from the textbook in `sub_ln`, a LayerNorm before the output projection: see `Block`.
    """

    def __init__(self, width: int, heads: int, sub_ln: bool = False, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps) if sub_ln else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Queries from x (B, T, D); keys and values from context (B, S, D), by default x itself.

        mask: bool, broadcast to (B, H, T, S), True where attention is allowed.
        """
        B, T, D = x.shape
        q, k, v = self.project(x, context)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, hd), S including all earlier positions
        # softmax(q·kᵀ / √hd)·v
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, hd)
        attended = attended.transpose(1, 2).reshape(B, T, D)  # (B, T, D)
        return self.out_proj(self.inner_attn_ln(attended))

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, hd), keys and values (B, H, S, hd).

        (A method of its own, because load_weights.py replaces it by one with packed weights.)
        """
        if context is None:
            context = x
        q = self.q_proj(x)
        k = self.k_proj(context)
        v = self.v_proj(context)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        return x.view(B, T, self.heads, D // self.heads).transpose(1, 2)  # (B, H, T, hd)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's cheap approximation of GELU. (The decoder uses the exact GELU.)"""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two linear layers around an activation; sub_ln adds a LayerNorm after it: see `Block`."""

    def __init__(self, width: int, mlp_width: int, activation, sub_ln: bool, eps: float):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.ffn_layernorm = nn.LayerNorm(mlp_width, eps) if sub_ln else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.fc1(x))
        return self.fc2(self.ffn_layernorm(hidden))


class Block(nn.Module):
    """A pre-norm transformer block: plain in the ViT, with sub-LN in the decoder.

    With pre-norm alone, the scale of what each layer adds drifts with depth. Sub-LN (MAGNETO, arXiv
    2210.06423, section 2) adds a LayerNorm before the last projection of attention and MLP, so the
    inputs of both have the same scale.
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
# From an image to image embeddings  (walkthrough: notebooks/01_vision, notebooks/02_resampler)
# ----------------------------------------------------------------------------------------------------

# CLIP's per-channel mean and standard deviation, RGB.
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def preprocess_image(image: Image.Image, image_size: int) -> Tensor:
    """An image of any size and mode -> pixels (3, image_size, image_size), float32.

    The whole image is squashed to a square (aspect ratio is not preserved), so coordinates in
    0..1 are the same in the square and in the image. ValueError for pixel values out of range: see
    `to_rgb`.
    """
    image = to_rgb(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255  # (image_size, image_size, 3)
    pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, image_size, image_size)


def preprocess_images(images: list[Image.Image], image_size: int) -> Tensor:
    """`preprocess_image` for a list of images: pixels (I, 3, image_size, image_size)."""
    return torch.stack([preprocess_image(image, image_size) for image in images])


# The Orientation tag of EXIF -> the operation that turns the image upright.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as an upright RGB image, with transparency composited on white.

    Only the Orientation tag of EXIF is used. (ImageOps.exif_transpose would also write the whole
    block back, which fails for many real files.) FileNotFoundError or ValueError, naming the file,
    if it cannot be read.
    """
    if re.match(r"\w+:/", str(path)) and not Path(path).exists():
        raise ValueError(f"{path} is a URL; download the image first")
    if not Path(path).exists():
        raise FileNotFoundError(f"no image at {path}")
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a regular file")
    try:
        with Image.open(path) as image:
            image.load()
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # a damaged EXIF block does not make the image unreadable
                orientation = None
            image = to_rgb(image)
            return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image that Pillow can read"
        raise ValueError(f"cannot read {path}: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, with transparency composited on white.

    Pillow would clip modes with more than 8 bits. Integer modes are read as 16 bits (0..65535),
    float mode as 0..1 or, if its maximum is above 1, as 0..255. ValueError for values outside that
    range and for an image without pixels.
    """
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: its size is {image.size[0]} x {image.size[1]}")
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts premultiplied gray only to LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """A 16-bit, 32-bit or float grayscale image -> mode L or LA, with the same brightness."""
    values = np.asarray(image).astype(np.float32)
    low = float(values.min())
    high = float(values.max())
    if image.mode != "F":
        limit = 65535.0
    elif high <= 1:
        limit = 1.0
    else:
        limit = 255.0
    if not (low >= 0 and high <= limit):  # also true for NaN
        raise ValueError(f"mode {image.mode} image with values {low:g} to {high:g}: expected 0 to {limit:g}")
    result = Image.fromarray((values * (255 / limit)).round().astype(np.uint8))
    transparent = image.info.get("transparency")  # of a 16-bit PNG: the value of its transparent pixels
    if transparent is not None:
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


class VisionTransformer(nn.Module):
    """CLIP's ViT (arXiv 2103.00020): all N positions of its last layer, each scaled to unit length.

    Differs from CLIP: [CLS] is passed on together with the patches, there is no projection into
    CLIP's joint space, and the features are normalized position by position.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        E = config.width
        eps = config.layer_norm_eps
        self.class_embedding = random_parameter(E, bound=E**-0.5)
        self.patch_embedding = nn.Conv2d(3, E, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = random_parameter(config.positions, E, bound=E**-0.5)
        self.pre_layernorm = nn.LayerNorm(E, eps)
        self.layers = nn.ModuleList(
            Block(E, config.heads, config.mlp_width, quick_gelu, sub_ln=False, eps=eps)
            for _ in range(config.layers)
        )
        self.post_layernorm = nn.LayerNorm(E, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (I, 3, height, width) -> features (I, N, E)."""
        patches = self.patch_embedding(pixels)  # (I, E, rows, columns)
        positions = self.interpolate_positions(patches.shape[2], patches.shape[3])  # (N, E)
        patches = patches.flatten(2).transpose(1, 2)  # (I, N-1, E), row by row from the top left
        cls = self.class_embedding.expand(len(pixels), 1, -1)  # (I, 1, E)
        x = torch.cat([cls, patches], dim=1)  # (I, N, E)
        x = self.pre_layernorm(x + positions)
        for layer in self.layers:
            x = layer(x)
        return F.normalize(self.post_layernorm(x), dim=-1)

    def interpolate_positions(self, rows: int, columns: int) -> Tensor:
        """The position embeddings (N, E), bicubically interpolated if the grid size differs."""
        grid = math.isqrt(len(self.position_embedding) - 1)
        if rows == columns == grid:
            return self.position_embedding
        cls = self.position_embedding[:1]
        patches = self.position_embedding[1:].T.reshape(1, -1, grid, grid)  # (1, E, grid, grid)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic")  # (1, E, rows, columns)
        return torch.cat([cls, patches.flatten(2)[0].T])  # (1 + rows * columns, E)


class Resampler(nn.Module):
    """N features of the ViT -> Q embeddings for the decoder, by one cross-attention.

    Q learned queries attend to the features, so the decoder's cost is independent of the number of
    patches. Differs from a textbook attention layer: the queries themselves are appended to the
    keys and values (as in Flamingo's resampler, arXiv 2204.14198, section 3.1.1), and there is no
    LayerNorm, residual or MLP. Outputs are ordered by query; spatial information comes only from
    the ViT's position embeddings.
    """

    def __init__(self, config: Kosmos2Config):
        super().__init__()
        D = config.text.width
        self.dense = nn.Linear(config.vision.width, D)
        self.latent_query = random_parameter(config.latent_query_num, D, bound=1.0)
        self.x_attn = Attention(D, config.text.heads)

    def forward(self, features: Tensor) -> Tensor:
        """features (I, N, E) -> image_embeds (I, Q, D)."""
        features = self.dense(features)  # (I, N, D)
        latents = self.latent_query.expand(len(features), -1, -1)  # (I, Q, D)
        return self.x_attn(latents, context=torch.cat([features, latents], dim=1))  # (I, Q, D)


# ----------------------------------------------------------------------------------------------------
# The decoder  (walkthrough: notebooks/03_decoder)
# ----------------------------------------------------------------------------------------------------

FIRST_POSITION = 2  # from fairseq, which reserves position 1 for padding; 0 is unused


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """Integer positions (B, T) -> position encodings (B, T, width), float32.

    Differs from "Attention Is All You Need" (section 3.5): all sines come first, then all cosines,
    instead of being interleaved, and the last frequency reaches the longest wavelength exactly.
    """
    half = width // 2
    step = math.log(10000) / max(half - 1, 1)
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=positions.device) * -step
    )  # (half,)
    angles = positions[..., None].float() * frequencies  # (B, T, half)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, T, 2 * half)
    return F.pad(table, (0, width % 2))  # (B, T, width): an odd width ends in a zero


def token_positions(tokens: Tensor, pad_mask: Tensor | None = None) -> Tensor:
    """Position ids (B, T): 2, 3, 4, ..., counting only tokens that are not padding."""
    check_mask("pad_mask", pad_mask, tokens)
    real = torch.ones_like(tokens) if pad_mask is None else (~pad_mask).long()
    return real.cumsum(dim=1) + FIRST_POSITION - 1


def check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    """ValueError for a mask that is not bool with the shape of tokens."""
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
        raise ValueError(f"{name}: expected bool {tuple(tokens.shape)}, got {mask.dtype} {tuple(mask.shape)}")


def check_disjoint(image_mask: Tensor | None, pad_mask: Tensor | None) -> None:
    if image_mask is not None and pad_mask is not None and (image_mask & pad_mask).any():
        raise ValueError("image_mask and pad_mask mark the same token; a slot cannot be padding")


def causal_mask(T: int, S: int, pad_mask: Tensor | None = None, device=None) -> Tensor | None:
    """The attention mask of the last T of S positions: bool, (T, S), or (B, 1, T, S) with padding.

    None if nothing is masked. pad_mask (B, S) is True on padding. A padding position attends to
    itself: a fully masked row would give NaN; its output is never used.
    """
    if T == 1 and pad_mask is None:
        return None
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)  # (T, S)
    if pad_mask is None:
        return mask
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - T :]  # (T, S)
    mask = mask & ~pad_mask[:, None, :]  # (B, T, S)
    return (mask | itself)[:, None]  # (B, 1, T, S)


class Embedding(nn.Embedding):
    """Token embeddings that are also the output projection (tied weights)."""

    def unembed(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)."""
        return F.linear(x, self.weight)


class Decoder(nn.Module):
    """A causal transformer with tied input and output embeddings."""

    def __init__(self, config: TextConfig):
        super().__init__()
        D = config.width
        eps = config.layer_norm_eps
        weight = random_parameter(config.vocab_size, D, bound=D**-0.5)
        self.embed_tokens = Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(
            Block(D, config.heads, config.mlp_width, F.gelu, sub_ln=True, eps=eps)
            for _ in range(config.layers)
        )
        self.layer_norm = nn.LayerNorm(D, eps)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """Embeddings x (B, T, D) and position ids (B, T) -> x (B, T, D) after the last norm.

        The factor sqrt(D) brings token embeddings, which are stored with lengths near one, to the
        scale of the position encodings. Image embeddings are already in place, so they are scaled
        and given positions like any token.
        """
        D = x.shape[-1]
        x = x * math.sqrt(D) + sinusoidal_positions(positions, D).to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, cache=caches[i] if caches else None)
        return self.layer_norm(x)

    def unembed(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)."""
        return self.embed_tokens.unembed(x)


# ----------------------------------------------------------------------------------------------------
# The whole model  (walkthrough: notebooks/00_overview)
# ----------------------------------------------------------------------------------------------------


class Kosmos2(nn.Module):
    """The grounded vision-language model; the module docstring shows its data flow.

    A batch may mix rows with no image, one or several: `pixels` or `image_embeds` hold the images
    of all rows in reading order, and `image_mask` marks the Q slots of each.
    """

    def __init__(self, config: Kosmos2Config):
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.resampler = Resampler(config)
        self.decoder = Decoder(config.text)

    def encode_image(self, pixels: Tensor, interpolate: bool = False) -> Tensor:
        """pixels (I, 3, image_size, image_size) -> image_embeds (I, Q, D).

        interpolate: accept any image of at least one patch, by interpolating the ViT's position
        embeddings; without it, ValueError for any size but the trained one.
        """
        size = self.config.vision.image_size
        patch = self.config.vision.patch_size
        shape = tuple(pixels.shape)
        if pixels.dim() != 4 or shape[1] != 3:
            raise ValueError(f"pixels: expected (I, 3, {size}, {size}), got {shape}")
        if interpolate and min(shape[2:]) < patch:
            raise ValueError(f"pixels: expected a height and width of at least {patch}, got {shape}")
        if not interpolate and shape[2:] != (size, size):
            raise ValueError(f"pixels: expected (I, 3, {size}, {size}), got {shape}")
        features = self.vision(pixels.to(self.vision.class_embedding.dtype))  # (I, N, E)
        return self.resampler(features)  # (I, Q, D)

    def embed(self, tokens: Tensor, pixels=None, image_embeds=None, image_mask=None) -> Tensor:
        """tokens (B, T) -> x (B, T, D), with the image embeddings in the image slots.

        Arguments as in `forward`. ValueError if images and slots do not match.
        """
        self._check_tokens(tokens)
        check_mask("image_mask", image_mask, tokens)
        if pixels is not None and image_embeds is not None:
            raise ValueError("pass either pixels or image_embeds, not both")
        if pixels is not None:
            image_embeds = self.encode_image(pixels)
        self._check_slots(image_embeds, image_mask)
        x = self.decoder.embed_tokens(tokens)  # (B, T, D)
        if image_embeds is None or len(image_embeds) == 0:
            return x
        # The mask's True entries, read row by row, take the image embeddings one after the other.
        # So image i fills the i-th run of Q slots, whichever row it is in.
        return x.masked_scatter(image_mask[..., None], image_embeds.to(x.dtype))  # (B, T, D)

    def forward(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_mask: Tensor | None = None,
        pad_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Next-token logits at every position, and with labels also the loss.

        tokens      (B, T) ids
        pixels      (I, 3, image_size, image_size) or image_embeds (I, Q, D): all images, in reading order
        image_mask  (B, T) bool, True on the I x Q image slots
        pad_mask    (B, T) bool, True on padding, on either side
        labels      (B, T) ids, one per token (shifted by one in this function); -100 is ignored
        Returns logits (B, T, V), or (logits, mean cross-entropy).
        Raises ValueError for shapes that do not fit and for rows longer than the context.
        """
        x = self.embed(tokens, pixels, image_embeds, image_mask)
        T = tokens.shape[1]
        positions = token_positions(tokens, pad_mask)
        check_disjoint(image_mask, pad_mask)
        self._check_length(positions)
        x = self.decoder(x, positions, causal_mask(T, T, pad_mask, tokens.device))
        logits = self.decoder.unembed(x)  # (B, T, V)
        if labels is None:
            return logits
        if labels.shape != tokens.shape:
            raise ValueError(f"labels: expected {tuple(tokens.shape)}, got {tuple(labels.shape)}")
        predicted = logits[:, :-1].flatten(0, 1).float()  # (B * (T - 1), V)
        targets = labels[:, 1:].flatten()  # (B * (T - 1),)
        loss = F.cross_entropy(predicted, targets, ignore_index=-100)
        return logits, loss

    def _check_tokens(self, tokens: Tensor) -> None:
        V = self.config.text.vocab_size
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens: expected (B, T) with T >= 1, got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected int64, got {tokens.dtype}")
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= V):
            raise ValueError(
                f"token ids must be in 0..{V - 1}; does the tokenizer belong to another checkpoint?"
            )

    def _check_slots(self, image_embeds: Tensor | None, image_mask: Tensor | None) -> None:
        Q = self.config.latent_query_num
        D = self.config.text.width
        if image_embeds is not None and tuple(image_embeds.shape[1:]) != (Q, D):
            raise ValueError(f"image_embeds: expected (I, {Q}, {D}), got {tuple(image_embeds.shape)}")
        images = 0 if image_embeds is None else len(image_embeds)
        slots = [0] if image_mask is None else image_mask.sum(dim=1).tolist()
        if sum(slots) != images * Q or any(count % Q for count in slots):
            raise ValueError(
                f"image_mask marks {slots} slots per row; expected {Q} for each image, images: {images}"
            )

    def _check_length(self, positions: Tensor, new_tokens: int = 0) -> None:
        if not positions.numel():
            return
        limit = self.config.text.max_positions
        length = int(positions.max()) - FIRST_POSITION + 1
        room = limit - length
        if room < 0 or (room == 0 and new_tokens > 0):
            raise ValueError(
                f"the prompt has {length} tokens, but the context holds only {limit}; shorten the prompt"
            )
        if new_tokens > room:
            raise ValueError(
                f"the prompt has {length} tokens and the context holds {limit}; "
                f"{new_tokens} new tokens do not fit; ask for at most {room}"
            )

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, pixels=None, image_embeds=None, image_mask=None, pad_mask=None, **options
    ) -> list[list[int]]:
        """Continue every row; returns the new ids of each, ending with </s> or at max_new_tokens.

        Arguments as in `forward`; rows of different lengths must be padded on the left
        (`pad_left`). Options are the fields of `GenerationOptions`, by name. A row's result depends
        neither on the other rows nor on its padding. (transformers 5.23 shifts the positions of
        padded rows when decoding begins.)
        Raises ValueError for options out of range and for prompts that exceed the context length.
        """
        state = self.prefill(tokens, pixels, image_embeds, image_mask, pad_mask, **options)
        return [result.ids for result in finish(state)]

    def stream(self, *inputs, **options) -> Iterator[list[int | None]]:
        """`generate`, step by step: yields the new id of every row, None for finished rows."""
        yield from decode(self.prefill(*inputs, **options))

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        pixels=None,
        image_embeds=None,
        image_mask=None,
        pad_mask=None,
        prefix=None,
        **options,
    ) -> "DecodeState":
        """Run the prompts of `generate`; `decode` or `beam_search` continue from here.

        prefix: the DecodeState after the common beginning of all prompts, one row without padding
        and without new tokens; `tokens` then holds only what follows it. Several questions about
        one image share its prefill this way:

            prefix = model.prefill(image_tokens, pixels, image_mask=image_mask, max_new_tokens=0)
            answers = finish(model.prefill(questions, pad_mask=pad_mask, prefix=prefix))
        """
        checked = GenerationOptions(**options)
        check_mask("pad_mask", pad_mask, tokens)
        if pad_mask is not None and not pad_mask.any():
            pad_mask = None
        if pad_mask is not None and pad_mask[:, -1].any():
            raise ValueError("generation needs left padding, but pad_mask is True at the end of a row")
        if prefix is not None and not (prefix.model is self and prefix.is_prefix()):
            raise ValueError("prefix: expected one row of this model, without padding and without new tokens")
        x = self.embed(tokens, pixels, image_embeds, image_mask)  # (B, T, D)
        check_disjoint(image_mask, pad_mask)
        B, T, D = x.shape
        past = 0 if prefix is None else prefix.caches[0].length
        positions = token_positions(tokens, pad_mask) + past
        self._check_length(positions, checked.max_new_tokens)

        heads = self.config.text.heads
        capacity = past + T + max(checked.max_new_tokens - 1, 0)
        caches = [KVCache(B, heads, capacity, D // heads, like=x) for _ in self.decoder.layers]
        prompts = tokens.tolist()
        if pad_mask is not None:
            prompts = [row[~padding].tolist() for row, padding in zip(tokens, pad_mask, strict=True)]
            pad_mask = F.pad(pad_mask, (past, 0), value=False)  # (B, past + T)
        if prefix is not None:
            prompts = [prefix.prompts[0] + prompt for prompt in prompts]
            for cache, shared in zip(caches, prefix.caches, strict=True):
                cache.append(shared.keys[:, :, :past], shared.values[:, :, :past])  # the same for all rows

        x = self.decoder(x, positions, causal_mask(T, past + T, pad_mask, x.device), caches)  # (B, T, D)
        next_position = positions[:, -1:] + 1  # (B, 1)
        logits = self.next_logits(x[:, -1])  # (B, V)
        return DecodeState(self, checked, prompts, caches, next_position, pad_mask, logits)

    def next_logits(self, x: Tensor) -> Tensor:
        """x (..., D) after the decoder -> float32 logits (..., V) of the next token."""
        logits = self.decoder.unembed(x).float()  # (..., V)
        if not torch.isfinite(logits.sum()):
            raise ValueError(
                "the logits are not finite: the weights are damaged or too large for this precision"
            )
        return logits


# ----------------------------------------------------------------------------------------------------
# Generation  (walkthrough: notebooks/05_sampling)
# ----------------------------------------------------------------------------------------------------

# (ids so far, number of tokens that may still follow) -> bool (V,), True where a token may come
# next; None if all may.
Constraint = Callable[[list[int], int], np.ndarray | None]


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt. ValueError for a value out of its range."""

    # Upper limit; prompt and new tokens must fit the context. 430 is the original demo's limit.
    max_new_tokens: int = 430
    min_new_tokens: int = 0  # no </s> before this many new tokens
    temperature: float = 0.0  # 0 takes the most likely token, 1 samples from the model's distribution
    top_k: int | None = None  # sample among the k most likely tokens
    top_p: float | None = None  # sample among the most likely tokens that together reach probability p
    num_beams: int = 1  # above 1: beam search; excludes sampling
    # Forbid any n-gram that has occurred already, including in the prompt and its slots. The published model
    # is used with 3 (config.text.no_repeat_ngram_size); transformers 5.23 loses that setting while loading.
    no_repeat_ngram_size: int = 0
    # With a seed, all rows share one random stream, so batching does not change results. (Equal prompts
    # in a batch get equal samples.)
    seed: int | None = None
    constraint: Constraint | None = None  # such as Tokenizer.allowed_tokens, which keeps boxes complete
    # Ids so far -> ids that probably follow, such as Tokenizer.likely_next. They are run in the same pass
    # as the last token, which costs little when decoding is memory-bound. A correct guess saves
    # a pass; the result stays the same. Used for one sequence without padding, not in beam search.
    draft: Callable[[list[int]], list[int]] | None = None

    def __post_init__(self):
        check_integers(
            "option", minimum=0, max_new_tokens=self.max_new_tokens, min_new_tokens=self.min_new_tokens
        )
        check_integers("option", minimum=0, no_repeat_ngram_size=self.no_repeat_ngram_size)
        check_integers("option", num_beams=self.num_beams)
        if self.top_k is not None:
            check_integers("option", top_k=self.top_k)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens})"
            )
        hottest = torch.finfo(torch.float32).max
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature <= hottest:
            raise ValueError(
                f"temperature: expected 0 (greedy) or a positive number, got {self.temperature!r}"
            )
        is_number = isinstance(self.top_p, (int, float))
        if self.top_p is not None and not (is_number and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")
        fits = type(self.seed) is int and -(2**63) <= self.seed < 2**64
        if self.seed is not None and not fits:
            raise ValueError(f"seed: expected an integer of at most 64 bits, got {self.seed!r}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search does not sample; use temperature 0 or num_beams 1")


@dataclass(frozen=True)
class Generated:
    """The new ids of a sequence, and the probability the model gave to each.

    Probabilities are the model's own: before temperature, n-gram blocking and constraints.
    """

    ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    def plus(self, token: int, probability: float) -> "Generated":
        return Generated([*self.ids, token], [*self.probabilities, probability])


@dataclass
class DecodeState:
    """Decoding state of a batch: sequences, KV caches and next-token logits.

    Sequence i continues prompts[rows[i]]. At first there is one for each prompt. Finished sequences
    leave the batch; beam search keeps several for each prompt.
    """

    model: Kosmos2
    options: GenerationOptions
    prompts: list[list[int]]
    caches: list[KVCache]  # one for each layer
    next_position: Tensor  # (B, 1)
    pad_mask: Tensor | None  # (B, S)
    logits: Tensor  # (B, V)
    rows: list[int] = field(init=False)
    sequences: list[Generated] = field(init=False)
    results: list[Generated] = field(init=False)  # what has been generated for each prompt
    # Guesses that have been run already: each id, and the logits (1, V) of what follows it.
    drafted: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self):
        self.rows = list(range(len(self.prompts)))
        self.sequences = [Generated() for _ in self.rows]
        self.results = list(self.sequences)

    def is_prefix(self) -> bool:
        """Whether other prompts can continue from here: see `Kosmos2.prefill`."""
        return len(self.rows) == 1 and self.pad_mask is None and not self.sequences[0].ids

    def all_ids(self, i: int) -> list[int]:
        """The ids of sequence i, those of its prompt included."""
        return self.prompts[self.rows[i]] + self.sequences[i].ids

    def extended(self, parents: list[int], tokens: list[int]) -> list[Generated]:
        """The sequences `parents`, each with one more token."""
        logits = self.logits[parents, tokens]  # (len(parents),)
        probabilities = (logits - self.logits.logsumexp(dim=-1)[parents]).exp().tolist()
        longer = []
        for i, token, probability in zip(parents, tokens, probabilities, strict=True):
            longer.append(self.sequences[i].plus(token, probability))
        return longer

    def step(self, parents: list[int], sequences: list[Generated]) -> None:
        """Continue with these sequences only, made by `extended`: run their last tokens through the
        decoder.

        parents: for each sequence, the index of the one it extends. An index may repeat;
        sequences that are not listed leave the batch.
        """
        device = self.next_position.device
        if parents != list(range(len(self.rows))):
            index = torch.tensor(parents, dtype=torch.long, device=device)
            for cache in self.caches:
                cache.reorder(index)
            self.next_position = self.next_position[index]
            if self.pad_mask is not None:
                self.pad_mask = self.pad_mask[index]
        self.rows = [self.rows[i] for i in parents]
        self.sequences = sequences
        position = self.next_position
        self.next_position = position + 1
        if not sequences:
            return
        if self._accept_guess(sequences[0].ids[-1]):
            return
        if self.pad_mask is not None:
            self.pad_mask = F.pad(self.pad_mask, (0, 1), value=False)  # (B, S)
        draft = self.guess_next()
        T = 1 + len(draft)
        tokens = torch.tensor([[sequence.ids[-1], *draft] for sequence in sequences], device=device)  # (B, T)
        positions = position + torch.arange(T, device=device)  # (B, T)
        x = self.model.decoder.embed_tokens(tokens)  # (B, T, D)
        mask = causal_mask(T, self.caches[0].length + T, self.pad_mask, device)
        x = self.model.decoder(x, positions, mask, self.caches)
        logits = self.model.next_logits(x)  # (B, T, V)
        self.logits = logits[:, 0]
        self.drafted = [(token, logits[:, i]) for i, token in enumerate(draft, start=1)]

    def _accept_guess(self, token: int) -> bool:
        """Whether this token was guessed (only for a single sequence): then `logits` become those
        after it.

        If not, the guesses were wrong and are dropped from the caches.
        """
        if self.drafted and self.drafted[0][0] == token:
            self.logits = self.drafted.pop(0)[1]
            return True
        for cache in self.caches:
            cache.length -= len(self.drafted)
        self.drafted = []
        return False

    def guess_next(self) -> list[int]:
        """The ids that options.draft expects next.

        Only for a single sequence: the rows of a batch would guess different numbers of ids.
        """
        options = self.options
        if options.draft is None or options.num_beams > 1:
            return []
        if len(self.rows) > 1 or self.pad_mask is not None:
            return []
        cache = self.caches[0]
        room = cache.keys.shape[2] - cache.length - 1
        return options.draft(self.all_ids(0))[:room]


@torch.inference_mode()
def decode(state: DecodeState) -> Iterator[list[int | None]]:
    """The decoding loop. After each step, yields the new id of every prompt, or None if it has ended.

    `state.results` holds what has been generated so far. A state can be decoded only once.
    """
    options = state.options
    if any(result.ids for result in state.results):
        return
    if options.num_beams > 1:
        raise ValueError("beam search cannot stream; use num_beams 1")
    generator = None if options.seed is None else torch.Generator().manual_seed(options.seed)
    cut: set[int] = set()  # prompts whose answers the length limit has cut short
    for remaining in range(options.max_new_tokens, 0, -1):
        logits = mask_logits(state.logits, state)  # (B, V)
        count = len(logits) if generator is None else 1  # with a seed, all rows share one number
        uniform = torch.rand(count, generator=generator).to(logits.device)
        sampled = sample(logits, options.temperature, options.top_k, options.top_p, uniform).tolist()
        tokens = []
        for i, token in enumerate(sampled):
            kept = EOS if state.rows[i] in cut else cut_markup(state, i, token, remaining)
            if kept != token:
                cut.add(state.rows[i])
            tokens.append(kept)
        sequences = state.extended(list(range(len(tokens))), tokens)
        new_ids: list[int | None] = [None] * len(state.prompts)
        for row, sequence in zip(state.rows, sequences, strict=True):
            state.results[row] = sequence
            new_ids[row] = sequence.ids[-1]
        yield new_ids
        unfinished = [i for i, token in enumerate(tokens) if token != EOS]
        if not unfinished or remaining == 1:
            return
        state.step(unfinished, [sequences[i] for i in unfinished])


def finish(state: DecodeState) -> list[Generated]:
    """Generate to the end, by beam search if num_beams > 1; returns one result for each prompt."""
    if state.options.num_beams > 1:
        return beam_search(state)
    for _ in decode(state):
        pass
    return state.results


def mask_logits(scores: Tensor, state: DecodeState) -> Tensor:
    """Next-token logits or log-probabilities (B, V), with -inf for tokens that may not come next.

    Rules apply in order; a rule that would forbid all remaining tokens is skipped.
    """
    options = state.options
    scores = scores.clone()
    scores[:, PAD] = -math.inf  # never part of a text. The original forbids it, too; transformers does not.
    for i, sequence in enumerate(state.sequences):
        ids = state.all_ids(i)
        rules = []
        if len(sequence.ids) < options.min_new_tokens:
            rules.append([EOS])
        if options.constraint is not None:
            # As if there were no length limit: `cut_markup` applies it.
            allowed = options.constraint(ids, state.model.config.text.max_positions)
            if allowed is not None:
                rules.append(~torch.from_numpy(allowed).to(scores.device))
        if options.no_repeat_ngram_size:
            rules.append(repeated_ngrams(ids, options.no_repeat_ngram_size))
        for forbidden in rules:
            masked = scores[i].clone()
            masked[forbidden] = -math.inf
            if masked.max() > -math.inf:
                scores[i] = masked
    return scores


def cut_markup(state: DecodeState, i: int, token: int, remaining: int) -> int:
    """The token, or a replacement if it is markup that no longer fits into the length limit.

    The replacement is </s>, even before min_new_tokens, or the tag that closes what is open. So the
    limit only truncates: everything before the cut stays the same.
    """
    if state.options.constraint is None:
        return token
    allowed = state.options.constraint(state.all_ids(i), remaining)
    if allowed is None or allowed[token] or not allowed.any():
        return token
    if allowed[EOS]:
        return EOS
    return int(allowed.argmax())  # the closing tag


def pad_left(rows: list[tuple[list[int], list[bool]]], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (ids, image_mask) of any lengths -> tokens, image_mask, pad_mask, each (B, T)."""
    T = max(len(ids) for ids, _ in rows)
    shape = (len(rows), T)
    tokens = torch.full(shape, PAD, device=device)
    image_mask = torch.full(shape, False, device=device)
    pad_mask = torch.full(shape, True, device=device)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, T - len(ids) :] = torch.tensor(ids)
        image_mask[i, T - len(mask) :] = torch.tensor(mask)
        pad_mask[i, T - len(ids) :] = False
    return tokens, image_mask, pad_mask


def repeated_ngrams(ids: list[int], n: int) -> list[int]:
    """The ids that would complete an n-gram which `ids` already contains."""
    tail = ids[len(ids) - n + 1 :]
    starts = range(len(ids) - n + 1)
    return [ids[i + n - 1] for i in starts if ids[i : i + n - 1] == tail]


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform: Tensor
) -> Tensor:
    """logits (B, V) and uniform random numbers (B,) or (1,) -> token ids (B,).

    Samples by inverting the cumulative distribution over tokens sorted by probability, which needs
    exactly one random number per token.
    """
    if temperature < torch.finfo(torch.float32).tiny:  # 0, or too small to divide by
        return logits.argmax(dim=-1)
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    logits = logits - logits[:, :1]  # a tiny temperature must not overflow
    probs = (logits / temperature).softmax(dim=-1)  # (B, V)
    if top_k is not None:
        probs[:, top_k:] = 0
        probs /= probs.sum(dim=-1, keepdim=True)
    if top_p is not None and top_p < 1:
        # Total probability of all more likely tokens.
        before = F.pad(probs.cumsum(dim=-1)[:, :-1], (1, 0))  # (B, V)
        probs[before >= top_p] = 0  # the token that crosses p stays
    cdf = probs.cumsum(dim=-1)  # (B, V)
    target = uniform[:, None] * cdf[:, -1:]  # (B, 1)
    chosen = (cdf < target).sum(dim=-1, keepdim=True)  # (B, 1)
    return ids.gather(1, chosen)[:, 0]


# ----------------------------------------------------------------------------------------------------
# Beam search, for texts and for boxes
# ----------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A sequence with one more token."""

    score: float  # summed log-probability of its new tokens
    parent: int  # the sequence it extends
    token: int


@torch.inference_mode()
def beam_search(state: DecodeState) -> list[Generated]:
    """Keep the num_beams most likely sequences of every prompt at each step; returns the best
    finished one of each.

    The score of a finished sequence is the mean log-probability of its new tokens (of the original
    token where `cut_markup` replaced it). A prompt is done when it has num_beams finished sequences
    and its best unfinished one scores no better than the worst of them. As with `decode`, a state
    can be searched only once; `state.results` keeps the result.
    """
    if any(result.ids for result in state.results):
        return state.results
    num_beams = state.options.num_beams
    limit = state.options.max_new_tokens
    totals = torch.zeros(len(state.rows))  # summed log-probability of every sequence
    finished: list[list[tuple[float, Generated]]] = [[] for _ in state.prompts]
    for length in range(1, limit + 1):
        scores = mask_logits(state.logits.log_softmax(dim=-1), state)
        scores = scores.cpu() + totals[:, None]  # (B, V)
        kept = []
        for row in dict.fromkeys(state.rows):
            beams = [i for i, r in enumerate(state.rows) if r == row]
            running, ended = best_continuations(state, scores, beams, remaining=limit - length + 1)
            for candidate, sequence in zip(ended, extend(state, ended), strict=True):
                finished[row].append((candidate.score / length, sequence))
            finished[row] = sorted(finished[row], key=lambda found: -found[0])[:num_beams]
            best = running[0].score / length if running else -math.inf
            if len(finished[row]) < num_beams or best > finished[row][-1][0]:
                kept += running
        if not kept:
            break
        totals = torch.tensor([candidate.score for candidate in kept])
        state.step([candidate.parent for candidate in kept], extend(state, kept))
    state.results = [found[0][1] if found else Generated() for found in finished]
    return state.results


def extend(state: DecodeState, candidates: list[Candidate]) -> list[Generated]:
    """The sequences of these candidates."""
    parents = [candidate.parent for candidate in candidates]
    return state.extended(parents, [candidate.token for candidate in candidates])


def best_continuations(
    state: DecodeState, scores: Tensor, beams: list[int], remaining: int
) -> tuple[list[Candidate], list[Candidate]]:
    """The best continuations of one prompt: num_beams that go on, and those of the best that end.

    scores (B, V): summed log-probabilities; beams: the sequences of this prompt.

    A sequence ends in only one way, by </s>, so of 2 * num_beams candidates at least num_beams go on,
    unless the length limit ends them, too. Where `cut_markup` replaces several tokens of a beam with
    the same one, only the most likely of these candidates counts.
    """
    V = scores.shape[1]
    num_beams = state.options.num_beams
    count = min(2 * num_beams, len(beams) * V)
    best, flat_index = scores[beams].flatten().topk(count)  # (count,), most likely first
    running = []
    ended = []
    seen = set()
    for score, index in zip(best.tolist(), flat_index.tolist(), strict=True):
        if score == -math.inf:
            break
        beam = beams[index // V]
        token = cut_markup(state, beam, index % V, remaining)
        if (beam, token) in seen:
            continue
        seen.add((beam, token))
        if token != EOS and remaining > 1:
            running.append(Candidate(score, beam, token))
        elif len(seen) <= num_beams:
            ended.append(Candidate(score, beam, token))
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
    probabilities. Consumes `state`, which needs max_new_tokens >= 2.
    """
    is_new = len(state.rows) == 1 and not state.sequences[0].ids
    if not is_new or state.options.max_new_tokens < 2 or count < 1:
        raise ValueError("rank_boxes: expected one prompt, no new tokens, max_new_tokens >= 2, count >= 1")
    grid = tokenizer.grid
    first_location = tokenizer.first_location
    cells = torch.arange(grid**2)
    first = state.logits[0].softmax(dim=-1)[first_location:].cpu()  # (grid²,)
    p_first, top_left = first.topk(min(beam, len(cells)))  # (beam,)
    parents = [0] * len(top_left)
    state.step(parents, state.extended(parents, (top_left + first_location).tolist()))
    p_second = state.logits.softmax(dim=-1)[:, first_location:].cpu()  # (beam, grid²)
    below = cells // grid >= top_left[:, None] // grid
    right = cells % grid >= top_left[:, None] % grid
    joint = (p_first[:, None] * p_second * (below & right)).flatten()  # (beam * grid²,)

    found: list[tuple[float, int, int]] = []
    kept: list[tuple[int, int, int, int]] = []
    best, flat_index = joint.topk(min(MOST_CANDIDATES, len(joint)))
    for probability, index in zip(best.tolist(), flat_index.tolist(), strict=True):
        ul = int(top_left[index // len(cells)])
        lr = index % len(cells)
        box = (ul % grid, ul // grid, lr % grid + 1, lr // grid + 1)  # in whole cells
        if probability > 0 and all(iou(box, other) < 0.5 for other in kept):
            found.append((math.sqrt(probability), ul, lr))
            kept.append(box)
        if len(found) == count:
            break
    return found
