"""Triton kernels for GPUs; `functional` computes the same without them.

`int8_scaled_mm` is an int8 product with the scales in its epilogue. `torch._int_mm` writes its int32 result to memory, four
bytes an element, for another kernel to read, scale and write again; here the sums stay in registers until they are scaled.

`gelu_quantize` is GELU followed by quantization. `torch.compile` pads a row to the next power of two, 16384 for the 8960
values of Wan 1.3B's feed-forward; here a row is two powers of two, 8192 and 1024.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from dax.quant.devices import check_device

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton
    TensorDescriptor = None

BLOCK_K = 128
SMALLEST_SHARED_MEMORY = 99 * 1024
"""Bytes that a thread block may have on GPUs of compute capability 8.6, 8.9 and 12.0."""


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    # GROUP_M rows of tiles run at the same time, so that what they read of w is still in the L2 cache.
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % (GROUP_M * tiles_n) % rows_in_group, tile % (GROUP_M * tiles_n) // rows_in_group


@triton.jit
def store_scaled(
    sums, tile_m, tile_n, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + cols, mask=cols < n, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)
    y = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(y_ptr + rows[:, None] * n + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def int8_scaled_mm_kernel(
    x_ptr, w_ptr, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, k,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Beyond the edge the modulo reads rows that are there: cheaper than a mask, and never stored.
    x_ptrs = x_ptr + (rows % m)[:, None] * k + ks[None, :]
    w_ptrs = w_ptr + (cols % n)[None, :] * k + ks[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, k, BLOCK_K):
        sums = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), sums, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    store_scaled(sums, tile_m, tile_n, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def int8_scaled_mm_tma_kernel(
    x_desc, w_desc, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, k, NUM_PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A program computes one tile after the other, and the copy engine loads the next one's operands during the epilogue.
    tiles_m, tiles_n, steps = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_PROGRAMS, flatten=True):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            x = x_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            w = w_desc.load([tile_n * BLOCK_N, step * BLOCK_K])
            sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
        store_scaled(sums, tile_m, tile_n, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, BLOCK_M, BLOCK_N)


# One configuration for a GPU, so that nothing is tried out at run time: the first that fits its shared memory. The first
# is the fastest of seven on an H100 at every shape of a Wan 1.3B layer.
INT8_CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 256}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=3),
]
# `autotune` is how a kernel tells `torch.compile` its warps and stages.
INT8_KERNELS = [triton.autotune([config], key=[])(int8_scaled_mm_kernel) for config in INT8_CONFIGS]


def int8_config(shared_memory: int) -> int:
    """Return which of `INT8_CONFIGS` fits `shared_memory` bytes a thread block: tiles for each stage, and barriers."""

    def needed(config: triton.Config) -> int:
        return config.num_stages * (config.kwargs["BLOCK_M"] + config.kwargs["BLOCK_N"]) * BLOCK_K + 1024

    return next((i for i, config in enumerate(INT8_CONFIGS) if needed(config) <= shared_memory), len(INT8_CONFIGS) - 1)


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a thread block of `device` may have."""
    if device.type != "cuda":  # interpreted
        return SMALLEST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED_MEMORY)


def int8_scaled_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """Return (x · x_scale) @ (w · w_scale)ᵀ + bias: int8 x [M, K] and w [N, K], float32 scales [M] and [N], bias [N].

    K is a multiple of `BLOCK_K`. Returns [M, N] in the type of `bias`. On a Hopper GPU, where it was measured to be faster,
    the tensor memory accelerator loads the operands.
    """
    product = int8_scaled_mm_hopper if has_tma(x.device) else int8_scaled_mm_any
    return product(x, w, x_scale, w_scale, bias)


@triton_op("dax::int8_scaled_mm", mutates_args={})
def int8_scaled_mm_any(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `int8_scaled_mm` on any GPU."""
    m, k = x.shape
    n = w.shape[0]
    y = torch.empty((m, n), dtype=bias.dtype, device=x.device)

    def grid(meta):
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    kernel = wrap_triton(INT8_KERNELS[int8_config(shared_memory(x.device))])
    kernel[grid](x, w, y, x_scale, w_scale, bias, m, n, k, BLOCK_K=BLOCK_K, GROUP_M=8)
    return y


def has_tma(device: torch.device) -> bool:
    """Return whether `int8_scaled_mm_hopper` runs on `device`: compute capability 9.0, and a Triton with descriptors."""
    return TensorDescriptor is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


# `custom_op`: the descriptors are made on the host, which `torch.compile` is not to trace.
@custom_op("dax::int8_scaled_mm_hopper", mutates_args=())
def int8_scaled_mm_hopper(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `int8_scaled_mm` with as many programs as multiprocessors."""
    m, k = x.shape
    n = w.shape[0]
    y = torch.empty((m, n), dtype=bias.dtype, device=x.device)
    block_m, block_n = 128, 256
    x_desc, w_desc = (TensorDescriptor.from_tensor(t, [b, BLOCK_K]) for t, b in ((x, block_m), (w, block_n)))
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3  # interpreted
    # Measured on an H100: with few tiles and a short K a fourth stage costs more than it hides.
    stages = 4 if tiles > 2 * processors or k > 4096 else 3
    int8_scaled_mm_tma_kernel[(min(tiles, processors),)](
        x_desc, w_desc, y, x_scale, w_scale, bias, m, n, k, min(tiles, processors),
        BLOCK_K=BLOCK_K, GROUP_M=8, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return y


@int8_scaled_mm_hopper.register_fake
def _(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty(x.shape[0], w.shape[0])


@triton.jit
def gelu(x_ptrs, inside):
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    # The tanh form as a sigmoid; rounded as the activation would be if it were written to memory.
    y = x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    return y.to(x_ptrs.dtype.element_ty).to(tl.float32)


@triton.jit
def quantize(y, reciprocal, q_ptrs, inside, qmax: tl.constexpr):
    q = y * reciprocal
    dtype = q_ptrs.dtype.element_ty
    if dtype == tl.int8:
        q = (q + 12582912.0) - 12582912.0  # 1.5 * 2²³: leaves the nearest integer, to even
    tl.store(q_ptrs, tl.clamp(q, -qmax, qmax).to(dtype), mask=inside)


@triton.jit
def gelu_quantize_kernel(
    x_ptr, q_ptr, scale_ptr, k,
    qmax: tl.constexpr, smallest: tl.constexpr, largest: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    a, b = gelu(x_ptr + row * k + head, head < k), gelu(x_ptr + row * k + tail, tail < k)
    absmax = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
    scale = tl.minimum(tl.maximum(absmax / qmax, smallest), largest)
    # A maximum ignores NaNs, and the scale has to be one.
    bad = tl.maximum(tl.max((a != a).to(tl.int32), 0), tl.max((b != b).to(tl.int32), 0))
    scale = tl.where(bad > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    quantize(a, 1 / scale, q_ptr + row * k + head, head < k, qmax)
    quantize(b, 1 / scale, q_ptr + row * k + tail, tail < k, qmax)


GELU_CONFIG = triton.Config({}, num_warps=8)
GELU_KERNEL = triton.autotune([GELU_CONFIG], key=[])(gelu_quantize_kernel)


@triton_op("dax::gelu_quantize", mutates_args={})
def gelu_quantize(x: Tensor, dtype: torch.dtype, qmax: float, smallest: float, largest: float) -> tuple[Tensor, Tensor]:
    """Quantize GELU(x), x [M, K], row by row: [M, K] in `dtype` and float32 scales [M, 1], `smallest` to `largest`.

    Raises RuntimeError for fp8 on a GPU that cannot multiply it.
    """
    check_device(dtype, x.device)
    m, k = x.shape
    q = torch.empty((m, k), dtype=dtype, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    head = triton.next_power_of_2(k + 1) // 2  # the largest that k holds
    tail = triton.next_power_of_2(max(k - head, 1))
    wrap_triton(GELU_KERNEL)[(m,)](x, q, scale, k, qmax, smallest, largest, HEAD=head, TAIL=tail)
    return q, scale
