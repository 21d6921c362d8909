# %% [markdown]
# # 4. Grounding: boxes as words
#
# Nothing in the decoder knows about boxes. A box is two words of the vocabulary, and a grounded sentence is
# just text. So pointing at things is next-token prediction, with all that comes with it: probabilities,
# sampling, prompts that contain boxes. This notebook is about the text.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import random

import torch
from PIL import Image

from kosmos2 import preprocess_image
from load_weights import load_checkpoint
from tokenizer import GRID, box_to_tokens, grit_to_text, iou, parse, to_markdown, tokens_to_box

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(picture, model.config.vision.image_size)[None]

# %% [markdown]
# ## The vocabulary
#
# Control tokens, the words (sentencepiece pieces), eleven tags, and one token for each of the 32 x 32 cells.
# In the published model there are 63,997 pieces, and the first location token has the id 64,013. Not all tags are
# for boxes: `</doc>`, `</chunk>` and `</line>` mark ends in longer documents, and `<mask>` is fairseq's; no task here
# uses them.

# %%
first = tokenizer.first_location
assert tokenizer.vocab_size == first + GRID * GRID
table(
    [("control", 0, 3), ("pieces", 4, first - 13), ("<mask>", first - 12, first - 12), ("tags", first - 11, first - 1),
     ("locations", first, tokenizer.vocab_size - 1)],
    ("kind", "first id", "last id"),
)  # fmt: skip
print(tokenizer.tokens[first - 11 : first + 2])

# %% [markdown]
# ## A box and its two tokens
#
# Cells are numbered row by row: cell 44 is column 12 of row 1. A box is written as the cell of its upper left
# corner and the cell of its lower right corner. (These cells have nothing to do with the ViT's patches, in spite of
# their name: the published model has 16 x 16 of those.) Back again, the corners are the *centres* of these cells: a corner
# may have been anywhere in its cell, and the centre is never off by more than half of it.
# Only if both cells lie in one row or column, where a box from centre to centre would be empty, it is all of
# the cells.

# %%
box = (0.39, 0.05, 0.99, 0.82)
ul, lr = box_to_tokens(box)
print(f"{box} -> cells {ul}, {lr} = (row, column) {divmod(ul, GRID)}, {divmod(lr, GRID)}")
by_hand = tuple((v + 0.5) / GRID for v in (ul % GRID, ul // GRID, lr % GRID, lr // GRID))
assert by_hand == tokens_to_box(ul, lr)
print("back:", by_hand, " a box in one cell:", tokens_to_box(44, 44))

fig, axis = plt.subplots(figsize=(5, 5))
axis.imshow(picture, extent=(0, 1, 1, 0))
for v in range(GRID + 1):
    axis.axhline(v / GRID, color="#b0b8a5", lw=0.4)
    axis.axvline(v / GRID, color="#b0b8a5", lw=0.4)
for cell, name, side, dy in ((ul, "upper left", "left", -1), (lr, "lower right", "right", 2)):
    row, column = divmod(cell, GRID)
    axis.add_patch(plt.Rectangle((column / GRID, row / GRID), 1 / GRID, 1 / GRID, color=COLORS[0], alpha=0.6))
    axis.annotate(
        f"{name}: {cell}",
        (column / GRID, (row + dy + 0.8) / GRID),
        color=COLORS[0],
        ha=side,
        va="bottom",
        backgroundcolor="white",
    )
for (x1, y1, x2, y2), color, style in ((by_hand, COLORS[0], "-"), (box, "black", "--")):
    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, lw=1.5, ls=style))
axis.axis("off")
show(
    fig,
    "The picture under a grid of 32 by 32 cells. Two cells are red; a dashed black box and the nearly equal red box that comes back from them.",
)

# %% [markdown]
# ## What the grid costs
#
# A corner is off by half a cell at most, 1/64 of the picture (thin boxes apart). How much overlap is lost depends on the size of
# the box. With errors uniform in ±1/64, each of the four sides is off by 1/128 on average, and costs a box of
# side s the share 1/(128 s) of its overlap: IoU is near 1 - 1/(32 s), with a grid of G cells 1 - 1/(G s). Prediction
# and measurement:

# %%
rng, sides = random.Random(0), (0.06, 0.1, 0.2, 0.4, 0.8)
measured = []
for side in sides:
    boxes = [
        (x := rng.uniform(0, 1 - side), y := rng.uniform(0, 1 - side), x + side, y + side)
        for _ in range(2000)
    ]
    measured.append(sum(iou(b, tokens_to_box(*box_to_tokens(b))) for b in boxes) / 2000)
table(
    [(s, f"{1 - 1 / (GRID * s):.3f}", f"{m:.3f}") for s, m in zip(sides, measured, strict=True)],
    ("side", "predicted", "measured"),
)
assert all(abs(1 - 1 / (GRID * s) - m) < 0.06 for s, m in zip(sides[1:], measured[1:], strict=True))

# %% [markdown]
# (The smallest boxes often lie in one row or column of cells, where the rule of whole cells takes over; there the
# prediction does not hold.) So with the real model, small things have loose boxes, and nothing in the weights can
# change it.
#
# ## Tags: text as hyperlinks
#
# `[a snowman](box)`: the paper's picture of a grounded caption. In tags, and as ids:

# %%
text = "<grounding> An image of<phrase> a red star</phrase><object><patch_index_0661><patch_index_0927></object>."
print(to_markdown(text))
print([tokenizer.tokens[i] for i in tokenizer.encode(text, add_bos=False)])

# %% [markdown]
# `parse` takes it apart: the caption without tags, and for each link its phrase, where the phrase stands in
# the caption, and its boxes. It never fails, whatever a model writes: half a link makes no entity. (A box
# without a phrase takes its own tokens as the phrase, as in transformers.)

# %%
for broken in (
    text,
    text.split("<patch_index_0927>")[0],
    "three < four <object></object>",
    "<object><patch_index_0001><patch_index_0000></object>",
):
    print(parse(broken))

# %% [markdown]
# ## The same tags, four tasks
#
# What we leave for the model to say decides the task. All of these are one function, `generate`.

# %%
prompts = {
    "caption": "<grounding>An image of",
    "find": "<grounding><phrase> the star</phrase>",
    "describe": "<grounding><phrase> It</phrase><object><patch_index_0661><patch_index_0927></object> is",
    "answer": "<grounding> Question: What color is the moon? Answer:",
}
for task, prompt in prompts.items():
    ids, mask = tokenizer.encode_prompt(prompt)
    new = model.generate(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=60)[0]
    print(f"{task:9}{prompt}\n{'':9}→{tokenizer.decode(new)}\n")

# %% [markdown]
# ## How sure is it?
#
# Location tokens have probabilities like all tokens. Over all cells, those of the next token are a map of
# where the model thinks the corner is. The score of a box is the geometric mean of the two it chose, the square
# root of their product, so that it is on the scale of a single token: two corners at 0.9 make 0.9.

# %%
ids, mask = tokenizer.encode_prompt("<grounding><phrase> the star</phrase><object>")
state = model.start(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=2)
corners = []
with torch.inference_mode():
    for _ in range(2):
        corners.append(state.logits[0].softmax(-1)[first:].view(GRID, GRID))
        state.advance([0], state.grow([0], [first + int(corners[-1].argmax())]))
fig, axes = plt.subplots(1, 2, figsize=(8.5, 4))
for axis, p, name in zip(axes, corners, ("upper left", "lower right"), strict=True):
    axis.imshow(picture, extent=(0, GRID, GRID, 0), alpha=0.5)
    axis.imshow(
        torch.where(p > 1e-3, p, torch.nan).sqrt(), extent=(0, GRID, GRID, 0), cmap="Reds", vmin=0, vmax=1
    )
    axis.set_title(f"{name} corner: p = {p.max():.2f}")
    axis.axis("off")
show(
    fig,
    "Two copies of the picture with a red spot each, a few cells wide: at the upper left and at the lower right corner of the star's box. Faint cells elsewhere are other guesses, at the corners of other shapes.",
)
score = (corners[0].max() * corners[1].max()).sqrt()
print(f"score of the box: sqrt({corners[0].max():.2f} · {corners[1].max():.2f}) = {score:.2f}")

# %% [markdown]
# `tiny/README.md` shows that the score means something: of boxes with score s, about s² have both corners in
# exactly the right cells.
#
# ## Where training data comes from
#
# GRIT records have a caption, and boxes for ranges of its characters: for phrases (`noun_chunks`) and for the
# longer expressions around them (`ref_exps`), which are taken instead where there are any. Of two that overlap,
# one that contains the other wins, otherwise the first.

# %%
caption = "A dog in a field of flowers"
chunks = [[0, 5, 0.3, 0.3, 0.6, 0.9, 0.9], [9, 27, 0.0, 0.2, 1.0, 1.0, 0.8]]
for expressions in (chunks, [[0, 27, 0.3, 0.3, 0.6, 0.9, 0.9]]):
    print(grit_to_text({"caption": caption, "noun_chunks": chunks, "ref_exps": expressions}))

# %% [markdown]
# ## Exercises
#
# 1. Write two boxes for one phrase and parse the text. What separates them?
# 2. Where does `box_to_tokens` put a box that ends exactly on a line between two cells? The original has two ways,
#    one for prompts and one in its data loader (`training=True`); where does the other put it?
# 3. A 16 x 16 grid: which lines of which files know the 32, and what would have to be trained again? (Functions have
#    a `grid` argument for a single call, as `tokens_to_box(0, 17, grid=16)`; scripts and training data do not give
#    it.) Notebook 6 makes such a model.
# 4. Predict `tokenizer.encode("</phrase>.")` before you run it. Why two tokens?
