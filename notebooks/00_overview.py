# %% [markdown]
# # 0. One picture, all the way through
#
# Kosmos-2 reads a picture and writes a sentence whose phrases are linked to boxes in the picture. Here one
# picture goes through the whole of it, and we look at what lies between any two parts. The notebooks that
# follow open the parts one by one.
#
# ![The parts of Kosmos-2: vision transformer, resampler, the row of tokens with its image slots, the decoder and the choice of the next token](overview.svg)
#
# (The sizes in the drawing are the published model's.) Everything here is the real architecture with the bundled weights: a small model, trained on pictures of
# coloured shapes. Only the sizes differ from the published one; the code takes them from the configuration.

# %%
from figures import ROOT, plt, reference, show, show_image, table  # isort: skip  (it also sets the paths)
import torch
from PIL import Image

from kosmos2 import preprocess_image, record
from load_weights import load_checkpoint
from sample import draw_answers
from tokenizer import to_markdown

model, tokenizer = load_checkpoint(ROOT / "tiny")
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
show_image(picture, "The picture of this notebook: five coloured shapes on a soft background.", width=224)

# %% [markdown]
# ## Sizes, before we compute anything
#
# A model's sizes follow from its configuration. With a picture of 112 x 112 pixels and patches of 14 x 14
# there are 8 x 8 = 64 patches; a [CLS] position makes 65. The resampler hands the decoder 32 vectors,
# whatever the number of patches. Every number we print below is predicted here.

# %%
vision, text, Q = model.config.vision, model.config.text, model.config.latent_query_num
N = (vision.image_size // vision.patch_size) ** 2 + 1
table(
    [
        ("pixels", "(1, 3, S, S)", (1, 3, vision.image_size, vision.image_size)),
        ("features", "(1, N, E)", (1, N, vision.width)),
        ("image_embeds", "(1, Q, D)", (1, Q, text.width)),
    ],
    ("tensor", "legend", "predicted shape"),
)

# %% [markdown]
# ## From the picture to image embeddings
#
# `preprocess_image` squashes the picture to a square, and shifts and scales its colours so that CLIP's
# training pictures had mean 0 and spread 1 (this one is brighter than most). `record` collects what the modules put out while the model runs; nothing runs twice for it.

# %%
pixels = preprocess_image(picture, vision.image_size)[None]
with torch.inference_mode(), record(model) as seen:
    features = model.vision(pixels)
    image_embeds = model.resampler(features)
assert pixels.shape == (1, 3, vision.image_size, vision.image_size)
assert features.shape == (1, N, vision.width) and image_embeds.shape == (1, Q, text.width)

fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1, 1.3, 1.3))
axes[0].imshow(((pixels[0] - pixels.min()) / (pixels.max() - pixels.min())).permute(1, 2, 0))
axes[0].set_title(f"pixels: mean {pixels.mean():.2f}, spread {pixels.std():.2f}")
for axis, values, title, labels in (
    (axes[1], features[0], "features", ("E", "N")), (axes[2], image_embeds[0], "image embeddings", ("D", "Q")),
):  # fmt: skip
    most = 3 * values.std()
    drawn = axis.imshow(values, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    axis.set(title=title, xlabel=labels[0], ylabel=labels[1])
    fig.colorbar(drawn)
show(
    fig,
    "Three panels: the pixels, still a recognisable picture; the features and the image embeddings as coloured stripes.",
)

# %% [markdown]
# Rows are positions. Among the features ([CLS], then the patches row by row) most rows look alike: they are the
# background; those that differ are the shapes. Of the image embeddings hardly two rows look alike, for each
# latent asks something else.
#
# Each feature vector has length one: the ViT's last step divides by the length. That is one of the things
# in which Kosmos-2 differs from the textbook, and notebook 2 shows what follows from it.

# %%
torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, N))

# %% [markdown]
# ## The prompt
#
# A picture takes the place of words. The prompt has Q slots between `<image>` and `</image>`; the
# embeddings of the ids in these slots are never used, the image embeddings stand there instead.

# %%
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of")
shown = [
    (t, i, tokenizer.tokens[i], "slot" if m else "")
    for t, (i, m) in enumerate(zip(ids, image_mask, strict=True))
]
table([row for row in shown if row[3] == "" or row[0] < 4], ("t", "id", "token", ""))
print(f"\n{len(ids)} positions = <s>, <image>, {Q} slots, </image>, and the words")
assert len(ids) == 3 + Q + len(tokenizer.encode("<grounding>An image of", add_bos=False))

# %% [markdown]
# ## One step of the decoder
#
# The decoder reads all positions at once and says, for each, how likely every token of the vocabulary is to
# come next. Only the last position matters to us.

# %%
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
with torch.inference_mode():
    x = model.embed(tokens, image_embeds=image_embeds, image_mask=mask)
    logits = model(tokens, image_embeds=image_embeds, image_mask=mask)
print("x:", tuple(x.shape), " logits:", tuple(logits.shape))
torch.testing.assert_close(x[0, 2 : 2 + Q], image_embeds[0])  # the picture is where the slots were
best = logits[0, -1].softmax(dim=0).topk(4)
table(
    [
        (f"{p:.4f}", repr(tokenizer.tokens[i]))
        for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ],
    ("p", "next token"),
)

# %% [markdown]
# `<phrase>` opens a phrase that will be linked to a box. No token here is special to the decoder: tags and
# boxes are words of its vocabulary, and it learned when to say them.
#
# ## Token by token

# %%
state = model.start(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=100)
new = state.finish()[0]
rows = [
    (t, tokenizer.tokens[i], f"{p:.3f}") for t, (i, p) in enumerate(zip(new, new.probabilities, strict=True))
]
table(rows[:14], ("step", "token", "p"))
print("…")

# %% [markdown]
# Two location tokens after `<object>`: the upper left and the lower right cell of a 32 x 32 grid. Where the
# model was less than sure, it hesitates between neighbouring cells. Read as text, and then as hyperlinks:

# %%
raw = tokenizer.decode(new)
print(raw, "\n")
print(to_markdown("An image of" + raw))

# %% [markdown]
# The score of a box says how sure the model was of its two tokens, from 0 to 1 (notebook 4). The least sure box
# is also the worst: the diamond's right corner is cut off.

# %%
caption, entities = tokenizer.read(ids, new)
for _, span, boxes, scores in entities:
    print(f"{caption[slice(*span)]:18} {[round(v, 3) for v in boxes[0]]}  score {scores[0]:.2f}")
show_image(
    draw_answers(picture, [{"text": caption, "entities": entities}]),
    "The picture again; every shape has a box around it in the colour of its phrase in the sentence below.",
    width=400,
)

# %% [markdown]
# ## Is it the real thing?
#
# Hugging Face's transformers reads the same folder of weights. If we have understood the architecture, both
# must compute the same numbers.

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
print(
    f"largest difference of a logit: {(logits - out.logits).abs().max():.1e}; all {len(new)} ids are the same"
)

# %% [markdown]
# (Exactly zero is possible: both do the same operations in the same order, on the same machine.)

# %% [markdown]
# ## Exercises
#
# Predict, then run. Answers are in `answers.py`.
#
# 1. Leave `<grounding>` out of the prompt. Which tokens will not come any more, and why?
# 2. Give the model a black picture. What does it say, and what are its scores like?
# 3. Exchange two rows of `image_embeds` before the decoder sees them. Does the sentence change? Should it?
# 4. What is the shape of `seen["resampler.x_attn"][0]`, and why is its last dimension N + Q and not N?
