# %% [markdown]
# # 6. Weights: what is in a checkpoint
#
# A model consists of an architecture and its parameters (1.66 billion in the published model). Checkpoint files hold
# these parameters under different tensor names: ours, the published ones (Hugging Face) or the original ones
# (fairseq). This notebook reads a checkpoint by hand, draws the map of names, counts parameters, and then changes a
# trained model. (Reading time: 30 minutes.)
#
# `Scene` draws random images whose objects and boxes are known; scenes from seed `HELD_OUT` on were not used in
# training. Both come from `training/` and are needed at the end.

# %%
from figures import COLORS, ROOT, plt, reference, show, table  # isort: skip  (sets the paths)
import io
import json
import os
import shutil
import tempfile
from dataclasses import replace
from unittest.mock import patch

import torch

import kosmos2
import load_weights
from inference.convert import save_checkpoint
from kosmos2 import Kosmos2, Kosmos2Config, pad_left, preprocess_image
from load_weights import FAIRSEQ, HUGGING_FACE, NAMES, Checkpoint, load_checkpoint, rename
from tokenizer import Tokenizer
from training.evaluate import HELD_OUT
from training.scenes import Scene, objects_text

# %% [markdown]
# ## A safetensors file, by hand
#
# The file begins with eight bytes that hold the length of the header. The header is JSON: the dtype, the shape and
# the offsets of each tensor. The data follows. There is no code in such a file.

# %%
content = (ROOT / "tiny" / "model.safetensors").read_bytes()
size = int.from_bytes(content[:8], "little")
header = json.loads(content[8 : 8 + size])
entry = header["image_to_text_projection.latent_query"]
print(f"file of {len(content):,} bytes, header of {size:,} bytes, {len(header) - 1} tensors")
print("image_to_text_projection.latent_query:", entry)

# %% [markdown]
# These are the latents of the resampler. Their bytes, read in the given dtype, are the parameter that the loader puts
# into the model:

# %%
start, end = (8 + size + offset for offset in entry["data_offsets"])
dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry["dtype"]]
by_hand = torch.frombuffer(bytearray(content[start:end]), dtype=dtype).view(entry["shape"])

model, tokenizer = load_checkpoint(ROOT / "tiny")
assert torch.equal(by_hand.float(), model.resampler.latent_query.detach())
print("equal:", tuple(by_hand.shape))

# %% [markdown]
# ## The map of names
#
# `NAMES` in `load_weights.py` lists the prefixes of names in three columns; {} is the number of a layer. What follows
# the prefix is the same in all three. Tensors are only renamed, never transposed, split or merged. Here each column
# is sorted alphabetically; lines connect the names of one tensor.

# %%
columns = [("here", 0), ("published (Hugging Face)", 0.27), ("original (fairseq)", 0.69)]
ranks = [{name: -n for n, name in enumerate(sorted(c))} for c in zip(*NAMES, strict=True)]
colors = {"vision": COLORS[0], "resampler": COLORS[1], "decoder": COLORS[2]}
for part in colors:
    print(part, sum(row[0].startswith(part) for row in NAMES), "prefixes")

# %% [markdown]
# The same map as a drawing:

# %%
fig, axis = plt.subplots(figsize=(12, 4.8))
for names in NAMES:
    color = colors[names[0].split(".")[0]]
    ends = []  # of the line to the left of each name, and of that to its right
    for name, rank, (_, x) in zip(names, ranks, columns, strict=True):
        axis.text(x, rank[name], name, fontfamily="monospace", fontsize=7, color=color, va="center")
        after_longest = x + 0.005 + 0.0064 * max(map(len, rank))
        ends.append(((x - 0.005, rank[name]), (after_longest, rank[name])))
    for (_, start), (end, _) in zip(ends, ends[1:], strict=False):
        axis.plot(*zip(start, end, strict=True), color=color, lw=0.8)
for title, x in columns:
    axis.text(x, 1, title, fontsize=9, weight="bold")
axis.set(xlim=(0, 1.05), ylim=(-len(NAMES), 1.5))
axis.axis("off")
show(fig, "The prefixes of tensor names in three columns; lines connect the names of one tensor.")

# %% [markdown]
# Two published names need care. `final_layer_norm` occurs in every block of the decoder: it is the norm before the MLP,
# not the last norm of the model. And `pre_layrnorm` is misspelled in the files. Do our names match the published
# tensors one to one?

# %%
published = set(reference().state_dict()) - {"text_model.lm_head.weight"}  # tied to the embedding
assert {rename(ours, HUGGING_FACE) for ours in model.state_dict()} == published
print(f"our {len(published)} names map to exactly those of transformers")

# %% [markdown]
# The loader recognizes the layout by the names. As a test, we write the bundled model under its fairseq names, as a
# file like the original `kosmos-2.pt`, and read it back:

# %%
state = {rename(name, FAIRSEQ): tensor for name, tensor in model.state_dict().items()}
with tempfile.TemporaryDirectory() as folder:
    torch.save({"model": state}, f"{folder}/kosmos-2.pt")
    shutil.copy(ROOT / "tiny" / "config.json", folder)
    again, _ = load_checkpoint(folder, tokenizer=tokenizer.model_file)
for name, tensor in model.state_dict().items():
    assert torch.equal(again.state_dict()[name], tensor)
print(list(state)[-1], "is read as", list(model.state_dict())[-1])

# %% [markdown]
# ## Where the parameters are
#
# Try to predict how many of the 1.66 billion parameters are in the ViT, in the embedding and in the decoder. First
# the formula for one block: four projections and two matrices of the MLP, all with biases, two norms, and with sub-LN
# two more.


# %%
def block(width: int, mlp: int, sub_ln: bool) -> int:
    """The number of parameters of a block."""
    attention = 4 * (width**2 + width)
    two_layers = 2 * width * mlp + mlp + width
    norms = 2 * (2 * width)
    if sub_ln:
        norms += 2 * width + 2 * mlp
    return attention + two_layers + norms


text = model.config.text
count = sum(p.numel() for p in model.decoder.layers[0].parameters())
assert count == block(text.width, text.mlp_width, sub_ln=True)
print(f"one decoder block of the bundled model: {count:,}")

# %% [markdown]
# The published model, from its configuration:

# %%
config = Kosmos2Config()
v, t, Q = config.vision, config.text, config.latent_query_num
patches = 3 * v.patch_size**2 * v.width
predicted = {
    "ViT, input and norms": patches + (1 + v.positions + 4) * v.width,
    "ViT, 24 blocks": v.layers * block(v.width, v.mlp_width, sub_ln=False),
    "resampler": (v.width + 1) * t.width + Q * t.width + 4 * (t.width**2 + t.width),
    "decoder, embedding": t.vocab_size * t.width,
    "decoder, 24 blocks": t.layers * block(t.width, t.mlp_width, sub_ln=True) + 2 * t.width,
}
total = sum(predicted.values())
shares = {part: n / total for part, n in predicted.items()}
table([(part, f"{n:>13,}", f"{shares[part]:.1%}") for part, n in predicted.items()],
      ("part", "parameters", "share"))  # fmt: skip

# %% [markdown]
# (The last norm of the decoder is counted with its blocks.) Is the prediction correct? On the "meta" device, tensors
# have shapes but no memory, so we can build the published model and count:

# %%
with torch.device("meta"):
    full = Kosmos2(config)
assert total == sum(p.numel() for p in full.parameters()) == 1_664_485_376
for name, size in (("fp32", 4), ("fp16 or bf16", 2), ("int8", 1)):
    print(f"{total:,} parameters in {name}: {total * size / 1e9:.2f} GB")

# %% [markdown]
# In int8, the scales and the parameters that stay in fp32 add a little. The same shares as a bar chart:

# %%
fig, axis = plt.subplots(figsize=(9, 1.5))
left = 0
for (part, share), color in zip(shares.items(), COLORS, strict=False):
    axis.barh(0, share, left=left, color=color, label=f"{part}: {share:.1%}")
    left += share
axis.axis("off")
axis.legend(ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0))
assert 0.70 < shares["decoder, 24 blocks"] < 0.75 and 0.18 < shares["ViT, 24 blocks"] < 0.20
show(fig, "A bar of five parts: the decoder's blocks take almost three quarters, the ViT a fifth.")

# %% [markdown]
# The decoder's blocks hold almost three quarters of all parameters, the ViT less than a fifth, the resampler a
# hundredth. Each new token needs every parameter of the decoder once, more than 1.3 billion; notebook 9 predicts the
# speed from that.
#
# ## Pickles
#
# `pytorch_model.bin` and `kosmos-2.pt` are pickles, and a pickle can call any function while it is loaded. Here is
# one that creates a file. `read_torch` in `load_weights.py` uses PyTorch's restricted unpickler (`weights_only=True`)
# and replaces everything else that the file names with inert stand-ins.


# %%
class Trap:
    def __reduce__(self):
        return io.open, (gotcha, "w")


folder = tempfile.mkdtemp()
trap, gotcha = f"{folder}/pytorch_model.bin", f"{folder}/gotcha"
torch.save({"config": Trap(), "weight": torch.ones(2)}, trap)
found = load_weights.read_torch(trap)
print("tensors found:", list(found), " file created:", os.path.exists(gotcha))
assert list(found) == ["weight"] and not os.path.exists(gotcha)

# %% [markdown]
# Without this protection, the function runs:

# %%
torch.load(trap, weights_only=False)
print("file created:", os.path.exists(gotcha))
assert os.path.exists(gotcha)

# %% [markdown]
# PyTorch blocks some modules, such as `os`, entirely: a file that names them is rejected.


# %%
class Command:
    def __reduce__(self):
        return os.system, (f"rm {gotcha}",)


torch.save({"config": Command(), "weight": torch.ones(2)}, trap)
try:
    load_weights.read_torch(trap)
    raise AssertionError("the file was read")
except ValueError as error:
    print(str(error).replace(f"{folder}/", "")[:60], "...")
assert os.path.exists(gotcha)  # the command did not run
shutil.rmtree(folder)

# %% [markdown]
# ## Incomplete checkpoints
#
# A model with a missing tensor would still generate captions, only worse. So the loader checks every tensor and
# raises an error that lists what is missing, unexpected or of the wrong shape.

# %%
checkpoint = Checkpoint(ROOT / "tiny")
assert checkpoint.problems() == []
del checkpoint.stored["image_to_text_projection.latent_query"]
print(checkpoint.problems())
assert "image_to_text_projection.latent_query" in checkpoint.problems()[0]

# %% [markdown]
# ## Changing a trained model: another grid
#
# To change a model and keep what it has learned: read its weights, change some tensors, build a model of the new
# sizes, load the weights into it, save. As an example, the bundled model gets a grid of 16 x 16 cells, not 32 x 32.
# Location tokens are last in the vocabulary, so all other tokens keep their ids. The grid is `location_grid` in the
# configuration.
#
# Each new cell covers four old ones. Should its embedding be random (with the standard deviation of the old
# embeddings), or the mean of the four? Make a prediction.

# %%
coarse = Tokenizer(tokenizer.model_file, model.config.latent_query_num, grid=16)
first = tokenizer.first_location
assert coarse.first_location == first and coarse.vocab_size == first + 16 * 16

embedding = model.state_dict()[load_weights.EMBEDDING]
D = embedding.shape[1]
mean_of_four = embedding[first:].view(16, 2, 16, 2, D).mean(dim=(1, 3)).view(16 * 16, D)
random = torch.randn(16 * 16, D) * embedding[first:].std()
print("location embeddings:", tuple(embedding[first:].shape), "->", tuple(mean_of_four.shape))

# %% [markdown]
# The model with these location embeddings:


# %%
def with_locations(locations: torch.Tensor) -> Kosmos2:
    """The bundled model with a 16 x 16 grid."""
    new_text = replace(model.config.text, vocab_size=coarse.vocab_size)
    new = Kosmos2(replace(model.config, text=new_text, location_grid=coarse.grid)).eval()
    new_embedding = torch.cat([embedding[:first], locations])
    new.load_state_dict(model.state_dict() | {load_weights.EMBEDDING: new_embedding})
    return new


changed = with_locations(mean_of_four)
print("embedding:", tuple(embedding.shape), "->", tuple(changed.decoder.embed_tokens.weight.shape))

# %% [markdown]
# We compare the two initializations by their loss on the boxes of objects in 100 unseen scenes, one object from each
# scene that has one with a unique name. Each sequence is a phrase and its box, `<phrase> the red
# cup</phrase><object>...</object>`, and only location tokens are counted.

# %%
images, prompts = [], []
for seed in range(HELD_OUT, HELD_OUT + 100):
    scene = Scene.random(seed)
    unique = [t for t in scene.things if len(scene.find(t.kind, t.color)) == 1]
    for thing in unique[:1]:
        box = objects_text([thing.box], coarse.grid)
        images.append(preprocess_image(scene.draw(), model.config.vision.image_size))
        prompts.append(coarse.encode_prompt(f"<grounding><phrase> the {thing.name}</phrase>{box}"))
pixels = torch.stack(images)
tokens, image_mask, pad_mask = pad_left(prompts)
labels = tokens.where(tokens >= first, -100)
print(f"{len(images)} images, {(labels >= 0).sum()} location tokens")

# %% [markdown]
# The losses, in nats, next to that of a uniform choice among 256 cells. (A loss of x nats is as uncertain as a choice
# among eˣ equally likely cells.)

# %%
losses = {"uniform": torch.tensor(256.0).log().item()}
for name, locations in (("random", random), ("mean of four", mean_of_four)):
    with torch.inference_mode():
        new = with_locations(locations)
        _, loss = new(tokens, pixels, None, image_mask, pad_mask, labels)
    losses[name] = loss.item()
table([(name, f"{loss:.2f}") for name, loss in losses.items()], ("start", "nats per location"))
assert losses["mean of four"] < losses["uniform"] < losses["random"]
assert losses["mean of four"] < losses["random"] - 1

# %% [markdown]
# With random embeddings the model is worse than a uniform choice; with the mean of four it is much better before any
# training. The mean of four embeddings is only useful if they are similar, so we check that. (In the bundled model
# they are similar from the start: see `init_weights` in `training/setup.py`. We cannot tell how similar those of the
# published model are.)

# %%
cells = torch.nn.functional.normalize(embedding[first:], dim=1).view(32, 32, D)
neighbors = (cells[:, 1:] * cells[:, :-1]).sum(-1).mean()
others = (cells[:, 16:] * cells[:, :16]).sum(-1).mean()
print(f"cosine similarity of neighbors {neighbors:.2f}, of cells half an image apart {others:.2f}")
assert neighbors > others + 0.15

# %% [markdown]
# The changed model is saved like any other. Published checkpoints have a grid of 32 x 32; any other grid is stored as
# `location_grid` in config.json, where the loader finds it.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(changed, tokenizer.model_file, folder)
    stored_grid = load_weights.read_config(f"{folder}/config.json").location_grid
    saved, saved_tokenizer = load_checkpoint(folder)
assert saved_tokenizer.grid == stored_grid == 16
assert torch.equal(saved.decoder.embed_tokens.weight, changed.decoder.embed_tokens.weight)
print(f"vocabulary {tokenizer.vocab_size} -> {saved.config.text.vocab_size}, grid 16 x 16")

# %% [markdown]
# The command of notebook 11, with `--checkpoint FOLDER`, would train the model further on your own boxes, with the new
# grid. (`--data` is required: the sentences about scenes are written for a grid of 32 x 32 cells.) To train from
# scratch with another grid, change the constant `GRID` in `tokenizer.py`.
#
# ## Changing a trained model: another layer
#
# Suppose that you add a second attention layer to the resampler. (Exercise 4 of notebook 2 is about how it should
# start. Here, its output projection is zero, so at first it changes nothing.)


# %%
class TwoLayers(kosmos2.Resampler):
    def __init__(self, config):
        super().__init__(config)
        self.x_attn2 = kosmos2.Attention(config.text.width, config.text.heads)
        torch.nn.init.zeros_(self.x_attn2.out_proj.weight)
        torch.nn.init.zeros_(self.x_attn2.out_proj.bias)

    def forward(self, features):
        latents = super().forward(features)  # (I, Q, D)
        return latents + self.x_attn2(latents, context=self.dense(features))


print(sum(p.numel() for p in TwoLayers(model.config).x_attn2.parameters()), "new parameters")

# %% [markdown]
# You would write this into `kosmos2.py`; in this notebook, `patch` does it for a few lines. With the changed code, the
# trained checkpoint is no longer complete. Which step rejects it? Not `load_state_dict`: `Checkpoint.problems` compares
# the names in the file with those of the model before any weight is read.

# %%
changed_code = patch.object(kosmos2, "Resampler", TwoLayers)
with changed_code:
    print(*Checkpoint(ROOT / "tiny").problems(), sep="\n")
    try:
        load_checkpoint(ROOT / "tiny")
        raise AssertionError("the checkpoint was loaded")
    except ValueError as error:
        assert "x_attn2" in str(error)

# %% [markdown]
# Instead, load the checkpoint with the unchanged code and copy its weights into the new model with `strict=False`. This
# returns the names of the tensors that the file does not have, so check that these are exactly the new ones.

# %%
with changed_code:
    deeper = Kosmos2(model.config).eval()
missing, unexpected = deeper.load_state_dict(model.state_dict(), strict=False)
assert not unexpected and all(name.startswith("resampler.x_attn2.") for name in missing)
with torch.inference_mode():
    torch.testing.assert_close(deeper.encode_image(pixels[:4]), model.encode_image(pixels[:4]))
print(f"{len(missing)} new tensors; the same image embeddings as before")

# %% [markdown]
# The new names begin with "resampler.", which `NAMES` already has, so the model can be saved. From then on, the changed
# code loads it, and the unchanged code rejects it: now the new tensors are unexpected.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(deeper, tokenizer.model_file, folder)
    with changed_code:
        again, _ = load_checkpoint(folder)
    print(Checkpoint(folder).problems()[0][:90], "...")
assert torch.equal(again.resampler.x_attn2.q_proj.weight, deeper.resampler.x_attn2.q_proj.weight)

# %% [markdown]
# ## Exercises
#
# Predict, then run. Answers are in `answers.py`.
#
# 1. How many bytes would the published model take in fp32 if its embedding were not tied?
# 2. Old files contain `position_ids` and `embed_positions.weights`; the loader ignores them. Why is that correct?
# 3. Which rows of the parameter table change with 32 instead of 24 decoder layers? With 128 latents?
# 4. Make a copy of the checkpoint with one NaN and load it. Which line finds it, and how much memory does that take?
