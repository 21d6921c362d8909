# %% [markdown]
# # 10. Departures from the textbook
#
# Kosmos-2 differs from a textbook transformer in the places listed below. A port can get most of them wrong and still
# run without an error, but its results differ. (A strict loader finds those that have weights: ours rejects a
# checkpoint with the weights of a LayerNorm that the model does not have.) Which of them matter? We change one at a
# time in the trained model and measure. (Reading time: 20 minutes.)
#
# | | here | the textbook | why |
# |---|---|---|---|
# | ViT | no bias in the patch projection | a bias | as in CLIP |
# | | a LayerNorm before the first block | none | as in CLIP |
# | | QuickGELU | GELU | as in CLIP, where it was cheaper |
# | | all positions are passed on | only [CLS], or only patches | boxes need positions |
# | | features of unit length | any length | like CLIP's final output |
# | resampler | latents among their own keys | keys from the image only | as in Flamingo; a head can ignore the image |
# | | no norm, residual or MLP | all three | the decoder's first block follows and has them |
# | input | image embeddings inserted before scaling by √D | - | they are treated like tokens |
# | positions | start at 2 | start at 0 | fairseq reserves position 1 for padding |
# | | all sines, then all cosines | interleaved | as in fairseq; any order can be learned |
# | | wavelengths up to 2π · 10,000 exactly | a little less | i / (D/2 - 1) instead of i / (D/2) |
# | blocks | pre-norm and sub-LN | pre-norm or post-norm alone | stable training of deep decoders |
#
# Not every row is measured below, and the tables also include mistakes that a port could make, such as a first
# position of 1. The helpers are in [`departures.py`](departures.py): a departure is a list of `unittest.mock.patch`
# objects, and `Trial` runs the model on unseen scenes with them. `Scene` and the scores come from `training/`.

# %%
from figures import ROOT, plt, show, table  # isort: skip

import torch
from departures import (
    Trial,
    block_departures,
    certain,
    cost,
    input_departures,
    logit_change,
    rows,
    vision_departures,
)

from load_weights import load_checkpoint

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")

# %% [markdown]
# ## What is measured
#
# For 40 scenes: the share of the objects that a plain caption names, and the IoU of the first box of a phrase. The cost
# of a departure is the drop in these numbers. The scenes are the same for all departures, so the difference is taken
# scene by scene, and we compute its standard error. Costs above three standard errors count as significant and have a
# star in the tables.

# %%
trial = Trial(model, tokenizer, count=40)
unchanged = trial.measure()
print(f"objects named {sum(unchanged.named) / 40:.2f}, IoU {sum(unchanged.overlaps) / 40:.2f}")
again = trial.measure()
assert logit_change(unchanged, again) < 1e-5
assert cost(unchanged.named, again.named) == (0, 0)

# %% [markdown]
# ## The ViT and the resampler
#
# Which of these five do you expect to hurt?

# %%
header = ("departure", "change of logits", "cost in objects named", "cost in IoU")
vision = {name: trial.measure(change) for name, change in vision_departures(model).items()}
table(rows(unchanged, vision), header)
without_norm = vision["ViT: no LayerNorm before the first block"]
assert certain(unchanged.overlaps, without_norm.overlaps)
assert certain(unchanged.named, without_norm.named)
assert logit_change(unchanged, vision["ViT: GELU instead of QuickGELU"]) < 0.1

# %% [markdown]
# The first LayerNorm cannot be left out. GELU and QuickGELU are so similar that the logits hardly change. Two
# departures change the logits by more than 5% and still have no star: on these 40 scenes, their cost is not
# significant.
#
# ## Embeddings and positions
#
# `Kosmos2.embed` inserts the image embeddings before the factor √D, so it applies to them, too. Here, the factor is
# removed from the image, from the tokens, and from both. The other departures change the position encodings.

# %%
inputs = {name: trial.measure(change) for name, change in input_departures(model).items()}
table(rows(unchanged, inputs), header)
assert certain(unchanged.named, inputs["nothing scaled"].named)

# %% [markdown]
# Without the factor on the tokens, the positions outweigh the tokens, and the model no longer works.
#
# ## Inside the blocks

# %%
blocks = {name: trial.measure(change) for name, change in block_departures(model).items()}
table(rows(unchanged, blocks), header)
assert certain(unchanged.overlaps, blocks["no sub-LN at all"].overlaps)
assert logit_change(unchanged, blocks["tanh GELU in the decoder"]) < 0.05

# %% [markdown]
# Without sub-LN, captions and boxes get worse: the output projections were trained on normalized inputs.
#
# ## Departures without a measurable cost
#
# How many departures have no star in either column?

# %%
measured = vision | inputs | blocks
points = []
for name, changed in measured.items():
    lost, error = cost(unchanged.overlaps, changed.overlaps)
    counts = certain(unchanged.overlaps, changed.overlaps) or certain(unchanged.named, changed.named)
    points.append((logit_change(unchanged, changed), name, lost, error, counts))
points.sort()
quiet = sum(not counts for *_, counts in points)
print(f"{quiet} of {len(points)} departures have no measurable cost on 40 scenes")
assert quiet >= 2

# %% [markdown]
# The figure shows all departures, ordered by how much they change the logits (left), with the cost in IoU and its
# standard error (right). The red ones have a star. (A red one may have a cost of zero here, if it loses names instead.)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
for change, name, lost, error, counts in points:
    color = "#c62828" if counts else "#1565c0"
    axes[0].plot(change, name, "o", color=color)
    axes[1].errorbar(lost, name, xerr=error, marker="o", color=color)
axes[0].set(xscale="log", xlabel="relative change of the logits")
axes[1].set(xlabel="cost in IoU")
for axis in axes:
    axis.grid(axis="y", alpha=0.3)
show(fig, "Each departure by name: left its change of the logits, right its cost in IoU with an error bar.")

# %% [markdown]
# Where a point on the right is blue, its cost may be due to chance; 40 scenes are too few to tell. Comparing logits
# with the reference finds nearly all of them. `tests/mutations.py` applies many of them and checks that a test fails.
#
# These numbers show what happens when a part is removed from a model that was trained with it. They do not show what
# happens if a model is trained without it.
#
# ## Exercises
#
# 1. Why does starting the positions at 1 cost so much less than removing the factor √D?
# 2. Add a departure: an attention without the factor 1/√hd. What do you expect, and what do you measure?
# 3. How many scenes does it take to show a cost of 0.01 in IoU?
