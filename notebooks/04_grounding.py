# %% [markdown]
# # 4. Grounding: boxes as tokens
#
# The decoder has no special code for boxes. A box is two tokens of the vocabulary, and a grounded caption is a sequence
# of tokens like any other. So grounding is next-token prediction: boxes have probabilities, can be sampled, and can be
# part of a prompt. This notebook explains the format. (Reading time: 25 minutes.)
#
# `grit_to_text` and `encode_record` from `training/data.py` write training captions as text and as ids, and
# `demo_scenes` from `demo.py` has the exact boxes of the objects in the bundled images.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import random

import torch
from demo import demo_scenes

from inference.page import to_markdown
from kosmos2 import open_image, preprocess_image
from load_weights import load_checkpoint
from tokenizer import GRID, box_to_tokens, iou, parse, tokens_to_box
from training.data import encode_record, grit_to_text

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
image = open_image(ROOT / "tiny" / "scene.png")
pixels = preprocess_image(image, model.config.vision.image_size)[None]

# %% [markdown]
# ## The vocabulary
#
# The vocabulary consists of control tokens (`<s>`, `<pad>`, `</s>`, `<unk>`), sentencepiece pieces, eleven tags, and
# one location token for each of the 32 x 32 cells. The published model has 63,997 pieces, and its first location token
# has the id 64,013. Not all tags are for boxes: `</doc>`, `</chunk>` and `</line>` are for longer documents. `<mask>`,
# one more control token, comes from fairseq.

# %%
first = tokenizer.first_location
assert tokenizer.vocab_size == first + GRID * GRID
rows = [
    ("control", 0, 3),
    ("pieces", 4, first - 13),
    ("<mask>", first - 12, first - 12),
    ("tags", first - 11, first - 1),
    ("locations", first, tokenizer.vocab_size - 1),
]
table(rows, ("kind", "first id", "last id"))
print(tokenizer.id_to_token[first - 11 : first + 2])
assert tokenizer.id_to_token[first - 12] == "<mask>"

# %% [markdown]
# ## A box and its two tokens
#
# Cells are numbered row by row from zero: cell 44 is column 12 of row 1. A box is written as the cell of its top-left
# corner and the cell of its bottom-right corner. (In spite of the name `patch_index`, cells are not the patches of
# the ViT: the published model has 16 x 16 patches.) Decoded, the corners are the *centers* of these cells, so they
# are off by at most half a cell in each direction. If both cells are in one row or column, a box from center to
# center would be empty, so it covers the cells entirely.

# %%
snowman = demo_scenes()["scene.png"].find("snowman")[0]
box = tuple(round(v, 3) for v in snowman.box)
top_left, bottom_right = box_to_tokens(box)
(row1, column1), (row2, column2) = divmod(top_left, GRID), divmod(bottom_right, GRID)
print(f"{box} -> cell {top_left} (row {row1}, column {column1})")
print(f"and cell {bottom_right} (row {row2}, column {column2})")

by_hand = tuple((v + 0.5) / GRID for v in (column1, row1, column2, row2))
assert by_hand == tokens_to_box(top_left, bottom_right)
assert all(abs(a - b) <= 0.5 / GRID for a, b in zip(box, by_hand, strict=True))
print("back:", by_hand)
print("a box in one cell:", tokens_to_box(44, 44))

# %% [markdown]
# The figure shows the original box of the snowman (dashed), its two cells, and the decoded box (red).

# %%
fig, axis = plt.subplots(figsize=(5, 5))
axis.imshow(image, extent=(0, 1, 1, 0), alpha=0.6)
for v in range(GRID + 1):
    axis.axhline(v / GRID, color="#b0b8a5", lw=0.4)
    axis.axvline(v / GRID, color="#b0b8a5", lw=0.4)
for row, column in ((row1, column1), (row2, column2)):
    corner = (column / GRID, row / GRID)
    axis.add_patch(plt.Rectangle(corner, 1 / GRID, 1 / GRID, color=COLORS[0], alpha=0.6))
for (x1, y1, x2, y2), color, style in ((by_hand, COLORS[0], "-"), (box, "black", "--")):
    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, lw=1.5, ls=style))
axis.axis("off")
show(
    fig,
    "The image under a grid of 32 by 32 cells. Around the snowman: two red cells, a dashed and a red box.",
)

# %% [markdown]
# ## What the grid costs
#
# A corner is off by at most half a cell, 1/64 of the image, in each direction (except for thin boxes, which grow to
# whole cells). With errors uniform in ±1/64, each of the four sides is off by 1/128 on average. For a box of side s,
# each side changes the area by a fraction 1/(128 s), the four together by 1/(32 s). So the IoU should be about 1 -
# 1/(32 s). Prediction and measurement:


# %%
def random_box(side: float, rng: random.Random) -> tuple[float, float, float, float]:
    x, y = rng.uniform(0, 1 - side), rng.uniform(0, 1 - side)
    return x, y, x + side, y + side


rng, count = random.Random(0), 2000
rows = []
for side in (0.06, 0.1, 0.2, 0.4, 0.8):
    boxes = [random_box(side, rng) for _ in range(count)]
    measured = sum(iou(b, tokens_to_box(*box_to_tokens(b))) for b in boxes) / count
    rows.append((side, round(1 - 1 / (GRID * side), 3), round(measured, 3)))
table(rows, ("side", "predicted", "measured"))
assert all(abs(predicted - measured) < 0.02 for _, predicted, measured in rows[2:])
assert all(measured > predicted + 0.03 for _, predicted, measured in rows[:2])

# %% [markdown]
# For small boxes, the measured IoU exceeds the prediction, which assumes errors much smaller than the side. The grid
# limits the accuracy of small boxes, however well the model is trained.
#
# ## Tags: text as hyperlinks
#
# `[a snowman](box)` is how the paper writes a grounded caption. Here is a link with tags, and its tokens:

# %%
link = "<phrase> a red star</phrase><object><patch_index_0661><patch_index_0927></object>"
text = f"<grounding> An image of{link}."
print(to_markdown(text))
print([tokenizer.id_to_token[i] for i in tokenizer.encode(text, add_bos=False)])

# %% [markdown]
# `parse` returns the caption without tags, and for each link its phrase, the span of the phrase in the caption, and
# its boxes. It leaves out malformed links instead of raising an error. (A box without a phrase is named by its
# location indices, as in transformers.)

# %%
examples = [
    text,
    text.split("<patch_index_0927>")[0],
    "three < four <object></object>",
    "<object><patch_index_0001><patch_index_0000></object>",
]
for example in examples:
    print(parse(example))

# %% [markdown]
# ## Four tasks with the same tags
#
# The prompt determines the task: the same call to `generate` handles all four.

# %%
location = "<object><patch_index_0467><patch_index_0924></object>"
prompts = {
    "caption": "<grounding>An image of",
    "ground": "<grounding><phrase> a fire</phrase>",
    "refer": f"<grounding><phrase> It</phrase>{location} is",
    "vqa": "<grounding> Question: What is right of the snowman? Answer:",
}
for task, prompt in prompts.items():
    ids, mask = tokenizer.encode_prompt(prompt)
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    new = model.generate(ids, pixels, image_mask=mask, max_new_tokens=60)[0]
    print(f"{task:9}{prompt}\n{'':9}→{tokenizer.decode(new)}\n")

# %% [markdown]
# ## Scores
#
# Location tokens have probabilities like all tokens. After `<object>`, the probabilities of all cells are a map of
# where the top-left corner may be. We append the most likely cell; the next probabilities are then a map of where the
# bottom-right corner may be.

# %%
ids, mask = tokenizer.encode_prompt("<grounding><phrase> a fire</phrase><object>")
ids, mask = torch.tensor([ids]), torch.tensor([mask])
state = model.prefill(ids, pixels, image_mask=mask, max_new_tokens=2)
corners = []
for _ in range(2):
    p = state.logits[0].softmax(-1)[first:].view(GRID, GRID)
    corners.append(p)
    state.step([first + int(p.argmax())])
    print(f"cell {p.argmax()}: p = {p.max():.2f}")

# %% [markdown]
# The maps show the square root of p, so that small probabilities are visible. Cells below p = 0.001 are left out.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.5, 4))
for axis, p, name in zip(axes, corners, ("top-left", "bottom-right"), strict=True):
    axis.imshow(image, extent=(0, GRID, GRID, 0), alpha=0.5)
    visible = torch.where(p > 1e-3, p, torch.nan).sqrt()
    axis.imshow(visible, extent=(0, GRID, GRID, 0), cmap="Reds", vmin=0, vmax=1)
    axis.set_title(f"{name} corner: largest p = {p.max():.2f}")
    axis.axis("off")
alt = "The faded image twice, with red cells where the corners of the fire's box may be."
show(fig, alt)

# %% [markdown]
# The score of a box is the geometric mean of the probabilities of its two tokens:

# %%
p1, p2 = corners[0].max(), corners[1].max()
print(f"score of the box: sqrt({p1:.2f} · {p2:.2f}) = {(p1 * p2).sqrt():.2f}")

# %% [markdown]
# ## Where training data comes from
#
# GRIT is the data set of the paper: web images whose captions were linked to boxes automatically. A record has a
# caption and two lists of boxes, each box with the range of characters that it belongs to. `noun_chunks` has phrases;
# `ref_exps` has longer expressions around them, or the phrase itself if there is none. The original training used
# `ref_exps`; `encode_record` uses `noun_chunks` if there are none. Nested expressions are dropped. `grit_to_text`
# writes a record as tagged text, and `encode_record` as token ids.

# %%
caption = "A dog in a field of flowers"
chunks = [[0, 5, 0.3, 0.3, 0.6, 0.9, 0.9], [9, 27, 0.0, 0.2, 1.0, 1.0, 0.8]]
for expressions in (chunks, [[0, 27, 0.3, 0.3, 0.6, 0.9, 0.9]]):
    record = {"caption": caption, "noun_chunks": chunks, "ref_exps": expressions}
    print(grit_to_text(record), len(encode_record(tokenizer, record)), "tokens")

# %% [markdown]
# ## Exercises
#
# 1. Write two boxes for one phrase and parse the result. What separates them?
# 2. Which cell does `box_to_tokens` use for a box that ends exactly on a cell boundary? And `cells` in
#    `training/scenes.py`, the rule of the original data loader?
# 3. For a 16 x 16 grid, what would have to be trained again? Notebook 6 makes such a model.
# 4. Predict `tokenizer.encode("</phrase>.", add_bos=False)` before you run it. Why is the period two tokens?
