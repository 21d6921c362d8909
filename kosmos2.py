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
- position ids that start at 2; sinusoids stored as [sin | cos] (`Decoder`, `sinusoidal_positions`)
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from urllib.request import url2pathname, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor, nn

from tokenizer import printable

BOS, PAD, EOS = 0, 1, 2  # the first ids of every published vocabulary

# ---- Configuration  (walkthrough: notebooks/06_weights) --------------------------------------------

LARGEST_SIZE = 2**24  # far above any model
MOST_LAYERS = 1000  # also the largest location grid: a damaged config.json must not fill the memory


def check_integer(name: str, value, minimum=1, maximum=LARGEST_SIZE):
    """ValueError, naming the value, unless it is an integer in this range."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise ValueError(f"{name}: expected an integer from {minimum} to {maximum}, got {value!r}")


def check_sizes(part, config):
    """ValueError unless the sizes of a VisionConfig or TextConfig are possible."""
    for name, value in vars(config).items():
        if name == "layer_norm_eps":
            if not isinstance(value, float) or not 0 < value < 1:
                raise ValueError(f"{part} {name}: expected a number between 0 and 1, got {value!r}")
        else:
            minimum = 0 if name == "no_repeat_ngram_size" else 1
            maximum = MOST_LAYERS if name == "layers" else LARGEST_SIZE
            check_integer(f"{part} {name}", value, minimum, maximum)
    if config.width % config.heads:
        raise ValueError(f"{part} width {config.width} is not a multiple of heads {config.heads}")


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
        check_sizes("vision", self)
        check_integer("vision patch_size", self.patch_size, maximum=self.image_size)

    @property
    def grid(self) -> int:  # patches per side
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:  # N: the patches and [CLS]
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
        check_sizes("text", self)


@dataclass(frozen=True)
class Kosmos2Config:
    """All sizes of a Kosmos-2. Defaults: the published model (1.66 B parameters)."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    latent_query_num: int = 64  # Q, under its published name
    location_grid: int = 32  # cells per side; the vocabulary has a location token for each cell

    def __post_init__(self):
        check_integer("latent_query_num", self.latent_query_num)
        check_integer("location_grid", self.location_grid, maximum=MOST_LAYERS)


# ---- Layers shared by the ViT, the resampler and the decoder ---------------------------------------


def random_parameter(*shape: int, bound: float) -> nn.Parameter:
    """Initial weights. (Uniform, because on the meta device, where the loader builds models,
    normal_() makes PyTorch import its compiler, which takes about a second.)"""
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class KVCache:
    """The keys and values of one attention layer for all positions so far, in a fixed buffer.

    They never change, so with a cache, a decoding step runs only the new position through the model.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,  # the most positions that fit
        head_width: int,
        like: Tensor,  # for its device and dtype
    ):
        self.keys = like.new_empty(batch, heads, capacity, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, hd) of new positions; returns those of all, (B, H, S, hd)."""
        start = self.length
        self.length += k.shape[2]
        assert self.length <= self.keys.shape[2], "the cache is full"
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        used = slice(0, self.length)
        return self.keys[:, :, used], self.values[:, :, used]

    def keep(self, rows: Tensor):
        """Keep these rows, in this order; a row may repeat."""
        used = slice(0, self.length)  # the rest is not worth copying
        keys, values = self.keys, self.values
        self.keys = keys.new_empty(len(rows), *keys.shape[1:])
        self.values = torch.empty_like(self.keys)
        self.keys[:, :, used] = keys[rows, :, used]
        self.values[:, :, used] = values[rows, :, used]


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
        """Queries (B, H, T, hd), keys and values (B, H, S, hd)."""
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

    Sub-LN (MAGNETO, arXiv 2210.06423, section 2) adds a LayerNorm before the last projection of
    attention and MLP. With pre-norm alone, the scale of what each layer adds drifts with depth.
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


# ---- From an image to image embeddings  (walkthrough: notebooks/01_vision, notebooks/02_resampler) -

# CLIP's per-channel mean and standard deviation, RGB.
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def preprocess_image(image: Image.Image, image_size: int) -> Tensor:
    """An image of any size and mode -> pixels (3, image_size, image_size), float32.

    The whole image is squashed to a square, so coordinates in 0..1 stay the same. Errors: see `to_rgb`.
    """
    image = to_rgb(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255  # (image_size, image_size, 3)
    pixels = (pixels - PIXEL_MEAN) / PIXEL_STD
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, image_size, image_size)


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
    """Read an image as upright RGB, with transparency composited on white.

    path: a file, or a data: or file: URL. FileNotFoundError or ValueError, naming it, if it cannot be
    read. (ImageOps.exif_transpose would write the whole EXIF block back, which fails for many files.)
    """
    name = printable(str(path))
    if str(path).startswith("file:"):
        path = url2pathname(str(path).removeprefix("file:"))
    is_data = str(path).startswith("data:")
    if not is_data and not os.path.isfile(path):
        hint = "; download it and pass the file" if "://" in str(path) else ""
        raise FileNotFoundError(f"no image file at {name}{hint}")
    try:
        source = BytesIO(urlopen(str(path)).read()) if is_data else path
        with Image.open(source) as image:
            image.load()
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # a damaged EXIF block does not make the image unreadable
                orientation = None
            image = to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"cannot read {name}: not an image that Pillow can read") from None
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"cannot read {name}: {str(error) or type(error).__name__}") from None
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, with transparency composited on white.

    ValueError for an image without pixels, for grayscale with more than 8 bits, which Pillow would
    clip, and for anything that is not a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"image: expected a PIL.Image.Image, got {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: its size is {image.size[0]} x {image.size[1]}")
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"the image has mode {image.mode}, with more than 8 bits; convert it to 8 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


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
        """pixels (I, 3, image_size, image_size) -> features (I, N, E)."""
        patches = self.patch_embedding(pixels)  # (I, E, grid, grid)
        patches = patches.flatten(2).transpose(1, 2)  # (I, N-1, E), row by row from the top left
        cls = self.class_embedding.expand(len(pixels), 1, -1)  # (I, 1, E)
        x = torch.cat([cls, patches], dim=1)  # (I, N, E)
        x = self.pre_layernorm(x + self.position_embedding)
        for layer in self.layers:
            x = layer(x)
        return F.normalize(self.post_layernorm(x), dim=-1)


class Resampler(nn.Module):
    """N features of the ViT -> Q embeddings for the decoder, by one cross-attention.

    Q learned queries attend to the features, so the decoder's cost is independent of the number of
    patches. Differs from a textbook attention layer: the queries themselves are appended to the
    keys and values (as in Flamingo's resampler, arXiv 2204.14198), and there is no
    LayerNorm, residual or MLP.
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


# ---- The decoder  (walkthrough: notebooks/03_decoder) ----------------------------------------------

FIRST_POSITION = 2  # from fairseq, which reserves position 1 for padding; 0 is unused


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """Integer positions (B, T) -> position encodings (B, T, width), float32.

    Differs from "Attention Is All You Need" (section 3.5): sines and cosines are not interleaved, and
    the last frequency reaches the longest wavelength exactly.
    """
    half = width // 2
    step = math.log(10000) / max(half - 1, 1)
    index = torch.arange(half, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(index * -step)  # (half,)
    angles = positions[..., None].float() * frequencies  # (B, T, half)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (B, T, 2 * half)
    return F.pad(table, (0, width % 2))  # (B, T, width): an odd width ends in a zero


def token_positions(pad_mask: Tensor, first: Tensor | int = FIRST_POSITION) -> Tensor:
    """Position ids (B, T) from `first` on, counting only tokens that are not padding."""
    return (~pad_mask).cumsum(dim=1) + first - 1


def causal_mask(T: int, pad_mask: Tensor) -> Tensor | None:
    """The attention mask of the last T of S positions: bool, (T, S), or (B, 1, T, S) with padding.

    None if nothing is masked. pad_mask (B, S) is True on padding. A padding position attends to
    itself: a fully masked row would give NaN; its output is never used.
    """
    padded = bool(pad_mask.any())
    if T == 1 and not padded:
        return None
    S = pad_mask.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool, device=pad_mask.device).tril(S - T)  # (T, S)
    if not padded:
        return mask
    itself = torch.eye(S, dtype=torch.bool, device=pad_mask.device)[S - T :]  # (T, S)
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

        The factor sqrt(D) brings token embeddings, which have lengths near one, to the scale of the
        position encodings. Image embeddings are already in place and are treated like token embeddings.
        """
        D = x.shape[-1]
        x = x * math.sqrt(D) + sinusoidal_positions(positions, D).to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, cache=caches[i] if caches else None)
        return self.layer_norm(x)

    def unembed(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V)."""
        return self.embed_tokens.unembed(x)


# ---- The whole model  (walkthrough: notebooks/00_overview) -----------------------------------------


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

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (I, 3, image_size, image_size) -> image_embeds (I, Q, D)."""
        size = self.config.vision.image_size
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels: expected (I, 3, {size}, {size}), got {tuple(pixels.shape)}")
        features = self.vision(pixels.to(self.vision.class_embedding.dtype))  # (I, N, E)
        return self.resampler(features)  # (I, Q, D)

    def embed(self, tokens: Tensor, pixels=None, image_embeds=None, image_mask=None, pad_mask=None) -> Tensor:
        """tokens (B, T) -> x (B, T, D), with the image embeddings in the image slots.

        Arguments and errors as in `forward`, but the length is not checked.
        """
        if pixels is not None and image_embeds is not None:
            raise ValueError("pass either pixels or image_embeds, not both")
        if pixels is not None:
            image_embeds = self.encode_image(pixels)
        self._check_inputs(tokens, image_embeds, image_mask, pad_mask)
        x = self.decoder.embed_tokens(tokens)  # (B, T, D)
        if image_embeds is None or len(image_embeds) == 0:
            return x
        # The mask's True entries, read row by row, take the image embeddings one after the other.
        # So image i fills the i-th run of Q slots, whichever row it is in.
        return x.masked_scatter(image_mask[..., None], image_embeds.to(x.dtype))  # (B, T, D)

    def forward(
        self, tokens: Tensor, pixels=None, image_embeds=None, image_mask=None, pad_mask=None, labels=None
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
        x = self.embed(tokens, pixels, image_embeds, image_mask, pad_mask)
        if pad_mask is None:
            pad_mask = torch.zeros_like(tokens, dtype=torch.bool)
        self.check_length((~pad_mask).sum(dim=1).tolist())
        x = self.decoder(x, token_positions(pad_mask), causal_mask(tokens.shape[1], pad_mask))
        logits = self.decoder.unembed(x)  # (B, T, V)
        if labels is None:
            return logits
        predicted = logits[:, :-1].flatten(0, 1).float()  # (B * (T - 1), V)
        targets = labels[:, 1:].flatten()  # (B * (T - 1),)
        loss = F.cross_entropy(predicted, targets, ignore_index=-100)
        return logits, loss

    def _check_inputs(self, tokens, image_embeds, image_mask, pad_mask):
        """ValueError for shapes, types and ids that do not fit together."""
        V = self.config.text.vocab_size
        Q = self.config.latent_query_num
        D = self.config.text.width
        shape = tuple(tokens.shape)
        is_batch = len(shape) == 2 and shape[1] > 0
        if not is_batch or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected int64 (B, T) with T >= 1, got {tokens.dtype} {shape}")
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= V):
            raise ValueError(f"token ids must be in 0..{V - 1}; is the tokenizer of another checkpoint?")
        for name, mask in (("image_mask", image_mask), ("pad_mask", pad_mask)):
            if mask is not None and (tuple(mask.shape) != shape or mask.dtype != torch.bool):
                raise ValueError(f"{name}: expected bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        if image_mask is not None and pad_mask is not None and (image_mask & pad_mask).any():
            raise ValueError("image_mask and pad_mask mark the same token; a slot cannot be padding")
        if image_embeds is not None and tuple(image_embeds.shape[1:]) != (Q, D):
            raise ValueError(f"image_embeds: expected (I, {Q}, {D}), got {tuple(image_embeds.shape)}")
        images = 0 if image_embeds is None else len(image_embeds)
        slots = [0] if image_mask is None else image_mask.sum(dim=1).tolist()
        if sum(slots) != images * Q or any(count % Q for count in slots):
            raise ValueError(f"image_mask marks {slots} slots; expected {Q} for each of {images} images")

    def check_length(self, lengths: list[int], new_tokens=0):
        """ValueError unless prompts of these lengths and their new tokens fit into the context."""
        limit = self.config.text.max_positions
        length = max(lengths, default=0)
        if length + new_tokens > limit:
            tokens = f"{length} tokens of the prompt and {new_tokens} new ones"
            raise ValueError(f"{tokens} do not fit into the context of {limit}; shorten one of them")

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, pixels=None, image_embeds=None, image_mask=None, pad_mask=None, **options
    ) -> list[list[int]]:
        """Continue every row; returns the new ids of each, ending with </s> or at max_new_tokens.

        Arguments as in `forward`, with rows padded on the left (`pad_left`), and the fields of
        `GenerationOptions`, by name. Up to rounding, a row's result depends neither on the other rows
        nor on its padding (when sampling, only with a seed). ValueError for bad options and overlong prompts.
        """
        state = self.prefill(tokens, pixels, image_embeds, image_mask, pad_mask, **options)
        return [row.ids for row in finish(state)]

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, pixels=None, image_embeds=None, image_mask=None, pad_mask=None, **options
    ) -> "DecodeState":
        """Run the prompts of `generate`; `decode` or `finish` continue from here."""
        checked = GenerationOptions(**options)
        x = self.embed(tokens, pixels, image_embeds, image_mask, pad_mask)  # (B, T, D)
        if pad_mask is None:
            pad_mask = torch.zeros_like(tokens, dtype=torch.bool)
        if pad_mask[:, -1].any():
            raise ValueError("generation needs left padding, but pad_mask is True at the end of a row")
        prompts = [row[~padding].tolist() for row, padding in zip(tokens, pad_mask, strict=True)]
        self.check_length([len(prompt) for prompt in prompts], checked.max_new_tokens)
        state = DecodeState(self, prompts, checked, capacity=tokens.shape[1] + checked.max_new_tokens)
        x = state.advance(x, pad_mask)  # (B, T, D)
        state.logits = self.next_logits(x[:, -1])
        return state

    def next_logits(self, x: Tensor) -> Tensor:
        """x (..., D) after the decoder -> float32 logits (..., V) of the next token."""
        logits = self.decoder.unembed(x).float()  # (..., V)
        if not torch.isfinite(logits.sum()):
            raise ValueError("the logits are not finite: weights damaged or too large for this precision")
        return logits


# ---- Generation  (walkthrough: notebooks/05_sampling) ----------------------------------------------
# `prefill` runs the prompts and makes a DecodeState; `decode` is the loop that continues it.

# (ids so far, number of tokens that may still follow) -> bool (V,), True where a token may come
# next; None if all may.
Constraint = Callable[[list[int], int], np.ndarray | None]


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt. ValueError for a value out of its range."""

    max_new_tokens: int = 430  # upper limit; the default is that of the original demo
    min_new_tokens: int = 0  # no </s> before this many new tokens, unless markup is cut
    temperature: float = 0.0  # 0 takes the most likely token, 1 samples from the model's distribution
    top_k: int | None = None  # sample among the k most likely tokens
    top_p: float | None = None  # sample among the most likely tokens that together reach probability p
    # Forbid any n-gram that has occurred already, including in the prompt and its slots. The published
    # model is used with 3 (config.text.no_repeat_ngram_size).
    no_repeat_ngram_size: int = 0
    # With a seed, all rows share one random stream, so batching does not change results.
    seed: int | None = None
    constraint: Constraint | None = None  # such as Tokenizer.allowed_tokens, which keeps boxes complete

    def __post_init__(self):
        for name in ("max_new_tokens", "min_new_tokens", "no_repeat_ngram_size"):
            check_integer(name, getattr(self, name), minimum=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens")
        if self.top_k is not None:
            check_integer("top_k", self.top_k)
        if self.seed is not None:
            check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        hottest = torch.finfo(torch.float32).max
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature <= hottest:
            raise ValueError(f"temperature: expected 0 or a positive number, got {self.temperature!r}")
        is_number = isinstance(self.top_p, (int, float))
        if self.top_p is not None and not (is_number and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p!r}")


@dataclass
class Row:
    """A prompt and what has been generated for it."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)  # the new ids
    # Of each new id, as the model gave it: before temperature, n-gram blocking and constraint.
    probabilities: list[float] = field(default_factory=list)
    cut: bool = False  # its markup did not fit into the length limit: only </s> may follow

    @property
    def all_ids(self) -> list[int]:
        return self.prompt + self.ids


class DecodeState:
    """A batch that is being decoded: its rows, KV caches, and the logits of its next tokens."""

    def __init__(self, model: Kosmos2, prompts: list[list[int]], options: GenerationOptions, capacity: int):
        B = len(prompts)
        heads = model.config.text.heads
        D = model.config.text.width
        like = model.decoder.layer_norm.weight  # for device and dtype
        self.model = model
        self.options = options
        self.rows = [Row(prompt) for prompt in prompts]  # one for each prompt
        self.running = list(self.rows)  # those in the caches; ended rows are removed
        self.caches = [KVCache(B, heads, capacity, D // heads, like) for _ in model.decoder.layers]
        self.next_position = torch.full((B, 1), FIRST_POSITION, device=like.device)  # (B, 1)
        self.pad_mask = torch.zeros(B, 0, dtype=torch.bool, device=like.device)  # (B, S)
        self.logits = like.new_empty(B, 0)  # (B, V), set by `prefill` and `step`

    def advance(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Run the next T positions of all running rows: embeddings x (B, T, D) -> x (B, T, D)."""
        B, T, D = x.shape
        if pad_mask is None:
            pad_mask = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        positions = token_positions(pad_mask, self.next_position)  # (B, T)
        self.next_position = positions[:, -1:] + 1
        self.pad_mask = torch.cat([self.pad_mask, pad_mask], dim=1)  # (B, S)
        return self.model.decoder(x, positions, causal_mask(T, self.pad_mask), self.caches)

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        """Run one token of each running row, and set `logits` to those of the tokens after it."""
        ids = torch.tensor(tokens, device=self.pad_mask.device)[:, None]  # (B, 1)
        x = self.advance(self.model.decoder.embed_tokens(ids))  # (B, 1, D)
        self.logits = self.model.next_logits(x[:, -1])

    def keep(self, indices: list[int]):
        """Keep only these running rows, in this order; a row that is repeated is copied."""
        if indices == list(range(len(self.running))):
            return
        index = torch.tensor(indices, dtype=torch.long, device=self.pad_mask.device)
        for cache in self.caches:
            cache.keep(index)
        self.next_position = self.next_position[index]
        self.pad_mask = self.pad_mask[index]
        self.logits = self.logits[index]
        kept = []
        for i in indices:
            row = self.running[i]
            if any(row is other for other in kept):
                row = replace(row, ids=[*row.ids], probabilities=[*row.probabilities])
            kept.append(row)
        self.running = kept


@torch.inference_mode()
def decode(state: DecodeState) -> Iterator[list[Row]]:
    """The decoding loop; yields the rows of all prompts after each step. A state is decoded only once."""
    if any(row.ids for row in state.rows):
        return
    options = state.options
    generator = None if options.seed is None else torch.Generator().manual_seed(options.seed)
    for remaining in range(options.max_new_tokens, 0, -1):
        # 1. Mask the logits and choose a token for each row.
        logits = mask_logits(state.logits, state)  # (B, V)
        count = len(logits) if generator is None else 1  # with a seed, all rows share one number
        uniform = torch.rand(count, generator=generator).to(logits.device)
        sampled = sample(logits, options.temperature, options.top_k, options.top_p, uniform)  # (B,)

        # 2. Append it with its probability.
        tokens = sampled.tolist()
        if options.constraint is not None:
            for i, row in enumerate(state.running):
                fitting = EOS
                if not row.cut:
                    fitting = cut_markup(options.constraint, row.all_ids, tokens[i], remaining)
                row.cut = row.cut or fitting != tokens[i]
                tokens[i] = fitting
        chosen_logits = state.logits[range(len(tokens)), tokens]  # (B,)
        probabilities = (chosen_logits - state.logits.logsumexp(dim=-1)).exp()  # (B,)
        for row, token, probability in zip(state.running, tokens, probabilities.tolist(), strict=True):
            row.ids.append(token)
            row.probabilities.append(probability)
        yield state.rows

        # 3. Drop the ended rows and run the others.
        unfinished = [i for i, token in enumerate(tokens) if token != EOS]
        if not unfinished or remaining == 1:
            return
        state.keep(unfinished)
        state.step([tokens[i] for i in unfinished])


def finish(state: DecodeState) -> list[Row]:
    """Decode to the end; returns the rows of all prompts, with their new ids and probabilities."""
    for _ in decode(state):
        pass
    return state.rows


def mask_logits(scores: Tensor, state: DecodeState) -> Tensor:
    """Next-token logits or log-probabilities (B, V), with -inf for tokens that may not come next.

    A rule that would leave no token is skipped.
    """
    options = state.options
    scores = scores.clone()
    scores[:, PAD] = -math.inf  # never generated. The original forbids it, too; transformers does not.
    for i, row in enumerate(state.running):
        rules = []
        if len(row.ids) < options.min_new_tokens:
            rules.append([EOS])
        if options.constraint is not None:
            # As if there were no length limit: `cut_markup` applies it.
            allowed = options.constraint(row.all_ids, state.model.config.text.max_positions)
            if allowed is not None:
                rules.append(~torch.from_numpy(allowed).to(scores.device))
        if options.no_repeat_ngram_size:
            rules.append(repeated_ngrams(row.all_ids, options.no_repeat_ngram_size))
        for forbidden in rules:
            masked = scores[i].clone()
            masked[forbidden] = -math.inf
            if masked.max() > -math.inf:
                scores[i] = masked
    return scores


def cut_markup(constraint: Constraint | None, ids: list[int], token: int, remaining: int) -> int:
    """The token, or a replacement if it (markup or a word in a phrase) no longer fits into the length limit.

    The replacement is </s> or the closing tag, so the limit only shortens the answer.
    """
    if constraint is None:
        return token
    allowed = constraint(ids, remaining)
    if allowed is None or allowed[token] or not allowed.any():
        return token
    if allowed[EOS]:
        return EOS
    return int(allowed.argmax())  # the closing tag


def repeated_ngrams(ids: list[int], n: int) -> list[int]:
    """The ids that would complete an n-gram which `ids` already contains."""
    tail = ids[len(ids) - n + 1 :]
    found = []
    for last in range(n - 1, len(ids)):
        if ids[last - n + 1 : last] == tail:
            found.append(ids[last])
    return found


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform: Tensor
) -> Tensor:
    """logits (B, V) and uniform random numbers (B,) or (1,) -> token ids (B,).

    Inverts the cumulative distribution over tokens sorted by probability: one random number per token.
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


def pad_left(rows: list[tuple], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (ids, image_mask) of any lengths -> tokens, image_mask, pad_mask for `prefill`, each (B, T)."""
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
