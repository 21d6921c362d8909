# %% [markdown]
# # 10. Departures from the textbook
#
# Kosmos-2 differs from a textbook transformer in the places listed below. A port that misses one of them still runs,
# but computes something else. Which of them matter? We change one at a time in the trained model and measure.
# (Reading time: 20 minutes.)
#
# | | here | the textbook | why |
# |---|---|---|---|
# | ViT | no bias in the patch projection | a bias | as in CLIP |
# | | a LayerNorm before the first block | none | as in CLIP |
# | | QuickGELU | GELU | as in CLIP, where it was cheaper |
# | | all positions are passed on | only [CLS], or only patches | boxes need positions |
# | | features of unit length | any length | as CLIP's final output |
# | resampler | latents among their own keys | keys from the image only | as in Flamingo; a head can ignore the image |
# | | no norm, residual or MLP | all three | the decoder's first block follows and has them |
# | input | image embeddings inserted before the scale | - | they are treated like tokens |
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
# For 40 scenes: the share of the things that a plain caption names, and the IoU of the first box of a phrase. The
# cost of a departure is the drop in these numbers. The scenes are the same for all departures, so the difference is
# taken scene by scene, and its standard error shows what may be chance: only a cost above three standard errors
# counts, marked with a star in the tables.

# %%
trial = Trial(model, tokenizer, count=40)
right = trial.measure()
print(f"things named {sum(right.named) / 40:.2f}, IoU {sum(right.overlaps) / 40:.2f}")
again = trial.measure()
assert logit_change(right, again) < 1e-5
assert cost(right.named, again.named) == (0, 0)

# %% [markdown]
# ## The ViT and the resampler
#
# Which of these five do you expect to hurt?

# %%
header = ("departure", "change of logits", "cost in things named", "cost in IoU")
vision = {name: trial.measure(change) for name, change in vision_departures(model).items()}
table(rows(right, vision), header)
without_norm = vision["ViT: no LayerNorm before the first block"]
assert certain(right.overlaps, without_norm.overlaps)
assert certain(right.named, without_norm.named)
assert logit_change(right, vision["ViT: GELU instead of QuickGELU"]) < 0.1

# %% [markdown]
# The first LayerNorm cannot be left out. GELU and QuickGELU are so similar that the logits hardly change. If the
# logits change a lot but there is no star, the model computes something different, but 40 scenes are too few to show
# a cost.
#
# ## Embeddings and positions
#
# `Kosmos2.embed` inserts the image embeddings before the factor √D, so it applies to them, too. Here, the factor is
# taken away from the image, from the tokens, and from both. The others change the position encodings.

# %%
inputs = {name: trial.measure(change) for name, change in input_departures(model).items()}
table(rows(right, inputs), header)
assert certain(right.named, inputs["nothing scaled"].named)

# %% [markdown]
# Without the factor, the positions outweigh the tokens, and the model no longer works.
#
# ## Inside the blocks

# %%
blocks = {name: trial.measure(change) for name, change in block_departures(model).items()}
table(rows(right, blocks), header)
assert certain(right.overlaps, blocks["no sub-LN at all"].overlaps)
assert logit_change(right, blocks["tanh GELU in the decoder"]) < 0.05

# %% [markdown]
# Without sub-LN, captions and boxes get worse: the output projections were trained on normalized inputs.
#
# ## Some changes go unnoticed
#
# Every departure as a point: the change of the logits, and the cost in IoU with its standard error. Red points have a
# star in one of the two columns, so a red point may have a cost of zero here if it loses names instead.

# %%
measured = vision | inputs | blocks
fig, axis = plt.subplots(figsize=(8, 3.5))
quiet = 0
for changed in measured.values():
    moved = logit_change(right, changed)
    lost, error = cost(right.overlaps, changed.overlaps)
    counts = certain(right.overlaps, changed.overlaps) or certain(right.named, changed.named)
    quiet += not counts
    color = "#c62828" if counts else "#1565c0"
    axis.errorbar(moved, lost, error, marker="o", color=color)
axis.set(xscale="log", xlabel="relative change of the logits", ylabel="cost in IoU")
show(fig, "Points with error bars: each departure, its cost in IoU by the change of the logits.")

# %%
print(f"{quiet} of {len(measured)} departures have no measurable cost on 40 scenes")
assert quiet >= 2

# %% [markdown]
# The cost of a blue point may be chance; 40 scenes cannot tell. Comparing logits with the reference finds every one
# of them. `tests/mutations.py` applies many of them and checks that a test fails.
#
# These numbers show what happens when a part is removed from a model that was trained with it. Training without it is
# another question.
#
# ## Exercises
#
# 1. Why does starting the positions at 1 cost so much less than removing the factor √D?
# 2. Add a departure: an attention without the factor 1/√hd. What do you expect, and what do you measure?
# 3. How many scenes does it take to show a cost of 0.01 in IoU?
