# %% [markdown]
# # 8. Training
#
# The objective, the attention mask and the data; then a small model is trained for less than a minute, and we look at
# the log of the run that made the bundled model. (Reading time: 25 minutes.) The data comes from `training/data.py`
# and `training/scenes.py`, the objective from `training/train.py`.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import json
import time
from dataclasses import replace

import torch
from data import Scenes, collate, encode_record, grit_to_text
from scenes import Scene
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
shown = [
    (tokenizer.id_to_token[t], n, tokenizer.id_to_token[y] if y >= 0 else "")
    for t, n, y in zip(row.tokens, row.texts, row.targets, strict=True)
]
boxed = next(
    n
    for n in range(1, max(row.texts))
    if any(y >= tokenizer.first_location for y, k in zip(row.targets, row.texts, strict=True) if k == n)
)
start = row.texts.index(boxed)
table(shown[start : start + 22], ("token", "text", "target"))
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
fig, axis = plt.subplots(figsize=(4.5, 4.5))
axis.imshow(mask, cmap="Greys")
axis.set(title="attention mask (rows are queries)", xlabel="position", ylabel="position")
show(
    fig,
    "The attention mask: a dark stripe on the left, where all texts attend to the image, and a dark triangle on the diagonal for each text.",
)

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
place = right >= tokenizer.first_location
print(f"loss of words {by_hand[~place].mean():.3f}, of locations {by_hand[place].mean():.3f} nats per token")
print(
    f"uniform over {tokenizer.vocab_size} tokens: ln = {torch.tensor(float(tokenizer.vocab_size)).log():.2f}"
)

# %% [markdown]
# ## Training for 60 steps
#
# From random weights, with two optimizers: AdamW, and Muon for the matrices inside the blocks. What is learned first?

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
        losses, _ = loss_of(**batch)
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
# The loss starts above ln V, because random logits are worse than uniform ones. Text is learned first; the loss of the
# locations is still near that of a uniform choice among 1,024 cells, ln 1024 = 6.9. What does the model write for two
# images?

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
        f"scene: {', '.join(thing.name for thing in told.things)}\nmodel: {parse(tokenizer.decode(new))[0]}\n"
    )

# %% [markdown]
# It writes something like captions, without having learned to see: a blind model, as in notebook 2.
#
# ## The bundled model
#
# The log of its last run. It began with a ViT that had been pretrained on labels for every patch
# (`training/pretrain.py`), so it could see from the first steps; the model card has the whole history.

# %%
log = [json.loads(line) for line in (ROOT / "tiny" / "log.jsonl").read_text().splitlines()]
losses = [r for r in log if "words" in r]
hits = [r for r in log if "accuracy" in r]
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for name, color in (("words", COLORS[1]), ("locations", COLORS[0])):
    axes[0].plot([r["step"] for r in losses], [r[name] for r in losses], color=color, label=name)
axes[0].set(title="loss, nats per token", xlabel="step", yscale="log")
for (task, name), color in zip(
    (
        ("ground", "phrase grounding"),
        ("caption", "captions"),
        ("color", "color questions"),
        ("count", "counting"),
    ),
    COLORS,
    strict=False,
):
    axes[1].plot(
        [r["step"] for r in hits], [r["accuracy"][task] for r in hits], "o-", color=color, label=name
    )
axes[1].set(title="accuracy on held-out scenes", xlabel="step", ylim=(0, 1))
for axis in axes:
    axis.legend(frameon=False)
show(
    fig,
    "Left: the losses of words and of locations over the steps. Right: the accuracy of four tasks on held-out scenes.",
)

# %% [markdown]
# ## Exercises
#
# 1. A loss of 0.3 nats per location token: how many equally likely cells does that correspond to?
# 2. Let prompts carry loss as well. Which line of `data.py` is it? What would you expect?
# 3. Give location tokens random initial embeddings instead of smooth ones (`init_weights`). What would a near
#    miss then teach the model about the neighboring cell?
# 4. Train only the resampler of the bundled model:
#    `python training/train.py --checkpoint tiny --out NEW --train resampler --steps 100 --lr 3e-4`. How many parameters move?
