# %% [markdown]
# # 3. The decoder
#
# A causal transformer that continues a sequence of tokens. Most of it is the textbook's, the √D in front of the
# embeddings included ("Attention Is All You Need", 3.4), which ports forget all the same. Not the textbook's: a
# position table that begins at 2 and has its sines before its cosines, sub-LN, and a picture that is put in
# *before* the scale. We build it by hand, oddities and all, and then change them one by one.

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image

import kosmos2
from kosmos2 import causal_mask, preprocess_image, record, sinusoidal_positions
from load_weights import load_checkpoint

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
theirs = reference()
decoder, config = model.decoder, model.config.text
D, V = config.width, config.vocab_size
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(picture, model.config.vision.image_size)[None]
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of a blue moon, a green triangle and")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
T = len(ids)

# %% [markdown]
# ## Embeddings, scaled
#
# Each id picks a row of the embedding matrix. The same matrix is the output projection at the other end
# ("tied"), where rows are compared with the decoder's output; that wants them about one long. The positions
# that are added have coordinates up to one, so they are √(D/2) long. Multiplying by √D brings embeddings to
# the same size: without it the positions would drown the words.

# %%
embeds = decoder.embed_tokens.weight[tokens]  # (1, T, D)
positions = sinusoidal_positions(torch.arange(T)[None] + 2, D)
words = embeds[0, ~mask[0]]
print(f"embeddings are {words.norm(dim=-1).mean():.2f} long, scaled {math.sqrt(D) * words.norm(dim=-1).mean():.1f}")
print(f"positions are {positions.norm(dim=-1).mean():.2f} long; √(D/2) = {math.sqrt(D / 2):.2f}")

# %% [markdown]
# The picture's embeddings take their slots *before* the scale, so they are scaled, and given positions, like
# words. The resampler learned to write vectors of a word's size; put in after the scale, the picture would be
# √D times too quiet. By hand:

# %%
x = embeds.clone()
x[mask] = model.encode_image(pixels)[0]
torch.testing.assert_close(x, model.embed(tokens, pixels, image_mask=mask))
x = x * math.sqrt(D) + positions

# %% [markdown]
# ## The position table, and why it begins at 2
#
# Sines of growing wavelength in the first half, cosines in the second (the textbook has them in turn). Each
# pair turns like the hand of a clock; the slowest takes 2π · 10,000 positions for a round.
#
# In fairseq, where the model was trained, position 1 belonged to padding (its token's id is 1) and real
# positions followed. So the first token is at 2, and the checkpoint knows nothing else.

# %%
step = math.log(10000) / (D // 2 - 1)
by_hand = torch.tensor([[f(p * math.exp(-i * step)) for f in (math.sin, math.cos) for i in range(D // 2)] for p in range(2, 2 + T)])
torch.testing.assert_close(by_hand, positions[0], rtol=1e-4, atol=1e-5)

fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].imshow(sinusoidal_positions(torch.arange(2, 130)[None], D)[0], aspect="auto", cmap="RdBu")
axes[0].set(title="the table: sines, then cosines", xlabel="D", ylabel="position - 2")
long = sinusoidal_positions(torch.arange(2, 302)[None], D)[0]
axes[1].plot(long @ long[100] / (D / 2))
axes[1].set(title="how alike position 102 is to others", xlabel="position - 2")
show(fig, "Left: stripes, fast ones on the left of each half. Right: a sharp peak at the position itself, falling off alike on both sides.")

# %% [markdown]
# ## Causal attention
#
# A token sees itself and what came before. `causal_mask` is True where a query (row) may look.

# %%
print(causal_mask(4, 4).int())
print("with a cache of 3 earlier positions, 2 new ones:")
print(causal_mask(2, 5).int())

# %% [markdown]
# ## One block, with sub-LN
#
# Pre-norm blocks leave the size of what a layer adds to chance. MAGNETO (arXiv 2210.06423) puts one more
# LayerNorm before the last projection of each branch: after the heads are joined, and inside the MLP *after*
# the activation. A deep decoder then trains without special care for its initial weights.

# %%
block = decoder.layers[0]
attn, mlp = block.attn, block.mlp
h = block.norm1(x)
q, k, v = (F.linear(h, m.weight, m.bias).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for m in (attn.q_proj, attn.k_proj, attn.v_proj))
scores = q @ k.mT / math.sqrt(q.shape[-1])  # (1, H, T, T)
scores = scores.masked_fill(~causal_mask(T, T), -math.inf)
joined = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
y = x + F.linear(attn.inner_attn_ln(joined), attn.out_proj.weight, attn.out_proj.bias)  # sub-LN, the first
h = F.gelu(F.linear(block.norm2(y), mlp.fc1.weight, mlp.fc1.bias))  # the exact GELU here
y = y + F.linear(mlp.ffn_layernorm(h), mlp.fc2.weight, mlp.fc2.bias)  # sub-LN, the second
torch.testing.assert_close(y, block(x, causal_mask(T, T)), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## To the logits
#
# All blocks, a last LayerNorm, and the embedding matrix once more: a token's logit is how well its embedding
# fits the output.

# %%
for layer in decoder.layers:
    x = layer(x, causal_mask(T, T))
logits = decoder.layer_norm(x) @ decoder.embed_tokens.weight.T
torch.testing.assert_close(logits, model(tokens, pixels, image_mask=mask), rtol=1e-4, atol=1e-4)
wanted = theirs(pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=mask.long()).logits
torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
best = logits[0, -1].softmax(-1).topk(3)
print([(tokenizer.tokens[i], round(p, 3)) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)])

# %% [markdown]
# ## Where the words look
#
# How much of each word's attention goes to the picture, block by block?

# %%
with record(model) as seen:
    model(tokens, pixels, image_mask=mask)
slots = mask[0].nonzero()[:, 0]
share = torch.stack([seen[f"decoder.layers.{i}.attn"][0][0][:, slots[-1] + 2 :, slots].sum(-1).mean(0) for i in range(config.layers)])
names = [tokenizer.tokens[i].replace("▁", "") for i in ids[slots[-1] + 2 :]]
fig, axis = plt.subplots(figsize=(10, 2.2))
drawn = axis.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
axis.set(xticks=range(len(names)), xticklabels=names, yticks=range(config.layers), ylabel="block", title="share of attention on the picture")
axis.tick_params(axis="x", rotation=45)
fig.colorbar(drawn)
show(fig, "A grid of words by blocks: attention to the picture differs from word to word and is strongest where the next word must be seen in it.")

# %% [markdown]
# ## What if one of them were left out?
#
# Nothing crashes. Each line below is a mistake that a port of this model could make, and what it costs: the
# relative change of the logits, and where the model now puts the upper left corner of "the red star".

# %%
asked_ids, asked_slots = tokenizer.encode_prompt("<grounding><phrase> the red star</phrase><object>")
asked = dict(tokens=torch.tensor([asked_ids]), pixels=pixels, image_mask=torch.tensor([asked_slots]))
right = model(**asked)
identity = torch.nn.Identity()


def variant(name: str, *changes) -> tuple:
    for change in changes:
        change.start()
    found = model(**asked)
    for change in changes:
        change.stop()
    token, p = int(found[0, -1].argmax()), float(found[0, -1].softmax(-1).max())
    return name, f"{(found - right).norm() / right.norm():.4f}", tokenizer.tokens[token], f"{p:.2f}"


def picture_after_scale(self, pixels, interpolate=False):
    return encode_image(self, pixels) / math.sqrt(D)


def sines_in_turn(positions, width):
    return sinusoidal_positions(positions, width).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


encode_image = kosmos2.Kosmos2.encode_image


def no_scale(self, x, positions, mask=None, caches=None):
    x = x + sinusoidal_positions(positions, x.shape[-1])
    for layer in self.layers:
        x = layer(x, mask)
    return self.layer_norm(x)


rows = [
    variant("as it is"),
    variant("positions from 0", patch.object(kosmos2, "FIRST_POSITION", 0)),
    variant("positions from 1", patch.object(kosmos2, "FIRST_POSITION", 1)),
    variant("no sub-LN in attention", *(patch.object(b.attn, "inner_attn_ln", identity) for b in decoder.layers)),
    variant("no sub-LN in the MLP", *(patch.object(b.mlp, "ffn_layernorm", identity) for b in decoder.layers)),
    variant("tanh GELU", *(patch.object(b.mlp, "activation", lambda x: F.gelu(x, approximate="tanh")) for b in decoder.layers)),
    variant("sines and cosines in turn", patch.object(kosmos2, "sinusoidal_positions", sines_in_turn)),
    variant("picture put in after the scale", patch.object(kosmos2.Kosmos2, "encode_image", picture_after_scale)),
    variant("no √D", patch.object(kosmos2.Decoder, "forward", no_scale)),
]
table(rows, ("variant", "change", "next token", "its p"))

# %% [markdown]
# Positions off by one or two cost little: sinusoids look alike under shifts, as far as the model has learned to
# use differences only. That is what makes it such a nasty mistake: the answer stays nearly the same, with
# another probability. Only a comparison of numbers finds it; `tests/mutations.py` makes 47 such mistakes and
# sees that a test notices each.
#
# ## Counting
#
# How many bytes is the cache of a 500-token caption in the published model? Two tensors a layer, D numbers a
# position each, 4 bytes a number (int8 weights do not change that). Positions: the prompt's 71, which are <s>,
# <image>, 64 slots, </image>, <grounding> and three words; and all new tokens but the last, which nobody reads.

# %%
full = kosmos2.TextConfig()
S = 71 + 499
predicted = 2 * full.layers * full.width * 4 * S
cache = kosmos2.KVCache(1, full.heads, S, full.width // full.heads, like=torch.zeros(1, device="meta"))
assert predicted == full.layers * 2 * cache.keys.numel() * 4
print(f"{predicted:,} bytes, {predicted // S:,} a position")

# %% [markdown]
# ## Exercises
#
# 1. Swap the picture's slots with the words (words first). Does the model still caption? Why might it not?
# 2. What is the smallest change to `causal_mask` that lets a prompt see itself in both directions?
# 3. The output projection is tied. What would `load_weights.py` have to do if it were not?
# 4. Where does a bias make no difference at all? (Hint: add a constant vector to all keys.)
