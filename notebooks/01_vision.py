# %% [markdown]
# # 1. Vision: from pixels to features
#
# The eye of Kosmos-2 is CLIP's ViT: cut the picture into patches, treat every patch as a word, and run a
# transformer over them. We build each step by hand in a few lines, and compare it with the module of
# `kosmos2.py` and with transformers.

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
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(picture, config.image_size)[None]
P, G, E = config.patch_size, config.grid, config.width
print(f"patch {P}, grid {G} x {G}, width {E}, {config.layers} layers, {config.heads} heads")

# %% [markdown]
# ## Pixels
#
# The picture is *squashed* to a square, its aspect is not kept. That costs some likeness, but it keeps boxes
# simple: 0.5 is the middle of the square and of the picture. Then every channel is shifted and scaled with
# CLIP's statistics. By hand:

# %%
square = picture.resize((config.image_size,) * 2, Image.Resampling.BICUBIC)
by_hand = torch.tensor(list(square.get_flattened_data())).view(config.image_size, config.image_size, 3) / 255
by_hand = ((by_hand - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(2, 0, 1)
torch.testing.assert_close(by_hand, pixels[0])

# %% [markdown]
# ## Patches
#
# A convolution whose stride is its size looks at each patch once. That makes it a linear layer on flattened
# patches: 3 x 14 x 14 = 588 numbers in, E numbers out. No bias: a shift is what the positions are for.

# %%
patches = pixels.unfold(2, P, P).unfold(3, P, P)  # (1, 3, G, G, P, P)
patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(1, G * G, 3 * P * P)  # row by row from the upper left
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
    "16 little squares: the first are bright against dark or striped along rows and columns, the last ones differ in colour.",
)

# %% [markdown]
# Those are the 16 directions of a patch that the embedding is most sensitive to (its singular vectors; the
# number is how sensitive; each is drawn from its own darkest to its brightest): all of the patch bright or dark,
# one half against the other, stripes along rows and columns, and then colours. Single
# kernels look like noise, since most of what they began with at random was never in the way.

# %% [markdown]
# ## Why 257, or here 65
#
# In front of the patches stands [CLS], a vector of its own that belongs to no place. CLIP used only its
# output to describe the whole picture. Kosmos-2 hands *all* N = G² + 1 positions on: 16² + 1 = 257 in the
# published model, 8² + 1 = 65 here.
#
# Attention treats its inputs as a set. What tells the model where a patch was is a learned vector added to
# it. Learned, but look at what it learned: places in one row or one column are alike.
#
# One more LayerNorm follows, before the first block. CLIP has it and most ViTs do not; the sum of patch and
# position then enters the blocks at one scale, whatever the picture.

# %%
x = torch.cat([vit.class_embedding.view(1, 1, E), by_hand], dim=1) + vit.position_embedding
assert x.shape == (1, G * G + 1, E)
x = F.layer_norm(x, (E,), vit.pre_layernorm.weight, vit.pre_layernorm.bias, config.layer_norm_eps)

places = F.normalize(vit.position_embedding[1:], dim=1)
fig, axes = plt.subplots(1, 4, figsize=(10, 2.7))
for axis, place in zip(axes, (0, 3 * G + 2, 4 * G + 6, G * G - 1), strict=True):
    axis.imshow((places @ places[place]).view(G, G), vmin=-1, vmax=1, cmap="RdBu")
    axis.plot(place % G, place // G, "k+")
    axis.axis("off")
fig.suptitle("How alike the position of one patch (+) is to those of all others")
fig.colorbar(axes[0].images[0], ax=axes)
show(
    fig,
    "Four 8 by 8 maps; in each a blue cross: the row and the column of the marked patch, and paler or red elsewhere.",
)

# %% [markdown]
# ## One block
#
# Pre-norm: LayerNorm, attention, add; LayerNorm, MLP, add. The activation is CLIP's QuickGELU,
# `x · sigmoid(1.702 x)`, close to GELU but not equal: a wrong one here costs no crash, only quality.

# %%
block = vit.layers[0]


def attention(x, attn):
    """Multi-head attention from its formula, softmax(q·kᵀ / √hd)·v, a head at a time."""
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
# ## All of it, and the last step
#
# After the last block a LayerNorm, and then what CLIP does not do at this place: every position, not only [CLS],
# is divided by its length, so that only directions are left. Why? CLIP was trained to compare directions: in its
# space a length means nothing. The LayerNorm had already brought all lengths close to √E (as far as its learned
# gains are close to one), so what the division changes most is the scale. Features of length one have
# coordinates of about 1/√E, and whatever reads them must be prepared for such small numbers: notebook 2 shows
# what happens if it is not, and notebook 3 what a trained model says when the division is left out.

# %%
with record(model) as seen:
    features = vit(pixels)
wanted = theirs(pixels).last_hidden_state
wanted = F.normalize(theirs.post_layernorm(wanted), dim=-1)  # transformers does these two outside its ViT
torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)
lengths = vit.post_layernorm(seen[f"vision.layers.{config.layers - 1}"][0]).norm(dim=-1)[0]
print(
    f"√E = {E**0.5:.1f}; lengths before: {lengths.min():.1f} to {lengths.max():.1f}, after: {features.norm(dim=-1).mean():.3f}"
)

# %% [markdown]
# ## What attention looks at
#
# `record` also keeps where each head looked. Rows of `weights` are queries, they sum to one.

# %%
weights = seen["vision.layers.3.attn"][0][0]  # (H, N, N)
torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
shown = {"on the moon": (6, 1), "on the star": (6, 6), "on the background": (1, 1)}
fig, axes = plt.subplots(config.heads, 3, figsize=(8, 8))
for column, (what, (row, col)) in enumerate(shown.items()):
    for head in range(config.heads):
        overlay(
            axes[head, column],
            picture,
            weights[head, 1 + row * G + col, 1:].view(G, G),
            f"head {head}: patch {what}",
        )
        for color, width in (("white", 4), ("black", 1.5)):
            place = (col + 0.5) / G * picture.width, (row + 0.5) / G * picture.height
            axes[head, column].plot(*place, "+", color=color, markersize=12, markeredgewidth=width)
fig.tight_layout()
show(
    fig,
    "Nine copies of the picture, bright where a head of the last block looks from a marked patch: often at the patch's own shape or its rim, or at a neighbouring shape.",
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
# 2. Shuffle them *before*. Why is that another story?
# 3. Replace `quick_gelu` by `F.gelu` in all blocks. How large is the change of the features? Would you notice
#    it in a caption?
# 4. `vit(pixels_of_another_size)` works: `place_embedding` interpolates. What stays the same for [CLS]?
