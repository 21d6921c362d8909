# %% [markdown]
# # 8. Training
#
# This notebook covers the data, the objective and the attention mask. Then we train a small model for 60 steps and
# look at the log of one of the runs that made the bundled model. (Reading time: 30 minutes.) The data comes from
# `training/data.py` and `training/scenes.py`, the objective and the optimizers from `training/train.py`, the initial
# weights from `training/setup.py`, and the labels of patches from `training/patches.py`.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import json
import math
from dataclasses import replace

import torch

from kosmos2 import Kosmos2, preprocess_image
from load_weights import load_checkpoint
from tokenizer import parse
from training.data import Scenes, collate, encode_record, grit_to_text
from training.patches import patch_labels
from training.scenes import COLORS as SCENE_COLORS
from training.scenes import KINDS, Scene
from training.setup import init_weights
from training.train import Losses, learning_rate, make_optimizers

model, tokenizer = load_checkpoint(ROOT / "tiny")
scene = Scene.random(5)

# %% [markdown]
# ## The data: a record, tagged text, tokens
#
# A GRIT record describes an image by a caption and the boxes of its phrases. Here is the record of a scene, whose
# boxes are exact. `encode_record` tokenizes the caption as a whole and inserts tags and boxes between its pieces, as
# the original data loader does. (The original loader also crops images to a square, and leaves out the boxes of half
# of the captions; here, images are squashed, and no caption loses its boxes at random.) `grit_to_text` writes a
# record as tagged text, for display.

# %%
record = scene.record()
print(record["caption"])
print([[start, end, *(round(v, 2) for v in box)] for start, end, *box, _ in record["noun_chunks"]])
print(grit_to_text(record))
print(len(encode_record(tokenizer, record)), "tokens")

# %% [markdown]
# ## The objective and its mask
#
# The loss is the mean of -log p(next token). Only the tokens of answers contribute, not those of prompts. (In the
# original training on GRIT, and in `Grit` of `training/data.py`, all tokens of the caption contribute.) Each row has
# one image in front and several sequences about it. The sequences do not attend to each other, so they can share one
# encoded image. Here is a part of a row with its targets; the code numbers the sequences in `sequences`. In answers,
# tags and location tokens count like all other tokens. (In `train.py`, the words "a", "an", "nothing" and the numbers
# count ten times as much: a single token decides whether two cats are named together.)

# %%
source = Scenes(tokenizer, model.config, length=256, first=5)
row = source.row(0)
boxed = 0
for number, target in zip(row.sequences, row.targets, strict=True):
    if target >= tokenizer.first_location and not boxed:
        boxed = number  # the first sequence with a box
start = row.sequences.index(boxed)
shown = []
for i in range(start, min(start + 22, len(row.tokens))):
    target = tokenizer.id_to_token[row.targets[i]] if row.targets[i] >= 0 else ""
    shown.append((tokenizer.id_to_token[row.tokens[i]], row.sequences[i], target))
table(shown, ("token", "sequence", "target"))

# %% [markdown]
# How many tokens of the row are targets? None of the image positions has a target:

# %%
counted = sum(y >= 0 for y in row.targets)
assert all(y < 0 for y in row.targets[: row.prefix - 1])
numbers = set(row.sequences) - {0}  # 0 is the image
print(f"{len(row.tokens)} tokens, {len(numbers)} sequences, {counted} targets")

# %% [markdown]
# The attention mask: each token attends to the image, to itself and to the earlier tokens of its sequence. The position
# ids of each sequence continue from the image, as if it were the only one. (There are two exceptions: a few-shot
# sequence contains a second image, and a sequence without an image has a negative number, attends only to itself and
# has positions of its own.)

# %%
sequences = torch.tensor(row.sequences)
same = sequences[:, None] == sequences[None, :]
to_image = (sequences[:, None] > 0) & (sequences[None, :] == 0)
mask = (same | to_image) & torch.ones(len(sequences), len(sequences), dtype=torch.bool).tril()
print(f"{mask.float().mean():.0%} of all pairs of positions")

# %% [markdown]
# As an image, allowed pairs in black:

# %%
fig, axis = plt.subplots(figsize=(4.5, 4.5))
axis.imshow(mask, cmap="Greys")
axis.set(title="attention mask (rows are queries)", xlabel="position", ylabel="position")
show(fig, "The attention mask: a stripe on the left for the image, and a triangle for each sequence.")

# %% [markdown]
# The stripe on the left is the attention of the sequences to the image (a sequence without an image leaves a gap); each
# triangle on the diagonal is the attention within one sequence.
#
# We compute the loss by hand, with the bundled model: logits, log-softmax, and the entries of the targets. `Losses`
# returns the loss of each target and the loss of the patches (see below), which we ignore here.

# %%
batch = collate([row])
with torch.no_grad():
    losses, _ = Losses(model)(**batch)
    x = model.embed(batch["tokens"], batch["pixels"], image_mask=batch["image_mask"])
    logits = model.decoder.unembed(model.decoder(x, batch["positions"], mask[None, None]))[0]
targets = torch.tensor([y for y in row.targets if y >= 0])
positions = [t for t, y in enumerate(row.targets) if y >= 0]
by_hand = -logits[positions].log_softmax(-1)[range(len(targets)), targets]
torch.testing.assert_close(losses, by_hand, rtol=1e-3, atol=1e-4)

# %% [markdown]
# Words and locations separately, and the loss of a uniform guess for comparison:

# %%
place = targets >= tokenizer.first_location
print(f"loss of words {by_hand[~place].mean():.3f}, of locations {by_hand[place].mean():.3f}")
print(f"uniform over {tokenizer.vocab_size} tokens: {math.log(tokenizer.vocab_size):.2f} nats")

# %% [markdown]
# ## Labels for patches
#
# The official model starts from CLIP's ViT, which was trained on hundreds of millions of images. The bundled model
# starts from random weights, and a ViT learns slowly from captions alone, because they say little about any single
# patch. So every patch gets its own labels: the kind, the color and the box of the object that covers it. A linear
# layer on the ViT's features predicts them (`PatchHead`). When `training/train.py` trains from scratch, its first steps
# (`--vision-steps`) train only the ViT, with this loss alone. Later, this loss is added to that of the tokens.
#
# `patch_labels` computes the labels from the boxes of a scene. An object covers a patch if its box (for a sticker,
# its opaque pixels) covers at least 30% of it. (A very small object gets at least the patch that it covers most.)
# Where boxes overlap, the object in front counts. Which labels are there in a scene with several objects?

# %%
crowded = Scene.random(7)
grid = model.config.vision.grid
labels = patch_labels(crowded, grid)  # (grid * grid, 6)
distinct, index, counts = labels.unique(dim=0, return_inverse=True, return_counts=True)
rows = []
for (kind, color, *box), count in zip(distinct.tolist(), counts.tolist(), strict=True):
    kind_name = KINDS[int(kind) - 1] if kind > 0 else "background"
    color_name = list(SCENE_COLORS)[int(color) - 1] if color > 0 else ""
    rows.append((kind_name, color_name, " ".join(f"{v:.2f}" for v in box), count))
table(rows, ("kind", "color", "box", "patches"))

# %% [markdown]
# The scene, and the labels of its patches:

# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 3.4))
size = model.config.vision.image_size
axes[0].imshow(crowded.draw().resize((size, size)), extent=(0, grid, grid, 0))
axes[0].set_title("scene")
axes[1].imshow(index.view(grid, grid), cmap="tab10", vmax=9, extent=(0, grid, grid, 0))
axes[1].set_title("labels of its patches")
show(fig, "Left: a scene. Right: its grid of patches, one color for each distinct label.")

# %% [markdown]
# Each object has become a group of patches with the same label. The box in the label is exact, so the ViT also has to
# learn where within a patch an object ends. Every kind in the scene is among the labels, and the patch at the center of
# the object in front has the labels of that object:

# %%
kinds = {KINDS[int(k) - 1] for k in labels[:, 0].unique() if k > 0}
assert kinds == {thing.kind for thing in crowded.things}
front = crowded.things[-1]
x1, y1, x2, y2 = front.box
column, row_number = int(grid * (x1 + x2) / 2), int(grid * (y1 + y2) / 2)
label = labels.view(grid, grid, 6)[row_number, column]
assert KINDS[int(label[0]) - 1] == front.kind
torch.testing.assert_close(label[2:], torch.tensor(front.box))

# %% [markdown]
# ## Training for 60 steps
#
# We train a model with fewer layers from random weights, without the labels of patches. There are two optimizers:
# Muon for the matrices inside the blocks, AdamW for everything else. (Muon orthogonalizes the update of each matrix:
# it sets all singular values of the momentum to about one; see `training/muon.py`.) What is learned first, the words
# or the locations?

# %%
text = replace(model.config.text, layers=2)
small = replace(model.config, text=text, vision=replace(model.config.vision, layers=2))
student = Kosmos2(small)
init_weights(student, tokenizer.first_location)
optimizers = make_optimizers(student, "muon", 4e-3)
loss_of = Losses(student)
lessons = Scenes(tokenizer, small, length=160, first=10_000)
print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} million parameters")

# %% [markdown]
# A step computes the losses of a batch and their gradient, and updates the weights.


# %%
def train_step(step: int, steps: int) -> tuple[float, float]:
    """Update the weights; returns the mean losses of (words, locations) before the update."""
    batch = collate([lessons.row(8 * step + n) for n in range(8)])
    losses, _ = loss_of(**batch)
    losses.mean().backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 4e-3, warmup=10)
        optimizer.step()
        optimizer.zero_grad()
    place = batch["targets"][batch["targets"] != -100] >= tokenizer.first_location
    return losses[~place].mean().item(), losses[place].mean().item()


print("learning rate at step 0:", learning_rate(0, 60, 4e-3, warmup=10))

# %% [markdown]
# 60 steps of 8 images:

# %%
curve = torch.tensor([train_step(step, 60) for step in range(60)])
for name, column in zip(("words", "locations"), curve.T, strict=True):
    print(f"{name}: {column[0]:.1f} at first, {column[-5:].mean():.1f} at the end")
assert curve[0].min() > math.log(tokenizer.vocab_size)
assert curve[-5:, 0].mean() < 0.45 * curve[0, 0]
assert abs(curve[-5:, 1].mean() - math.log(1024)) < 1

# %% [markdown]
# The loss starts above ln V, because random logits are worse than uniform ones. Words are learned first. The loss of
# the locations is still about that of a uniform choice among the 1,024 cells, ln 1024 = 6.9. What does the model
# write for two images?

# %%
student.eval()
ids, slots = tokenizer.encode_prompt("<grounding>An image of")
for seed in (1, 2):
    told = Scene.random(seed)
    pixels = preprocess_image(told.draw(), small.vision.image_size)[None]
    inputs = {"pixels": pixels, "image_mask": torch.tensor([slots])}
    new = student.generate(torch.tensor([ids]), **inputs, max_new_tokens=40)[0]
    print("scene:", ", ".join(thing.name for thing in told.things))
    print("model:", parse(tokenizer.decode(new))[0])

# %% [markdown]
# These look like captions, but they do not fit the scenes. Do they depend on the image at all? We shift the images of a
# batch by one, and compare the losses.

# %%
batch = collate([lessons.row(1000 + n) for n in range(8)])
swapped = batch | {"pixels": batch["pixels"].roll(1, dims=0)}
increase = {}
for name, learner in (("after 60 steps", student), ("bundled model", model)):
    with torch.no_grad():
        own, other = (Losses(learner)(**b)[0].mean().item() for b in (batch, swapped))
    increase[name] = other - own
    print(f"{name}: loss {own:.2f} with the correct images, {other:.2f} with others")
assert abs(increase["after 60 steps"]) < 0.2 and increase["bundled model"] > 0.5

# %% [markdown]
# After 60 steps, the image makes almost no difference to the loss: the model is nearly as blind as the one in
# notebook 2. For the bundled model, the loss rises with the wrong image.
#
# ## The bundled model
#
# This is the log of run I, one of the runs that made the bundled weights, one JSON object per line. The first steps
# train only the ViT, so their lines have no `words` or `locations`; the [model card](../tiny/README.md) has the details
# of the run. How do the losses and the accuracy develop?

# %%
log = [json.loads(line) for line in (ROOT / "tiny" / "log.jsonl").read_text().splitlines()]
curves = {}
for name in ("patches", "words", "locations"):
    points = [(entry["step"], entry[name]) for entry in log if entry.get(name)]
    if points:
        curves[name] = points
rows = []
for name, points in curves.items():
    (first_step, first_loss), (last_step, last_loss) = points[0], points[-1]
    rows.append((name, first_step, f"{first_loss:.3f}", last_step, f"{last_loss:.3f}"))
    assert last_loss < first_loss
table(rows, ("loss", "first step", "value", "last step", "value"))

# %% [markdown]
# All steps:

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for (name, points), color in zip(curves.items(), COLORS, strict=False):
    axes[0].plot(*zip(*points, strict=True), color=color, label=name)
axes[0].set(title="loss", xlabel="step", ylabel="nats per token; sum of patch losses", yscale="log")
measured = [entry for entry in log if "accuracy" in entry]
for task, color in zip(("ground", "caption", "color", "count"), COLORS, strict=False):
    points = [(entry["step"], entry["accuracy"].get(task, math.nan)) for entry in measured]
    if points:
        axes[1].plot(*zip(*points, strict=True), "o-", color=color, label=task)
axes[1].set(title="accuracy on a few held-out scenes", xlabel="step", ylim=(0, 1.05), xlim=axes[0].get_xlim())
for axis in axes:
    axis.legend(frameon=False)
show(fig, "Left: the losses over the steps. Right: the accuracy of four tasks on held-out scenes.")

# %% [markdown]
# Every loss ends below its first value. This run continued from trained weights, so the losses of words and locations
# start far below that of equal probabilities (7.22, see above). They fall in the first 80 steps after those that train
# only the ViT, rise again a little, stay level while the learning rate is constant, and fall while it decays, over the
# last 60% of the steps. Each step uses new scenes, so these are close to losses on unseen data. The accuracy is
# measured on a few scenes only, so its curves are noisy; these scenes may contain stickers, unlike those of the model
# card's first table.
#
# ## Exercises
#
# 1. A loss of 0.3 nats per location token: how many equally likely cells does that correspond to?
# 2. Include the prompts in the loss as well. Which line of `data.py` is it? What would you expect?
# 3. Give location tokens random initial embeddings instead of smooth ones (`init_weights`). What would a near miss
#    then teach the model about the neighboring cell?
# 4. Train only the resampler of the bundled model: `python -m training.train --checkpoint tiny --out NEW --train
#    resampler --optimizer adamw --lr 3e-4 --steps 100`. How many parameters are updated?
