# %% [markdown]
# # 6. Weights: what is in a checkpoint
#
# A model is its architecture and 1.66 billion numbers. They come in files under other names than ours: the
# published layout (Hugging Face's) and the original one (fairseq's). This notebook reads a checkpoint the hard
# way, draws the map of names, and counts.

# %%
from figures import COLORS, ROOT, plt, reference, show, table  # isort: skip
import json
import math
import pickle
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from evaluate import HELD_OUT
from scenes import Scene

from kosmos2 import Kosmos2, Kosmos2Config, preprocess_image
from load_weights import EMBEDDING, NAMES, Checkpoint, load_checkpoint, read_torch, rename, save_checkpoint
from tokenizer import Tokenizer, boxes_to_text

# %% [markdown]
# ## A safetensors file, by hand
#
# Eight bytes: the length of the header. The header: JSON, for each tensor its type, shape and place. Then the
# numbers, nothing else. No code, so nothing can run.

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
# `NAMES` in `load_weights.py` is all of it: beginnings of names in three columns ({} is a layer's number). What
# follows a beginning is the same in all three. Nothing is transposed, split or joined, so a tensor only moves. Here
# each column is in the order of its alphabet, as in a file; follow the lines, and mind what misleads: the
# `final_layer_norm` of a published block is its second of two, not the last.

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
    "Three columns of beginnings of names, joined by lines: for each of ours its published and its original name. For example: decoder.layers.{}.norm2 is text_model.model.layers.{}.final_layer_norm and gpt_model.decoder.layers.{}.final_layer_norm.",
)

# %%
checkpoint = Checkpoint(ROOT / "tiny")
assert checkpoint.problems() == []
published = set(reference().state_dict()) - {"text_model.lm_head.weight"}  # the embedding, once more
assert {rename(ours, 1) for ours in model.state_dict()} == published
print(f"{len(published)} names: ours, theirs and the file's are the same set")

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
    "One bar: the decoder's blocks are three quarters of it, the ViT under a fifth, the embedding 8 percent, the resampler one percent; the ViT's patches and positions are too thin to be seen.",
)

# %% [markdown]
# A decoding step reads the decoder's share once for every token, a good 1.3 billion numbers: notebook 9 makes
# a prediction of speed from that.
#
# ## Why not simply torch.load?
#
# `pytorch_model.bin` and `kosmos-2.pt` are pickles, and a pickle is a program. Here is one that creates a
# file when it is read. `read_torch` gives it nothing to run: of everything a pickle names it makes either a
# description of a tensor or a thing that does nothing.


# %%
class Trap:
    def __reduce__(self):
        return Path.touch, (Path(folder) / "gotcha",)


with tempfile.TemporaryDirectory() as folder:
    trap = Path(folder) / "pytorch_model.bin"
    with zipfile.ZipFile(trap, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Trap()}))
    found = read_torch(trap)
    print("tensors found:", found, " file created by reading:", (Path(folder) / "gotcha").exists())
    assert not (Path(folder) / "gotcha").exists()
    with zipfile.ZipFile(trap) as archive:
        pickle.loads(archive.read("archive/data.pkl"))  # what an unguarded reader does
    assert (Path(folder) / "gotcha").exists()

# %% [markdown]
# ## What may be wrong with a checkpoint
#
# Every tensor is accounted for, by name. A model that is loaded with a tensor missing still speaks, only
# worse; so nothing is loaded unless all is there.

# %%
del checkpoint.stored["image_to_text_projection.latent_query"]
print(checkpoint.problems())

# %% [markdown]
# ## Surgery
#
# To change a model and keep what it learned: read its weights, change the tensors in question, make a model of the
# new sizes, load, save. Here the bundled model gets locations in a 16 x 16 grid. Words keep their ids, as locations
# are last in the vocabulary; each new cell lies on four old ones. What should its embedding be? Guess first: numbers
# of the right size, or the mean of the four? We ask what both make of 100 boxes.

# %%
coarse, first = (
    Tokenizer(tokenizer.model_file, model.config.latent_query_num, grid=16),
    tokenizer.first_location,
)
embedding = model.state_dict()[EMBEDDING]
cells = embedding[first:].view(16, 2, 16, 2, -1).mean(dim=(1, 3)).flatten(0, 1)  # (16², D)
noise = torch.randn(cells.shape, generator=torch.Generator().manual_seed(0)) * cells.std()
starts = {"mean of four": cells, "random": noise}


def operate(locations) -> Kosmos2:
    new = Kosmos2(replace(model.config, text=replace(model.config.text, vocab_size=coarse.vocab_size))).eval()
    new.load_state_dict(model.state_dict() | {EMBEDDING: torch.cat([embedding[:first], locations])})
    return new


# %%
shapes = [
    (scene, shape) for scene in map(Scene.random, range(HELD_OUT, HELD_OUT + 45)) for shape in scene.shapes
][:100]
pixels = torch.stack([preprocess_image(scene.draw(), model.config.vision.image_size) for scene, _ in shapes])
for name, locations in starts.items():
    patient, losses = operate(locations), []
    for picture, (_, shape) in zip(pixels, shapes, strict=True):
        text = f"<grounding><phrase> the {shape.name}</phrase>" + boxes_to_text(
            [shape.box], grid=16, training=True
        )
        ids, mask = coarse.encode_prompt(text)
        labels = [i if i >= first else -100 for i in ids]
        with torch.inference_mode():
            losses.append(
                patient(
                    torch.tensor([ids]),
                    picture[None],
                    None,
                    torch.tensor([mask]),
                    labels=torch.tensor([labels]),
                )[1]
            )
    print(
        f"{name:13} {torch.stack(losses).mean():.2f} nats a location; a guess among 256 cells: {math.log(256):.2f}"
    )

# %% [markdown]
# The mean of four works before any training. Saved, it is a checkpoint like any other; `python tiny/train.py
# --checkpoint FOLDER --out NEW --steps 300 --batch 16 --lr 3e-4` goes on from there. (The grid is not in config.json. It is
# `GRID` in tokenizer.py; change that line before you load it.)

# %%
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(operate(cells), tokenizer.model_file, folder)
    saved = Checkpoint(folder)
    print(
        f"complete: {not saved.problems()}; vocabulary {tokenizer.vocab_size} -> {saved.config.text.vocab_size}"
    )

# %% [markdown]
# ## Exercises
#
# 1. How many bytes would the published model take if its embedding were not tied? Predict from the table.
# 2. `position_ids` and `embed_positions.weights` are in old files, and ignored. Why may they be?
# 3. Which numbers of the table change with 32 instead of 24 decoder layers? With 128 latents?
# 4. Make a copy of the checkpoint with one NaN and load it. Where is it found, at no cost of memory?
