# %% [markdown]
# # 9. Speed: what a token costs
#
# How fast can a model generate on this machine? For one image at a time, this hardly depends on the speed of the
# arithmetic: each token needs every weight of the decoder once, so the question is how fast they can be read. We
# predict the speed from that, measure it, and then make the weights smaller. (Reading time: 25 minutes.)

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import load_weights
from kosmos2 import Kosmos2Config, finish, preprocess_image
from load_weights import PackedLinear, load_checkpoint, multi_core_linear, quantize

torch.set_grad_enabled(False)

# %% [markdown]
# All times below are medians of a few rounds.


# %%
def seconds(run, rounds: int = 7) -> float:
    """The median of some rounds, after a warm-up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# %% [markdown]
# ## Two numbers of your machine
#
# Memory bandwidth and operations per second. These are limits, so the best of several rounds counts. They differ from
# machine to machine, and from run to run where memory is shared with others. Everything below is computed from the
# values measured here.


# %%
def best(run, rounds: int = 12) -> float:
    return min(seconds(run, 1) for _ in range(rounds))


big = torch.ones(2**26)  # 256 MB: larger than any cache
bandwidth = big.numel() * 4 / best(big.sum)
a, b = torch.randn(512, 2048), torch.randn(2048, 4096)
compute = 2 * 512 * 2048 * 4096 / best(lambda: a @ b)
print(f"{torch.get_num_threads()} threads")
print(f"memory {bandwidth / 1e9:.0f} GB/s, compute {compute / 1e9:.0f} GFLOP/s")
print(f"ridge: {compute / bandwidth:.0f} operations per byte use both fully")

# %% [markdown]
# ## The roofline
#
# A linear layer with N x K weights and R rows of input does 2·R·N·K operations on 4·N·K bytes: R/2 operations per byte
# in fp32. With one row this is far below the ridge, so memory bandwidth is the limit. With many rows (a long prompt, a
# large batch) arithmetic is the limit. So prefill and decoding are two different problems.

# %%
N, K = 4096, 2048
weight = torch.randn(N, K) / K**0.5
layers = [weight.clone() for _ in range(6)]  # more than fits into the caches, as in a model
rows = (1, 2, 4, 16, 64, 256)
predicted = [max(4 * N * K / bandwidth, 2 * R * N * K / compute) for R in rows]
measured = []
for R in rows:
    x = torch.randn(R, K)
    measured.append(seconds(lambda x=x: [multi_core_linear(x, w) for w in layers], 5) / len(layers))
columns = zip(rows, predicted, measured, strict=True)
shown = [(R, f"{1e3 * p:.2f}", f"{1e3 * m:.2f}") for R, p, m in columns]
table(shown, ("rows", "predicted ms", "measured ms"))

# %% [markdown]
# The same as a figure, on logarithmic scales:

# %%
fig, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(rows, [1e3 * v for v in predicted], "--", color="#777777", label="the roofline")
axis.plot(rows, [1e3 * v for v in measured], "o-", color=COLORS[1], label="measured")
axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms per layer")
axis.set_title("limited by memory, then by arithmetic")
axis.set_xticks(rows, rows)
axis.set_yticks((1, 3, 10, 30), (1, 3, 10, 30))
axis.minorticks_off()
axis.legend(frameon=False)
show(fig, "Time of a layer against the number of rows: the predicted line is flat, then rises.")

# %% [markdown]
# 16 rows cost much less than 16 times as much as one row: this is why batches pay off.

# %%
assert measured[3] < 12 * measured[0]

# %% [markdown]
# ## A prediction for the published model
#
# A token needs the matrices of 24 blocks and the output projection.

# %%
t = Kosmos2Config().text
weights = t.layers * (4 * t.width**2 + 2 * t.width * t.mlp_width) + t.vocab_size * t.width
print(f"{weights / 1e9:.2f} billion weights per token")
rows = []
for name, size in (("fp32", 4), ("fp16", 2), ("int8", 1)):
    took = weights * size / bandwidth
    rows.append((name, f"{weights * size / 1e9:.2f} GB", f"{1e3 * took:.0f} ms", f"{1 / took:.1f}"))
table(rows, ("weights", "read per token", "at least", "tokens per second at most"))

# %% [markdown]
# `tests/benchmark.py` measures how close the whole model comes to this.
#
# ## One row, several cores
#
# PyTorch runs a one-row matmul on one core, which cannot saturate memory bandwidth. `multi_core_linear` in
# `load_weights.py` turns it into a batched matmul over slices of the matrix, which uses all cores. The loader replaces
# the linear layers of the model by such layers; `kosmos2.py` itself uses plain `nn.Linear`.

# %%
x = torch.randn(1, K)
torch.testing.assert_close(multi_core_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-5)
for name, run in (("F.linear", F.linear), ("multi_core_linear", multi_core_linear)):
    took = seconds(lambda run=run: [run(x, w) for w in layers]) / len(layers)
    print(f"{name:18} {4 * N * K / took / 1e9:5.1f} GB/s")

# %% [markdown]
# ## int8, step by step
#
# To read fewer bytes, give each output a scale so that its largest weight becomes 127, and round. By hand:

# %%
scale = weight.abs().amax(dim=1) / 127
q = (weight / scale[:, None]).round().to(torch.int8)
torch.testing.assert_close(quantize(weight)[0], q)
step = (weight - q * scale[:, None]).abs().amax(dim=1) / scale
deviations = float((scale / weight.std(dim=1)).mean())
print(f"rounding is off by at most {step.max():.2f} steps")
print(f"a step is {deviations:.3f} standard deviations of the weights")

# %% [markdown]
# Uniform rounding has a variance of step²/12. So the relative error of a product should be about step / √12, relative
# to the standard deviation of the weights. Inputs are rounded in the same way, and both errors add as squares:

# %%
packed = PackedLinear(q, None, scale)  # it rounds its input itself
x = torch.randn(64, K)
of_weights = float((scale / weight.std(dim=1)).pow(2).mean() / 12)
of_inputs = float((x.abs().amax(dim=1) / 127 / x.std(dim=1)).pow(2).mean() / 12)
exact = F.linear(x, weight)
error = float((packed(x) - exact).norm() / exact.norm())
print(f"predicted relative error {(of_weights + of_inputs) ** 0.5:.4f}, measured {error:.4f}")
assert abs((of_weights + of_inputs) ** 0.5 / error - 1) < 0.1

# %% [markdown]
# With one scale for the whole matrix instead of one per output, a single large weight makes all others coarse:

# %%
outlier = weight.clone()
outlier[7, 7] = 20 * weight.std()
errors = {}
for name, size in (
    ("one scale for each output", outlier.abs().amax(1, keepdim=True)),
    ("one scale for all", outlier.abs().max()),
):
    rounded = (outlier / size * 127).round() * size / 127
    errors[name] = float((rounded - outlier).norm() / outlier.norm())
    print(f"{name:26} relative error of the weights {errors[name]:.4f}")
assert errors["one scale for all"] > 2 * errors["one scale for each output"]

# %% [markdown]
# Inputs have one scale per row. With one scale for the batch, rows with small values would be coarse next to a row with
# large ones, and results would depend on the batch.

# %%
x = torch.randn(4, K)
x[0] *= 20  # a row with large values
for name, size in (
    ("one scale for each row", x.abs().amax(1, keepdim=True)),
    ("one scale for all", x.abs().max()),
):
    rounded = (x / size * 127).round() * size / 127
    error = float((rounded - x)[1:].norm() / x[1:].norm())
    print(f"{name:26} relative error of the other rows {error:.4f}")

# %% [markdown]
# ## The cost on the bundled model
#
# The logits change a little. Does the caption? (`training/evaluate.py --precision int8` compares thousands of answers.
# In fp16 only the weights are 16-bit; the bundled weights are stored in fp16, so nothing changes.)

# %%
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
models = {p: load_checkpoint(ROOT / "tiny", p) for p in ("fp32", "fp16", "int8")}
tokenizer = models["fp32"][1]
pixels = preprocess_image(image, models["fp32"][0].config.vision.image_size)[None]
ids, mask = tokenizer.encode_prompt("<grounding>An image of")
tokens, image_mask = torch.tensor([ids]), torch.tensor([mask])
logits = {}
for name, (model, _) in models.items():
    logits[name] = model(tokens, pixels, image_mask=image_mask)

# %%
exact = logits["fp32"]
rows = []
for name, (model, _) in models.items():
    error = float((logits[name] - exact).norm() / exact.norm())
    state = model.prefill(tokens, pixels, image_mask=image_mask, max_new_tokens=100)
    result = finish(state)[0]
    text, entities = tokenizer.parse_output(ids, result.ids, result.probabilities)
    rows.append((name, f"{error:.1e}", f"{entities[0].scores[0]:.3f}", text[:60]))
table(rows, ("weights", "error of logits", "first score", "caption"))
assert float((logits["int8"] - exact).norm() / exact.norm()) < 0.1

# %% [markdown]
# ## Quantize once
#
# Quantizing reads all weights in their original precision at every start. `python load_weights.py CHECKPOINT --save DIR
# --precision int8` does it once and stores the int8 matrices with their scales. The outputs are the same to the bit.

# %%
folder = Path(tempfile.mkdtemp())
checkpoint = load_weights.Checkpoint(ROOT / "tiny")
load_weights.save_packed(checkpoint, "int8", tokenizer.model_file, folder)
before = (ROOT / "tiny" / "model.safetensors").stat().st_size
after = (folder / "model.int8.safetensors").stat().st_size
print(f"{before / 1e6:.1f} MB in fp16, {after / 1e6:.1f} MB in int8")
saved, _ = load_checkpoint(folder, "int8")
assert torch.equal(saved(tokens, pixels, image_mask=image_mask), logits["int8"])
assert after < 0.65 * before

# %% [markdown]
# ## Exercises
#
# 1. With 16 rows, how much faster can int8 be than fp32 at most, on your machine? Which of the two numbers
#    from the beginning decides?
# 2. Predict the fp32 error of the sum of 2,048 products, and compare it with int8's.
# 3. Quantize to 4 bits (`/ 7`). Predict the error by the same formula, then measure.
# 4. The cache is read as well. From which length on does it cost as much as the int8 weights?
