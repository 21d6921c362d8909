# %% [markdown]
# # 6. Weights: what is in a checkpoint
#
# A model is its architecture and 1.66 billion parameters. Checkpoint files use other tensor names than our code: the
# published layout (Hugging Face) and the original one (fairseq). This notebook reads a checkpoint by hand, draws the
# map of names, and counts. (Reading time: 20 minutes.)

# %%
from figures import COLORS, ROOT, plt, reference, show, table  # isort: skip
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from evaluate import HELD_OUT
from scenes import Scene

from kosmos2 import Kosmos2, Kosmos2Config, preprocess_image
from load_weights import (
    EMBEDDING,
    HUGGING_FACE,
    NAMES,
    Checkpoint,
    load_checkpoint,
    read_torch,
    rename,
    save_checkpoint,
)
from tokenizer import Tokenizer, boxes_to_text

# %% [markdown]
# ## A safetensors file, by hand
#
# Eight bytes with the length of the header; the header, JSON with the dtype, shape and offsets of each tensor; then
# the data. There is no code in such a file.

# %%
file = ROOT / "tiny" / "model.safetensors"
content = file.read_bytes()
size = int.from_bytes(content[:8], "little")
header = json.loads(content[8 : 8 + size])
name = "image_to_text_projection.latent_query"
entry = header[name]
print(f"header of {size} bytes, {len(header) - 1} tensors; {name}: {entry}")
start, end = (8 + size + offset for offset in entry["data_offsets"])
dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry["dtype"]]
by_hand = torch.frombuffer(bytearray(content[start:end]), dtype=dtype).view(entry["shape"])

model, tokenizer = load_checkpoint(ROOT / "tiny")
torch.testing.assert_close(by_hand.float(), model.resampler.latent_query.detach())

# %% [markdown]
# ## The map of names
#
# `NAMES` in `load_weights.py` has the prefixes of names in three columns ({} is the number of a layer). The rest of a
# name is the same in all three. Tensors are only renamed. Here each column is sorted alphabetically. Note a misleading
# name: `final_layer_norm` of a published block is the second of its two norms.

# %%
parts = dict(zip(("vision", "resampler", "decoder"), COLORS, strict=False))
orders = [{name: place for place, name in enumerate(sorted(column))} for column in zip(*NAMES, strict=True)]
fig, axis = plt.subplots(figsize=(12, 4.8))
for names in NAMES:
    color = parts[names[0].split(".")[0]]
    ends = []
    for name, order, left in zip(names, orders, (0, 0.27, 0.69), strict=True):
        text = axis.text(left, -order[name], name, family="monospace", fontsize=7, color=color, va="center")
        ends.append((left, left + 0.0064 * len(name) + 0.003, -order[name]))
    for (_, right, y1), (left, _, y2) in zip(ends, ends[1:], strict=False):
        axis.plot([right, left - 0.005], [y1, y2], color=color, lw=0.8)
for left, title in ((0, "here"), (0.27, "published (Hugging Face)"), (0.69, "original (fairseq)")):
    axis.text(left, 1, title, fontsize=9, weight="bold")
axis.set(xlim=(0, 1.05), ylim=(-len(NAMES), 1.5))
axis.axis("off")
show(
    fig,
    "Three columns of name prefixes, connected by lines: for each of ours its published and its original name. For example: decoder.layers.{}.norm2 is text_model.model.layers.{}.final_layer_norm and gpt_model.decoder.layers.{}.final_layer_norm.",
)

# %%
checkpoint = Checkpoint(ROOT / "tiny")
assert checkpoint.problems() == []
published = set(reference().state_dict()) - {"text_model.lm_head.weight"}  # tied to the embedding
assert {rename(ours, HUGGING_FACE) for ours in model.state_dict()} == published
print(f"{len(published)} names; ours map to exactly those of transformers")

# %% [markdown]
# ## Where the parameters are
#
# Predicted from the configuration of the published model, then counted from the modules (on the "meta"
# device, where tensors have shapes but no memory).

# %%
config = Kosmos2Config()
v, t, Q = config.vision, config.text, config.latent_query_num


def block(width, mlp, sub_ln):
    """Four projections, two norms, an MLP; with sub-LN a norm of the width and one of the MLP's width."""
    return (
        4 * (width**2 + width)
        + 4 * width
        + 2 * width * mlp
        + mlp
        + width
        + (2 * (width + mlp) if sub_ln else 0)
    )


predicted = {
    "ViT: patches, [CLS], positions, two norms": 3 * v.patch_size**2 * v.width
    + v.width
    + v.positions * v.width
    + 4 * v.width,
    "ViT: 24 blocks": v.layers * block(v.width, v.mlp_width, False),
    "resampler": v.width * t.width + t.width + Q * t.width + 4 * (t.width**2 + t.width),
    "decoder: embedding, also the output": t.vocab_size * t.width,
    "decoder: 24 blocks and a norm": t.layers * block(t.width, t.mlp_width, True) + 2 * t.width,
}
with torch.device("meta"):
    published = Kosmos2(config)
total = sum(p.numel() for p in published.parameters())
assert sum(predicted.values()) == total
table(
    [(part, f"{n:,}", f"{n / total:.1%}") for part, n in predicted.items()], ("part", "parameters", "share")
)
for part in ("vision", "resampler", "decoder"):
    print(f"{part}: {sum(p.numel() for p in getattr(published, part).parameters()):,}")
print(
    f"{total:,} parameters: {total * 4 / 1e9:.2f} GB in fp32, {total * 2 / 1e9:.2f} in 16 bits, {total / 1e9:.2f} in 8 (and a little for scales)"
)

fig, axis = plt.subplots(figsize=(9, 1.5))
left = 0
for (part, n), color in zip(predicted.items(), COLORS, strict=False):
    axis.barh(0, n, left=left, color=color, label=part)
    left += n
axis.axis("off")
axis.legend(ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0))
show(
    fig,
    "One bar: the blocks of the decoder are about three quarters of all parameters, the ViT under a fifth, the embedding 8 percent, the resampler one percent.",
)

# %% [markdown]
# A decoding step reads the parameters of the decoder once per token, more than 1.3 billion; notebook 9 predicts the
# speed from that.
#
# ## Pickles
#
# `pytorch_model.bin` and `kosmos-2.pt` are pickles, and a pickle can call any function. This one creates a file when
# it is loaded. `read_torch` uses `torch.load(weights_only=True)` and replaces every other class that the file names
# by an inert stand-in.


# %%
class Trap:
    def __reduce__(self):
        return open, (str(Path(folder) / "gotcha"), "w")


with tempfile.TemporaryDirectory() as folder:
    trap = Path(folder) / "pytorch_model.bin"
    torch.save({"config": Trap(), "weight": torch.ones(2)}, trap)
    print("tensors found:", list(read_torch(trap)))
    assert not (Path(folder) / "gotcha").exists()
    torch.load(trap, weights_only=False)  # without protection, the function runs
    assert (Path(folder) / "gotcha").exists()

# %% [markdown]
# ## Incomplete checkpoints
#
# The loader checks every tensor by name and raises an error if one is missing: a model with a missing tensor would
# still write text, only worse.

# %%
del checkpoint.stored["image_to_text_projection.latent_query"]
print(checkpoint.problems())

# %% [markdown]
# ## Changing a trained model
#
# To change a model and keep what it learned: read its weights, change some tensors, build a model with the new sizes,
# load and save. Here the bundled model gets a 16 x 16 grid. All other tokens keep their ids, because location tokens
# are last in the vocabulary. Each new cell covers four old ones. Should its embedding be random, of the right scale,
# or the mean of the four? Compare the loss of both on 100 boxes.

# %%
coarse, first = (
    Tokenizer(tokenizer.model_file, model.config.latent_query_num, grid=16),
    tokenizer.first_location,
)
embedding = model.state_dict()[EMBEDDING]
cells = embedding[first:].view(16, 2, 16, 2, -1).mean(dim=(1, 3)).flatten(0, 1)  # (16², D)
noise = torch.randn(cells.shape, generator=torch.Generator().manual_seed(0)) * cells.std()
starts = {"mean of four": cells, "random": noise}


def with_locations(locations) -> Kosmos2:
    new = Kosmos2(replace(model.config, text=replace(model.config.text, vocab_size=coarse.vocab_size))).eval()
    new.load_state_dict(model.state_dict() | {EMBEDDING: torch.cat([embedding[:first], locations])})
    return new


# %%
things = [
    (scene, thing) for scene in map(Scene.random, range(HELD_OUT, HELD_OUT + 45)) for thing in scene.things
][:100]
pixels = torch.stack([preprocess_image(scene.draw(), model.config.vision.image_size) for scene, _ in things])
for name, locations in starts.items():
    changed, losses = with_locations(locations), []
    for one, (_, thing) in zip(pixels, things, strict=True):
        text = f"<grounding><phrase> the {thing.name}</phrase>" + boxes_to_text(
            [thing.box], grid=16, training=True
        )
        ids, mask = coarse.encode_prompt(text)
        labels = [i if i >= first else -100 for i in ids]
        with torch.inference_mode():
            losses.append(
                changed(
                    torch.tensor([ids]),
                    one[None],
                    None,
                    torch.tensor([mask]),
                    labels=torch.tensor([labels]),
                )[1]
            )
    print(
        f"{name:13} {torch.stack(losses).mean():.2f} nats per location token; uniform over 256 cells: {math.log(256):.2f}"
    )

# %% [markdown]
# The mean of four works before any training. Saved, it is a checkpoint like any other, and
# `python training/train.py --checkpoint FOLDER --out NEW --steps 300 --batch 16 --lr 3e-4` trains it further. The grid
# of a checkpoint follows from the size of its vocabulary, so the loader finds it.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(with_locations(cells), tokenizer.model_file, folder)
    saved = Checkpoint(folder)
    assert load_checkpoint(folder)[1].grid == 16
    print(
        f"complete: {not saved.problems()}; vocabulary {tokenizer.vocab_size} -> {saved.config.text.vocab_size}"
    )

# %% [markdown]
# ## Exercises
#
# 1. How many bytes would the published model take if its embedding were not tied? Predict from the table.
# 2. `position_ids` and `embed_positions.weights` are in old files and ignored. Why is that correct?
# 3. Which numbers of the table change with 32 instead of 24 decoder layers? With 128 latents?
# 4. Make a copy of the checkpoint with one NaN and load it. Which line finds it, and how much memory does that take?
