# %% [markdown]
# # 3. The decoder
#
# The decoder is a causal transformer that continues a sequence of tokens. Most of it is the textbook transformer,
# including the factor √D for the embeddings ("Attention Is All You Need", section 3.4). It is pre-norm, with GELU, like
# GPT-2. Not in the textbook: position ids that start at 2, a table with all sines before the cosines and slightly
# different wavelengths, sub-LN, and image embeddings that are inserted *before* scaling by √D. We write the decoder by
# hand; [10_departures](10_departures.ipynb) measures what it costs to undo each of these differences. (Reading time: 30
# minutes.)

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import math

import torch
import torch.nn.functional as F
from recording import record

import kosmos2
from kosmos2 import causal_mask, open_image, preprocess_image, sinusoidal_positions
from load_weights import load_checkpoint

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
theirs = reference()

# %% [markdown]
# The running example is the bundled image, with the beginning of its caption as the prompt.

# %%
decoder, config = model.decoder, model.config.text
D, V = config.width, config.vocab_size
image = open_image(ROOT / "tiny" / "scene.png")
pixels = preprocess_image(image, model.config.vision.image_size)[None]
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of a snowman next to a")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
T = len(ids)
print(f"{T} tokens, {sum(image_mask)} of them image slots")

# %% [markdown]
# ## Embeddings, scaled
#
# Each id selects a row of the embedding matrix, which is also the output projection ("tied"). Position encodings have
# a length of √(D/2). How long are the embeddings of tokens and images, before and after the factor √D?

# %%
embeds = decoder.embed_tokens.weight[tokens]  # (1, T, D)
positions = sinusoidal_positions(torch.arange(T)[None] + 2, D)
lengths = {
    "tokens": embeds[0, ~mask[0]].norm(dim=-1).mean().item(),
    "image embeddings": model.encode_image(pixels)[0].norm(dim=-1).mean().item(),
    "positions": positions.norm(dim=-1).mean().item(),
}
rows = []
for name, length in lengths.items():
    scaled = "" if name == "positions" else f"{math.sqrt(D) * length:.1f}"
    rows.append((name, f"{length:.1f}", scaled))
table(rows, ("mean length", "as stored", "times √D"))
assert math.isclose(lengths["positions"], math.sqrt(D / 2), rel_tol=1e-3)
assert lengths["tokens"] < lengths["positions"] < math.sqrt(D) * lengths["tokens"]
assert lengths["image embeddings"] > 10 * lengths["tokens"]

# %% [markdown]
# Stored token embeddings are shorter than the position encodings; with the factor √D they are longer. Image embeddings
# are more than ten times as long as token embeddings. They are inserted *before* scaling by √D, so they are scaled and
# given positions like tokens. If they were inserted after it, they would be √D times shorter than in training, and the
# position encodings, which have no factor, would weigh √D times as much against them. Notebook 10 measures whether that
# costs anything.
#
# The input of the decoder, by hand:

# %%
x = embeds.clone()
x[mask] = model.encode_image(pixels)[0]
torch.testing.assert_close(x, model.embed(tokens, pixels, image_mask=mask))
x = x * math.sqrt(D) + positions

# %% [markdown]
# ## The position table, and why it starts at 2
#
# The first half holds sines of increasing wavelength, the second half the cosines; the textbook interleaves them. The
# longest wavelength is 2π · 10,000 positions. (With n = D/2 frequencies, frequency i is 10,000 to the power of
# -i/(n-1); the textbook divides by n.)
#
# fairseq, in which the model was trained, reserves position 1 for padding, so the first token has position 2.

# %%
step = math.log(10000) / (D // 2 - 1)
rows = []
for p in range(2, 2 + T):
    angles = [p * math.exp(-i * step) for i in range(D // 2)]
    rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
torch.testing.assert_close(torch.tensor(rows), positions[0], rtol=1e-4, atol=1e-5)

# %% [markdown]
# The table, and how similar the encodings of other positions are to that of position 102:

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].imshow(sinusoidal_positions(torch.arange(2, 130)[None], D)[0], aspect="auto", cmap="RdBu")
axes[0].set(title="the table: sines, then cosines", xlabel="D", ylabel="position - 2")
long = sinusoidal_positions(torch.arange(2, 302)[None], D)[0]
axes[1].plot(long @ long[100] / (D / 2))
axes[1].set(title="similarity of position 102 to others", xlabel="position - 2", ylabel="dot product / (D/2)")
show(
    fig,
    "Left: the position table as colored stripes. Right: a curve with its peak at 100, which is position 102.",
)
assert (long @ long[100]).argmax() == 100

# %% [markdown]
# ## Causal attention
#
# A token attends to itself and to earlier tokens. `causal_mask` is True where attention is allowed. Its arguments are
# the number of queries and the padding of all positions (here there is none).

# %%
no_padding = torch.zeros(1, T, dtype=torch.bool)
print(causal_mask(4, no_padding[:, :4]).int())
print("with a cache of 3 earlier positions, 2 new ones:")
print(causal_mask(2, no_padding[:, :5]).int())

# %% [markdown]
# ## One block, with sub-LN
#
# MAGNETO (arXiv 2210.06423) adds a LayerNorm before the last projection of each branch: after the heads are
# concatenated, and in the MLP *after* the activation. So the inputs of both last projections have the same scale in
# every block, which makes training deep decoders more stable. The decoder has sub-LN in every block, the ViT nowhere.

# %%
block = decoder.layers[0]
attn, mlp = block.attn, block.mlp
h = block.norm1(x)


def project(layer):
    """One of the three projections, split into heads: (1, H, T, D / H)"""
    return F.linear(h, layer.weight, layer.bias).unflatten(-1, (attn.heads, -1)).transpose(1, 2)


q, k, v = project(attn.q_proj), project(attn.k_proj), project(attn.v_proj)
scores = q @ k.mT / math.sqrt(q.shape[-1])  # (1, H, T, T)
causal = causal_mask(T, no_padding)  # (T, T)
scores = scores.masked_fill(~causal, -math.inf)
joined = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
assert joined.shape == (1, T, D)

# %% [markdown]
# The two residual branches, each with its sub-LN in front of the last projection:

# %%
y = x + F.linear(attn.inner_attn_ln(joined), attn.out_proj.weight, attn.out_proj.bias)
h = F.gelu(F.linear(block.norm2(y), mlp.fc1.weight, mlp.fc1.bias))  # the exact GELU
y = y + F.linear(mlp.ffn_layernorm(h), mlp.fc2.weight, mlp.fc2.bias)
torch.testing.assert_close(y, block(x, causal), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## To the logits
#
# After all blocks come a last LayerNorm and the embedding matrix again: the logit of a token is the dot product of its
# embedding and the output.

# %%
for layer in decoder.layers:
    x = layer(x, causal)
logits = decoder.layer_norm(x) @ decoder.embed_tokens.weight.T
torch.testing.assert_close(logits, model(tokens, pixels, image_mask=mask), rtol=1e-4, atol=1e-4)
inputs = {"pixel_values": pixels, "input_ids": tokens, "image_embeds_position_mask": mask.long()}
torch.testing.assert_close(logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-4)
probabilities, best = logits[0, -1].softmax(-1).topk(3)
for i, p in zip(best.tolist(), probabilities.tolist(), strict=True):
    print(f"{tokenizer.id_to_token[i]:<12} {p:.3f}")

# %% [markdown]
# ## Attention on the image
#
# How much of the attention of each token goes to the image, block by block, on average over the heads?

# %%
with record(model) as seen:
    model(tokens, pixels, image_mask=mask)
slots = mask[0].nonzero()[:, 0]
start = int(slots[-1]) + 2  # the first token after </image>
share = torch.empty(config.layers, T - start)
for i in range(config.layers):
    weights = seen[f"decoder.layers.{i}.attn"][0][0]  # (H, T, T)
    share[i] = weights[:, start:, slots].sum(-1).mean(0)
names = [tokenizer.id_to_token[i].replace("▁", "") for i in ids[start:]]
assert (share > 0).all() and (share < 1).all()

# %% [markdown]
# As a map of blocks and tokens:

# %%
fig, axis = plt.subplots(figsize=(10, 2.2))
drawn = axis.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
axis.set_xticks(range(len(names)), names, rotation=45)
axis.set(yticks=range(config.layers), ylabel="block", title="share of attention on the image")
fig.colorbar(drawn)
show(fig, "A map of blocks by tokens: the share of attention on the image, between 0 and 1.")

# %% [markdown]
# In the last block, nearly all attention of "a" is on the image: the next token names an object.

# %%
assert all(share[-1, t] > 0.9 for t, name in enumerate(names) if name == "a")

# %% [markdown]
# ## Counting
#
# How large is the cache of a 500-token caption in the published model? Two tensors per layer, D numbers per position, 4
# bytes per number. There are 71 positions of the prompt (`<s>`, `<image>`, 64 slots, `</image>`, `<grounding>` and
# three pieces) and all new tokens but the last.

# %%
full = kosmos2.TextConfig()
S = 71 + 499
predicted = 2 * full.layers * full.width * 4 * S
like = torch.zeros(1, device="meta")
cache = kosmos2.KVCache(1, full.heads, S, full.width // full.heads, like)
assert predicted == full.layers * 2 * cache.keys.numel() * 4
print(f"{predicted:,} bytes, {predicted // S:,} per position")

# %% [markdown]
# ## Exercises
#
# 1. Put the words of the prompt in front of the image slots. Does the model still write a caption? Why might it not?
# 2. What is the smallest change to `causal_mask` that lets a prompt attend to itself in both directions?
# 3. The output projection is tied. What would change in `load_weights.py` if it were not?
# 4. Which bias has no effect at all? (Hint: add a constant vector to all keys.)
