"""The one kernel of our own: an int8 product with the scales in its epilogue, for GPUs. Needs Triton.

`torch._int_mm` writes its int32 result to memory, four bytes an element, for another kernel to read, scale and write
again. Here the sums never leave the registers. `functional.linear` computes the same without it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK_K = 128


# One configuration, so nothing is tried out at run time: the fastest of seven on an H100 at every shape of a Wan 1.3B
# layer. `autotune` is how a kernel tells `torch.compile` its warps and stages.
@triton.autotune([triton.Config({"BLOCK_M": 128, "BLOCK_N": 256}, num_warps=8, num_stages=3)], key=[])
@triton.jit
def int8_scaled_mm_kernel(
    x_ptr, w_ptr, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, m, n, k,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of GROUP_M rows of tiles are worked on together, so that what they read of w is still in the L2 cache.
    tile, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first, GROUP_M)
    tile_m = first + tile % (GROUP_M * tiles_n) % rows_in_group
    tile_n = tile % (GROUP_M * tiles_n) // rows_in_group
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Beyond the edge the modulo reads what is there already: cheaper than a mask, and never stored.
    x_ptrs = x_ptr + (rows % m)[:, None] * k + ks[None, :]
    w_ptrs = w_ptr + (cols % n)[None, :] * k + ks[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, k, BLOCK_K):
        sums = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), sums, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + cols, mask=cols < n, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)
    y = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(y_ptr + rows[:, None] * n + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton_op("dax::int8_scaled_mm", mutates_args={})
def int8_scaled_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """(x · x_scale) @ (w · w_scale)ᵀ + bias: int8 x [M, K] and w [N, K], float32 scales [M] and [N], bias [N].

    K is a multiple of `BLOCK_K`. Returns [M, N] in the type of `bias`.
    """
    m, k = x.shape
    n = w.shape[0]
    y = torch.empty((m, n), dtype=bias.dtype, device=x.device)

    def grid(meta):
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    wrap_triton(int8_scaled_mm_kernel)[grid](x, w, y, x_scale, w_scale, bias, m, n, k, BLOCK_K=BLOCK_K, GROUP_M=8)
    return y
