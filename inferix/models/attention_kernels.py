"""Attention kernels and the table of where each was verified.

Each takes q [B, T, H, d], k and v [B, K, H, d] and returns the result and the log-sum-exp of the scores: [B, T, H, d] and
[B, H, T], or, where it works on parts of the keys, [P, B, T, H, d] and [P, B, H, T].
"""

import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor], Result]

FP8_PROBABILITY_SCALE = 256.0
"""Factor on the softmax weights, which are at most 1: brings them to where e4m3 is finest."""
FP8_OUTPUT_SCALE = 4.0
"""Factor on the results of 8-bit attention: averages of values, so that 448 / 4 = 112 is enough."""


@cache
def select(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return the fastest kernel that was verified on this kind of device; None where none takes ``dtype``."""
    if device.type == "cpu":
        return cpu_attention if dtype in (torch.float32, torch.bfloat16, torch.float16) else None
    capability = torch.cuda.get_device_capability(device)
    fa3 = flash_attention_3(device, dtype) if dtype in (torch.bfloat16, torch.float8_e4m3fn) else None
    table: list[tuple[tuple[int, int] | None, torch.dtype, Kernel | None]] = [
        # capability it was verified on (None: any), dtype, kernel (None: not installed)
        ((9, 0), torch.bfloat16, fa3),
        ((9, 0), torch.bfloat16, cudnn_attention),
        ((9, 0), torch.float8_e4m3fn, fa3),
        ((9, 0), torch.float8_e4m3fn, cudnn_fp8_attention if _is_installed("cudnn") else None),
        (None, torch.bfloat16, aten_flash_attention),
        (None, torch.float16, aten_flash_attention),
        (None, torch.float32, aten_efficient_attention),
    ]
    for verified_on, takes, kernel in table:
        if kernel is not None and takes == dtype and verified_on in (None, capability):
            return kernel
    return None


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --- PyTorch's own ---


def cpu_attention(q: Tensor, k: Tensor, v: Tensor) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.transpose(1, 2), lse


def aten_flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def aten_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Result:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse[..., : q.shape[2]]


# --- cuDNN, 16 bits ---


def num_splits(tokens: int, keys: int, heads: int, processors: int) -> int:
    """Return into how many parts the keys are best split for a kernel that gives each multiprocessor 128 queries of a head.

    Where the last round of such tiles leaves many multiprocessors idle, rounds of half the length waste less.
    """
    rounds = math.ceil(tokens / 128) * heads / processors
    choices = [parts for parts in (1, 2, 4) if keys % parts == 0]
    return min(choices, key=lambda parts: math.ceil(parts * rounds) / parts * 1.02**parts)  # 2 % for each merge


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Result:
    """bfloat16. With a batch of one the keys are split where that fills the GPU better, the parts as one batch."""
    batch, tokens, heads, _ = q.shape
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    parts = num_splits(tokens, k.shape[1], heads, processors) if batch == 1 else 1
    if parts > 1:
        q = q.expand(parts, -1, -1, -1)
        k, v = (x.view(parts, -1, *x.shape[2:]) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)
    out, lse = out.transpose(1, 2), lse.view(q.shape[:3])
    return (out[:, None], lse[:, None]) if parts > 1 else (out, lse)


# --- FlashAttention-3, 16 and 8 bits ---

FLASH_ATTENTION_3 = ("flash_attn_interface", "fa3_fwd_interface")
"""Modules that may hold it: the official build, then the package fa3-fwd, somebody else's build of the same code."""


@cache
def flash_attention_3(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Return FlashAttention-3's kernel for inputs of ``dtype``, bfloat16 or float8_e4m3fn; its results are in bfloat16.

    None where it is not installed, or, with a warning, where it fails or gives wrong results. 8-bit values should have zero
    mean, as for ``cudnn_fp8_attention``.
    """
    for name in FLASH_ATTENTION_3:
        if not _is_installed(name) or torch.cuda.get_device_capability(device) != (9, 0):
            continue
        try:
            function = importlib.import_module(name).flash_attn_func
            return _verified_flash_attention_3(function, device, dtype)
        except Exception as error:  # a module of that name may be anything, and fail in any way
            warnings.warn(f"{name} is not used for {dtype}: {error}", stacklevel=2)
    return None


def _verified_flash_attention_3(function: Callable, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return a kernel that calls ``function``. Raises ValueError where its signature or its results are not FA3's."""
    parameters = inspect.signature(function).parameters
    if missing := {"q", "k", "v", "num_splits"} - parameters.keys():
        raise ValueError(f"flash_attn_func has no parameter {', '.join(sorted(missing))}")
    with_lse = (
        {"return_attn_probs": True} if "return_attn_probs" in parameters else {}
    )  # older builds always return both
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    eight_bit = dtype.itemsize == 1

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Result:
        # 8-bit keys come in parts already, which fill the GPU
        splits = 1 if eight_bit else fa3_num_splits(q.shape[0], q.shape[1], k.shape[1], q.shape[2], processors)
        out, lse, *_ = function(q, k, v, num_splits=splits, **with_lse)
        return out, lse

    generator = torch.Generator(device).manual_seed(0)
    sizes = (96, 640, 640)
    q, k, v = (torch.randn(1, n, 2, 128, device=device, generator=generator).to(dtype) for n in sizes)
    wanted, wanted_lse = aten_efficient_attention(*(x.float() for x in (q, k, v)))
    out, lse = kernel(q, k, v)
    if out.shape != wanted.shape or lse.shape != wanted_lse.shape:
        raise ValueError("flash_attn_func returns other shapes than FlashAttention-3")
    tolerance = 0.1 if eight_bit else 0.02  # softmax weights are in 8 bits too
    if (out.float() - wanted).norm() > tolerance * wanted.norm() or (lse.float() - wanted_lse).abs().max() > 0.05:
        raise ValueError("flash_attn_func does not compute attention")
    return kernel


def fa3_num_splits(batch: int, tokens: int, keys: int, heads: int, processors: int) -> int:
    """Return the number of splits of the keys that FlashAttention-3 is fastest with.

    Minimizes a model of its time fitted to an H100: rounds of tiles of 128 queries over each split's keys, plus writing and
    reading each split's partial results (53 ns for 100 rows of queries; 10.8 ns a key and round).
    """
    rows = batch * tokens * heads
    rounds = math.ceil(tokens / 128) * batch * heads / processors
    if rounds > 8:  # seen to be fastest with 40 heads
        return 3 if keys > 16384 else 1

    def nanoseconds(splits: int) -> float:
        merge = 0.53 * rows * splits if splits > 1 else 0.0
        return math.ceil(splits * rounds) / splits * keys * 10.8 + merge

    return min((1, 2, 3), key=nanoseconds)


# --- cuDNN, 8 bits ---

FP8_SCALES = {
    "descale_q": 1.0,
    "descale_k": 1.0,
    "descale_v": 1.0,
    "descale_s": 1 / FP8_PROBABILITY_SCALE,
    "scale_s": FP8_PROBABILITY_SCALE,
    "scale_o": FP8_OUTPUT_SCALE,
}
UIDS = {name: uid for uid, name in enumerate(("q", "k", "v", "out", "lse", *FP8_SCALES), start=1)}


def cudnn_fp8_attention(q: Tensor, k: Tensor, v: Tensor) -> Result:
    """float8_e4m3fn, both products in 8 bits. The result is in e4m3 too, times ``FP8_OUTPUT_SCALE``.

    The values should have zero mean: Hopper sums 8-bit products with about 14 bits, and sums of one sign lose magnitude.
    """
    import cudnn

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    graph, workspace_size = _fp8_graph(*((tuple(x.shape), x.stride()) for x in (q, k, v)), q.device)
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty(batch, tokens, heads, head_dim, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, tokens, 1, device=q.device)
    tensors = {"q": q, "k": k, "v": v, "out": out.transpose(1, 2), "lse": lse, **_fp8_scales(q.device)}
    handle = _cudnn_handle(q.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
    workspace = torch.empty(max(workspace_size, 1), device=q.device, dtype=torch.uint8)
    graph.execute({UIDS[name]: tensor for name, tensor in tensors.items()}, workspace, handle=handle)
    return out, lse.squeeze(-1)


@cache
def _cudnn_handle(device: torch.device) -> Any:
    import cudnn

    return cudnn.create_handle()


@cache
def _fp8_scales(device: torch.device) -> dict[str, Tensor]:
    return {name: torch.full((1, 1, 1, 1), value, device=device) for name, value in FP8_SCALES.items()}


@cache
def _fp8_graph(q: tuple, k: tuple, v: tuple, device: torch.device) -> tuple[Any, int]:
    """Return cuDNN's execution plan for tensors of these (shape, stride)s, and the bytes of workspace it needs."""
    import cudnn

    real, stored = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
    graph = cudnn.pygraph(io_data_type=stored, intermediate_data_type=real, compute_data_type=real)

    def tensor(name: str, shape: tuple[int, ...], stride: tuple[int, ...], dtype: Any) -> Any:
        return graph.tensor(name=name, uid=UIDS[name], dim=list(shape), stride=list(stride), data_type=dtype)

    inputs = {name: tensor(name, shape, stride, stored) for name, (shape, stride) in (("q", q), ("k", k), ("v", v))}
    scales = {name: tensor(name, (1, 1, 1, 1), (1, 1, 1, 1), real) for name in FP8_SCALES}
    (batch, heads, tokens, head_dim), _ = q
    out, lse, max_s, max_o = graph.sdpa_fp8(
        **inputs, **scales, generate_stats=True, attn_scale=head_dim**-0.5, use_causal_mask=False, name="attention"
    )
    layout = [tokens * heads * head_dim, head_dim, heads * head_dim, 1]
    out.set_output(True).set_uid(UIDS["out"]).set_dim([batch, heads, tokens, head_dim]).set_stride(layout)
    lse.set_output(True).set_uid(UIDS["lse"]).set_data_type(real)
    lse.set_dim([batch, heads, tokens, 1]).set_stride([heads * tokens, tokens, 1, 1])
    for unused in (max_s, max_o):
        unused.set_output(False).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, graph.get_workspace_size()
