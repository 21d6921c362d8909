# %% [markdown]
# # 3. The decoder
#
# A causal transformer that continues a sequence of tokens. Most of it is the textbook transformer, including the
# factor √D for the embeddings ("Attention Is All You Need", section 3.4). Not in the textbook: position ids that
# start at 2, a table with all sines before the cosines, sub-LN, and image embeddings that are inserted *before*
# the scale. We write the decoder by hand and then change one of these things at a time. (Reading time: 40 minutes.)

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import math
from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F
from data import encode_example
from evaluate import HELD_OUT, choose_examples, score
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
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(image, model.config.vision.image_size)[None]
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of a snowman next to a")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
T = len(ids)

# %% [markdown]
# ## Embeddings, scaled
#
# Each id selects a row of the embedding matrix, which is also the output projection ("tied"). Position encodings
# have a length of √(D/2). How long are the embeddings of tokens and images, before and after the factor √D?

# %%
embeds = decoder.embed_tokens.weight[tokens]  # (1, T, D)
positions = sinusoidal_positions(torch.arange(T)[None] + 2, D)
lengths = {
    "tokens": embeds[0, ~mask[0]].norm(dim=-1).mean().item(),
    "image embeddings": model.encode_image(pixels)[0].norm(dim=-1).mean().item(),
    "positions": positions.norm(dim=-1).mean().item(),
}
rows = [(name, f"{length:.1f}", f"{math.sqrt(D) * length:.1f}") for name, length in lengths.items()]
table(rows, ("mean length", "as stored", "times √D"))
assert math.isclose(lengths["positions"], math.sqrt(D / 2), rel_tol=1e-3)
assert lengths["tokens"] < lengths["positions"] < math.sqrt(D) * lengths["tokens"]
assert lengths["image embeddings"] > 5 * lengths["tokens"]

# %% [markdown]
# Stored token embeddings are shorter than the position encodings; with the factor √D they are longer. Image
# embeddings are several times as long as token embeddings. They are inserted *before* the scale, so they are
# scaled and given positions like tokens. If they were inserted after it, they would be √D times shorter than in
# training, but the first LayerNorm of each block divides by the length, so most of this difference disappears
# wherever the image embedding is large compared with the position that is added to it. By hand:

# %%
x = embeds.clone()
x[mask] = model.encode_image(pixels)[0]
torch.testing.assert_close(x, model.embed(tokens, pixels, image_mask=mask))
x = x * math.sqrt(D) + positions

# %% [markdown]
# ## The position table, and why it starts at 2
#
# Sines of growing wavelength in the first half, cosines in the second; the textbook interleaves them. The longest
# wavelength is 2π · 10,000 positions. (Frequency i of n is 10,000 to the power of -i / (n - 1); the textbook divides
# by n.)
#
# fairseq, in which the model was trained, reserves position 1 for padding, so the first token has position 2.

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
axes[1].set(title="similarity of position 102 to others", xlabel="position - 2")
show(
    fig,
    "Left: the position table as colored stripes. Right: the similarity to position 102, with a peak at the position itself.",
)

# %% [markdown]
# ## Causal attention
#
# A token attends to itself and to earlier tokens. `causal_mask` is True where attention is allowed.

# %%
print(causal_mask(4, 4).int())
print("with a cache of 3 earlier positions, 2 new ones:")
print(causal_mask(2, 5).int())

# %% [markdown]
# ## One block, with sub-LN
#
# In pre-norm blocks, the scale of what each layer adds is not controlled. MAGNETO (arXiv 2210.06423) adds a
# LayerNorm before the last projection of each branch: after the heads are concatenated, and in the MLP *after* the
# activation.

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
y = x + F.linear(attn.inner_attn_ln(joined), attn.out_proj.weight, attn.out_proj.bias)  # first sub-LN
h = F.gelu(F.linear(block.norm2(y), mlp.fc1.weight, mlp.fc1.bias))  # the exact GELU
y = y + F.linear(mlp.ffn_layernorm(h), mlp.fc2.weight, mlp.fc2.bias)  # second sub-LN
torch.testing.assert_close(y, block(x, causal_mask(T, T)), rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## To the logits
#
# All blocks, a last LayerNorm, and the embedding matrix again: the logit of a token is the dot product of its
# embedding and the output.

# %%
for layer in decoder.layers:
    x = layer(x, causal_mask(T, T))
logits = decoder.layer_norm(x) @ decoder.embed_tokens.weight.T
torch.testing.assert_close(logits, model(tokens, pixels, image_mask=mask), rtol=1e-4, atol=1e-4)
expected = theirs(pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=mask.long()).logits
torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
best = logits[0, -1].softmax(-1).topk(3)
print(
    [
        (tokenizer.id_to_token[i], round(p, 3))
        for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
)

# %% [markdown]
# ## Attention on the image
#
# How much of the attention of each token goes to the image, block by block?

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
names = [tokenizer.id_to_token[i].replace("▁", "") for i in ids[slots[-1] + 2 :]]
fig, axis = plt.subplots(figsize=(10, 2.2))
drawn = axis.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
axis.set(
    xticks=range(len(names)),
    xticklabels=names,
    yticks=range(config.layers),
    ylabel="block",
    title="share of attention on the image",
)
axis.tick_params(axis="x", rotation=45)
fig.colorbar(drawn)
show(
    fig,
    "A map of blocks by tokens: the share of attention on the image, between 0 and 1.",
)

# %% [markdown]
# ## All differences from the textbook, and what each is worth
#
# | | here | the textbook | why |
# |---|---|---|---|
# | ViT | a LayerNorm before the first block | none | as in CLIP |
# | | QuickGELU | GELU | as in CLIP, where it was cheaper |
# | | all positions are passed on | only [CLS], or only patches | boxes need positions |
# | | features of unit length | any length | CLIP compares directions only |
# | resampler | latents among their own keys | keys from the image only | as in Flamingo; a head can ignore the image |
# | | no norm, residual or MLP | all three | the first block of the decoder has them |
# | input | image embeddings inserted before the scale | - | they are treated like tokens |
# | positions | start at 2 | start at 0 | fairseq reserves position 1 for padding |
# | | all sines, then all cosines | interleaved | as in fairseq; any order can be learned |
# | | wavelengths up to 2π · 10,000 exactly | a little less: i / (D/2), not i / (D/2 - 1) | the same |
# | blocks | sub-LN | pre-norm or post-norm | stable training of deep decoders |
#
# Nothing crashes if one of these is missing; each is a mistake that a port could make. What does it cost? On 40
# scenes: the relative change of the logits, the share of things that captions name, and the mean IoU of the boxes
# of phrases. There are about 120 things, so differences of less than 0.05 can be chance.

# %%
identity, encode = torch.nn.Identity(), kosmos2.VisionTransformer.forward
asked = choose_examples(40, HELD_OUT + 40_000, only=("plain caption", "ground"))
prompts = [encode_example(tokenizer, example) for _, example in asked]
batch = dict(zip(("tokens", "image_mask", "pad_mask"), pad_left(prompts), strict=True))
batch["pixels"] = torch.stack(
    [preprocess_image(scene.draw(), model.config.vision.image_size) for scene, _ in asked]
)


def hits() -> tuple[float, float]:
    """(share of things named in captions, mean IoU of the first boxes)"""
    named, overlaps = [], []
    for (scene, example), new in zip(asked, model.generate(**batch, max_new_tokens=30), strict=True):
        if example.task == "ground":
            boxes = [box for entity in parse(tokenizer.decode(new))[1] for box in entity.boxes]
            overlaps.append(iou(boxes[0], example.targets[0].box) if boxes else 0.0)
        else:
            named += score(example, tokenizer.decode(new), scene)
    return sum(named) / len(named), sum(overlaps) / len(overlaps)


# %% [markdown]
# The mistakes:


# %%
def without_cls(self, pixels):
    return encode(self, pixels)[:, 1:]


def resample_without_latents(self, features):
    return self.x_attn(self.latent_query.expand(len(features), -1, -1), self.dense(features))


def interleaved(positions, width):
    return sinusoidal_positions(positions, width).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def textbook_wavelengths(positions, width):
    frequencies = torch.exp(torch.arange(width // 2) * -math.log(10000) / (width // 2))
    angles = positions[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def scaled(image_factor: float, factor: float):
    """Scale the image embeddings, or all embeddings."""
    encode_image, embed = kosmos2.Kosmos2.encode_image, kosmos2.Kosmos2.embed
    return [
        patch.object(kosmos2.Kosmos2, "encode_image", lambda self, *a: encode_image(self, *a) * image_factor),
        patch.object(kosmos2.Kosmos2, "embed", lambda self, *a: embed(self, *a) * factor),
    ]


def in_blocks(blocks, part: str, name: str, value) -> list:
    return [patch.object(getattr(block, part), name, value) for block in blocks]


# %%
vit = model.vision
variants = {
    "none": [],
    "ViT: no LayerNorm before the first block": [patch.object(vit, "pre_layernorm", identity)],
    "ViT: GELU instead of QuickGELU": in_blocks(vit.layers, "mlp", "activation", F.gelu),
    "ViT: without [CLS]": [patch.object(kosmos2.VisionTransformer, "forward", without_cls)],
    "features not of unit length": [patch.object(F, "normalize", lambda x, dim: x)],
    "latents not among their keys": [patch.object(kosmos2.Resampler, "forward", resample_without_latents)],
    "image embeddings inserted after the scale": scaled(1 / math.sqrt(D), 1),
    "no scale √D": scaled(1, 1 / math.sqrt(D)),
    "positions from 0": [patch.object(kosmos2, "FIRST_POSITION", 0)],
    "positions from 1": [patch.object(kosmos2, "FIRST_POSITION", 1)],
    "sines and cosines interleaved": [patch.object(kosmos2, "sinusoidal_positions", interleaved)],
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
table(rows, ("change", "change of logits", "things named", "IoU"))

# %% [markdown]
# Two changes are certain to break the model: without √D the positions dominate the tokens, and without any sub-LN
# the boxes are wrong. Most others change the logits much more than the captions or the boxes: only a comparison of
# numbers finds such mistakes. That is what `tests/mutations.py` is for. (And this only measures a part that is
# removed from a model trained with it; training without it is another question.)

# %%
values = {row[0]: tuple(map(float, row[1:])) for row in rows}
assert values["none"][0] == 0 and values["tanh GELU in the decoder"][0] < 0.05
assert values["no scale √D"][1] < 0.5 * values["none"][1]
assert values["no sub-LN at all"][2] < 0.8 * values["none"][2]

# %% [markdown]
# ## Counting
#
# How large is the cache of a 500-token caption in the published model? Two tensors per layer, D numbers per
# position, 4 bytes per number. There are 71 positions of the prompt (<s>, <image>, 64 slots, </image>, <grounding>
# and three pieces) and all new tokens but the last.

# %%
full = kosmos2.TextConfig()
S = 71 + 499
predicted = 2 * full.layers * full.width * 4 * S
cache = kosmos2.KVCache(1, full.heads, S, full.width // full.heads, like=torch.zeros(1, device="meta"))
assert predicted == full.layers * 2 * cache.keys.numel() * 4
print(f"{predicted:,} bytes, {predicted // S:,} per position")

# %% [markdown]
# ## Exercises
#
# 1. Put the text in front of the image slots. Does the model still write a caption? Why might it not?
# 2. What is the smallest change to `causal_mask` that lets a prompt attend to itself in both directions?
# 3. The output projection is tied. What would change in `load_weights.py` if it were not?
# 4. Which bias has no effect at all? (Hint: add a constant vector to all keys.)
