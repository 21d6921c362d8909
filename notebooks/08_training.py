# %% [markdown]
# # 8. Training: from nothing to pointing
#
# What is the objective, what is masked, and what does it look like when a model begins to see? This notebook
# trains a small model for a minute, and then reads the log of the run that made the bundled one.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import json
import time
from dataclasses import replace

import torch
from data import Scenes, collate
from scenes import Scene
from train import CONFIG, Losses, init_weights, learning_rate, make_optimizers

from kosmos2 import Kosmos2, preprocess_image
from load_weights import load_checkpoint
from tokenizer import grit_to_text, parse

model, tokenizer = load_checkpoint(ROOT / "tiny")
scene = Scene.random(5)

# %% [markdown]
# ## The data: a record, a text, tokens
#
# GRIT describes a picture by a caption and the boxes of its phrases. Ours are made by the program that drew
# the picture, so they are true.

# %%
record = scene.record()
print(record["caption"])
print([[start, end, *(round(v, 2) for v in box)] for start, end, *box, _ in record["noun_chunks"]])
print(grit_to_text(record))

# %% [markdown]
# ## The objective and its mask
#
# Predict the next token; the loss is the mean of -log p(right token). Only answers are asked for: a model
# should not waste itself on predicting questions. (In the original training on GRIT every token of a text was
# asked for; `Grit` in `tiny/data.py` does so.) Each row holds one picture and many texts that do not see
# each other, so that the picture is encoded once. Here is a row: what must be predicted after each token. In
# answers tags and locations count like words; the image slots, which come before all of this, and prompts do not.

# %%
source = Scenes(tokenizer, model.config, length=224, first=5)
row = source.row(0)
asked = [
    (tokenizer.tokens[t], n, tokenizer.tokens[y] if y >= 0 else "")
    for t, n, y in zip(row.tokens, row.texts, row.targets, strict=True)
]
boxed = next(
    n
    for n in range(1, max(row.texts))
    if any(y >= tokenizer.first_location for y, k in zip(row.targets, row.texts, strict=True) if k == n)
)
start = row.texts.index(boxed)
table(asked[start : start + 22], ("token", "text", "must predict"))
counted = sum(y >= 0 for y in row.targets)
assert all(y < 0 for y in row.targets[: row.prefix - 1])
print(f"{len(row.tokens)} tokens, {max(row.texts)} texts, {counted} targets")

# %% [markdown]
# The mask: text k sees the picture and what came before in itself. Each text's positions go on from the picture's,
# as if it stood there alone.

# %%
texts = torch.tensor(row.texts)
same = texts[:, None] == texts[None, :]
picture = (texts[:, None] > 0) & (texts[None, :] == 0)
mask = (same | picture) & torch.ones(len(texts), len(texts), dtype=torch.bool).tril()
fig, axis = plt.subplots(figsize=(4.5, 4.5))
axis.imshow(mask, cmap="Greys")
axis.set(title="who sees whom (row: the one that looks)", xlabel="position", ylabel="position")
show(
    fig,
    "A square of positions by positions: a dark stripe on the left where all texts see the picture, and a dark triangle on the diagonal for each text.",
)

# %% [markdown]
# By hand, with the bundled model: logits at every position, log-softmax, and the targets' entries.

# %%
batch = collate([row])
with torch.no_grad():
    losses = Losses(model)(**batch)
    x = model.embed(batch["tokens"], batch["pixels"], image_mask=batch["image_mask"])
    logits = model.decoder.unembed(model.decoder(x, batch["positions"], mask[None, None]))[0]
right = torch.tensor([y for y in row.targets if y >= 0])
positions = [t for t, y in enumerate(row.targets) if y >= 0]
by_hand = -logits[positions].log_softmax(-1)[range(len(right)), right]
torch.testing.assert_close(losses, by_hand, rtol=1e-3, atol=1e-4)
place = right >= tokenizer.first_location
print(f"loss of words {by_hand[~place].mean():.3f}, of locations {by_hand[place].mean():.3f} nats a token")
print(
    f"an untrained model guesses among {tokenizer.vocab_size}: ln = {torch.tensor(float(tokenizer.vocab_size)).log():.2f}"
)

# %% [markdown]
# ## A minute of training
#
# From new weights, with two optimizers: AdamW, and for the matrices inside the blocks Muon, which makes a step equally
# large in all directions of a matrix and needs about half as many steps here. First a guess at what is learned first. (The order of difficulty: which *kind* of token
# comes next; which words are common; where things are; and last what shape they have.)

# %%
small = replace(
    CONFIG,
    text=replace(CONFIG.text, vocab_size=tokenizer.vocab_size, layers=2),
    vision=replace(CONFIG.vision, layers=2),
)
student = Kosmos2(small)
init_weights(student, tokenizer.first_location)
optimizers, loss_of = make_optimizers(student, "muon", 4e-3), Losses(student)
lessons = Scenes(tokenizer, small, length=160, first=10_000)
curve, begun, steps = [], time.perf_counter(), 60
for step in range(steps):
    batch = collate([lessons.row(8 * step + n) for n in range(8)])
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 4e-3, warmup=10)
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss_of(**batch)
    losses.mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    targets = batch["targets"][batch["targets"] != -100]
    place = targets >= tokenizer.first_location
    curve.append((losses[~place].mean().item(), losses[place].mean().item()))
words, places = zip(*curve, strict=True)
assert sum(words[-5:]) / 5 < 0.45 * words[0]
print(
    f"words: {words[0]:.1f} at first, {sum(words[-5:]) / 5:.1f} at the end; locations: {places[0]:.1f}, {sum(places[-5:]) / 5:.1f}"
)

# %% [markdown]
# (At first the loss is above ln V: random logits are worse than equal ones.) It does not see yet: its locations
# are hardly better than a guess among 1,024 cells, ln 1024 = 6.9. But it begins to speak. What does it say of a
# picture, and would it say something else of another one?

# %%
student.eval()
ids, slots = tokenizer.encode_prompt("<grounding>An image of")
for seed in (1, 2):
    told = Scene.random(seed)
    pixels = preprocess_image(told.draw(), small.vision.image_size)[None]
    new = student.generate(torch.tensor([ids]), pixels, image_mask=torch.tensor([slots]), max_new_tokens=40)[
        0
    ]
    print(
        f"the picture: {', '.join(s.name for s in told.shapes)}\nthe student: {parse(tokenizer.decode(new))[0]}\n"
    )

# %% [markdown]
# A sentence, well-formed and boxed, and a guess: a blind model, as in notebook 2. Seeing begins where guessing gains
# nothing any more.
#
# ## The whole run
#
# The log of the run that made the bundled model see, 5,500 steps. (Two shorter ones followed, to teach it prompts
# with two pictures.) Words fall first; locations, which must be seen and not guessed, take all of the run.

# %%
log = [json.loads(line) for line in (ROOT / "tiny" / "log.jsonl").read_text().splitlines()]
losses = [r for r in log if "words" in r]
hits = [r for r in log if "accuracy" in r]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for name, color in (("words", COLORS[1]), ("locations", COLORS[0])):
    axes[0].plot([r["step"] for r in losses], [r[name] for r in losses], color=color, label=name)
axes[0].set(title="loss, nats a token", xlabel="step", yscale="log")
for (task, name), color in zip(
    (
        ("ground", "phrase grounding"),
        ("caption", "shapes in captions"),
        ("color", "color questions"),
        ("count", "counting"),
    ),
    COLORS,
    strict=False,
):
    axes[1].plot(
        [r["step"] for r in hits], [r["accuracy"][task] for r in hits], "o-", color=color, label=name
    )
axes[1].set(title="hits on held-out scenes", xlabel="step", ylim=(0, 1))
for axis in axes:
    axis.legend(frameon=False)
show(
    fig,
    "Left: the losses of words and of locations fall over the steps, words first. Right: hits rise from a few tenths to about 0.9 and above; phrase grounding is first, shapes in captions last.",
)

# %% [markdown]
# ## Exercises
#
# 1. A loss of 0.3 nats for a location: how many cells is the model hesitating between, in effect? (exp)
# 2. Let questions carry loss as well. Which line of `data.py` is it? What would you expect?
# 3. Give location tokens random initial embeddings instead of smooth ones (`init_weights`). What would a near
#    miss then teach the model about the neighbouring cell?
# 4. Train only the resampler, going on from the bundled weights:
#    `python tiny/train.py --checkpoint tiny --out NEW --train resampler --steps 100 --lr 3e-4`. How many parameters move?
