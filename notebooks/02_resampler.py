# %% [markdown]
# # 2. The resampler: from patches to a few latents
#
# 256 patches would be 256 positions of the prompt, and the decoder's work grows with each. The resampler
# asks Q learned questions about the picture instead, and hands on the Q answers: 64 in the published model,
# 32 in the bundled one. It is a single attention layer. What is unusual is what it leaves out, and one thing
# it adds.

# %%
from figures import ROOT, overlay, plt, reference, show, table  # isort: skip
from dataclasses import replace

import torch
import torch.nn.functional as F
from evaluate import HELD_OUT
from PIL import Image
from scenes import Scene
from train import init_weights

from kosmos2 import Kosmos2, preprocess_image
from load_weights import load_checkpoint

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
theirs = reference()
resampler, config = model.resampler, model.config
Q, D = config.latent_query_num, config.text.width
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(picture, config.vision.image_size)[None]
features = model.vision(pixels)
N = features.shape[1]

# %% [markdown]
# ## By hand
#
# `dense` brings features to the decoder's width. Then the latents are queries, and keys and values come from
# the features **and the latents themselves**: N + Q of them. No LayerNorm, no residual, no MLP.

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
# ## Where the latents look
#
# Here is what each head of some latents reads from the picture (the [CLS] position and the latents left out
# of the drawing). There is no rule that they should share the picture out; training finds what serves.

# %%
grid = config.vision.grid
chosen = weights[0, :, :, 1:N].amax(-1).sum(0).topk(5).indices.sort().values  # the most decided ones
fig, axes = plt.subplots(attn.heads, len(chosen), figsize=(11, 6.8))
for column, latent in enumerate(chosen.tolist()):
    for head in range(attn.heads):
        overlay(
            axes[head, column],
            picture,
            weights[0, head, latent, 1:N].view(grid, grid),
            f"latent {latent}, head {head}",
        )
fig.tight_layout()
show(
    fig,
    "15 copies of the picture; in each a latent's head brightens one or several of the shapes, or a region of the picture.",
)

# %% [markdown]
# ## Latents among their own keys
#
# What if the latents were not among the keys? Then every head would have to spend all of its attention on
# the picture. With them it can look away: attention to a latent is attention to a constant. How much is it?

# %%
away = weights[0, :, :, N:].sum(-1)  # (H, Q)
fig, axis = plt.subplots(figsize=(9, 1.9))
shown = axis.imshow(away, aspect="auto", cmap="viridis", vmin=0, vmax=1)
axis.set(xlabel="latent", ylabel="head", title="share of attention on the latents instead of the picture")
fig.colorbar(shown)
show(
    fig,
    "A strip of 3 rows and 32 columns: which heads of which latents look away from the picture, and how much.",
)

without = attn(resampler.latent_query[None], keys[:, :N])  # the same layer without the extra keys
change = (without - by_hand).norm() / by_hand.norm()
print(
    f"on average {away.mean():.2f} of the attention; without these keys the embeddings change by {change:.0%}"
)

# %% [markdown]
# It is all or nothing: nearly every head of every latent looks either only at the picture or only away from it.
# Heads that look away add a constant to their latent's embedding. What becomes of the caption, if they must
# look at the picture after all?

# %%
ids, mask = tokenizer.encode_prompt("<grounding>An image of")
for name, embeds in (("with their own keys", by_hand), ("without", without)):
    new = model.generate(torch.tensor([ids]), None, embeds, torch.tensor([mask]), max_new_tokens=100)[0]
    text, entities = tokenizer.read(ids, new)
    print(f"{name}: {text}  scores: {[round(e.scores[0], 2) for e in entities]}")

# %% [markdown]
# And [CLS], which stands for no place? It is a key like the others:

# %%
print(
    f"of the attention on the picture, [CLS] gets {float(weights[0, :, :, 0].sum() / weights[0, :, :, :N].sum()):.3f}; an equal share would be {1 / N:.3f}"
)

# %% [markdown]
# The order of the *keys* does not matter, only that of the queries: attention is a sum. So the picture's
# geometry reaches the latents only through the positions that the ViT added (notebook 1).

# %%
shuffled = torch.randperm(N)
torch.testing.assert_close(resampler(features[:, shuffled]), resampler(features), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Why unit length matters: the blind model
#
# Features have length one, so their coordinates are about 1/√E. The latents start as a normal distribution
# with spread one, in the published model as well. If `dense` starts with small weights (0.02 is what
# transformers would draw, 1/√D the usual rule), the picture is a whisper among shouting
# latents: all pictures look alike to the decoder, and guessing is the quickest way to a lower loss. Measured on
# untrained models: how far are the embeddings of eight pictures from their mean? And what if it is the latents
# that start small?

# %%
pictures = torch.stack([preprocess_image(Scene.random(s).draw(), config.vision.image_size) for s in range(8)])


def spread(model) -> float:
    """How far embeddings of several pictures are from their mean, against their length."""
    found = model.encode_image(pictures)
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
    ("std of dense", "of the latents", "spread over pictures"),
)

# %% [markdown]
# What counts is how loud the picture is beside the latents. The bundled model starts both with std 1
# (`init_weights` in `tiny/train.py`). And what does a blind
# model do? Take the sight of the trained one away by giving it the average of eight pictures' embeddings:

# %%
names = [f"{s.color} {s.shape}" for s in Scene.random(HELD_OUT + 8).shapes]
seen = model.encode_image(preprocess_image(Scene.random(HELD_OUT + 8).draw(), config.vision.image_size)[None])
blind = model.encode_image(pictures).mean(0, keepdim=True)
print("the picture holds:", ", ".join(names))
for name, embeds in (("seeing", seen), ("blind", blind)):
    new = model.generate(torch.tensor([ids]), None, embeds, torch.tensor([mask]), max_new_tokens=100)[0]
    text, entities = tokenizer.read(ids, new)
    print(f"{name}: {text}  scores: {[round(e.scores[0], 2) for e in entities]}")

# %% [markdown]
# A blind model still writes perfect sentences: language is the easy part. What it says does not depend on the
# picture, and now and then it hits something by chance; scores alone need not give it away. That is why `tests/test_tiny.py` asks the same question about two pictures, and wants two answers.
#
# ## Counting
#
# One projection E → D, Q latents, and four projections D → D, all with biases but the latents.

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
# 2. Cut the latents in half: `Kosmos2(replace(config, latent_query_num=16))`. Which tensors change shape?
# 3. Give the resampler features of length ten instead of one. What happens to `away`, and why?
# 4. Build a second resampler layer: latents that have looked once look again. What must it start with, so that a
#    trained model says at first what it said before? (Hint: a residual, and an `out_proj` of zeros.)
# 5. Two pictures in one prompt are 2 x (Q + 2) positions. At which Q would the published model run out of its
#    2,048 positions with eight pictures?
