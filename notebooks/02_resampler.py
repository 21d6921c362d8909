# %% [markdown]
# # 2. The resampler: from patches to a few latents
#
# The 256 patches of the published model would take 256 positions of the prompt, and each one adds to the decoder's
# cost. The resampler condenses them into Q vectors with Q learned queries. Q is a hyperparameter: 64 in the published
# model, 32 in the bundled one. The resampler is a single attention layer without LayerNorm, residual or MLP, and its
# queries are also among its keys. (Reading time: 25 minutes.)
#
# Three helpers come from `training/`: `Scene` draws random scenes, scenes from the seed `HELD_OUT` on were not used
# in training, and `init_weights` initializes a model before training.

# %%
from figures import ROOT, overlay, plt, reference, show, table  # isort: skip
from dataclasses import replace

import torch

from kosmos2 import Kosmos2, finish, open_image, preprocess_image
from load_weights import load_checkpoint
from training.evaluate import HELD_OUT
from training.scenes import Scene
from training.setup import init_weights

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
theirs = reference()
resampler, config = model.resampler, model.config

# %% [markdown]
# The resampler's input is the features of an image (notebook 1).

# %%
E, Q, D = config.vision.width, config.latent_query_num, config.text.width
image = open_image(ROOT / "tiny" / "scene.png")
pixels = preprocess_image(image, config.vision.image_size)[None]
features = model.vision(pixels)
N = features.shape[1]
print(f"{N} positions (with [CLS]) go in, {Q} vectors of width {D} come out")

# %% [markdown]
# ## By hand
#
# `dense` projects the features to the decoder's width. Then the latents are the queries, and keys and values come
# from the features **and the latents themselves**: N + Q of them. No LayerNorm, no residual, no MLP.

# %%
attn, latents = resampler.x_attn, resampler.latent_query[None]
keys = torch.cat([resampler.dense(features), latents], dim=1)
assert keys.shape == (1, N + Q, D)


def split_heads(t):
    return t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (1, H, positions, hd)


q = split_heads(attn.q_proj(latents))
k, v = split_heads(attn.k_proj(keys)), split_heads(attn.v_proj(keys))
weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (1, H, Q, N + Q)
by_hand = attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
expected = theirs.image_to_text_projection(features)[0]
torch.testing.assert_close(by_hand, resampler(features), rtol=1e-4, atol=1e-4)
torch.testing.assert_close(by_hand, expected, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## What the latents attend to
#
# The figure shows the attention weights on the patches, by head, for the five latents with the largest weights. The
# larger the weight, the redder the patch; each panel is scaled to its own maximum. [CLS] and the latents are not shown.

# %%
grid = config.vision.grid
largest = weights[0, :, :, 1:N].amax(-1).sum(0)  # of each latent, summed over the heads
chosen = largest.topk(5).indices.sort().values.tolist()
fig, axes = plt.subplots(attn.heads, len(chosen), figsize=(11, 2.3 * attn.heads))
for column, latent in enumerate(chosen):
    for head in range(attn.heads):
        on_patches = weights[0, head, latent, 1:N].view(grid, grid)
        overlay(axes[head, column], image, on_patches, f"latent {latent}, head {head}")
fig.tight_layout()
alt = "Copies of the image, one per head and latent, red where the attention weight is large."
show(fig, alt)

# %% [markdown]
# Each of these heads attends to only a few patches. What share of its attention on the image goes to the four largest
# weights?

# %%
on_patches = weights[0, :, chosen, 1:N]  # (H, 5, N - 1)
share = on_patches.topk(4).values.sum(-1) / on_patches.sum(-1)
print(f"mean {share.mean():.2f}, an equal share would be {4 / (N - 1):.2f}")
assert share.mean() > 0.5

# %% [markdown]
# ## The latents as keys
#
# Attention weights sum to one. Without the latents among the keys, each head would have to spend all of its attention
# on the image. The keys and values of the latents do not depend on the image: for each head and latent, they add a
# fixed vector; only its weight depends on the image. How large is that weight?

# %%
on_latents = weights[0, :, :, N:].sum(-1)  # (H, Q)
fig, axis = plt.subplots(figsize=(9, 1.9))
shown = axis.imshow(on_latents, aspect="auto", cmap="viridis", vmin=0, vmax=1)
axis.set(xlabel="latent", ylabel="head")
axis.set_title("share of attention on the latents instead of the image")
fig.colorbar(shown)
show(fig, "A heat map of heads by latents: the share of attention on the latents, from 0 to 1.")

without = attn(latents, keys[:, :N])  # the same layer without the extra keys
change = (without - by_hand).norm() / by_hand.norm()
print(f"on average, {on_latents.mean():.2f} of the attention is on the latents")
print(f"without these keys, the embeddings change by {change:.0%}")

# %% [markdown]
# Nearly every square of the figure is dark or bright: for a latent, a head attends either to the image or to the
# latents, hardly ever to both. What happens to the caption if these keys are removed from the trained model?

# %%
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])


def print_caption(name, image_embeds):
    state = model.prefill(tokens, None, image_embeds, mask, max_new_tokens=100)
    row = finish(state)[0]
    caption, entities = tokenizer.parse_output(ids, row.ids, row.probabilities)
    print(f"{name}: {caption}  scores: {[[round(s, 2) for s in e.scores] for e in entities]}")
    return caption


for name, embeds in (("with their own keys", by_hand), ("without them", without)):
    print_caption(name, embeds)

# %% [markdown]
# Notebook 10 measures this on 40 scenes. [CLS] is among the keys, too. How much attention does it get?

# %%
share = weights[0, :, :, 0].sum() / weights[0, :, :, :N].sum()
print(f"of the attention on the image, [CLS] gets {share:.3f}; an equal share would be {1 / N:.3f}")
assert share < 0.1 / N

# %% [markdown]
# This is far less than an equal share.
#
# Reordering the keys, together with their values, changes nothing: attention is a weighted sum. So spatial
# information reaches the latents only through the position embeddings of the ViT (notebook 1).

# %%
order = torch.randperm(N)
shuffled = resampler(features[:, order])
torch.testing.assert_close(shuffled, resampler(features), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Why unit length matters: models that ignore the image
#
# Features have unit length, so their values are about 1/√E. The latents start with standard deviation one, in the
# published model as well. If `dense` starts with small weights (0.02 in transformers, 1/√E as a usual rule), the
# embeddings of different images become more alike; at 0.02 they are nearly identical. We measure this on untrained
# models: how far are the embeddings of eight images from their mean? And what if the latents start small, too?

# %%
drawn = [Scene.random(seed).draw() for seed in range(8)]
images = torch.stack([preprocess_image(image, config.vision.image_size) for image in drawn])


def spread(model) -> float:
    """How far the embeddings of the images are from their mean, relative to their length."""
    embeds = model.encode_image(images)
    return float((embeds - embeds.mean(0)).norm() / embeds.norm())


untrained = Kosmos2(replace(config, text=replace(config.text, layers=1))).eval()
spreads = {}
for std, scale in ((1, 1), (0.3, 1), (E**-0.5, 1), (0.02, 1), (1, 0.02), (0.02, 0.02)):
    init_weights(untrained, tokenizer.first_location)
    untrained.resampler.dense.weight.normal_(std=std, generator=torch.Generator().manual_seed(0))
    untrained.resampler.latent_query.mul_(scale)
    spreads[std, scale] = spread(untrained)
print(len(spreads), "untrained models")

# %% [markdown]
# The last row is the trained model:

# %%
rows = [(f"{std:.2f}", f"{scale:.2f}", f"{s:.3f}") for (std, scale), s in spreads.items()]
rows.append(("trained", "", f"{spread(model):.3f}"))
table(rows, ("std of dense", "of the latents", "spread over images"))
assert spreads[0.02, 1] < 0.6 * spreads[E**-0.5, 1]
assert spreads[E**-0.5, 1] < 0.6 * spreads[1, 1]
assert min(spreads[0.02, 0.02], spreads[1, 0.02]) > 0.7 * spreads[1, 1]

# %% [markdown]
# With latents of standard deviation one, a smaller `dense` means a smaller spread. With small latents, the spread is
# large for both sizes of `dense`: the latents must not be much larger than the projected features. The bundled model
# starts both with standard deviation one (`init_weights` in `training/setup.py`).
#
# What does a model write if it ignores the image (a *blind* model)? We give the trained model the average of the
# embeddings of the eight images above; the scene here is a different one:

# %%
scene = Scene.random(HELD_OUT + 10)
seeing = model.encode_image(preprocess_image(scene.draw(), config.vision.image_size)[None])
blind = model.encode_image(images).mean(0, keepdim=True)
print("the scene:", ", ".join(thing.name for thing in scene.things))
assert print_caption("seeing", seeing) != print_caption("blind", blind)

# %% [markdown]
# The second caption does not depend on the scene: a blind model writes the same caption for every image. For this
# reason, `tests/test_training.py` checks that one question about two images gets two different answers.
#
# ## Counting
#
# One projection E → D, Q latents, and four projections D → D; the projections have biases.


# %%
def resampler_parameters(E, D, Q):
    return (E * D + D) + Q * D + 4 * (D * D + D)


here = resampler_parameters(config.vision.width, D, Q)
assert here == sum(p.numel() for p in resampler.parameters())
rows = [("here", here), ("published model", resampler_parameters(1024, 2048, 64))]
table(rows, ("resampler", "parameters"))

# %% [markdown]
# ## Exercises
#
# 1. What would change if the latents were not among their own keys *during training*? What could a head then not
#    express?
# 2. Use half as many latents: `Kosmos2(replace(config, latent_query_num=Q // 2))`. Which tensors change shape?
# 3. Give the resampler features of length ten instead of one. What happens to `on_latents`, and why?
# 4. Add a second resampler layer. How must it start, so that a trained model writes the same captions at first?
#    (Hint: a residual, and an `out_proj` of zeros.)
# 5. Two images in one prompt take 2 x (Q + 2) positions. At which Q would eight images exceed the 2,048 positions of
#    the published model?
