# %% [markdown]
# # 8. Training
#
# The objective, the attention mask and the data; then a small model is trained for less than a minute, and we look at
# the log of the run that made the bundled model. (Reading time: 30 minutes.) The data comes from `training/data.py`
# and `training/scenes.py`, the objective from `training/train.py`, the labels of patches from `training/patches.py`.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import json
import math
from dataclasses import replace

import torch
from data import Scenes, collate, encode_record, grit_to_text
from patches import patch_labels
from scenes import KINDS, Scene
from train import CONFIG, Losses, init_weights, learning_rate, make_optimizers

from kosmos2 import Kosmos2, preprocess_image
from load_weights import load_checkpoint
from tokenizer import parse

model, tokenizer = load_checkpoint(ROOT / "tiny")
scene = Scene.random(5)

# %% [markdown]
# ## The data: a record, a text, tokens
#
# A GRIT record describes an image by a caption and the boxes of its phrases. The bundled model is trained on scenes,
# whose records are exact. `encode_record` tokenizes the caption as a whole and inserts tags and boxes between its
# pieces, as the original data loader does.

# %%
record = scene.record()
print(record["caption"])
print([[start, end, *(round(v, 2) for v in box)] for start, end, *box, _ in record["noun_chunks"]])
print(grit_to_text(record))
print(len(encode_record(tokenizer, record)), "tokens")

# %% [markdown]
# ## The objective and its mask
#
# The loss is the mean of -log p(next token). Only answers carry loss, not prompts. (In the original training on GRIT,
# and in `Grit` of `training/data.py`, all tokens of the text do.) Each row has one image and several texts that do not
# attend to each other, so the image is encoded once. Here is a part of a row with its targets. In answers, tags and
# location tokens count like all tokens.

# %%
source = Scenes(tokenizer, model.config, length=256, first=5)
row = source.row(0)
boxed = 0
for number, target in zip(row.texts, row.targets, strict=True):
    if target >= tokenizer.first_location and not boxed:
        boxed = number  # the first text with a box
start = row.texts.index(boxed)
shown = []
for i in range(start, min(start + 22, len(row.tokens))):
    target = tokenizer.id_to_token[row.targets[i]] if row.targets[i] >= 0 else ""
    shown.append((tokenizer.id_to_token[row.tokens[i]], row.texts[i], target))
table(shown, ("token", "text", "target"))

# %%
counted = sum(y >= 0 for y in row.targets)
assert all(y < 0 for y in row.targets[: row.prefix - 1])
print(f"{len(row.tokens)} tokens, {len(set(row.texts)) - 1} texts, {counted} targets")

# %% [markdown]
# The attention mask: each text attends to the image and to its own earlier tokens. The position ids of each text
# continue from the image, as if it were the only text.

# %%
texts = torch.tensor(row.texts)
same = texts[:, None] == texts[None, :]
image = (texts[:, None] > 0) & (texts[None, :] == 0)
mask = (same | image) & torch.ones(len(texts), len(texts), dtype=torch.bool).tril()

# %%
fig, axis = plt.subplots(figsize=(4.5, 4.5))
axis.imshow(mask, cmap="Greys")
axis.set(title="attention mask (rows are queries)", xlabel="position", ylabel="position")
show(fig, "The attention mask: a stripe on the left for the image, and a triangle for each text.")

# %% [markdown]
# The loss by hand, with the bundled model: logits, log-softmax, and the entries of the targets.

# %%
batch = collate([row])
with torch.no_grad():
    losses, _ = Losses(model)(**batch)
    x = model.embed(batch["tokens"], batch["pixels"], image_mask=batch["image_mask"])
    logits = model.decoder.unembed(model.decoder(x, batch["positions"], mask[None, None]))[0]
right = torch.tensor([y for y in row.targets if y >= 0])
positions = [t for t, y in enumerate(row.targets) if y >= 0]
by_hand = -logits[positions].log_softmax(-1)[range(len(right)), right]
torch.testing.assert_close(losses, by_hand, rtol=1e-3, atol=1e-4)

# %%
place = right >= tokenizer.first_location
print(f"loss of words {by_hand[~place].mean():.3f}, of locations {by_hand[place].mean():.3f}")
print(f"uniform over {tokenizer.vocab_size} tokens: {math.log(tokenizer.vocab_size):.2f} nats")

# %% [markdown]
# ## Labels for patches
#
# The official model starts from CLIP's ViT, which has seen hundreds of millions of images. Ours has to learn to see from
# drawings, and texts alone teach it slowly. So in the first steps, a linear layer on the ViT's features predicts for
# each patch what covers it: kind, color and box. Later this loss stays beside that of the texts. The labels of a scene:

# %%
grid = model.config.vision.grid
labels = patch_labels(scene, grid).view(grid, grid, 6)
fig, axes = plt.subplots(1, 2, figsize=(7, 3.4))
size = model.config.vision.image_size
axes[0].imshow(scene.draw().resize((size, size)), extent=(0, grid, grid, 0))
axes[1].imshow(labels[:, :, 0], cmap="tab20", extent=(0, grid, grid, 0))
axes[1].set_title("kind of each patch")
show(fig, "Left: the scene. Right: its patches, colored by the kind of the thing that covers them.")
kinds = {KINDS[int(k) - 1] for k in labels[:, :, 0].unique() if k > 0}
print(kinds)
assert kinds == {thing.kind for thing in scene.things}

# %% [markdown]
# ## Training for 60 steps
#
# From random weights, with two optimizers: AdamW, and Muon for the matrices inside the blocks. What is learned first?

# %%
text = replace(CONFIG.text, vocab_size=tokenizer.vocab_size, layers=2)
small = replace(CONFIG, text=text, vision=replace(CONFIG.vision, layers=2))
student = Kosmos2(small)
init_weights(student, tokenizer.first_location)
optimizers = make_optimizers(student, "muon", 4e-3)
loss_of = Losses(student)
lessons = Scenes(tokenizer, small, length=160, first=10_000)
print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} million parameters")

# %% [markdown]
# A step: the losses of a batch, their gradient, an update.


# %%
def train_step(step: int, steps: int) -> tuple[float, float]:
    """The losses of (words, locations), after which the weights are updated."""
    batch = collate([lessons.row(8 * step + n) for n in range(8)])
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = loss_of(**batch)
    losses.mean().backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 4e-3, warmup=10)
        optimizer.step()
        optimizer.zero_grad()
    targets = batch["targets"][batch["targets"] != -100]
    place = targets >= tokenizer.first_location
    return losses[~place].mean().item(), losses[place].mean().item()


# %%
curve = torch.tensor([train_step(step, 60) for step in range(60)])
for name, column in zip(("words", "locations"), curve.T, strict=True):
    print(f"{name}: {column[0]:.1f} at first, {column[-5:].mean():.1f} at the end")
assert curve[-5:, 0].mean() < 0.45 * curve[0, 0]

# %% [markdown]
# The loss starts above ln V, because random logits are worse than uniform ones. Text is learned first; the loss of the
# locations is still near that of a uniform choice among 1,024 cells, ln 1024 = 6.9. What does the model write for two
# images?

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
# It writes something like captions, without having learned to see: a blind model, as in notebook 2.
#
# ## The bundled model
#
# The log of the run that made it; the [model card](../tiny/README.md) has the details. The first steps have no texts.

# %%
log = [json.loads(line) for line in (ROOT / "tiny" / "log.jsonl").read_text().splitlines()]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for name, color in zip(("locations", "words", "patches"), COLORS, strict=False):
    points = [(entry["step"], entry[name]) for entry in log if name in entry]
    axes[0].plot(*zip(*points, strict=True), color=color, label=name)
axes[0].set(title="loss", xlabel="step", yscale="log")
for task, color in zip(("ground", "caption", "color", "count"), COLORS, strict=False):
    points = [(entry["step"], entry["accuracy"][task]) for entry in log if "accuracy" in entry]
    axes[1].plot(*zip(*points, strict=True), "o-", color=color, label=task)
axes[1].set(title="accuracy on a few held-out scenes", xlabel="step", ylim=(0, 1))
for axis in axes:
    axis.legend(frameon=False)
show(fig, "Left: the losses over the steps. Right: the accuracy of four tasks on held-out scenes.")

# %% [markdown]
# ## Exercises
#
# 1. A loss of 0.3 nats per location token: how many equally likely cells does that correspond to?
# 2. Let prompts carry loss as well. Which line of `data.py` is it? What would you expect?
# 3. Give location tokens random initial embeddings instead of smooth ones (`init_weights`). What would a near
#    miss then teach the model about the neighboring cell?
# 4. Train only the resampler of the bundled model:
#    `python training/train.py --checkpoint tiny --out NEW --train resampler --steps 100 --lr 3e-4`. How many parameters move?
