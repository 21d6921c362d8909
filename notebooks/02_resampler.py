# %% [markdown]
# # 2. The resampler: from patches to a few latents
#
# 256 patches would take 256 positions of the prompt, and the decoder's cost grows with each. The resampler
# condenses them into Q vectors with Q learned queries: 64 in the published model, 32 in the bundled one. It is a
# single attention layer, unusual in what it leaves out and in one thing it adds. (Reading time: 25 minutes.)

# %%
from figures import ROOT, overlay, plt, reference, show, table  # isort: skip
from dataclasses import replace

import torch
import torch.nn.functional as F
from evaluate import HELD_OUT
from PIL import Image
from scenes import Scene
from train import init_weights

from kosmos2 import Kosmos2, finish, preprocess_image, preprocess_images
from load_weights import load_checkpoint

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
theirs = reference()
resampler, config = model.resampler, model.config
Q, D = config.latent_query_num, config.text.width
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(image, config.vision.image_size)[None]
features = model.vision(pixels)
N = features.shape[1]

# %% [markdown]
# ## By hand
#
# `dense` projects the features to the decoder's width. Then the latents are the queries, and keys and values
# come from the features **and the latents themselves**: N + Q of them. No LayerNorm, no residual, no MLP.

# %%
keys = torch.cat(
    [features @ resampler.dense.weight.T + resampler.dense.bias, resampler.latent_query[None]], dim=1
)
assert keys.shape == (1, N + Q, D)
attn = resampler.x_attn
q = F.linear(resampler.latent_query[None], attn.q_proj.weight, attn.q_proj.bias)
k = F.linear(keys, attn.k_proj.weight, attn.k_proj.bias)
v = F.linear(keys, attn.v_proj.weight, attn.v_proj.bias)
q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (1, H, positions, hd)
weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (1, H, Q, N + Q)
by_hand = F.linear((weights @ v).transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

torch.testing.assert_close(by_hand, resampler(features), rtol=1e-4, atol=1e-4)
torch.testing.assert_close(by_hand, theirs.image_to_text_projection(features)[0], rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## What the latents attend to
#
# The attention weights of each head of some latents on the patches ([CLS] and the latents are not shown; each
# panel is scaled to its own maximum).

# %%
grid = config.vision.grid
chosen = weights[0, :, :, 1:N].amax(-1).sum(0).topk(5).indices.sort().values  # those with the largest weights
fig, axes = plt.subplots(attn.heads, len(chosen), figsize=(11, 6.8))
for column, latent in enumerate(chosen.tolist()):
    for head in range(attn.heads):
        overlay(
            axes[head, column],
            image,
            weights[0, head, latent, 1:N].view(grid, grid),
            f"latent {latent}, head {head}",
        )
fig.tight_layout()
show(
    fig,
    "15 copies of the image; in each, the patches that one head of one latent attends to are bright.",
)

# %% [markdown]
# ## Latents among their own keys
#
# Attention weights sum to one. Without the latents among the keys, each head would have to spend all of its
# attention on the image. Attention to a latent is attention to a constant. How much of it is there?

# %%
away = weights[0, :, :, N:].sum(-1)  # (H, Q)
fig, axis = plt.subplots(figsize=(9, 1.9))
shown = axis.imshow(away, aspect="auto", cmap="viridis", vmin=0, vmax=1)
axis.set(xlabel="latent", ylabel="head", title="share of attention on the latents instead of the image")
fig.colorbar(shown)
show(
    fig,
    "A map of 3 heads by 32 latents: the share of attention on the latents, between 0 and 1.",
)

without = attn(resampler.latent_query[None], keys[:, :N])  # the same layer without the extra keys
change = (without - by_hand).norm() / by_hand.norm()
print(
    f"on average {away.mean():.2f} of the attention; without these keys the embeddings change by {change:.0%}"
)

# %% [markdown]
# What happens to the caption if these keys are removed from the trained model?

# %%
ids, mask = tokenizer.encode_prompt("<grounding>An image of")


def caption(image_embeds):
    """The caption and its entities."""
    state = model.prefill(torch.tensor([ids]), None, image_embeds, torch.tensor([mask]), max_new_tokens=100)
    result = finish(state)[0]
    return tokenizer.parse_output(ids, result.ids, result.probabilities)


for name, embeds in (("with their own keys", by_hand), ("without them", without)):
    text, entities = caption(embeds)
    print(f"{name}: {text}  scores: {[round(e.scores[0], 2) for e in entities]}")

# %% [markdown]
# [CLS] is a key like the others:

# %%
print(
    f"of the attention on the image, [CLS] gets {float(weights[0, :, :, 0].sum() / weights[0, :, :, :N].sum()):.3f}; an equal share would be {1 / N:.3f}"
)

# %% [markdown]
# The order of the *keys* does not matter, only that of the queries: attention is a weighted sum. So spatial
# information reaches the latents only through the position embeddings of the ViT (notebook 1).

# %%
shuffled = torch.randperm(N)
torch.testing.assert_close(resampler(features[:, shuffled]), resampler(features), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Why unit length matters: the blind model
#
# Features have unit length, so their values are about 1/√E. The latents start with standard deviation one, in
# the published model as well. If `dense` starts with small weights (0.02 in transformers, 1/√D as a usual rule),
# the image hardly changes the embeddings: all images look alike to the decoder. Measured on untrained models: how
# far are the embeddings of eight images from their mean? And what if the latents start small instead?

# %%
images = preprocess_images([Scene.random(s).draw() for s in range(8)], config.vision.image_size)


def spread(model) -> float:
    """How far the embeddings of several images are from their mean, relative to their length."""
    found = model.encode_image(images)
    return float((found - found.mean(0)).norm() / found.norm())


untrained = Kosmos2(replace(config, text=replace(config.text, layers=1))).eval()
rows = []
for std, latents in ((1.0, 1.0), (0.3, 1.0), (D**-0.5, 1.0), (0.02, 1.0), (1.0, 0.02), (0.02, 0.02)):
    init_weights(untrained, tokenizer.first_location)
    untrained.resampler.dense.weight.normal_(std=std, generator=torch.Generator().manual_seed(0))
    untrained.resampler.latent_query.mul_(latents)
    rows.append((f"{std:.2f}", f"{latents:.2f}", f"{spread(untrained):.3f}"))
table(
    [*rows, ("trained", "", f"{spread(model):.3f}")],
    ("std of dense", "of the latents", "spread over images"),
)

# %% [markdown]
# What counts is the scale of the image relative to the latents. The bundled model starts both with std 1
# (`init_weights` in `training/train.py`). What does a blind model do? Give the trained model the average of the
# embeddings of eight images:

# %%
scene = Scene.random(HELD_OUT + 8)
seen = model.encode_image(preprocess_image(scene.draw(), config.vision.image_size)[None])
blind = model.encode_image(images).mean(0, keepdim=True)
print("the scene:", ", ".join(thing.name for thing in scene.things))
for name, embeds in (("seeing", seen), ("blind", blind)):
    text, entities = caption(embeds)
    print(f"{name}: {text}  scores: {[round(e.scores[0], 2) for e in entities]}")

# %% [markdown]
# A blind model still writes correct sentences, but they do not depend on the image. That is why
# `tests/test_training.py` asks one question about two images and expects two answers.
#
# ## Counting
#
# One projection E → D, Q latents, and four projections D → D; the projections have biases.

# %%
E = config.vision.width
predicted = (E * D + D) + Q * D + 4 * (D * D + D)
assert predicted == sum(p.numel() for p in resampler.parameters())
published = (1024 * 2048 + 2048) + 64 * 2048 + 4 * (2048 * 2048 + 2048)
table([("here", predicted), ("published model", published)], ("resampler", "parameters"))

# %% [markdown]
# ## Exercises
#
# 1. What would change if the latents were not among their own keys *during training*? What could a head then
#    not express?
# 2. Use half as many latents: `Kosmos2(replace(config, latent_query_num=16))`. Which tensors change shape?
# 3. Give the resampler features of length ten instead of one. What happens to `away`, and why?
# 4. Add a second resampler layer. How must it start, so that a trained model writes the same text at first?
#    (Hint: a residual, and an `out_proj` of zeros.)
# 5. Two images in one prompt take 2 x (Q + 2) positions. At which Q would eight images exceed the 2,048 positions
#    of the published model?
