"""Self-attention over the key-value cache: one function that picks the kernel, and the merge of partial results.

Shapes: queries q [B, T, H, d]; keys k and values v [B, K, H, d]; log-sum-exps of the scores [B, H, T], float32.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix.models import attention_kernels as kernels

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return scaled dot-product attention [B, T, H*d] by the kernel that PyTorch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x to ``dtype``; values that float8_e4m3fn cannot hold become its largest one.

    No scale is needed, because queries and keys are RMS-normalised and values are of similar magnitude: e4m3 has the same
    relative precision from 2^-6 to 448.
    """
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == FP8 else x.to(dtype)


class PartialAttention(NamedTuple):
    """Attention over P parts of the keys, each with its own softmax."""

    out: Tensor
    """[P, B, T, H, d]"""
    lse: Tensor
    """Log-sum-exp of each part's scores [P, B, H, T], float32."""
    value_mean: Tensor | None = None
    """What was subtracted from the values of each part and has to be added to its result [P, B, H, d], float32."""


def merge_partials(partials: PartialAttention, dtype: torch.dtype) -> Tensor:
    """Return the attention over all keys [B, T, H*d] in ``dtype``.

    A part's weight is its share of the sum of exponentials. Softmax weights sum to 1, so that values of which a constant
    was subtracted give a result that lacks just this constant.
    """
    out, lse, value_mean = partials
    if out.shape[0] == 1 and value_mean is None and out.dtype != FP8:
        return out[0].flatten(2).to(dtype)
    scale = 1 / kernels.FP8_OUTPUT_SCALE if out.dtype == FP8 else 1.0
    if out.is_cuda:
        from inferix.models.merge_kernel import merge  # Triton's, which not every CPU build of PyTorch comes with

        return merge(out, lse, value_mean, scale, dtype)
    values = out.float() * scale
    if value_mean is not None:
        values = values + value_mean[:, :, None]
    return (values * lse.softmax(0).transpose(-1, -2)[..., None]).sum(0).flatten(2).to(dtype)


class Part(NamedTuple):
    """Keys of consecutive positions in the cache whose values share a mean."""

    start: int
    length: int


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    parts: Sequence[Part] = (),
    value_mean: Tensor | None = None,
) -> PartialAttention:
    """Return attention as ``merge_partials`` takes it, by the fastest verified kernel for the device and the dtypes.

    Args:
        q, k, v: in the dtype of the cache.
        dtype: of the computation where the keys' dtype has no kernel.
        parts: with ``value_mean``: the parts that the keys consist of, in order.
        value_mean: [P, B, H, d], float32, what was subtracted from each part's values.
    """
    kernel = kernels.select(q.device, q.dtype)
    if kernel is None:  # no 8-bit attention here: attend in ``dtype``
        if value_mean is not None:
            pieces = v.to(dtype).split([part.length for part in parts], dim=1)
            v = torch.cat([piece + mean[:, None].to(dtype) for piece, mean in zip(pieces, value_mean)], dim=1)
        return partial_attention(q.to(dtype), k.to(dtype), v.to(dtype), dtype)
    if value_mean is None:
        out, lse = kernel(q, k, v)
        return PartialAttention(out[None], lse[None]) if out.ndim == 4 else PartialAttention(out, lse)
    return attention_by_part(kernel, q, k, v, parts, value_mean)


def attention_by_part(
    kernel: Callable, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], value_mean: Tensor
) -> PartialAttention:
    """Attend to every part on its own; consecutive parts of equal length form one batch, for a single launch."""
    outs, lses = [], []
    for length, parts_of_length in groupby(parts, key=lambda part: part.length):
        group = list(parts_of_length)
        count, keys = len(group), slice(group[0].start, group[0].start + len(group) * length)
        results = []
        for query, key, value in zip(q, k[:, keys], v[:, keys]):  # each entry of the batch
            key, value = (x.unflatten(0, (count, length)) for x in (key, value))
            results.append(kernel(query.expand(count, *query.shape), key, value))
        outs.append(torch.stack([out for out, _ in results], dim=1) if len(results) > 1 else results[0][0][:, None])
        lses.append(torch.stack([lse for _, lse in results], dim=1) if len(results) > 1 else results[0][1][:, None])
    out, lse = (torch.cat(each) if len(each) > 1 else each[0] for each in (outs, lses))
    return PartialAttention(out, lse, value_mean)
