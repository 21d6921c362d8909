# %% [markdown]
# # 9. Speed: what a token costs
#
# How fast can a model write on this machine? For one picture at a time the answer hardly depends on how fast
# the processor calculates. Each token needs every weight of the decoder once, so the question is how fast they
# can be read. We predict from that, measure, and then make the weights smaller.

# %%
from figures import COLORS, ROOT, plt, show, table  # isort: skip
import statistics
import time

import torch
import torch.nn.functional as F
from PIL import Image

from kosmos2 import Kosmos2Config, PackedLinear, linear, preprocess_image, quantize
from load_weights import load_checkpoint

torch.set_grad_enabled(False)


def seconds(run, rounds: int = 7) -> float:
    """The median of some rounds, after one to warm up."""
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
# Bytes a second from memory, and operations a second. Limits, so the best of several rounds counts. (These outputs
# differ from machine to machine and from run to run, most of all where memory is shared with others, as in a
# cloud; a point may then even lie a little below its limit. Everything below is computed from what is measured here.)


# %%
def best(run, rounds: int = 12) -> float:
    return min(seconds(run, 1) for _ in range(rounds))


big = torch.ones(2**26)  # 256 MB: larger than any cache
bandwidth = big.numel() * 4 / best(big.sum)
a, b = torch.randn(512, 2048), torch.randn(2048, 4096)
compute = 2 * 512 * 2048 * 4096 / best(lambda: a @ b)
print(
    f"{torch.get_num_threads()} threads: memory {bandwidth / 1e9:.0f} GB/s, compute {compute / 1e9:.0f} GFLOP/s"
)
print(f"ridge: {compute / bandwidth:.0f} operations for every byte read keep both busy")

# %% [markdown]
# ## The roofline
#
# A linear layer with N x K weights and R rows of input does 2·R·N·K operations on 4·N·K bytes: R/2 operations a
# byte in fp32. With one row, far below the ridge: memory decides. With many rows (a long prompt, a large
# batch), far above it: the processor decides. That is why reading a prompt and writing an answer are two
# different problems.

# %%
N, K = 4096, 2048
weight = torch.randn(N, K) / K**0.5
layers = [weight.clone() for _ in range(6)]  # more than fits into the caches, as in a model
rows = (1, 2, 4, 16, 64, 256)
predicted = [max(4 * N * K / bandwidth, 2 * R * N * K / compute) for R in rows]
measured = []
for R in rows:
    x = torch.randn(R, K)
    measured.append(seconds(lambda x=x: [linear(x, w) for w in layers], 5) / len(layers))
table(
    [(R, f"{1e3 * p:.2f}", f"{1e3 * m:.2f}") for R, p, m in zip(rows, predicted, measured, strict=True)],
    ("rows", "predicted ms", "measured ms"),
)

fig, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(rows, [1e3 * v for v in predicted], "--", color="#777777", label="the roofline")
axis.plot(rows, [1e3 * v for v in measured], "o-", color=COLORS[1], label="measured")
axis.set(
    xscale="log",
    yscale="log",
    xlabel="rows",
    ylabel="ms a layer",
    title="first memory decides, then the processor",
)
axis.set(xticks=rows, xticklabels=rows, yticks=(1, 3, 10, 30), yticklabels=(1, 3, 10, 30))
axis.minorticks_off()
axis.legend(frameon=False)
show(
    fig,
    "Time of a layer against the number of rows on logarithmic scales: the predicted line is flat for a few rows and then rises; the measured points lie above it, farthest in the middle.",
)

# %% [markdown]
# (Between one row and many, PyTorch's products reach neither limit: the points lie well above the line there.) So 16
# rows cost a few times as much as one, not 16 times: that is what a batch is good for. While prompts are read, the
# activations of a large batch no longer fit the caches and become memory traffic themselves; `rows_at_a_time` keeps
# to as many rows as fit.
#
# ## A prediction for the published model
#
# A token needs the matrices of 24 blocks and the output projection.

# %%
t = Kosmos2Config().text
weights = t.layers * (4 * t.width**2 + 2 * t.width * t.mlp_width) + t.vocab_size * t.width
print(f"{weights / 1e9:.2f} billion weights a token")
table(
    [(name, f"{weights * size / 1e9:.2f} GB", f"{1e3 * weights * size / bandwidth:.0f} ms", f"{bandwidth / weights / size:.1f}")
     for name, size in (("fp32", 4), ("fp16", 2), ("int8", 1))],
    ("weights", "read for a token", "at least", "tokens/s at most"),
)  # fmt: skip

# %% [markdown]
# `tests/benchmark.py` measures how close the real thing comes. Here is one of its layers:
#
# ## One row, two cores
#
# PyTorch's product of one row with a matrix runs on one core, and one core alone cannot read as fast as the
# memory delivers. `linear` in `kosmos2.py` turns it into a batch of slices, which goes to all cores. (Waking them costs
# a little every time. So where weights are packed, queries, keys and values are one product: `Attention.project`.)

# %%
x = torch.randn(1, K)
torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-5)
for name, run in (("F.linear", F.linear), ("linear", linear)):
    took = seconds(lambda run=run: [run(x, w) for w in layers]) / len(layers)
    print(f"{name:9} {4 * N * K / took / 1e9:5.1f} GB/s")

# %% [markdown]
# ## int8, step by step
#
# Fewer bytes, then. Give each output a scale, so that its largest weight becomes 127, and round. By hand:

# %%
scale = weight.abs().amax(dim=1) / 127
q = (weight / scale[:, None]).round().to(torch.int8)
torch.testing.assert_close(quantize(weight)[0], q)
step = (weight - q * scale[:, None]).abs().amax(dim=1) / scale
print(
    f"rounding is off by at most {step.max():.2f} steps; a step is {float((scale / weight.std(dim=1)).mean()):.3f} standard deviations"
)

# %% [markdown]
# Uniform rounding has a variance of step²/12. So the relative error of a product should be near
# step / √12, in units of the weights' spread; the input is rounded in the same way, and errors of both add as
# squares. Prediction, and the layer:

# %%
packed = PackedLinear(q, None, scale)  # weights, bias and scales; it rounds what comes in by itself
x = torch.randn(64, K)
of_weights = float((scale / weight.std(dim=1)).pow(2).mean() / 12)
of_inputs = float((x.abs().amax(dim=1) / 127 / x.std(dim=1)).pow(2).mean() / 12)
exact = F.linear(x, weight)
error = float((packed(x) - exact).norm() / exact.norm())
print(f"predicted relative error {(of_weights + of_inputs) ** 0.5:.4f}, measured {error:.4f}")
assert abs((of_weights + of_inputs) ** 0.5 / error - 1) < 0.1

# %% [markdown]
# One scale for a whole matrix, instead of one for each output? Then a single large weight makes all others
# coarse:

# %%
outlier = weight.clone()
outlier[7, 7] = 20 * weight.std()
for name, s in (
    ("one scale for each output", outlier.abs().amax(1, keepdim=True) / 127),
    ("one for all", outlier.abs().max() / 127),
):
    rounded = (outlier / s).round() * s
    print(f"{name:26} relative error of the weights {float((rounded - outlier).norm() / outlier.norm()):.4f}")

# %% [markdown]
# Inputs need scales as well, and each row its own: one for a whole batch would make quiet rows coarse beside a loud
# one, and what a picture is called would depend on its neighbours.

# %%
x = torch.randn(4, K)
x[0] *= 20  # a loud neighbour
for name, s in (
    ("one scale for each row", x.abs().amax(1, keepdim=True) / 127),
    ("one for all", x.abs().max() / 127),
):
    rounded = (x / s).round() * s
    print(f"{name:26} relative error of the quiet rows {float((rounded - x)[1:].norm() / x[1:].norm()):.4f}")

# %% [markdown]
# ## What does it cost the bundled model?
#
# Logits move a little. Does what it says? (`tiny/evaluate.py --precision int8` asks thousands of questions. In fp16
# only the weights are halved and sums stay fp32; the bundled weights are stored in 16 bits, so here it costs nothing.
# With weights that need 32 the error is about 1e-3.)

# %%
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
models = {p: load_checkpoint(ROOT / "tiny", p) for p in ("fp32", "fp16", "int8")}
tokenizer = models["fp32"][1]
pixels = preprocess_image(picture, models["fp32"][0].config.vision.image_size)[None]
ids, mask = tokenizer.encode_prompt("<grounding>An image of")
rows, exact = [], None
for name, (model, _) in models.items():
    logits = model(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]))
    exact = logits if exact is None else exact
    new = model.generate(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=100)[0]
    text, entities = tokenizer.read(ids, new)
    rows.append(
        (
            name,
            f"{float((logits - exact).norm() / exact.norm()):.1e}",
            f"{entities[0].scores[0]:.3f}",
            text[:60] + "…",
        )
    )
table(rows, ("weights", "error of logits", "first score", "caption"))

# %% [markdown]
# ## Exercises
#
# 1. With 16 rows, how much faster can int8 be than fp32 at most, on your machine? Which of the two numbers
#    from the beginning decides?
# 2. Predict the fp32 error of the sum of 2,048 products, and compare it with int8's.
# 3. Quantise to 4 bits (`/ 7`). Predict the error by the same formula, then measure.
# 4. The cache is read as well. From which length on does it cost as much as the int8 weights?
