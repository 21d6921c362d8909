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
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from data import encode_example
from evaluate import HELD_OUT, ask_about, score
from PIL import Image

import kosmos2
from kosmos2 import causal_mask, pad_left, preprocess_image, record, sinusoidal_positions
from load_weights import load_checkpoint
from tokenizer import iou, parse

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
# ("tied"), where rows are compared with the decoder's output; that wants them short, one or two long. The positions
# that are added have coordinates up to one, so they are √(D/2) long. Multiplying by √D makes the words at least as
# loud: without it the positions would drown them.

# %%
embeds = decoder.embed_tokens.weight[tokens]  # (1, T, D)
positions = sinusoidal_positions(torch.arange(T)[None] + 2, D)
words = embeds[0, ~mask[0]]
print(
    f"embeddings are {words.norm(dim=-1).mean():.2f} long, scaled {math.sqrt(D) * words.norm(dim=-1).mean():.1f}"
)
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
# pair turns like the hand of a clock; the slowest takes 2π · 10,000 positions for a round. (Exactly: frequency i of
# n is 10,000 to the power of -i / (n - 1). The textbook divides by n and never quite reaches it.)
#
# In fairseq, where the model was trained, position 1 belonged to padding (its token's id is 1) and real
# positions followed. So the first token is at 2, and the checkpoint knows nothing else.

# %%
step = math.log(10000) / (D // 2 - 1)
by_hand = torch.tensor(
    [
        [f(p * math.exp(-i * step)) for f in (math.sin, math.cos) for i in range(D // 2)]
        for p in range(2, 2 + T)
    ]
)
torch.testing.assert_close(by_hand, positions[0], rtol=1e-4, atol=1e-5)

fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].imshow(sinusoidal_positions(torch.arange(2, 130)[None], D)[0], aspect="auto", cmap="RdBu")
axes[0].set(title="the table: sines, then cosines", xlabel="D", ylabel="position - 2")
long = sinusoidal_positions(torch.arange(2, 302)[None], D)[0]
axes[1].plot(long @ long[100] / (D / 2))
axes[1].set(title="how alike position 102 is to others", xlabel="position - 2")
show(
    fig,
    "Left: stripes, fast ones on the left of each half. Right: a sharp peak at the position itself, falling off alike on both sides.",
)

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
q, k, v = (
    F.linear(h, m.weight, m.bias).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    for m in (attn.q_proj, attn.k_proj, attn.v_proj)
)
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
print(
    [
        (tokenizer.tokens[i], round(p, 3))
        for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
)

# %% [markdown]
# ## Where the words look
#
# How much of each word's attention goes to the picture, block by block? (The first words have little else to look
# at. Of the others, those look most after which something must be seen: "a" before a colour, a colour before a
# shape.)

# %%
with record(model) as seen:
    model(tokens, pixels, image_mask=mask)
slots = mask[0].nonzero()[:, 0]
share = torch.stack(
    [
        seen[f"decoder.layers.{i}.attn"][0][0][:, slots[-1] + 2 :, slots].sum(-1).mean(0)
        for i in range(config.layers)
    ]
)
names = [tokenizer.tokens[i].replace("▁", "") for i in ids[slots[-1] + 2 :]]
fig, axis = plt.subplots(figsize=(10, 2.2))
drawn = axis.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
axis.set(
    xticks=range(len(names)),
    xticklabels=names,
    yticks=range(config.layers),
    ylabel="block",
    title="share of attention on the picture",
)
axis.tick_params(axis="x", rotation=45)
fig.colorbar(drawn)
show(
    fig,
    "A grid of words by blocks. In two blocks the first words look at nothing but the picture; later some look more than others.",
)

# %% [markdown]
# ## Every departure, why it is there, and what breaks without it
#
# With the decoder we have met all the places where Kosmos-2 is not the transformer of the textbook:
#
# | | here | the textbook | why |
# |---|---|---|---|
# | ViT | a LayerNorm before the first block | none | CLIP's: patches and positions enter at one scale |
# | | QuickGELU | GELU | CLIP's, it was cheaper; the decoder's weights never met it |
# | | all positions handed on, [CLS] too | only [CLS], or only patches | boxes need places; [CLS] comes at no cost |
# | | features of length one | as they are | in CLIP's space only directions mean something |
# | resampler | latents among their own keys | keys from the picture only | a head can look away (Flamingo's) |
# | | no norm, residual or MLP | all three | the decoder's first block brings them |
# | input | the picture put in before the scale | nothing to put in | an image embedding is a word like any other |
# | positions | begin at 2 | begin at 0 | fairseq: position 1 is padding's |
# | | sines first, cosines second | in turn | fairseq's way to build the table; for learning, any order would do |
# | | wavelengths up to 2π · 10,000 exactly | a little less: i / (D/2), not i / (D/2 - 1) | the same |
# | blocks | sub-LN | pre-norm, or post-norm | deep decoders train without special care |
#
# (The scale √D and the tied output are the textbook's, and often forgotten.) Nothing crashes when one of them is
# left out of the trained model; each is a mistake that a port could make. What does it cost? On 40 scenes: how much
# the logits of the prompt's words change, the share of shapes that captions name (of about 120, so differences of
# a few hundredths are chance), and the mean overlap (IoU) of boxes asked for.

# %%
identity, seeing = torch.nn.Identity(), kosmos2.VisionTransformer.forward
asked = ask_about(40, HELD_OUT + 40_000, only=("plain caption", "ground"))
prompts = [encode_example(tokenizer, example) for _, example in asked]
batch = dict(zip(("tokens", "image_mask", "pad_mask"), pad_left(prompts), strict=True))
batch["pixels"] = torch.stack(
    [preprocess_image(scene.draw(), model.config.vision.image_size) for scene, _ in asked]
)


def hits() -> tuple[float, float]:
    """(share of shapes named in captions, mean IoU of the first boxes)"""
    named, overlaps = [], []
    for (scene, example), new in zip(asked, model.generate(**batch, max_new_tokens=30), strict=True):
        if example.task == "ground":
            boxes = [box for entity in parse(tokenizer.decode(new))[1] for box in entity.boxes]
            overlaps.append(iou(boxes[0], example.targets[0].box) if boxes else 0.0)
        else:
            named += score(example, tokenizer.decode(new), scene)
    return sum(named) / len(named), sum(overlaps) / len(overlaps)


# %% [markdown]
# The mistakes, as a few lines each:


# %%
def without_cls(self, pixels):
    return seeing(self, pixels)[:, 1:]


def resample_without_latents(self, features):
    return self.x_attn(self.latent_query.expand(len(features), -1, -1), self.dense(features))


def in_turn(positions, width):
    return sinusoidal_positions(positions, width).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def textbook_wavelengths(positions, width):
    frequencies = torch.exp(torch.arange(width // 2) * -math.log(10000) / (width // 2))
    angles = positions[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def scaled(by_picture: float, by_words: float):
    """The right decoder divides out the scale of the picture or of everything."""
    encode, embed = kosmos2.Kosmos2.encode_image, kosmos2.Kosmos2.embed
    return [
        patch.object(kosmos2.Kosmos2, "encode_image", lambda self, *a: encode(self, *a) * by_picture),
        patch.object(kosmos2.Kosmos2, "embed", lambda self, *a: embed(self, *a) * by_words),
    ]


def in_blocks(blocks, part: str, name: str, value) -> list:
    return [patch.object(getattr(block, part), name, value) for block in blocks]


# %%
vit = model.vision
variants = {
    "as it is": [],
    "ViT: no LayerNorm before the first block": [patch.object(vit, "pre_layernorm", identity)],
    "ViT: GELU instead of QuickGELU": in_blocks(vit.layers, "mlp", "activation", F.gelu),
    "ViT: without [CLS]": [patch.object(kosmos2.VisionTransformer, "forward", without_cls)],
    "features not of unit length": [patch.object(F, "normalize", lambda x, dim: x)],
    "latents not among their keys": [patch.object(kosmos2.Resampler, "forward", resample_without_latents)],
    "the picture after the scale": scaled(1 / math.sqrt(D), 1),
    "no scale √D": scaled(1, 1 / math.sqrt(D)),
    "positions from 0": [patch.object(kosmos2, "FIRST_POSITION", 0)],
    "positions from 1": [patch.object(kosmos2, "FIRST_POSITION", 1)],
    "sines and cosines in turn": [patch.object(kosmos2, "sinusoidal_positions", in_turn)],
    "the textbook's wavelengths": [patch.object(kosmos2, "sinusoidal_positions", textbook_wavelengths)],
    "no sub-LN in attention": in_blocks(decoder.layers, "attn", "inner_attn_ln", identity),
    "no sub-LN in the MLP": in_blocks(decoder.layers, "mlp", "ffn_layernorm", identity),
    "no sub-LN at all": in_blocks(decoder.layers, "attn", "inner_attn_ln", identity)
    + in_blocks(decoder.layers, "mlp", "ffn_layernorm", identity),
    "QuickGELU in the decoder": in_blocks(decoder.layers, "mlp", "activation", kosmos2.quick_gelu),
    "tanh GELU in the decoder": in_blocks(
        decoder.layers, "mlp", "activation", lambda x: F.gelu(x, approximate="tanh")
    ),
}
rows, right, words = [], model(**batch), ~(batch["pad_mask"] | batch["image_mask"])
for name, changes in variants.items():
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        moved = float((model(**batch) - right)[words].norm() / right[words].norm())
        rows.append((name, f"{moved:.4f}", *(f"{h:.2f}" for h in hits())))
table(rows, ("variant", "change of logits", "shapes named", "IoU"))

# %% [markdown]
# Without √D there is nothing but positions, and no word comes out; without any sub-LN words come, but boxes are
# anywhere. Four more cost something that a demo might
# show: the first LayerNorm, the order of the position table, and each half of sub-LN. All the others move the logits
# by up to a quarter, and neither captions nor boxes. LayerNorms forgive a wrong scale, a trained model answers with
# room to spare, and the bundled one has learned to ignore [CLS] altogether.
#
# So that is what makes these mistakes nasty: the answer stays nearly the same, with other probabilities. Only a
# comparison of numbers finds them; `tests/mutations.py` makes 49 such mistakes and sees that a test notices each.
# And mind what was measured: a part taken out of a model that was trained with it, four blocks deep. What sub-LN
# does for the training of 24 blocks, or unit length for a resampler that starts from nothing (notebook 2), is
# another question.
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
