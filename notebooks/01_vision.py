# %% [markdown]
# # 1. Vision: from pixels to features
#
# The vision tower of Kosmos-2 is CLIP's ViT: it cuts the image into patches, treats each patch as a token, and
# runs a transformer over them. We write each step by hand in a few lines and compare it with the module in
# `kosmos2.py` and with transformers. (Reading time: 25 minutes.)

# %%
from figures import ROOT, overlay, plt, reference, show, table  # isort: skip
import torch
import torch.nn.functional as F
from PIL import Image

from kosmos2 import PIXEL_MEAN, PIXEL_STD, preprocess_image, quick_gelu, record
from load_weights import load_checkpoint

torch.set_grad_enabled(False)
model, _ = load_checkpoint(ROOT / "tiny")
theirs = reference().vision_model.model
vit, config = model.vision, model.config.vision
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(image, config.image_size)[None]
P, G, E = config.patch_size, config.grid, config.width
print(f"patch {P}, grid {G} x {G}, width {E}, {config.layers} layers, {config.heads} heads")

# %% [markdown]
# ## Pixels
#
# The image is *squashed* to a square; its aspect ratio is not preserved. This distorts things a little, but
# keeps boxes simple: 0.5 is the middle of the square and of the image. Then each channel is normalized with
# CLIP's mean and standard deviation. By hand:

# %%
square = image.resize((config.image_size,) * 2, Image.Resampling.BICUBIC)
by_hand = torch.tensor(list(square.get_flattened_data())).view(config.image_size, config.image_size, 3) / 255
by_hand = ((by_hand - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(2, 0, 1)
torch.testing.assert_close(by_hand, pixels[0])

# %% [markdown]
# ## Patches
#
# A convolution whose stride equals its size covers each patch once. So it is a linear layer on flattened
# patches: 3 x 14 x 14 = 588 numbers in, E numbers out, no bias (the position embeddings include one).

# %%
patches = pixels.unfold(2, P, P).unfold(3, P, P)  # (1, 3, G, G, P, P)
patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(1, G * G, 3 * P * P)  # row by row from the top left
by_hand = patches @ vit.patch_embedding.weight.view(E, -1).T
torch.testing.assert_close(
    by_hand, vit.patch_embedding(pixels).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4
)

_, sizes, directions = torch.linalg.svd(vit.patch_embedding.weight.view(E, -1), full_matrices=False)
fig, axes = plt.subplots(2, 8, figsize=(10, 2.9))
for axis, size, kernel in zip(axes.flat, sizes, directions.view(-1, 3, P, P), strict=False):
    axis.imshow(((kernel - kernel.min()) / (kernel.max() - kernel.min())).permute(1, 2, 0))
    axis.set_title(f"{size:.1f}")
    axis.axis("off")
show(
    fig,
    "16 small color images of 14 by 14 pixels, ordered by singular value.",
)

# %% [markdown]
# These are the 16 patch patterns that the embedding is most sensitive to: its right singular vectors, each
# scaled to its own minimum and maximum, with the singular value above.

# %% [markdown]
# ## Why 257 positions, or here 101
#
# In front of the patches stands [CLS], a learned vector that belongs to no patch. CLIP uses only its output,
# to describe the whole image. Kosmos-2 passes on *all* N = G² + 1 positions: 16² + 1 = 257 in the published
# model, 10² + 1 = 101 here.
#
# Attention treats its inputs as a set. The position of a patch comes from a learned vector that is added to
# it. The maps below show the cosine similarity of four position embeddings to all others.
#
# One more LayerNorm follows, before the first block. CLIP has it and most ViTs do not.

# %%
x = torch.cat([vit.class_embedding.view(1, 1, E), by_hand], dim=1) + vit.position_embedding
assert x.shape == (1, G * G + 1, E)
x = F.layer_norm(x, (E,), vit.pre_layernorm.weight, vit.pre_layernorm.bias, config.layer_norm_eps)

places = F.normalize(vit.position_embedding[1:], dim=1)
fig, axes = plt.subplots(1, 4, figsize=(10, 2.7))
for axis, place in zip(axes, (0, 3 * G + 2, 5 * G + 7, G * G - 1), strict=True):
    axis.imshow((places @ places[place]).view(G, G), vmin=-1, vmax=1, cmap="RdBu")
    axis.plot(place % G, place // G, "k+")
    axis.axis("off")
fig.suptitle("Cosine similarity of the position embedding of one patch (+) to all others")
fig.colorbar(axes[0].images[0], ax=axes)
show(
    fig,
    "Four 10 by 10 maps of cosine similarity, each with one marked patch.",
)

# %% [markdown]
# ## One block
#
# Pre-norm: LayerNorm, attention, add; LayerNorm, MLP, add. The activation is CLIP's QuickGELU,
# `x · sigmoid(1.702 x)`, which is close to GELU but not equal.

# %%
block = vit.layers[0]


def attention(x, attn):
    """Multi-head attention by its formula, softmax(q·kᵀ / √hd)·v, one head at a time."""
    q, k, v = (F.linear(x, m.weight, m.bias) for m in (attn.q_proj, attn.k_proj, attn.v_proj))  # (1, N, E)
    heads = []
    for qh, kh, vh in zip(*(t.chunk(attn.heads, dim=-1) for t in (q, k, v)), strict=True):  # (1, N, hd)
        weights = (qh @ kh.mT / qh.shape[-1] ** 0.5).softmax(-1)  # (1, N, N)
        heads.append(weights @ vh)
    return F.linear(torch.cat(heads, -1), attn.out_proj.weight, attn.out_proj.bias)


y = x + attention(block.norm1(x), block.attn)
y = y + block.mlp.fc2(quick_gelu(block.mlp.fc1(block.norm2(y))))
torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)

difference = (quick_gelu(line := torch.linspace(-4, 4, 200)) - F.gelu(line)).abs().max()
print(f"QuickGELU and GELU differ by up to {difference:.3f}")

# %% [markdown]
# ## The whole ViT, and its last step
#
# After the last block comes a LayerNorm, and then each position is divided by its length, which CLIP does not do
# here. Features of unit length have values of about 1/√E, so the layer that follows must expect small inputs:
# notebook 2 shows what happens if it does not.

# %%
with record(model) as seen:
    features = vit(pixels)
expected = theirs(pixels).last_hidden_state
expected = F.normalize(theirs.post_layernorm(expected), dim=-1)  # transformers does this outside its ViT
torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
lengths = vit.post_layernorm(seen[f"vision.layers.{config.layers - 1}"][0]).norm(dim=-1)[0]
print(
    f"√E = {E**0.5:.1f}; lengths before: {lengths.min():.1f} to {lengths.max():.1f}, after: {features.norm(dim=-1).mean():.3f}"
)

# %% [markdown]
# ## Attention weights
#
# `record` also keeps the attention weights. Each row of `weights` belongs to one query and sums to one.

# %%
weights = seen[f"vision.layers.{config.layers - 1}.attn"][0][0]  # (H, N, N)
torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
shown = {"on the snowman": (6, 3), "on the fire": (7, 6), "in the sky": (1, 7)}
fig, axes = plt.subplots(config.heads, 3, figsize=(8, 8))
for column, (what, (row, col)) in enumerate(shown.items()):
    for head in range(config.heads):
        overlay(
            axes[head, column],
            image,
            weights[head, 1 + row * G + col, 1:].view(G, G),
            f"head {head}: patch {what}",
        )
        for color, width in (("white", 4), ("black", 1.5)):
            place = (col + 0.5) / G * image.width, (row + 0.5) / G * image.height
            axes[head, column].plot(*place, "+", color=color, markersize=12, markeredgewidth=width)
fig.tight_layout()
show(
    fig,
    "Nine copies of the image, bright where a head of the last block attends to from a marked patch; each panel is scaled to its own maximum.",
)

# %% [markdown]
# ## Counting
#
# Parameters of a block: four projections of E² + E, an MLP of 2·E·M + M + E, two norms of 2E.

# %%
M = config.mlp_width
predicted = 4 * (E * E + E) + 2 * E * M + M + E + 2 * 2 * E
assert predicted == sum(p.numel() for p in block.parameters())
full = dict(E=1024, M=4096, layers=24)
count = full["layers"] * (
    4 * (full["E"] ** 2 + full["E"]) + 2 * full["E"] * full["M"] + full["M"] + 5 * full["E"]
)
table([("here", predicted * config.layers), ("published model", count)], ("ViT blocks", "parameters"))

# %% [markdown]
# ## Exercises
#
# 1. Shuffle the patches *after* the positions were added. Which outputs change, and how?
# 2. Shuffle them *before*. Why is the result different?
# 3. Replace `quick_gelu` by `F.gelu` in all blocks. How much do the features change? Would you notice it in a
#    caption?
# 4. `vit(pixels_of_another_size)` works, because `interpolate_positions` interpolates. What stays the same for
#    [CLS]?
