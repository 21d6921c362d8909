# %% [markdown]
# # 0. One image, from pixels to text
#
# Kosmos-2 reads an image and writes a caption whose phrases are linked to boxes in the image. This notebook
# follows one image through the whole model and looks at every tensor on the way. The following notebooks
# explain the parts one by one. (Reading time: 20 minutes.)
#
# ![The parts of Kosmos-2: vision transformer, resampler, the row of tokens with its image slots, the decoder and the choice of the next token](overview.svg)
#
# (The sizes in the diagram are those of the published model.) The notebooks use the real architecture with
# the bundled weights: a small model trained on drawings. Only the sizes differ from the published model, and
# the code takes them from the configuration.

# %%
from figures import ROOT, plt, reference, show, show_answers, show_image, table  # isort: skip  (it also sets the paths)
import torch
from PIL import Image

from kosmos2 import finish, preprocess_image, record
from load_weights import load_checkpoint
from sample import Answer, draw_answers
from tokenizer import to_markdown

model, tokenizer = load_checkpoint(ROOT / "tiny")
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
show_image(image, "The image of this notebook: a snowman next to a fire in the snow.", width=224)

# %% [markdown]
# ## Sizes, before we compute anything
#
# The sizes of all tensors follow from the configuration. An image of 140 x 140 pixels has 10 x 10 = 100
# patches of 14 x 14 pixels; with [CLS] there are 101 positions. The resampler passes 32 vectors to the decoder,
# whatever the number of patches.

# %%
vision, text, Q = model.config.vision, model.config.text, model.config.latent_query_num
N = (vision.image_size // vision.patch_size) ** 2 + 1
table(
    [
        ("pixels", "(1, 3, size, size)", (1, 3, vision.image_size, vision.image_size)),
        ("features", "(1, N, E)", (1, N, vision.width)),
        ("image_embeds", "(1, Q, D)", (1, Q, text.width)),
    ],
    ("tensor", "legend", "predicted shape"),
)

# %% [markdown]
# ## From the image to image embeddings
#
# `preprocess_image` squashes the image to a square and normalizes its colors with the mean and standard
# deviation of CLIP's training images. `record` collects the outputs of blocks and the attention weights while
# the model runs.

# %%
pixels = preprocess_image(image, vision.image_size)[None]
with torch.inference_mode(), record(model) as seen:
    features = model.vision(pixels)
    image_embeds = model.resampler(features)
assert pixels.shape == (1, 3, vision.image_size, vision.image_size)
assert features.shape == (1, N, vision.width) and image_embeds.shape == (1, Q, text.width)

fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1, 1.3, 1.3))
axes[0].imshow(((pixels[0] - pixels.min()) / (pixels.max() - pixels.min())).permute(1, 2, 0))
axes[0].set_title(f"pixels: mean {pixels.mean():.2f}, std {pixels.std():.2f}")
for axis, values, title, labels in (
    (axes[1], features[0], "features", ("E", "N")), (axes[2], image_embeds[0], "image embeddings", ("D", "Q")),
):  # fmt: skip
    most = 3 * values.std()
    drawn = axis.imshow(values, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
    fig.colorbar(drawn)
show(
    fig,
    "Three panels: the pixels, the features and the image embeddings, the last two as colored rows.",
)

# %% [markdown]
# Each row is a position: on the left [CLS], then the patches row by row; on the right the latents. Each
# feature vector has unit length, because the last step of the ViT divides by the length. This is one of the
# things in which Kosmos-2 differs from the textbook; notebook 2 shows what follows from it.

# %%
torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, N))

# %% [markdown]
# ## The prompt
#
# The prompt has Q slots between `<image>` and `</image>`. The image embeddings replace the token embeddings
# of these slots, so the ids in them are only placeholders.
#
# `<grounding>` at the beginning of the text switches boxes on: the model was trained on texts with boxes that
# begin with it and on texts without boxes that do not.

# %%
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of")
shown = [
    (t, i, tokenizer.id_to_token[i], "slot" if m else "")
    for t, (i, m) in enumerate(zip(ids, image_mask, strict=True))
]
table([row for row in shown if row[3] == "" or row[0] < 4], ("t", "id", "token", ""))
print(f"\n{len(ids)} positions = <s>, <image>, {Q} slots, </image>, and the text")
assert len(ids) == 3 + Q + len(tokenizer.encode("<grounding>An image of", add_bos=False))

# %% [markdown]
# ## One step of the decoder
#
# The decoder processes all positions at once and returns, for each, the logits of the next token. To continue
# the text, only the last position matters. The ViT and the resampler use no mask; in the decoder, each position
# attends to itself and to earlier ones only.
#
# Position ids start at 2 (fairseq reserves 0 and 1): `<s>` has 2, `<image>` 3, the Q slots follow, then
# `</image>`, and the first token of the text has 2 + 3 + Q - 1 + 1 = Q + 5. (For Q = 64 that is 69.)

# %%
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
with torch.inference_mode():
    x = model.embed(tokens, image_embeds=image_embeds, image_mask=mask)
    logits = model(tokens, image_embeds=image_embeds, image_mask=mask)
print("x:", tuple(x.shape), " logits:", tuple(logits.shape))
torch.testing.assert_close(x[0, 2 : 2 + Q], image_embeds[0])  # the image embeddings are in the slots
best = logits[0, -1].softmax(dim=0).topk(4)
table(
    [
        (f"{p:.4f}", repr(tokenizer.id_to_token[i]))
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ],
    ("p", "next token"),
)

# %% [markdown]
# `<phrase>` opens a phrase that will be linked to a box. To the decoder, tags and location tokens are ordinary
# tokens of its vocabulary.
#
# ## Token by token

# %%
state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=100)
result = finish(state)[0]
new = result.ids
rows = []
for t, (i, p) in enumerate(zip(new, result.probabilities, strict=True)):
    rows.append((t, tokenizer.id_to_token[i], f"{p:.3f}"))
table(rows[:14], ("step", "token", "p"))

# %% [markdown]
# After `<object>` come two location tokens: the top-left and the bottom-right cell of a 32 x 32 grid. As text,
# and as hyperlinks:

# %%
raw = tokenizer.decode(new)
print(raw, "\n")
print(to_markdown("An image of" + raw))

# %% [markdown]
# The score of a box is the geometric mean of the probabilities of its two tokens (notebook 4).

# %%
caption, entities = tokenizer.parse_output(ids, new, result.probabilities)
for _, span, boxes, scores in entities:
    print(f"{caption[slice(*span)]:18} {[round(v, 3) for v in boxes[0]]}  score {scores[0]:.2f}")
answer = Answer(caption, raw, entities)
show_image(draw_answers(image, [answer]), "The image with a labeled box around each thing.", width=400)
show_answers(image, answer)

# %% [markdown]
# ## Comparison with the reference
#
# Hugging Face transformers loads the same folder. Image embeddings, logits and generated ids must be equal.

# %%
theirs = reference()
with torch.inference_mode():
    out = theirs(pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=mask.long())
torch.testing.assert_close(image_embeds, out.image_embeds, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(logits, out.logits, rtol=1e-4, atol=1e-4)
their_ids = theirs.generate(
    pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=mask.long(),
    attention_mask=torch.ones_like(tokens), max_new_tokens=100, do_sample=False,
)[0, len(ids) :].tolist()  # fmt: skip
assert their_ids == list(new)
print(f"largest difference of a logit: {(logits - out.logits).abs().max():.1e}; all {len(new)} ids are equal")

# %% [markdown]
# ## Exercises
#
# Predict, then run. Answers are in `answers.py`.
#
# 1. Leave `<grounding>` out of the prompt. Which tokens disappear, and why?
# 2. Give the model a black image. What does it write?
# 3. Swap two rows of `image_embeds` before the decoder. Does the text change? Should it?
# 4. What is the shape of `seen["resampler.x_attn"][0]`, and why is its last dimension N + Q and not N?
