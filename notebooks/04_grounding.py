# %% [markdown]
# # 4. Grounding: boxes as tokens
#
# The decoder has no special code for boxes. A box is two tokens of the vocabulary, and a grounded caption is
# text. So grounding is next-token prediction, with probabilities, sampling, and prompts that contain boxes. This
# notebook is about that text. (Reading time: 25 minutes.)

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import random

import torch
from data import encode_record, grit_to_text
from PIL import Image

from kosmos2 import preprocess_image
from load_weights import load_checkpoint
from tokenizer import GRID, box_to_tokens, iou, parse, to_markdown, tokens_to_box

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(image, model.config.vision.image_size)[None]

# %% [markdown]
# ## The vocabulary
#
# Control tokens, sentencepiece pieces, eleven tags, and one location token for each of the 32 x 32 cells. The
# published model has 63,997 pieces, and its first location token has the id 64,013. Not all tags are for boxes:
# `</doc>`, `</chunk>` and `</line>` are for longer documents, and `<mask>` comes from fairseq.

# %%
first = tokenizer.first_location
assert tokenizer.vocab_size == first + GRID * GRID
table(
    [("control", 0, 3), ("pieces", 4, first - 13), ("<mask>", first - 12, first - 12), ("tags", first - 11, first - 1),
     ("locations", first, tokenizer.vocab_size - 1)],
    ("kind", "first id", "last id"),
)  # fmt: skip
print(tokenizer.id_to_token[first - 11 : first + 2])

# %% [markdown]
# ## A box and its two tokens
#
# Cells are numbered row by row: cell 44 is column 12 of row 1. A box is written as the cell of its top-left corner
# and the cell of its bottom-right corner. (In spite of the name `patch_index`, cells are not the patches of the ViT:
# the published model has 16 x 16 patches.) Decoded, the corners are the *centers* of these cells, so they are off by
# at most half a cell. If both cells are in one row or column, a box from center to center would be empty, so it
# covers the cells entirely.

# %%
box = (0.39, 0.05, 0.99, 0.82)
ul, lr = box_to_tokens(box)
print(f"{box} -> cells {ul}, {lr} = (row, column) {divmod(ul, GRID)}, {divmod(lr, GRID)}")
by_hand = tuple((v + 0.5) / GRID for v in (ul % GRID, ul // GRID, lr % GRID, lr // GRID))
assert by_hand == tokens_to_box(ul, lr)
print("back:", by_hand, " a box in one cell:", tokens_to_box(44, 44))

fig, axis = plt.subplots(figsize=(5, 5))
axis.imshow(image, extent=(0, 1, 1, 0))
for v in range(GRID + 1):
    axis.axhline(v / GRID, color="#b0b8a5", lw=0.4)
    axis.axvline(v / GRID, color="#b0b8a5", lw=0.4)
for cell, name, side, dy in ((ul, "top left", "left", -1), (lr, "bottom right", "right", 2)):
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
    "The image with a grid of 32 by 32 cells. Two cells are red; a dashed black box, and the almost equal red box decoded from these cells.",
)

# %% [markdown]
# ## What the grid costs
#
# A corner is off by at most half a cell, 1/64 of the image (except for thin boxes, which grow to whole cells). With
# errors uniform in ±1/64, each of the four sides is off by 1/128 on average, which costs a box of side s a share of
# 1/(128 s) of its overlap. So the IoU should be about 1 - 1/(32 s). Prediction and measurement:

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
# The prediction does not hold for the smallest boxes, which often are in one row or column of cells. Small things
# have loose boxes, whatever the weights.
#
# ## Tags: text as hyperlinks
#
# `[a snowman](box)` is how the paper writes a grounded caption. With tags, and as tokens:

# %%
text = "<grounding> An image of<phrase> a red star</phrase><object><patch_index_0661><patch_index_0927></object>."
print(to_markdown(text))
print([tokenizer.id_to_token[i] for i in tokenizer.encode(text, add_bos=False)])

# %% [markdown]
# `parse` returns the caption without tags, and for each link its phrase, the span of the phrase in the caption, and
# its boxes. It never raises: malformed links are left out. (A box without a phrase is named by its tokens, as in
# transformers.)

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
# The task depends on where the prompt ends. All of these are one function, `generate`.

# %%
prompts = {
    "caption": "<grounding>An image of",
    "find": "<grounding><phrase> a fire</phrase>",
    "describe": "<grounding><phrase> It</phrase><object><patch_index_0529><patch_index_0921></object> is",
    "answer": "<grounding> Question: What is right of the snowman? Answer:",
}
for task, prompt in prompts.items():
    ids, mask = tokenizer.encode_prompt(prompt)
    new = model.generate(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=60)[0]
    print(f"{task:9}{prompt}\n{'':9}→{tokenizer.decode(new)}\n")

# %% [markdown]
# ## Scores
#
# Location tokens have probabilities like all tokens. The probabilities of all cells are a map of where the corner
# may be (the map shows their square root, so that small ones are visible). The score of a box is the geometric mean
# of the probabilities of its two tokens.

# %%
ids, mask = tokenizer.encode_prompt("<grounding><phrase> a fire</phrase><object>")
state = model.prefill(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=3)
corners = []
with torch.inference_mode():
    for _ in range(2):
        corners.append(state.logits[0].softmax(-1)[first:].view(GRID, GRID))
        state.step([0], state.append([0], [first + int(corners[-1].argmax())]))
fig, axes = plt.subplots(1, 2, figsize=(8.5, 4))
for axis, p, name in zip(axes, corners, ("top left", "bottom right"), strict=True):
    axis.imshow(image, extent=(0, GRID, GRID, 0), alpha=0.5)
    axis.imshow(
        torch.where(p > 1e-3, p, torch.nan).sqrt(), extent=(0, GRID, GRID, 0), cmap="Reds", vmin=0, vmax=1
    )
    axis.set_title(f"{name} corner: p = {p.max():.2f}")
    axis.axis("off")
show(
    fig,
    "Two copies of the image with red cells where the top-left and the bottom-right corner of the box of the fire may be.",
)
score = (corners[0].max() * corners[1].max()).sqrt()
print(f"score of the box: sqrt({corners[0].max():.2f} · {corners[1].max():.2f}) = {score:.2f}")

# %% [markdown]
# `tiny/README.md` lists the scores of present and absent phrases.
#
# ## Where training data comes from
#
# GRIT records have a caption, and boxes for ranges of its characters: for phrases (`noun_chunks`) and for longer
# expressions around them (`ref_exps`), which the original training used. Nested expressions are dropped.
# (`grit_to_text` and `encode_record` are in `training/data.py`.)

# %%
caption = "A dog in a field of flowers"
chunks = [[0, 5, 0.3, 0.3, 0.6, 0.9, 0.9], [9, 27, 0.0, 0.2, 1.0, 1.0, 0.8]]
for expressions in (chunks, [[0, 27, 0.3, 0.3, 0.6, 0.9, 0.9]]):
    record = {"caption": caption, "noun_chunks": chunks, "ref_exps": expressions}
    print(grit_to_text(record), len(encode_record(tokenizer, record)), "tokens")

# %% [markdown]
# ## Exercises
#
# 1. Write two boxes for one phrase and parse the text. What separates them?
# 2. Which cell does `box_to_tokens` use for a box that ends exactly on a cell boundary? And with `training=True`, the
#    rule of the original data loader?
# 3. For a 16 x 16 grid, what would have to be trained again? Notebook 6 makes such a model.
# 4. Predict `tokenizer.encode("</phrase>.")` before you run it. Why two tokens?
