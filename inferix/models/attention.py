"""Self-attention over the cache: as PyTorch has it, and as a Hopper GPU does it fastest, in 16 and in 8 bits.

Shapes: queries q [B, T, H, d], keys k and values v [B, K, H, d], results [B, T, H*d].
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

PROBABILITY_SCALE = 256.0
"""8-bit attention: softmax weights are at most 1; this brings them to where e4m3 is finest."""
OUTPUT_SCALE = 4.0
"""8-bit attention: results are averages of values, so that up to 448 / 4 = 112 is room enough."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention by whichever kernel PyTorch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``; what an 8-bit float cannot hold becomes the largest value that it can.

    No scale is needed: queries and keys come out of an RMS norm, values are of their size, and e4m3 has the same
    relative precision from 2^-6 to 448.
    """
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == FP8 else x.to(dtype)


def cache_attention(q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Attention by the fastest way that the device and the dtype of q, k and v allow; the result in ``out_dtype``."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    if hopper and q.dtype == torch.bfloat16:
        return split_attention(cudnn_attention, q, k, v, out_dtype)
    if hopper and q.dtype == FP8 and importlib.util.find_spec("cudnn"):
        return split_attention(cudnn_fp8_attention, q, k, v, out_dtype)
    return attention(*(x.to(out_dtype) for x in (q, k, v)))


def num_splits(batch: int, tokens: int, keys: int, heads: int, processors: int) -> int:
    """In how many parts the keys are best worked on: 1, 2 or 4.

    A multiprocessor takes 128 queries of one head at a time. Where the last round of these leaves many multiprocessors
    idle, rounds of half or a quarter of the length waste less: 12 % of the time for 4680 queries on an H100, in two parts
    for 12 heads, in four for 6.
    """
    rounds = math.ceil(tokens / 128) * heads / processors
    choices = [parts for parts in (1, 2, 4) if batch == 1 and keys % parts == 0] or [1]
    return min(choices, key=lambda parts: math.ceil(parts * rounds) / parts * 1.02**parts)  # merging takes its time too


def split_attention(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Attention to parts of the keys, in one launch as the entries of a batch, and merged."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    parts = num_splits(q.shape[0], q.shape[1], k.shape[1], q.shape[2], processors)
    if parts > 1:
        q = q.expand(parts, -1, -1, -1)
        k, v = (x.view(parts, -1, *x.shape[2:]) for x in (k, v))
    out, lse = kernel(*(x.transpose(1, 2) for x in (q, k, v)), with_lse=parts > 1)
    out = out.transpose(1, 2)  # tokens before heads, as they lie in memory
    if out.dtype == out_dtype and parts == 1:
        return out.flatten(2)
    return compiled_merge()(out, lse, out_dtype)


def merge(out: Tensor, lse: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Results over P parts of the keys, and their log-sum-exps, to the whole's [B, T, H*d].

    ``out`` is [P, B, T, H, d] and ``lse`` [P, B, H, T], or both without B, which then is 1. Without ``lse`` ``out`` is one
    whole [B, T, H, d].
    """
    whole = out.float() / (OUTPUT_SCALE if out.dtype == FP8 else 1)
    if lse is not None:
        weights = (lse - lse.amax(0)).exp().transpose(-1, -2)[..., None]
        whole = sum(part * weight for part, weight in zip(whole, weights)) / sum(weights)
        whole = whole.reshape(-1, *whole.shape[-3:])
    return whole.flatten(2).to(out_dtype)


@cache
def compiled_merge() -> Callable:
    return torch.compile(merge, dynamic=False)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """cuDNN's kernel for q [B, H, T, d]; also each row's logarithm of the sum of exponentials [B, H, T]."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, with_lse, 0.0, False, False)
    return out, lse.view(out.shape[:3]) if with_lse else None


def cudnn_fp8_attention(q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """cuDNN's kernel with both products in 8 bits; the result in e4m3, ``OUTPUT_SCALE`` times too large."""
    import cudnn

    key = tuple((tuple(x.shape), x.stride()) for x in (q, k, v))
    graph, workspace_size = _fp8_graph(*key, with_lse, q.device)
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty(batch, tokens, heads, head_dim, device=q.device, dtype=FP8).transpose(1, 2)
    tensors = {"q": q, "k": k, "v": v, "out": out, **_fp8_scales(q.device)}
    if with_lse:
        tensors["lse"] = torch.empty(batch, heads, tokens, 1, device=q.device)
    handle = _cudnn_handle(q.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
    workspace = torch.empty(max(workspace_size, 1), device=q.device, dtype=torch.uint8)
    graph.execute({UIDS[name]: tensor for name, tensor in tensors.items()}, workspace, handle=handle)
    return out, tensors["lse"].squeeze(-1) if with_lse else None


SCALES = {
    "descale_q": 1.0,
    "descale_k": 1.0,
    "descale_v": 1.0,
    "descale_s": 1 / PROBABILITY_SCALE,
    "scale_s": PROBABILITY_SCALE,
    "scale_o": OUTPUT_SCALE,
}
UIDS = {name: uid for uid, name in enumerate(("q", "k", "v", "out", "lse", *SCALES), start=1)}


@cache
def _cudnn_handle(device: torch.device):
    import cudnn

    return cudnn.create_handle()


@cache
def _fp8_scales(device: torch.device) -> dict[str, Tensor]:
    return {name: torch.full((1, 1, 1, 1), value, device=device) for name, value in SCALES.items()}


@cache
def _fp8_graph(q: tuple, k: tuple, v: tuple, with_lse: bool, device: torch.device):
    """cuDNN's execution plan for tensors of these (shape, stride)s, and the bytes of workspace it needs."""
    import cudnn

    real, code = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
    graph = cudnn.pygraph(io_data_type=code, intermediate_data_type=real, compute_data_type=real)

    def tensor(name: str, shape, stride, dtype):
        return graph.tensor(name=name, uid=UIDS[name], dim=list(shape), stride=list(stride), data_type=dtype)

    inputs = {name: tensor(name, *layout, code) for name, layout in (("q", q), ("k", k), ("v", v))}
    scales = {name: tensor(name, (1, 1, 1, 1), (1, 1, 1, 1), real) for name in SCALES}
    (batch, heads, tokens, head_dim), _ = q
    out, lse, max_s, max_o = graph.sdpa_fp8(
        **inputs, **scales, generate_stats=with_lse, attn_scale=head_dim**-0.5, use_causal_mask=False, name="attention"
    )
    layout = [tokens * heads * head_dim, head_dim, heads * head_dim, 1]
    out.set_output(True).set_uid(UIDS["out"]).set_dim([batch, heads, tokens, head_dim]).set_stride(layout)
    if with_lse:
        lse.set_output(True).set_uid(UIDS["lse"]).set_data_type(real)
        lse.set_dim([batch, heads, tokens, 1]).set_stride([heads * tokens, tokens, 1, 1])
    for unused in (max_s, max_o):
        unused.set_output(False).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, graph.get_workspace_size()


# What ranks that share the keys need: each attends to its part, and the parts are merged.


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention [B, T, H, d] in ``out_dtype``, and each row's logarithm of the sum of exponentials, float32 [B, H, T]."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    fp8_kernel = hopper and q.dtype == FP8 and importlib.util.find_spec("cudnn")
    if q.dtype == FP8 and not fp8_kernel:
        q, k, v = (x.to(out_dtype) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if fp8_kernel:
        out, lse = cudnn_fp8_attention(q, k, v, with_lse=True)
        return (out.transpose(1, 2).float() / OUTPUT_SCALE).to(out_dtype), lse
    if hopper and q.dtype == torch.bfloat16:
        out, lse = cudnn_attention(q, k, v, with_lse=True)
    elif not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def merge_parts(out: Tensor, lse: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Results [R, B, T, H, d] over R parts of the keys, and their log-sum-exps [R, B, H, T], to the whole's [B, T, H*d]."""
    return (compiled_merge() if out.is_cuda else merge)(out, lse, out_dtype)
