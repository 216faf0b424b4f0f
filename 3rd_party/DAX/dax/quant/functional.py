"""The arithmetic: float tensors to 8-bit values and scales, and the product of two 8-bit matrices.

Everything here is plain torch without data-dependent branches, so `torch.compile` fuses the quantization into whatever
computed the activation, and the scales into whatever follows the product.

A value x is stored as q (`qdata`) with x ≈ q·s, for a group of values that shares the scale s = max|x| / qmax. qmax is
the largest finite value of the 8-bit type: 127 (int8, whose -128 stays unused to keep it symmetric), 448
(float8_e4m3fn), 57344 (float8_e5m2). The linear layer is then
y[m, n] = s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + b[n].
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

try:
    from dax.quant import kernels
except ImportError:  # a build of torch without Triton, such as a CPU's
    kernels = None  # type: ignore[assignment]

QMAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

FLOAT32 = torch.finfo(torch.float32)
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = {dtype: min(torch.finfo(dtype).max, FLOAT32.max * (1 - FLOAT32.eps)) for dtype in FLOAT_TYPES}
"""The largest finite value of each type, or a little less, so that the scale times qmax is finite in float32."""

# What the GPU products ask for: `_scaled_mm` wants K and N in multiples of 16, `_int_mm` in multiples of 8 and more
# than 16 rows. One rule serves both, on every device, so that the path tested on a CPU is the one a GPU takes.
ALIGNMENT = 16
MIN_INT8_ROWS = 17

# Values of a row that the registers of a GPU's thread block hold.
LONGEST_GELU_ROW = 16384

# These names of torch are private. Where a version lacks one, the same product is computed in float32.
HAS_INT_MM = hasattr(torch, "_int_mm")
HAS_SCALED_MM = hasattr(torch, "_scaled_mm")
# Without VNNI, oneDNN's int8 product adds pairs of 16-bit partial sums that saturate: wrong, not only slow.
CPU_HAS_INT8_DOT = HAS_INT_MM and getattr(torch.cpu, "_is_vnni_supported", lambda: False)()


def in_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for the device of `x`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of a tensor (and more) so that autocast does not change the types it computes in."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not in_autocast(x):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


def absmax_to_scale(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 scale, of `absmax`'s shape, that maps a group's largest magnitude to qmax of `dtype`.

    It is at least the smallest normal float32, so that a group of zeros or denormals becomes zeros and the scale's
    reciprocal stays finite. For an infinity it is the scale of the largest finite value of `absmax.dtype`; a NaN stays
    NaN.
    """
    return (absmax.float() / QMAX[dtype]).clamp_(FLOAT32.tiny, LARGEST[absmax.dtype] / QMAX[dtype])


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype, in_float: bool = False) -> Tensor:
    """Return `x` [..., K] in 8 bits for a scale that broadcasts against it: round(x / scale) in `dtype`, saturating.

    Infinities become ±qmax. A NaN stays NaN in fp8; int8 has no value for it (see `quantize_per_token`).

    With `in_float` the same values come as float32, for a product that is computed in float32 (see `float_product`).
    """
    q = x.float() * scale.reciprocal()
    if dtype == torch.int8:
        q = q.round_()
    # What a cast does with values it cannot hold differs between versions of torch, so it never sees one.
    q = q.clamp_(-QMAX[dtype], QMAX[dtype])
    if not in_float:
        return q.to(dtype)
    return q if dtype == torch.int8 else round_to_fp8(q, dtype)


def round_to_fp8(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values within ±qmax to those of the fp8 type `dtype`, to nearest and ties to even, as a cast does.

    `q` is overwritten. On a CPU this takes a quarter of the time of a cast and back. Adding 1.5 · 2²³ · step to a value
    and subtracting it again leaves a multiple of the step, which is a power of two below the value's own (or below the
    smallest normal number).
    """
    if torch.jit.is_tracing():  # TorchScript has no view(dtype)
        return q.to(dtype).float()
    mantissa_bits, smallest_normal = (3, 2.0**-6) if dtype == torch.float8_e4m3fn else (2, 2.0**-14)
    exponent = (q.view(torch.int32) & 0x7F800000).view(torch.float32)  # the power of two at or below |q|
    power, steps = exponent.clamp_min_(smallest_normal), 1.5 * 2.0 ** (23 - mantissa_bits)
    return q.add_(power, alpha=steps).sub_(power, alpha=steps)


def quantize_per_token(x: Tensor, dtype: torch.dtype, in_float: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize `x` [..., K] to qdata [..., K] and float32 scales [..., 1]. On a weight [out, in] this is per-channel.

    A row with an infinity saturates: the infinity counts as the largest finite value of `x.dtype`. A row with a NaN
    gets the scale NaN, so that its output is NaN in every column, as a float Linear's would be, and no other row is.
    `in_float` is as in `quantize`.
    """
    scale = absmax_to_scale(x.abs().amax(-1, keepdim=True), dtype)
    return quantize(x, scale, dtype, in_float), scale


def gelu(x: Tensor) -> Tensor:
    """Return GELU of `x` (any shape and float type), tanh form: (1 + tanh(u)) / 2 = sigmoid(2u), a third of the work."""
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * y * (1 + 0.044715 * y * y))).to(x.dtype)


def quantize_gelu_per_token(x: Tensor, dtype: torch.dtype, in_float: bool = False) -> tuple[Tensor, Tensor]:
    """Return `quantize_per_token` of GELU(`x`); on a GPU, rows of up to `LONGEST_GELU_ROW` take one Triton kernel."""
    if not x.is_cuda or kernels is None or x.shape[-1] > LONGEST_GELU_ROW:
        return quantize_per_token(gelu(x), dtype, in_float)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    q, scale = kernels.gelu_quantize(rows, dtype, QMAX[dtype], FLOAT32.tiny, LARGEST[x.dtype] / QMAX[dtype])
    return q.view(x.shape), scale.view(*x.shape[:-1], 1)


def quantize_per_tensor(
    x: Tensor, dtype: torch.dtype, group: "dist.ProcessGroup | None" = None, in_float: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize `x` of any shape to qdata of that shape and one float32 scale of shape []; a NaN anywhere makes it NaN.

    With `group`, whose ranks each hold a part of the tensor, the scale is that of the whole tensor, the same on all
    ranks (except that a NaN may show on the rank alone that has it). `in_float` is as in `quantize`.
    """
    absmax = x.abs().amax()
    if group is not None:
        absmax = absmax.float()
        dist.all_reduce(absmax, dist.ReduceOp.MAX, group=group)
        absmax = absmax.to(x.dtype)
    scale = absmax_to_scale(absmax, dtype)
    return quantize(x, scale, dtype, in_float), scale


def hadamard(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the orthonormal Walsh-Hadamard matrix [n, n], n a power of two up to 64: symmetric, its own inverse."""
    i = torch.arange(n, device=device)
    parity = i[:, None] & i
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return ((1 - 2 * (parity & 1)) * n**-0.5).to(dtype)


@no_autocast
def rotate(x: Tensor, width: int | None = None) -> Tensor:
    """Multiply `x` [..., K] by a block-diagonal Hadamard matrix, which spreads an outlier over its block; twice undoes it.

    A block is 64, 16 or 4 wide, as K allows, so that its entries are exact in every type; for other K nothing changes.
    Magnitudes beyond 1/64 of the type's largest saturate, so that no sum overflows: an infinity never makes a NaN.
    (QuaRot, arXiv 2404.00456: x Wᵀ = (x H)(W H)ᵀ.) `width` is K as a number, where a trace records `x.shape`.
    """
    width = x.shape[-1] if width is None else width
    n = next(n for n in (64, 16, 4, 1) if width % n == 0)
    limit = torch.finfo(x.dtype).max / n
    blocks = x.clamp(-limit, limit).contiguous().unflatten(-1, (-1, n))  # cuBLAS rounds by layout
    return (blocks @ hadamard(n, x.device, x.dtype)).flatten(-2)


def pad_to(q: Tensor, rows: int, cols: int) -> Tensor:
    """Pad `q` [r, c] of an 8-bit type with zeros below and to the right: [rows, cols]. No copy if it fits already."""
    r, c = q.shape
    if (r, c) == (rows, cols):
        return q
    return F.pad(q.view(torch.int8), (0, cols - c, 0, rows - r)).view(q.dtype)  # zero is the byte 0 in all of them


def pad_weight(wq: Tensor) -> Tensor:
    """Pad `wq` [N, K] to multiples of `ALIGNMENT` both ways; return it as it is where it fits already."""
    n, k = wq.shape
    return pad_to(wq, n + -n % ALIGNMENT, k + -k % ALIGNMENT)


@torch.library.custom_op("dax::cuda_int8_mm", mutates_args=())
def cuda_int8_mm(x: Tensor, w: Tensor) -> Tensor:
    """Multiply as `torch._int_mm`, any number of rows: CUDA wants more than 16, and a branch on M would be a guard."""
    m, k = x.shape
    return torch._int_mm(pad_to(x, max(m, MIN_INT8_ROWS), k), w.t())[:m]


@cuda_int8_mm.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.int32)


def float_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `device` multiplies values of the 8-bit type `dtype` as the float32 numbers that they stand for."""
    if device.type == "cpu" and (dtype != torch.int8 or not CPU_HAS_INT8_DOT):
        return True
    if torch.jit.is_tracing():  # TorchScript has neither view(dtype), nor padding of fp8, nor products in 8 bits
        return True
    return device.type == "meta" or not (HAS_INT_MM if dtype == torch.int8 else HAS_SCALED_MM)


def float_linear(
    q: Tensor, scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Compute `linear` in float32, from the dequantized weight and the float32 values `q` [..., K], which it overwrites.

    The dequantized weight lives for this call only: kept, it would take back four times the memory that 8 bits save.
    """
    w, unit = to_float32(wq)
    w.mul_(w_scale if unit == 1 else w_scale * unit)
    return F.linear(q.mul_(scale), w, None if bias is None else bias.float()).to(out_dtype)


def to_float32(q: Tensor) -> tuple[Tensor, float]:
    """Return 8-bit values as float32 `values`, a new tensor, and the power of two `unit` that they lack: q = values · unit.

    The fp8 formats are float16 with bits left out: e5m2 is its upper byte; e4m3 has one exponent bit less, and a bias
    of 7 instead of 15, hence the unit of 2⁸. On a CPU this is up to 13 times faster than `q.float()` (torch 2.13). Only
    e4m3's NaN is lost on the way (it reads as 480).
    """
    if q.dtype == torch.int8 or torch.jit.is_tracing():
        return q.float(), 1.0
    bits = q.view(torch.int8).to(torch.int16)
    if q.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float(), 1.0
    mask = 0xBFFF - 0x10000  # as int16: all but the top exponent bit, into which the sign was extended
    return bits.bitwise_left_shift_(7).bitwise_and_(mask).view(torch.float16).float(), 2.0**8


def int8_mm(x: Tensor, w: Tensor) -> Tensor:
    """Multiply int8 [M, K] by int8 [N, K] transposed → the exact int32 [M, N]."""
    return cuda_int8_mm(x, w) if x.is_cuda else torch._int_mm(x, w.t())


def fp8_mm(x: Tensor, w: Tensor) -> Tensor:
    """Multiply fp8 [M, K] by fp8 [N, K] transposed → float32 [M, N], on a GPU."""
    one = x.new_ones((1, 1), dtype=torch.float32)
    return torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


def scaled_fp8_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear` in one product with the scales [M or 1, 1], [N or 1, 1] and the bias [N] in its epilogue.

    It returns bfloat16, the one type for which every GPU and version of torch promises row-wise scales.
    """
    if x_scale.numel() > 1 or w_scale.numel() > 1:  # row-wise means one scale a row on both sides
        x_scale = x_scale.expand(x.shape[0], 1).contiguous()
        w_scale = w_scale.expand(w.shape[0], 1).contiguous()
    bias = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def scaled_int8_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear` in one product, as `scaled_fp8_mm`, by a Triton kernel; K is a multiple of `kernels.BLOCK_K`."""
    x_scale = x_scale.expand(x.shape[0], 1).contiguous().view(-1)  # the kernel reads one scale a row, side by side
    w_scale = w_scale.expand(w.shape[0], 1).contiguous().view(-1)
    bias = x_scale.new_zeros(w.shape[0], dtype=torch.bfloat16) if bias is None else bias.to(torch.bfloat16)
    return kernels.int8_scaled_mm(x, w, x_scale, w_scale, bias)


@no_autocast
def linear(
    xq: Tensor,
    x_scale: Tensor,
    wq: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    padded_wq: Tensor | None = None,
) -> Tensor:
    """Return y = (xq · x_scale) @ (wq · w_scale)ᵀ + bias, multiplied in 8 bits, scaled and summed in float32.

    Args:
        xq: [..., K] int8 with an int8 weight, float8_e4m3fn or float8_e5m2 with a float8_e4m3fn weight; or such
            values in float32 (see `float_product`), which are overwritten.
        x_scale: float32, one value, or one for each row: [..., 1].
        wq: [N, K]; any N and K.
        w_scale: float32, [1, 1] or [N, 1].
        bias: [N] or None.
        padded_wq: `pad_weight(wq)`, where the caller keeps it; otherwise it is made on each call.

    Returns:
        [..., N] in `out_dtype`.

    Raises:
        RuntimeError: the widths of `xq` and `wq` differ.
    """
    check_width(xq, wq)
    if xq.dtype == torch.float32:
        return float_linear(xq, x_scale, wq, w_scale, bias, out_dtype)
    if float_product(xq.dtype, xq.device):
        values, unit = to_float32(xq)
        return float_linear(values * unit, x_scale, wq, w_scale, bias, out_dtype)
    n = wq.shape[0]
    w = pad_weight(wq) if padded_wq is None else padded_wq
    x, x_scale = xq.reshape(-1, xq.shape[-1]).contiguous(), x_scale.reshape(-1, 1)
    x = pad_to(x, x.shape[0], w.shape[1])
    if out_dtype == torch.bfloat16 and w.shape[0] == n and (scaled_mm := epilogue_mm(x)) is not None:
        y = scaled_mm(x, x_scale, w, w_scale, bias)
    else:
        sums = int8_mm(x, w) if x.dtype == torch.int8 else fp8_mm(x, w)
        y = sums[:, :n].float().mul_(x_scale)
        y = y * w_scale.t() if bias is None else torch.addcmul(bias.float(), y, w_scale.t())
    return y.to(out_dtype).view(*xq.shape[:-1], n)


def epilogue_mm(x: Tensor) -> Callable[..., Tensor] | None:
    """Return the product with the scales in its epilogue that takes `x` [M, K], or None where there is none."""
    if not x.is_cuda:
        return None
    if x.dtype != torch.int8:
        return scaled_fp8_mm
    return scaled_int8_mm if kernels is not None and x.shape[1] % kernels.BLOCK_K == 0 else None


def check_width(x: Tensor, weight: Tensor) -> None:
    """Raises RuntimeError, in the words of `torch.nn.functional.linear`, if `x` [..., K] does not fit `weight` [N, K]."""
    n, k = weight.shape
    if torch.jit.is_tracing():  # there a shape is a recorded value, and a branch on it a warning
        return
    if x.dim() == 0:
        raise RuntimeError("both arguments to linear need to be at least 1D, but they are 0D and 2D")
    if x.shape[-1] != k:
        rows = math.prod(x.shape[:-1])
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({rows}x{x.shape[-1]} and {k}x{n})")
