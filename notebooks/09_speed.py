# %% [markdown]
# # 9. Speed: what a token costs
#
# How fast can a model generate on this machine? For one image at a time, each token uses every weight of the decoder
# once, in one multiplication and one addition, so reading the weights takes longer than the arithmetic: memory
# bandwidth is the limit. We predict times from that, measure them, and then make the weights smaller. The layers are
# those of `inference/fast.py`; `kosmos2.py` itself uses plain `nn.Linear`. (Reading time: 25 minutes.)

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from inference.convert import save_packed
from inference.fast import (
    FEW_ROWS,
    PackableCheckpoint,
    PackedLinear,
    cpu_maker,
    input_steps,
    load_checkpoint,
    multi_core_linear,
    quantize,
    sliced_matmul,
)
from kosmos2 import Kosmos2Config, finish, open_image, preprocess_image
from load_weights import INT8_FILE

_ = torch.set_grad_enabled(False)

# %% [markdown]
# Each time below is the shortest of several rounds. Other work on the machine can only make a round slower, so the
# shortest one is closest to what the machine can do.


# %%
def best(run, rounds: int = 12) -> float:
    """Shortest time of some rounds in seconds, after a warm-up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


print(f"{torch.get_num_threads()} threads, CPU: {cpu_maker()}")

# %% [markdown]
# ## Bandwidth and compute of your machine
#
# We measure memory bandwidth (by adding up an array that is larger than the caches) and operations per second (by a
# product of two matrices). All predicted times below follow from these two values.

# %%
big = torch.ones(2**28)  # 1 GiB
bandwidth = big.numel() * 4 / best(big.sum)
a, b = torch.randn(512, 2048), torch.randn(2048, 4096)
compute = 2 * 512 * 2048 * 4096 / best(lambda: a @ b)
ridge = compute / bandwidth
print(f"memory {bandwidth / 1e9:.0f} GB/s, compute {compute / 1e9:.0f} GFLOP/s")
print(f"ridge: at {ridge:.0f} operations per byte, both take the same time")
assert ridge > 1

# %% [markdown]
# ## The roofline
#
# A linear layer with n_out x n_in weights and R rows of input does 2·R·n_out·n_in operations on 4·n_out·n_in bytes: R/2
# operations per byte in fp32. The *roofline* estimates its time: the time to read the weights or the time for the
# arithmetic, whichever is longer. Below the *ridge*, memory bandwidth is the limit; above it, compute. A decoding step
# has one row for each sequence, a prefill one for each token of the prompt. At how many rows is the ridge?

# %%
n_out, n_in = 4096, 2048
at_ridge = 2 * ridge  # R/2 operations per byte
row_counts = (1, 2, 4, 16, 64, 256)


def predict(R: float) -> float:
    return max(4 * n_out * n_in / bandwidth, 2 * R * n_out * n_in / compute)


predicted = [predict(R) for R in row_counts]
print(f"one row: {1e3 * predicted[0]:.2f} ms, limited by memory")
print(f"the ridge is at {at_ridge:.0f} rows; from there on, the time grows with the rows")
assert at_ridge > 2

# %% [markdown]
# Now we measure. (We use 16 layers, because the weights of a single one would stay in the cache of some CPUs.)

# %%
weight = torch.randn(n_out, n_in) / n_in**0.5
layers = [weight.clone() for _ in range(16)]  # 0.5 GB


def time_per_layer(kernel, x: torch.Tensor, rounds: int) -> float:
    return best(lambda: [kernel(x, w) for w in layers], rounds) / len(layers)


measured = [time_per_layer(multi_core_linear, torch.randn(R, n_in), 6) for R in row_counts]
columns = zip(row_counts, predicted, measured, strict=True)
shown = [(R, f"{1e3 * p:.2f}", f"{1e3 * m:.2f}", f"{m / p:.1f}") for R, p, m in columns]
table(shown, ("rows", "predicted ms", "measured ms", "ratio"))

# %% [markdown]
# The same as a figure, on logarithmic scales:

# %%
fig, axis = plt.subplots(figsize=(6, 3.2))
corners = (1, min(at_ridge, row_counts[-1]), row_counts[-1])
axis.plot(corners, [1e3 * predict(R) for R in corners], "--", color="#777777", label="predicted (roofline)")
axis.plot(row_counts, [1e3 * v for v in measured], "o-", color=COLORS[1], label="measured")
axis.axvline(at_ridge, color="#777777", lw=0.8, ls=":", label="ridge")
axis.set(xscale="log", yscale="log", xlabel="rows", ylabel="ms per layer")
axis.set_xticks(row_counts, row_counts)
axis.minorticks_off()
axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
axis.yaxis.set_major_formatter("{x:g}")
axis.legend(frameon=False)
show(fig, "Time of a layer against the number of rows, predicted and measured; a line marks the ridge.")

# %% [markdown]
# The prediction is flat up to the ridge and then proportional to the number of rows. Measured times can be lower: a
# matmul may read memory faster than the sum used to measure the bandwidth. They have no sharp bend at the ridge.
# Between a few rows and the ridge, real kernels are slower than predicted, because with so few rows they reach neither
# the bandwidth nor the peak of the arithmetic, so the time already grows before the ridge. 16 rows take less than 16
# times as long as one, and with many rows the time grows with their number.

# %%
assert measured[3] < 16 * measured[0]
assert measured[-1] > 2 * measured[3]
print(f"16 rows take {measured[3] / measured[0]:.1f} times as long as one row")
print(f"256 rows take {measured[-1] / measured[3]:.1f} times as long as 16")

# %% [markdown]
# For one sequence, a decoding step is limited by memory. Speculative decoding (notebook 5) and decoding in batches
# benefit, because additional rows cost less than the first. In a prefill, arithmetic is the limit.
#
# ## A prediction for the published model
#
# A token needs the matrices of all blocks and the output projection. How many tokens per second does the measured
# bandwidth allow?

# %%
t = Kosmos2Config().text
weights = t.layers * (4 * t.width**2 + 2 * t.width * t.mlp_width) + t.vocab_size * t.width
print(f"{weights / 1e9:.2f} billion weights per token")
rows = []
for name, size in (("fp32", 4), ("fp16", 2), ("int8", 1)):
    took = weights * size / bandwidth
    rows.append((name, f"{weights * size / 1e9:.2f} GB", f"{1e3 * took:.0f} ms", f"{1 / took:.1f}"))
table(rows, ("weights", "read per token", "predicted time", "tokens per second"))

# %% [markdown]
# `tests/benchmark.py` measures how close the whole model comes to this.
#
# ## A few rows on several cores
#
# On some CPUs, `F.linear` multiplies a single row on one core, which cannot saturate memory bandwidth. `sliced_matmul`
# cuts the matrix into slices and multiplies them as a batch, which uses all cores. On other CPUs, `F.linear` is already
# as fast as memory allows. So `multi_core_linear`, which we have measured above, takes one or the other, depending on
# the vendor of the CPU, the number of rows (`FEW_ROWS`) and the size of the matrix (`MANY_WEIGHTS`). The choice is
# fixed in the code: kernels add in different orders, so if the faster one were chosen by timing, the same command could
# give slightly different logits from run to run.

# %%
shown = []
for R in (1, 2, 4, 8, 16, 32):
    x = torch.randn(R, n_in)
    expected = F.linear(x, weight)
    torch.testing.assert_close(sliced_matmul(x, weight), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(multi_core_linear(x, weight), expected, rtol=1e-4, atol=1e-5)
    times = [time_per_layer(kernel, x, 4) for kernel in (F.linear, sliced_matmul)]
    chosen = "sliced" if R in FEW_ROWS[cpu_maker()] else "F.linear"
    shown.append((R, *[f"{1e3 * took:.2f} ms" for took in times], chosen))
table(shown, ("rows", "F.linear", "sliced_matmul", "used here"))

# %% [markdown]
# Which kernel is faster depends on the CPU, the number of cores and the number of rows. On the AMD EPYC of the table in
# [`inference/README.md`](../inference/README.md), the sliced matmul makes decoding 1.9 times as fast as transformers,
# which uses `F.linear`. On an Intel Xeon, it is clearly faster for 7 to 16 rows only.
#
# ## int8, step by step
#
# To store a weight in one byte, each output gets a scale that maps its largest weight to 127, and we round the scaled
# weights. By hand:

# %%
scale = weight.abs().amax(dim=1) / 127
q = (weight / scale[:, None]).round().to(torch.int8)
torch.testing.assert_close(quantize(weight)[0], q)
step = (weight - q * scale[:, None]).abs().amax(dim=1) / scale
deviations = float((scale / weight.std(dim=1)).mean())
print(f"rounding is off by at most {step.max():.2f} steps")
print(f"a step is {deviations:.3f} standard deviations of the weights")
assert step.max() < 0.501

# %% [markdown]
# A rounding error is uniform over one step, so its variance is step²/12. The relative error of a product should
# therefore be about step / √12, divided by the standard deviation of the weights. Inputs are rounded in the same way
# (to 127 steps on either side of zero, or 63 on CPUs without VNNI, the instructions for int8 dot products), and both
# errors add as squares:

# %%
packed = PackedLinear(q, None, scale)  # it rounds its input itself
steps = 127 if packed.packed is None else input_steps()
x = torch.randn(64, n_in)
of_weights = float((scale / weight.std(dim=1)).pow(2).mean() / 12)
of_inputs = float((x.abs().amax(dim=1) / steps / x.std(dim=1)).pow(2).mean() / 12)
exact = F.linear(x, weight)
error = float((packed(x) - exact).norm() / exact.norm())
predicted_error = (of_weights + of_inputs) ** 0.5
print(f"relative error: predicted {predicted_error:.4f}, measured {error:.4f}")
assert abs(predicted_error / error - 1) < 0.1

# %% [markdown]
# What if there were one scale for the whole matrix instead of one per output? A single large weight would make the
# steps large for all other weights:

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
# Inputs have one scale per row. With one scale for the batch, a row with large values would make the steps large for
# all other rows, and results would depend on the batch.

# %%
x = torch.randn(4, n_in)
x[0] *= 20  # a row with large values
errors = {}
for name, size in (
    ("one scale for each row", x.abs().amax(1, keepdim=True)),
    ("one scale for all", x.abs().max()),
):
    rounded = (x / size * 127).round() * size / 127
    errors[name] = float((rounded - x)[1:].norm() / x[1:].norm())
    print(f"{name:26} relative error of the other rows {errors[name]:.4f}")
assert errors["one scale for all"] > 5 * errors["one scale for each row"]

# %% [markdown]
# ## The cost on the bundled model
#
# By how much do the logits change, and does the caption change? (`python tests/model_card.py precision int8` compares
# many answers.) In fp16 on a CPU, only the large matrices are 16-bit. Those of the bundled model are stored in fp16, so
# only the order of sums changes there.

# %%
image = open_image(ROOT / "tiny" / "scene.png")
models = {p: load_checkpoint(ROOT / "tiny", p) for p in ("fp32", "fp16", "int8")}
tokenizer = models["fp32"][1]
pixels = preprocess_image(image, models["fp32"][0].config.vision.image_size)[None]
ids, mask = tokenizer.encode_prompt("<grounding>An image of")
tokens, image_mask = torch.tensor([ids]), torch.tensor([mask])
logits = {}
for name, (model, _) in models.items():
    logits[name] = model(tokens, pixels, image_mask=image_mask)
    print(name, tuple(logits[name].shape))

# %% [markdown]
# The difference from fp32, and the captions:

# %%
exact = logits["fp32"]
rows = []
for name, (model, _) in models.items():
    error = float((logits[name] - exact).norm() / exact.norm())
    state = model.prefill(tokens, pixels, image_mask=image_mask, max_new_tokens=100)
    row = finish(state)[0]
    caption, entities = tokenizer.parse_output(ids, row.ids, row.probabilities)
    rows.append((name, f"{error:.1e}", f"{entities[0].scores[0]:.3f}", caption[:60]))
table(rows, ("weights", "error of logits", "first score", "caption"))
assert float((logits["fp16"] - exact).norm() / exact.norm()) < 1e-4
assert float((logits["int8"] - exact).norm() / exact.norm()) < 0.1

# %% [markdown]
# ## Quantize once
#
# Quantizing while loading reads all weights in their original precision at every start. This command quantizes a
# checkpoint once, and stores the int8 matrices with their scales:
#
#     python -m inference.convert CHECKPOINT DIR --precision int8
#
# How large is the new file, and are the outputs still bit-identical? `save_packed` is the function behind the
# command.

# %%
checkpoint = PackableCheckpoint(ROOT / "tiny")
before = (ROOT / "tiny" / "model.safetensors").stat().st_size
with tempfile.TemporaryDirectory() as folder:
    save_packed(checkpoint, "int8", tokenizer.model_file, folder)
    after = (Path(folder) / INT8_FILE).stat().st_size
    saved, _ = load_checkpoint(folder, "int8")
print(f"{before / 1e6:.1f} MB in fp16, {after / 1e6:.1f} MB in int8")
assert torch.equal(saved(tokens, pixels, image_mask=image_mask), logits["int8"])
assert 0.5 * before < after < 0.65 * before

# %% [markdown]
# The logits are equal. The file is a little larger than half of the one in fp16, because only the matrices of the
# linear layers and of the token embedding are int8, and each has scales.
#
# ## Exercises
#
# 1. With 16 rows, how much faster can int8 be than fp32 at most, on your machine? Which of the two numbers from the
#    beginning decides?
# 2. Predict the fp32 error of the sum of 2,048 products, and compare it with int8's.
# 3. Quantize to 4 bits (`/ 7`). Predict the error by the same formula, then measure.
# 4. The cache is read as well. From which length on does it cost as much as the int8 weights?
