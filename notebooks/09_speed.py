# %% [markdown]
# # 9. Speed: what a token costs
#
# How fast can a model generate on this machine? For one image at a time, each token uses every weight of the decoder
# once, in one multiplication and one addition, so reading the weights takes longer than the arithmetic: memory
# bandwidth is the limit. We predict times from that, measure them, and then make the weights smaller. (Reading time:
# 25 minutes.)

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import load_weights
from kosmos2 import Kosmos2Config, finish, preprocess_image
from load_weights import (
    PackedLinear,
    fastest_kernel,
    input_steps,
    load_checkpoint,
    multi_core_linear,
    quantize,
    rows_times_slices,
    slices_times_columns,
)

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


# %% [markdown]
# ## Bandwidth and compute of your machine
#
# We measure memory bandwidth and operations per second; all predictions below follow from these two values.

# %%
big = torch.ones(2**28)  # 1 GiB: larger than the caches
bandwidth = big.numel() * 4 / best(big.sum)
a, b = torch.randn(512, 2048), torch.randn(2048, 4096)
compute = 2 * 512 * 2048 * 4096 / best(lambda: a @ b)
print(f"{torch.get_num_threads()} threads")
print(f"memory {bandwidth / 1e9:.0f} GB/s, compute {compute / 1e9:.0f} GFLOP/s")
print(f"ridge: at {compute / bandwidth:.0f} operations per byte, both take the same time")

# %% [markdown]
# ## The roofline
#
# A linear layer with N x K weights and R rows of input does 2·R·N·K operations on 4·N·K bytes: R/2 operations per
# byte in fp32. The *roofline* is a lower bound on its time: the longer of the time to read the weights and the time
# for the arithmetic. At the *ridge*, both are equal. Below the ridge, memory bandwidth is the limit; above it,
# compute. A decoding step has one row for each text. A prefill has one for each token of the prompt. Which resource
# limits each?

# %%
N, K = 4096, 2048
weight = torch.randn(N, K) / K**0.5
layers = [weight.clone() for _ in range(16)]  # 0.5 GB: more than fits into most caches, as in a model
rows = (1, 2, 4, 16, 64, 256)
predicted = [max(4 * N * K / bandwidth, 2 * R * N * K / compute) for R in rows]
measured = []
for R in rows:
    x = torch.randn(R, K)
    took = best(lambda x=x: [multi_core_linear(x, w) for w in layers], 6)
    measured.append(took / len(layers))
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
axis.set_title("first memory is the limit, then arithmetic")
axis.set_xticks(rows, rows)
axis.minorticks_off()
axis.legend(frameon=False)
show(fig, "Time of a layer against the number of rows, predicted and measured.")

# %%
assert compute / bandwidth > 1  # so one row, with 1/2 operation per byte, is below the ridge
assert measured[3] < 12 * measured[0]
assert measured[-1] > 2 * measured[3]

# %% [markdown]
# One row is below the ridge: for a decoding step for one text, the limit is memory. (Other work on the machine
# changes both lines from run to run, and a matmul may read a little faster than the sum that measured the bandwidth.)
# On paper, a few more rows are free, because the weights are read only once; the measured line shows what they cost
# with real kernels. That is what speculative decoding (notebook 5) and decoding in batches save: 16 rows take much
# less than 16 times as long as one row. With many rows, as in a prefill, arithmetic is the limit, and the time grows
# with the number of rows.
#
# ## A prediction for the published model
#
# A token needs the matrices of all blocks and the output projection. How many tokens per second does the bandwidth
# allow?

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
# ## A few rows on several cores
#
# On some CPUs, `F.linear` multiplies a single row on one core, which cannot saturate memory bandwidth. A batched
# matmul over slices of the matrix uses all cores, with the slices as its left or right operand. On other CPUs,
# `F.linear` is faster. So `multi_core_linear` in `load_weights.py`, which we have measured above, first finds the
# fastest of these kernels for the given number of rows (`fastest_kernel`). The loader replaces the linear layers of
# the model with layers that call it; `kosmos2.py` itself uses plain `nn.Linear`.

# %%
kernels = (F.linear, slices_times_columns, rows_times_slices)
rows = []
for R in (1, 2, 4, 16):
    x = torch.randn(R, K)
    expected = F.linear(x, weight)
    times = {}
    for kernel in kernels:
        torch.testing.assert_close(kernel(x, weight), expected, rtol=1e-4, atol=1e-5)
        times[kernel] = best(lambda x=x, run=kernel: [run(x, w) for w in layers], 4) / len(layers)
    chosen = fastest_kernel(R)
    assert times[chosen] < 2 * min(times.values())
    rows.append((R, *[f"{1e3 * took:.2f} ms" for took in times.values()], chosen.__name__))
table(rows, ("rows", "F.linear", "slices x columns", "rows x slices", "chosen"))

# %% [markdown]
# Which kernel is the fastest depends on the CPU and on the number of rows. On the AMD EPYC of the README's table, the
# sliced matmul makes decoding 1.9 times as fast as transformers, which uses `F.linear`; on an Intel Xeon, `F.linear`
# is already as fast as memory allows.
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
x = torch.randn(64, K)
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
x = torch.randn(4, K)
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
# By how much do the logits change, and does the caption change? (`training/evaluate.py --precision int8` compares
# many answers.) In fp16, only the weights are 16-bit (on a CPU). The large matrices of the bundled model are stored
# in fp16, so only the order of sums changes there.

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
assert float((logits["fp16"] - exact).norm() / exact.norm()) < 1e-4
assert float((logits["int8"] - exact).norm() / exact.norm()) < 0.1

# %% [markdown]
# ## Quantize once
#
# Quantizing while loading reads all weights in their original precision at every start. This command quantizes a
# checkpoint once, and stores the int8 matrices with their scales:
#
#     python load_weights.py CHECKPOINT --save DIR --precision int8
#
# How large is the new file, and are the outputs still the same to the bit? `save_packed` is the function behind the
# command.

# %%
checkpoint = load_weights.Checkpoint(ROOT / "tiny")
before = (ROOT / "tiny" / "model.safetensors").stat().st_size
with tempfile.TemporaryDirectory() as folder:
    load_weights.save_packed(checkpoint, "int8", tokenizer.model_file, folder)
    after = (Path(folder) / load_weights.INT8_FILE).stat().st_size
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
