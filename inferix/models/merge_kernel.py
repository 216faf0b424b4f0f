"""The merge of partial attention results as one Triton kernel for GPUs, of which any number may be given."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 32


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr, lse_ptr, mean_ptr, result_ptr, scale, parts, batch, tokens, heads,
    HAS_MEAN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    # One program: some tokens of one head. The parts are a loop, so that one kernel serves any number of them.
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, HEAD_BLOCK)
    row = tl.program_id(1).to(tl.int64)  # of [B, H]
    entry, head = row // heads, row % heads
    rows = batch * heads
    inside = (token < tokens)[:, None] & (channel < HEAD_DIM)[None, :]
    largest = tl.full((BLOCK_TOKENS,), float("-inf"), tl.float32)
    for part in range(parts):
        lse = tl.load(lse_ptr + (part * rows + row) * tokens + token, mask=token < tokens, other=0.0)
        largest = tl.maximum(largest, lse)
    total = tl.full((BLOCK_TOKENS,), 0.0, tl.float32)
    sums = tl.full((BLOCK_TOKENS, HEAD_BLOCK), 0.0, tl.float32)
    for part in range(parts):
        lse = tl.load(lse_ptr + (part * rows + row) * tokens + token, mask=token < tokens, other=0.0)
        weight = tl.exp(lse - largest)
        first = ((part * batch + entry) * tokens + token) * heads + head
        values = tl.load(out_ptr + first[:, None] * HEAD_DIM + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        values *= scale
        if HAS_MEAN:
            mean = tl.load(mean_ptr + (part * rows + row) * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
            values += mean[None, :]
        total += weight
        sums += values * weight[:, None]
    first = (entry * tokens + token) * heads + head
    result = (sums / total[:, None]).to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + first[:, None] * HEAD_DIM + channel[None, :], result, mask=inside)


def merge(out: Tensor, lse: Tensor, value_mean: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """Return [B, T, H*d] in ``dtype``: the sum over P of softmax(lse) times (``out`` times ``scale`` + ``value_mean``).

    Args:
        out: [P, B, T, H, d].
        lse: [P, B, H, T], float32.
        value_mean: [P, B, H, d], float32; None: zero.
    """
    parts, batch, tokens, heads, head_dim = out.shape
    result = torch.empty(batch, tokens, heads * head_dim, device=out.device, dtype=dtype)
    grid = (triton.cdiv(tokens, BLOCK_TOKENS), batch * heads)
    merge_kernel[grid](
        out.contiguous(), lse.contiguous(), lse if value_mean is None else value_mean.contiguous(), result, scale,
        parts, batch, tokens, heads, HAS_MEAN=value_mean is not None, HEAD_DIM=head_dim,
        HEAD_BLOCK=triton.next_power_of_2(head_dim), BLOCK_TOKENS=BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip
    return result
