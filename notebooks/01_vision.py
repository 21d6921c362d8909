# %% [markdown]
# # 1. Vision: from pixels to features
#
# The vision tower of Kosmos-2 is CLIP's ViT: it cuts the image into patches, treats each patch as a token, and runs a
# transformer over them. We write each step by hand in a few lines and compare it with the module in `kosmos2.py` and
# with transformers. One measurement at the end uses random scenes with known objects and boxes (`Scene`, from
# `training/`). Seeds from `HELD_OUT` on were not used in training. (Reading time: 30 minutes.)

# %%
from figures import ROOT, overlay, plt, reference, show, table  # isort: skip
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from recording import record

from kosmos2 import PIXEL_MEAN, PIXEL_STD, VisionConfig, open_image, pad_left, preprocess_image, quick_gelu
from load_weights import load_checkpoint
from tokenizer import PROMPTS, iou
from training.evaluate import HELD_OUT
from training.scenes import Scene, article

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
theirs = reference().vision_model.model
vit, config = model.vision, model.config.vision
P, G, E = config.patch_size, config.grid, config.width
print(f"patch {P}, grid {G} x {G}, width {E}, {config.layers} layers, {config.heads} heads")

# %% [markdown]
# ## Pixels
#
# The image is *squashed* to a square; its aspect ratio is not preserved. This distorts shapes a little, but keeps
# boxes simple: 0.5 is the middle of the square and of the image. Then each channel is normalized with CLIP's mean and
# standard deviation. By hand:

# %%
image = open_image(ROOT / "tiny" / "scene.png")
pixels = preprocess_image(image, config.image_size)[None]

square = image.resize((config.image_size, config.image_size), Image.Resampling.BICUBIC)
by_hand = torch.from_numpy(np.array(square)) / 255  # (rows, columns, 3)
by_hand = (by_hand - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
torch.testing.assert_close(by_hand.permute(2, 0, 1), pixels[0])

# %% [markdown]
# ## Patches
#
# A convolution whose stride equals its size sees each patch exactly once, so it is the same as a linear layer on
# flattened patches: 3·P² numbers in, E numbers out, no bias (the position embeddings can take its place).

# %%
patches = pixels.unfold(2, P, P).unfold(3, P, P)  # (1, 3, G, G, P, P)
patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(1, G * G, 3 * P * P)  # row by row
matrix = vit.patch_embedding.weight.view(E, 3 * P * P)
embedded = patches @ matrix.T
expected = vit.patch_embedding(pixels).flatten(2).transpose(1, 2)
torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-4)
print(f"{3 * P * P} numbers in, {E} out")

# %% [markdown]
# Which unit-norm patches does the matrix stretch most? Its right singular vectors: the first has the longest embedding,
# the second the longest among those orthogonal to the first, and so on. The figure shows the first 16, each scaled to
# its own minimum and maximum, with its singular value above.

# %%
_, sizes, directions = torch.linalg.svd(matrix, full_matrices=False)
fig, axes = plt.subplots(2, 8, figsize=(10, 2.9))
for i, axis in enumerate(axes.flat):
    pattern = directions[i].view(3, P, P)
    pattern = (pattern - pattern.min()) / (pattern.max() - pattern.min())
    axis.imshow(pattern.permute(1, 2, 0))
    axis.set_title(f"{sizes[i]:.1f}")
    axis.axis("off")
show(fig, f"16 small color images of {P} by {P} pixels, ordered by singular value.")

# %% [markdown]
# ## [CLS] and the positions
#
# A learned vector that belongs to no patch, [CLS], is put in front of the patches. CLIP uses only its output, to
# describe the whole image. Kosmos-2 passes on *all* N = G² + 1 positions: 16² + 1 = 257 in the published model.
#
# Attention ignores the order of its inputs, so a learned position vector is added to [CLS] and to each patch. As in
# CLIP, but not in most ViTs, one more LayerNorm follows before the first block.

# %%
x = torch.cat([vit.class_embedding.view(1, 1, E), embedded], dim=1) + vit.position_embedding
assert x.shape == (1, G * G + 1, E)
norm = vit.pre_layernorm
x = F.layer_norm(x, (E,), norm.weight, norm.bias, config.layer_norm_eps)
print(f"{x.shape[1]} positions")

# %% [markdown]
# The maps below show the cosine similarity of four position embeddings to all others.

# %%
positions = F.normalize(vit.position_embedding[1:], dim=1)
similarity = positions @ positions.T  # (G², G²)
fig, axes = plt.subplots(1, 4, figsize=(10, 2.7))
for axis, patch in zip(axes, (0, 3 * G + 2, 5 * G + 7, G * G - 1), strict=True):
    axis.imshow(similarity[patch].view(G, G), vmin=-1, vmax=1, cmap="RdBu")
    axis.plot(patch % G, patch // G, "k+")
    axis.axis("off")
fig.suptitle("Cosine similarity of the position embedding of one patch (+) to all others")
fig.colorbar(axes[0].images[0], ax=axes)
show(fig, f"Four {G} by {G} maps of cosine similarity, each with one marked patch.")

# %% [markdown]
# On average, the embeddings of neighboring patches are more similar than those of two arbitrary patches. The bundled
# model did not have to learn this: its position embeddings start as two-dimensional sines and cosines (`init_weights`
# in `training/setup.py`). CLIP's started as random numbers.

# %%
position_grid = positions.view(G, G, E)
neighbors = (position_grid[:, :-1] * position_grid[:, 1:]).sum(-1)  # next to each other in a row
print(f"mean similarity: {neighbors.mean():.2f} for neighbors, {similarity.mean():.2f} overall")
assert neighbors.mean() > similarity.mean() + 0.2

# %% [markdown]
# ## One block
#
# Pre-norm: LayerNorm, attention, add; LayerNorm, MLP, add. Multi-head attention by its formula, one head at a time:


# %%
def attention(x, attn):
    """softmax(q·kᵀ / √hd)·v for each head, then the output projection."""
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)  # (1, N, E)
    hd = E // attn.heads
    outputs = []
    for start in range(0, E, hd):
        head = slice(start, start + hd)
        weights = (q[..., head] @ k[..., head].mT / hd**0.5).softmax(-1)  # (1, N, N)
        outputs.append(weights @ v[..., head])
    return attn.out_proj(torch.cat(outputs, dim=-1))


block = vit.layers[0]
y = x + attention(block.norm1(x), block.attn)
y = y + block.mlp.fc2(quick_gelu(block.mlp.fc1(block.norm2(y))))
torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)

# %% [markdown]
# The activation is CLIP's QuickGELU, `x · sigmoid(1.702 x)`, which is close to GELU but not equal:

# %%
line = torch.linspace(-4, 4, 200)
torch.testing.assert_close(quick_gelu(line), line * torch.sigmoid(1.702 * line))
difference = (quick_gelu(line) - F.gelu(line)).abs().max()
print(f"QuickGELU and GELU differ by up to {difference:.3f}")

# %% [markdown]
# ## The whole ViT, and its last step
#
# After the last block comes a LayerNorm. Then each position is divided by its length. (CLIP does this only to its
# final output, the projected [CLS].) Features of unit length have values of about 1/√E, so the layer that follows
# must expect small inputs: notebook 2 shows what happens if it does not.

# %%
with record(model) as seen:
    features = vit(pixels)
expected = theirs(pixels).last_hidden_state
expected = F.normalize(theirs.post_layernorm(expected), dim=-1)  # outside the ViT in transformers
torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)

# %% [markdown]
# `record` kept the output of the last block, so we can compare the lengths before and after the division. (A
# LayerNorm whose weights are one and whose biases are zero returns vectors of length √E.)

# %%
last = vit.post_layernorm(seen[f"vision.layers.{config.layers - 1}"][0])
before, after = last.norm(dim=-1), features.norm(dim=-1)
print(f"√E = {E**0.5:.1f}")
print(f"lengths before: {before.min():.1f} to {before.max():.1f}, after: {after.mean():.3f}")
torch.testing.assert_close(features, last / before[..., None])

# %% [markdown]
# ## Attention weights
#
# `record` also keeps the attention weights. Each row of `weights` belongs to one query and sums to one. Three patches
# as queries, given as (row, column):

# %%
weights = seen[f"vision.layers.{config.layers - 1}.attn"][0][0]  # (H, N, N)
torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
queries = {
    "on the snowman": (int(0.7 * G), int(0.41 * G)),
    "on the fire": (int(0.7 * G), int(0.75 * G)),
    "in the sky": (int(0.2 * G), int(0.75 * G)),
}
print(queries)

# %% [markdown]
# The figure shows which patches each head of the last block attends to from these patches (+). The larger the weight,
# the redder the patch. `overlay` scales each panel to its own maximum, so colors cannot be compared between panels.
# [CLS] is not shown.

# %%
fig, axes = plt.subplots(config.heads, 3, figsize=(8, 2.6 * config.heads))
for column, (where, (row, col)) in enumerate(queries.items()):
    for head in range(config.heads):
        axis = axes[head, column]
        to_patches = weights[head, 1 + row * G + col, 1:].view(G, G)
        overlay(axis, image, to_patches, f"head {head}: patch {where}")
        x_mark, y_mark = (col + 0.5) / G * image.width, (row + 0.5) / G * image.height
        axis.plot(x_mark, y_mark, "+", color="white", markersize=12, markeredgewidth=4)
        axis.plot(x_mark, y_mark, "+", color="black", markersize=12, markeredgewidth=1.5)
fig.tight_layout()
alt = "Copies of the image, one per head and query, red where the attention weight is large."
show(fig, alt)

# %% [markdown]
# From a patch on an object, head 0 attends mostly to the object's lower edge and head 1 to its upper edge: the patch
# labels that the ViT was trained on ask for the boxes of objects (notebook 8). In most panels, the weight is
# concentrated on a few patches. What fraction of the attention on the patches goes to the top 10% of them?

# %%
query_rows = [1 + row * G + col for row, col in queries.values()]
to_patches = weights[:, query_rows, 1:]  # (H, 3, G²)
share = to_patches.topk(G * G // 10).values.sum(-1) / to_patches.sum(-1)
print(f"mean over heads and queries: {share.mean():.2f}")
assert share.mean() > 0.5

# %% [markdown]
# ## Images of another size
#
# Everything in the ViT works for any number of patches, except the table of position embeddings: it has one row for
# each patch of a `grid` x `grid` image. `Kosmos2` therefore accepts pixels of one size only. transformers can also
# interpolate the table: it treats the embeddings of the patches as an image with E channels and resizes it. [CLS] is
# not part of the grid, so its embedding stays the same.


# %%
def interpolate_positions(table, rows: int, columns: int):
    """Position embeddings (1 + G², E) -> (1 + rows * columns, E)."""
    as_image = table[1:].T.reshape(1, E, G, G)
    resized = F.interpolate(as_image, size=(rows, columns), mode="bicubic")  # (1, E, rows, columns)
    return torch.cat([table[:1], resized.flatten(2)[0].T])


torch.testing.assert_close(interpolate_positions(vit.position_embedding, G, G), vit.position_embedding)
print(tuple(interpolate_positions(vit.position_embedding, 9, 16).shape))

# %% [markdown]
# The whole ViT with interpolated positions, compared with transformers on a larger image:


# %%
def features_of(pixels):
    """The features of images of any size, (I, 1 + rows * columns, E)."""
    patches = vit.patch_embedding(pixels)  # (I, E, rows, columns)
    cls = vit.class_embedding.expand(len(pixels), 1, E)
    x = torch.cat([cls, patches.flatten(2).mT], dim=1)
    x = vit.pre_layernorm(x + interpolate_positions(vit.position_embedding, *patches.shape[2:]))
    for layer in vit.layers:
        x = layer(x)
    return F.normalize(vit.post_layernorm(x), dim=-1)


larger = preprocess_image(image, 15 * P)[None]
expected = theirs(larger, interpolate_pos_encoding=True).last_hidden_state
expected = F.normalize(theirs.post_layernorm(expected), dim=-1)
torch.testing.assert_close(features_of(larger), expected, rtol=1e-4, atol=1e-4)
print(f"{15 * P} x {15 * P} pixels: features", tuple(features_of(larger).shape))

# %% [markdown]
# Can the model use such features? Most of its training images had the usual size, but in some steps they had 3/4 to
# twice as many pixels per side (`Scenes` in `training/data.py`), with interpolated positions. We ask it for the boxes
# of 60 objects in unseen scenes, one object with a unique name from each, at several sizes. The resampler and the
# decoder need no change, because the resampler accepts any number of features.


# %%
def phrase(thing) -> str:
    return f"{article(thing.name)} {thing.name}"


scenes, asked = [], []
for seed in range(HELD_OUT, HELD_OUT + 90):
    scene = Scene.random(seed)
    unique = [thing for thing in scene.things if len(scene.find(thing.kind, thing.color)) == 1]
    if unique and len(asked) < 60:
        scenes.append(scene.draw())
        asked.append(unique[0])
prompts = [tokenizer.encode_prompt(PROMPTS["ground"].format(text=phrase(thing))) for thing in asked]
tokens, image_mask, pad_mask = pad_left(prompts)
print(len(asked), "objects:", ", ".join(map(phrase, asked[:5])), "...")

# %% [markdown]
# For each size: the share of boxes with an IoU of at least 0.5. (IoU, intersection over union, is the area that two
# boxes share, divided by the area that they cover together.)

# %%
rows, accuracy = [], {}
for patches in (G // 2, 3 * G // 4, G, 5 * G // 4, 3 * G // 2, 2 * G):
    images = torch.stack([preprocess_image(scene, patches * P) for scene in scenes])
    embeds = model.resampler(features_of(images))
    answers = model.generate(tokens, None, embeds, image_mask, pad_mask, max_new_tokens=4)
    hits = 0
    for (ids, _), new, thing in zip(prompts, answers, asked, strict=True):
        _, entities = tokenizer.parse_output(ids, new)
        hits += bool(entities) and iou(entities[0].boxes[0], thing.box) >= 0.5
    accuracy[patches] = hits / len(asked)
    rows.append((patches * P, f"{patches} x {patches}", f"{accuracy[patches]:.2f}"))
table(rows, ("pixels per side", "patches", "boxes found"))

# %% [markdown]
# At larger sizes, nearly all boxes are found, and at 3/4 of the usual size most of them. At half the size, which was
# not in the training data, many are lost. On 240 objects instead of 60, the share is 1.00 at the usual size, 0.93 to
# 0.96 at larger ones, and 0.89 at 3/4. The cost of the ViT's attention grows with the square of the number of patches.

# %%
assert accuracy[G] >= 0.95
assert all(accuracy[patches] >= 0.95 for patches in accuracy if patches > G)
assert accuracy[3 * G // 4] >= accuracy[G] - 0.15
assert accuracy[G // 2] < accuracy[G] - 0.1

# %% [markdown]
# ## Counting
#
# Parameters of a block: four projections of E² + E, an MLP of 2·E·M + M + E, two norms of 2E.


# %%
def block_parameters(E, M):
    return 4 * (E * E + E) + (2 * E * M + M + E) + 2 * 2 * E


here = block_parameters(E, config.mlp_width)
assert here == sum(p.numel() for p in block.parameters())
published = VisionConfig()  # the defaults are the published sizes
there = block_parameters(published.width, published.mlp_width)
rows = [("here", here * config.layers), ("published model", there * published.layers)]
table(rows, ("ViT blocks", "parameters"))

# %% [markdown]
# ## Exercises
#
# 1. Shuffle the patches *after* adding the positions. Which outputs change, and how?
# 2. Shuffle them *before*. Why is the result different?
# 3. Replace `quick_gelu` by `F.gelu` in all blocks. How much do the features change? Would you notice it in a
#    caption?
# 4. `interpolate_positions` resizes all rows of the table but one. What would go wrong if that row were resized, too?
