# %% [markdown]
# # 0. One image, from pixels to text
#
# Kosmos-2 reads an image and writes a caption whose phrases are linked to boxes in the image. This notebook follows
# one image through the whole model and looks at the main tensors on the way. The following notebooks explain the
# parts one by one. (Reading time: 20 minutes.)
#
# ![The parts of Kosmos-2: vision transformer, resampler, the row of tokens with its image slots, the decoder and the choice of the next token](overview.svg)
#
# (The sizes in the diagram are those of the published model.) The notebooks use the real architecture with the
# bundled weights: a small model trained on drawings. It differs from the published model only in its sizes, its
# vocabulary and its setting for n-gram blocking (notebook 5), all of which the code reads from the checkpoint.
# `figures.py`, next to the notebooks, has the helpers for figures and tables, and it puts the project's modules on
# the import path.

# %%
from figures import ROOT, plt, reference, show, show_answers, show_image, table  # isort: skip
import torch

from inference.page import to_markdown
from kosmos2 import finish, open_image, preprocess_image, token_positions
from load_weights import load_checkpoint
from sample import Answer, draw_answers

model, tokenizer = load_checkpoint(ROOT / "tiny")
image = open_image(ROOT / "tiny" / "scene.png")
show_image(image, "The image of this notebook: a snowman next to a fire in the snow.", width=224)

# %% [markdown]
# ## Predicting the shapes
#
# The sizes of all tensors follow from the configuration. The ViT cuts the image into a square grid of patches; with
# [CLS], a learned vector in front of them, there are N = grid² + 1 positions. The resampler passes Q vectors to the
# decoder, whatever the number of patches.

# %%
vision, text, Q = model.config.vision, model.config.text, model.config.latent_query_num
size = vision.image_size
grid = size // vision.patch_size
N = grid**2 + 1
print(f"{size} x {size} pixels, {grid} x {grid} patches, {N} positions, {Q} image embeddings")
rows = [
    ("pixels", "(1, 3, size, size)", (1, 3, size, size)),
    ("features", "(1, N, E)", (1, N, vision.width)),
    ("image_embeds", "(1, Q, D)", (1, Q, text.width)),
]
table(rows, ("tensor", "dimensions", "predicted shape"))

# %% [markdown]
# ## From the image to image embeddings
#
# `preprocess_image` squashes the image to a square and normalizes its colors with the mean and standard deviation of
# CLIP's training images. The ViT and the resampler do the rest.

# %%
pixels = preprocess_image(image, size)[None]
with torch.inference_mode():
    features = model.vision(pixels)
    image_embeds = model.resampler(features)
assert pixels.shape == (1, 3, size, size)
assert features.shape == (1, N, vision.width)
assert image_embeds.shape == (1, Q, text.width)
print(f"pixels: mean {pixels.mean():.2f}, standard deviation {pixels.std():.2f}")

# %% [markdown]
# The figure shows the three tensors. The color scale of the features and of the image embeddings is clipped at three
# standard deviations.

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1, 1.3, 1.3))
scaled = (pixels[0] - pixels.min()) / (pixels.max() - pixels.min())
axes[0].imshow(scaled.permute(1, 2, 0))
axes[0].set_title("pixels")
panels = (axes[1], features[0], "features"), (axes[2], image_embeds[0], "image embeddings")
for axis, values, title in panels:
    limit = 3 * values.std()
    drawn = axis.imshow(values, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    axis.set_title(title)
    fig.colorbar(drawn)
axes[1].set(xlabel="E", ylabel="N")
axes[2].set(xlabel="D", ylabel="Q")
show(fig, "Three panels: the squashed image, the features and the image embeddings as heat maps.")

# %% [markdown]
# In the middle panel, each row is a position: [CLS] first, then the patches, row by row. In the right panel, each row
# is one of the Q image embeddings.
#
# Each feature vector has unit length, because the last step of the ViT divides it by its length. This is one of the
# differences from a textbook transformer; it matters when training starts (notebook 2).

# %%
torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, N))

# %% [markdown]
# ## The prompt
#
# The prompt has Q slots between `<image>` and `</image>`. The image embeddings replace the token embeddings of these
# slots, so the ids in them are only placeholders. `<s>` begins every sequence, and `</s>` ends it. A `▁` stands for a
# space: `▁An` begins a new word.
#
# `<grounding>` at the beginning of the prompt makes the model write boxes: in training, only examples that began with
# it had boxes.

# %%
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of")
rows = []
for t, (i, is_slot) in enumerate(zip(ids, image_mask, strict=True)):
    if not is_slot or t < 4:  # all but the first two slots are left out
        rows.append((t, i, tokenizer.id_to_token[i], "slot" if is_slot else ""))
table(rows, ("t", "id", "token", ""))
print(f"\n{len(ids)} positions = <s>, <image>, {Q} slots, </image>, and the words")
assert len(ids) == 3 + Q + len(tokenizer.encode("<grounding>An image of", add_bos=False))

# %% [markdown]
# ## One step of the decoder
#
# The decoder processes all positions at once and returns scores for the next token at each of them (the *logits*;
# softmax turns them into probabilities). To continue the prompt, we need only the logits of the last position. The ViT
# and the resampler use no mask; in the decoder, each position attends to itself and to earlier ones only.
#
# Position ids start at 2 (fairseq, the toolkit it was trained with, reserves 1 for padding, and 0 is unused): `<s>` has
# 2, `<image>` has 3, and the Q slots have 4 to Q + 3. `</image>` has Q + 4, and the first token after it has Q + 5.
# (For Q = 64 that is 69.)

# %%
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
assert tokenizer.id_to_token[ids[Q + 3]] == "<grounding>"
no_padding = torch.zeros_like(mask)
assert token_positions(no_padding)[0, Q + 3] == Q + 5
with torch.inference_mode():
    x = model.embed(tokens, image_embeds=image_embeds, image_mask=mask)
    logits = model(tokens, image_embeds=image_embeds, image_mask=mask)
print("x:", tuple(x.shape), " logits:", tuple(logits.shape))
torch.testing.assert_close(x[0, 2 : 2 + Q], image_embeds[0])  # the slots

# %% [markdown]
# These are the most likely tokens after the prompt:

# %%
best = logits[0, -1].softmax(dim=0).topk(4)
rows = []
for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    rows.append((f"{p:.4f}", repr(tokenizer.id_to_token[i])))
table(rows, ("p", "next token"))
assert tokenizer.id_to_token[best.indices[0]] == "<phrase>" and best.values[0] > 0.5

# %% [markdown]
# `<phrase>` opens a phrase that will be linked to a box. To the decoder, tags and location tokens are ordinary tokens
# of its vocabulary.
#
# ## Token by token
#
# `prefill` runs the prompt through the decoder. `finish` then appends one token at a time until `</s>` or the limit:
# the most likely one, unless the options ask for sampling (notebook 5). `generate` does both in one call. Here are the
# first 14 steps:

# %%
state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=100)
row = finish(state)[0]
new = row.ids
rows = []
for t, (i, p) in enumerate(zip(new, row.probabilities, strict=True)):
    rows.append((t, tokenizer.id_to_token[i], f"{p:.3f}"))
table(rows[:14], ("step", "token", "p"))

# %% [markdown]
# After `<object>` come two location tokens: the cells of the top-left and the bottom-right corner in a 32 x 32 grid.
# Here is the whole answer as tagged text, and as Markdown with links:

# %%
raw = tokenizer.decode(new)
print(raw, "\n")
print(to_markdown("An image of" + raw))

# %% [markdown]
# `parse_output` turns the answer into a caption and its entities: phrases with boxes and scores. The score of a box
# is the geometric mean of the probabilities of its two tokens (notebook 4).

# %%
caption, entities = tokenizer.parse_output(ids, new, row.probabilities)
for entity in entities:
    box = [round(v, 3) for v in entity.boxes[0]]
    print(f"{entity.phrase:18} {box}  score {entity.scores[0]:.2f}")

start = [tokenizer.id_to_token[i] for i in new].index("<object>")
p1, p2 = row.probabilities[start + 1 : start + 3]
assert abs(entities[0].scores[0] - (p1 * p2) ** 0.5) < 1e-3

# %% [markdown]
# `draw_answers` draws the boxes:

# %%
answer = Answer(caption, raw, entities)
labeled = draw_answers(image, [answer])
alt = "The image with the boxes of the caption, each labeled with its phrase."
show_image(labeled, alt, width=400)

# %% [markdown]
# `show_answers` shows the caption as hyperlinks, as the pages of `python -m inference.page` do. Hover over a phrase to
# highlight its box. The percentages are the scores.

# %%
show_answers(image, answer)

# %% [markdown]
# ## Comparison with the reference
#
# Hugging Face transformers loads the same folder. The image embeddings and the logits must agree up to rounding, and
# the generated ids must be equal.

# %%
theirs = reference()
inputs = dict(pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=mask.long())
with torch.inference_mode():
    out = theirs(**inputs)
torch.testing.assert_close(image_embeds, out.image_embeds, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-4)
print(f"largest difference from the logits of transformers: {(logits - out.logits).abs().max():.1e}")

options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=100, do_sample=False)
their_ids = theirs.generate(**inputs, **options)[0, len(ids) :].tolist()
assert their_ids == list(new)
print(f"all {len(new)} ids are equal")

# %% [markdown]
# ## Exercises
#
# Predict, then run. Answers are in `answers.py`.
#
# 1. Leave `<grounding>` out of the prompt. Which tokens disappear, and why?
# 2. Give the model a black image. What does it write?
# 3. Swap two rows of `image_embeds` before the decoder. Does the caption change? Should it?
# 4. `record` from `recording.py` collects attention weights while the model runs. After `with record(model) as seen:
#    model.encode_image(pixels)`, what is the shape of `seen["resampler.x_attn"][0]`, and why is its last dimension
#    N + Q and not N?
