"""Load a checkpoint with linear layers that are fast on a CPU.

    from inference.fast import load_checkpoint
    model, tokenizer = load_checkpoint("microsoft/kosmos-2-patch14-224", precision="int8")

Decoding is memory-bound: each step multiplies one row by every weight, so it takes as long as
reading the weights. kosmos2.py uses plain nn.Linear; after building the model, `load_checkpoint`
replaces its layers: in fp32 with ones that use all cores, in fp16 and int8 with smaller ones.
(Walkthrough: notebooks/09_speed.)
"""

import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import load_weights
from kosmos2 import Attention, Block, Embedding, Kosmos2
from load_weights import EMBEDDING, FLOATS, INT8_FILE, WEIGHT_FILES, Checkpoint, LazyTensor
from tokenizer import Tokenizer

PRECISIONS = [*load_weights.PRECISIONS, "int8"]
PACKED = ("fp16", "int8")  # on a CPU: the large matrices have this precision, everything else is float32
SCALE = "_scale"  # the scales of an int8 matrix NAME.weight are stored as NAME.weight_scale

# ---- float32 on all cores --------------------------------------------------------------------------

# The numbers of rows for which a batched matmul over slices of the matrix is faster than F.linear: up to
# 16 rows, F.linear runs on one core, which cannot saturate the memory bandwidth; on Intel CPUs, it does so
# only for 7 to 16 rows. (Measured on an AMD EPYC and an Intel Xeon, and fixed here: if the fastest kernel
# were chosen at run time, the logits would change from run to run.)
FEW_ROWS = {"intel": range(7, 17), "other": range(1, 17)}
MANY_WEIGHTS = 2**20  # smaller matrices stay in the cache of one core


class MultiCoreLinear(nn.Linear):
    """nn.Linear that uses all cores even for a few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return multi_core_linear(x, self.weight, self.bias)


class MultiCoreEmbedding(Embedding):
    """Embedding whose output projection uses all cores even for a few rows."""

    def unembed(self, x: Tensor) -> Tensor:
        return multi_core_linear(x, self.weight)


def multi_core_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in) times weight (out, in) transposed, plus bias (out,)."""
    n_out, n_in = weight.shape
    rows = x.numel() // n_in
    use_slices = rows in FEW_ROWS[cpu_maker()] and weight.numel() >= MANY_WEIGHTS
    if not use_slices or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y = sliced_matmul(x.reshape(rows, n_in), weight)  # (rows, out)
    y = y.reshape(*x.shape[:-1], n_out)  # (..., out)
    return y if bias is None else y + bias


def sliced_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) times weight (out, in) transposed -> (rows, out), slice by slice of the outputs."""
    count = max(n for n in range(1, 65) if len(weight) % n == 0)  # for all cores, yet each still large
    slices = weight.unflatten(0, (count, -1))  # (slices, out / slices, in)
    columns = x.T.expand(count, -1, -1)  # (slices, in, rows)
    return torch.bmm(slices, columns).flatten(0, 1).T  # (rows, out)


@lru_cache
def cpu_maker() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else platform.processor()
    return "intel" if "GenuineIntel" in text else "other"


def use_multi_core_layers(model: Kosmos2) -> None:
    """Replace the linear layers and the embedding of a model on the meta device.

    The names of its tensors stay the same.
    """
    with torch.device("meta"):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(name, MultiCoreLinear(module.in_features, module.out_features))
            elif type(module) is Embedding:
                model.set_submodule(name, MultiCoreEmbedding.from_pretrained(module.weight, freeze=False))


# ---- 8 and 16 bits ---------------------------------------------------------------------------------

MANY_OUTPUTS = 2**14  # packing a matrix with more outputs in one piece takes about three times as long


class PackedLinear(nn.Module):
    """A linear layer with 8- or 16-bit weights, for CPUs; inputs and outputs are float32.

    In int8, the weights of output n are scale[n] * q[n] with q in -127..127. Each row of x is
    rounded the same way, to 127 steps (63 on CPUs without VNNI: see `input_steps`), with a scale of
    its own, so rows are independent of each other. Uses PyTorch's fbgemm kernels (in int8, their sums
    are exact) where they are available. Elsewhere (ARM), plain arithmetic saves memory but not time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None):
        """weight (out, in): float16, or int8 with its scale (out,)."""
        super().__init__()
        self.bias = bias
        self.scale = scale
        self.weight = weight
        self.packed = None
        engines = torch.backends.quantized.supported_engines
        if hasattr(torch.ops.quantized, INT8_KERNEL) and ("x86" in engines or "fbgemm" in engines):
            self.weight = None
            self.packed = pack(weight, bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None and self.packed is not None:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        if self.scale is None:
            return F.linear(x, self.weight.float(), self.bias)
        size = absmax(x)  # (..., 1)
        if self.packed is not None:
            y = int8_matmul(x / size, self.packed, input_steps())
        else:
            rounded = (x / size * 127).round() / 127
            y = F.linear(rounded, self.weight.float()) * self.scale
        if self.bias is None:
            return y.mul_(size)
        return torch.addcmul(self.bias, y, size, out=y)


class PackedAttention(Attention):
    """Self-attention with one packed matmul for queries, keys and values: faster than three."""

    qkv_proj: PackedLinear

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is not None:
            raise ValueError("PackedAttention is self-attention: queries, keys and values have one input")
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)  # (B, T, D) each
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)


class PackedEmbedding(nn.Module):
    """`Embedding` in 8 or 16 bits: rows for tokens, the whole matrix for the logits."""

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.scale = scale
        self.parts = nn.ModuleList()  # of the output projection
        for start in range(0, len(weight), MANY_OUTPUTS):
            rows = slice(start, start + MANY_OUTPUTS)
            part_scale = None if scale is None else scale[rows]
            self.parts.append(PackedLinear(weight[rows], None, part_scale))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight[tokens].float()  # (B, T, D)
        return rows if self.scale is None else rows * self.scale[tokens][..., None]

    def unembed(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)  # (..., V)


INT8_KERNEL = "linear_with_input_q_dq_qweight_dq_output_fp32"
# PyTorch warns that quantized tensors are deprecated; its kernels take no others.
warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)


def pack(weight: Tensor, bias: Tensor | None, scale: Tensor | None):
    """Weights in the memory layout of PyTorch's kernels; for int8 without the bias."""
    if scale is None:
        return torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
    zero_points = torch.zeros(len(scale), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_points, 0)
    return torch.ops.quantized.linear_prepack(weight, None)


def int8_matmul(x: Tensor, packed, steps: int) -> Tensor:
    """x (..., in) in -1..1, rounded to `steps` steps on either side of zero, times int8 weights."""
    kernel = getattr(torch.ops.quantized, INT8_KERNEL)
    return kernel(x, 1 / steps, steps + 1, packed)


@lru_cache
def input_steps() -> int:
    """127, or 63 on CPUs without VNNI instructions, which add pairs of products in int16.

    The kernel stores inputs as 1 to 255. Two products of 255 and 127 overflow int16 and saturate
    silently; this checks for it with one small matmul.
    """
    trial = pack(torch.full((16, 64), 127, dtype=torch.int8), None, torch.ones(16))
    products = int8_matmul(torch.ones(1, 64), trial, 127)
    exact = torch.allclose(products, torch.tensor(64.0 * 127))
    return 127 if exact else 63


def absmax(x: Tensor) -> Tensor:
    """The largest absolute value of each row, (..., 1), at least 1e-30.

    (x.abs() would allocate a copy of x.)
    """
    high = x.amax(dim=-1, keepdim=True)
    low = x.amin(dim=-1, keepdim=True)
    return torch.maximum(high, -low).clamp(min=1e-30)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> q, int8 (out, in), and scale (out,), so that scale * q is close to weight."""
    scale = absmax(weight)[:, 0] / 127
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, len(weight), 512):  # parts that stay in the cache
        rows = slice(start, start + 512)
        quantized[rows].copy_((weight[rows] / scale[rows, None]).round_())
    return quantized, scale


# ---- Loading ---------------------------------------------------------------------------------------


class PackableCheckpoint(Checkpoint):
    """A checkpoint that may also be in int8 (convert.py).

    An int8 matrix with its scales is shown to the checks of `Checkpoint` as one float32 tensor,
    computed when it is read; `int8` has the two parts.
    """

    weight_files = [*WEIGHT_FILES, INT8_FILE]

    def read_files(self) -> dict[str, LazyTensor]:
        stored = super().read_files()
        self.int8: dict[str, tuple[LazyTensor, LazyTensor]] = {}  # stored name -> matrix and scales
        for name in [name for name in stored if name + SCALE in stored]:
            matrix = stored[name]
            scale = stored[name + SCALE]
            is_int8 = matrix.dtype == "int8" and len(matrix.shape) == 2
            if is_int8 and scale.shape == matrix.shape[:1] and scale.dtype in FLOATS.values():
                self.int8[name] = matrix, stored.pop(name + SCALE)
                stored[name] = LazyTensor(matrix.shape, "float32", partial(self.read_dense, name))
        return stored

    def read_int8(self, name: str) -> tuple[Tensor, Tensor]:
        """A stored int8 matrix (out, in) and its scales (out,), checked."""
        matrix, scale = (part.read() for part in self.int8[name])
        scale = scale.float()
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f"{name}{SCALE} has NaN, infinite or non-positive values; the checkpoint is damaged"
            )
        return matrix, scale

    def read_dense(self, name: str) -> Tensor:
        matrix, scale = self.read_int8(name)
        return matrix * scale[:, None]

    def quantized(self, ours: str) -> tuple[Tensor, Tensor]:
        """A matrix as int8 (out, in) and its scales (out,): as stored, or quantized now."""
        name = self.names[ours]
        if name in self.int8:
            return self.read_int8(name)
        return quantize(self.tensor(ours, torch.float32, copy=False))


def load_checkpoint(
    path: str | Path,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[Kosmos2, Tokenizer]:
    """`load_weights.load_checkpoint` with the layers of this file on a CPU (not for bf16), plain ones elsewhere.

    precision: fp32 (exact, the default), bf16 (half the memory), fp16 (on a CPU for the large
    matrices only), int8 (the fastest on x86 CPUs; also rounds the inputs of the large matrices);
    independent of the stored one. inference/README.md has their memory and speed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    device = load_weights.choose_device(device, precision)
    on_cpu = device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise ValueError("int8 is for CPUs; use bf16 or fp16 on other devices")
    checkpoint = PackableCheckpoint(path)
    found_tokenizer = load_weights.check_checkpoint(checkpoint, tokenizer)
    if precision in PACKED and on_cpu:
        return read_packed(checkpoint, precision).eval(), found_tokenizer
    if precision == "fp32" and on_cpu:
        use_multi_core_layers(checkpoint.model)
    model = load_weights.read_model(checkpoint, load_weights.PRECISIONS[precision], device)
    return model.eval(), found_tokenizer


def read_packed(checkpoint: PackableCheckpoint, precision: str) -> Kosmos2:
    """The large matrices in 8 or 16 bits, packed as they are read, the rest as float32.

    For inference only.
    """
    model = checkpoint.model
    sources = share_qkv(model)  # a packed module -> the modules whose weights it stacks
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Embedding)):
            sources[name] = [name]

    def read(name: str) -> nn.Module:
        return packed_module(checkpoint, precision, sources[name])

    def size(name: str) -> int:
        return checkpoint.numel(f"{sources[name][0]}.weight")

    largest_first = sorted(sources, key=size, reverse=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, module in zip(largest_first, pool.map(read, largest_first), strict=True):
            model.set_submodule(name, module)
    rest = {name: checkpoint.tensor(name, torch.float32) for name in model.state_dict()}
    model.load_state_dict(rest, strict=True, assign=True)
    return model.requires_grad_(False)


def share_qkv(model: Kosmos2) -> dict[str, list[str]]:
    """Replace the attention of all blocks with PackedAttention.

    Blocks have self-attention, so queries, keys and values share one input. Returns the names
    {qkv_proj: [q_proj, k_proj, v_proj]}.
    """
    sources = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Block):
            with torch.device("meta"):
                attention = PackedAttention(module.attn.out_proj.in_features, module.attn.heads)
            attention.inner_attn_ln = module.attn.inner_attn_ln
            attention.q_proj = attention.k_proj = attention.v_proj = None  # qkv_proj replaces them
            module.attn = attention
            sources[f"{name}.attn.qkv_proj"] = [f"{name}.attn.{part}_proj" for part in "qkv"]
    return sources


def packed_module(checkpoint: PackableCheckpoint, precision: str, sources: list[str]) -> nn.Module:
    """One layer with the stacked weights of these modules, in 8 or 16 bits."""
    weights = []
    scales = []
    for source in sources:
        if precision == "int8":
            weight, scale = checkpoint.quantized(f"{source}.weight")
            scales.append(scale)
        else:
            weight = checkpoint.tensor(f"{source}.weight", torch.float16)
        weights.append(weight)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # (out, in), of all sources
    scale = torch.cat(scales) if scales else None  # (out,)
    if f"{sources[0]}.weight" == EMBEDDING:
        checkpoint.check_tied()
        return PackedEmbedding(weight, scale)
    bias = torch.cat([checkpoint.tensor(f"{source}.bias", torch.float32) for source in sources])
    return PackedLinear(weight, bias, scale)
