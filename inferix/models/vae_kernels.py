"""The memory-bound functions of ``vae_decoder`` as Triton kernels for GPUs: see there for what each computes.

Written out because ``torch.compile`` spends seconds of every start on tracing them for each number of channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Elements that one program holds."""
PIXELS = 512
"""Pixels of one frame that one program of ``to_pixels`` computes."""


@triton.jit
def plus(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def add_norm_silu_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, bias_ptr, gamma_ptr, total_ptr, out_ptr, rows, frames, frame_rows,
    out_batch_stride, out_frame_stride, epsilon,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNEL_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # One program: all channels of some pixels. x, residual and total are contiguous, out in its pixels alone.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, CHANNEL_BLOCK)
    present = channel < CHANNELS
    inside = (row < rows)[:, None] & present[None, :]
    offset = row[:, None] * CHANNELS + channel[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=present, other=0.0).to(tl.float32)
    total = x.to(tl.float32) + bias[None, :]
    if HAS_RESIDUAL:
        total = tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32) + total
        tl.store(total_ptr + offset, total.to(x.dtype), mask=inside)
    if HAS_NORM:
        gamma = tl.load(gamma_ptr + channel, mask=present, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.reduce(total * total, 1, plus) / CHANNELS + epsilon)
        normed = total * scale[:, None] * gamma[None, :]
        result = normed / (1.0 + tl.exp(-normed))
        frame = row // frame_rows
        first = frame // frames * out_batch_stride + frame % frames * out_frame_stride + row % frame_rows * CHANNELS
        tl.store(out_ptr + first[:, None] + channel[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unshuffle_add_kernel(  # type: ignore[no-untyped-def]
    groups_ptr, bias_ptr, out_ptr, rows, height, width,
    CHANNELS: tl.constexpr, CHANNEL_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    # One program: all channels of some pixels of the output, ``height`` x ``width`` a frame. Both tensors are contiguous.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, CHANNEL_BLOCK)
    present = channel < CHANNELS
    inside = (row < rows)[:, None] & present[None, :]
    line, x = row // width, row % width
    frame, y = line // height, line % height
    a, b = y % 2, x % 2
    group = (frame * (height // 2 + 1) + y // 2 + a) * (width // 2 + 1) + x // 2 + b
    first = (group * 4 + 2 * a + b) * CHANNELS
    values = tl.load(groups_ptr + first[:, None] + channel[None, :], mask=inside, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=present, other=0.0).to(tl.float32)
    result = (values.to(tl.float32) + bias[None, :]).to(values.dtype)
    tl.store(out_ptr + row[:, None] * CHANNELS + channel[None, :], result, mask=inside)


@triton.jit
def to_pixels_kernel(  # type: ignore[no-untyped-def]
    taps_ptr, bias_ptr, out_ptr, frames, frame_rows, TAPS: tl.constexpr, PIXELS: tl.constexpr
):
    # One program: some pixels of one frame. A frame is the sum of its own newest taps and the older ones of two before it.
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    frame = tl.program_id(1).to(tl.int64)
    inside = pixel < frame_rows
    first = frame + frame // frames * 2  # the buffer of every batch entry begins with two frames more
    for channel in tl.static_range(3):
        value = tl.full((PIXELS,), 0.0, tl.float32)
        for age in tl.static_range(3):
            source = taps_ptr + ((first + age) * frame_rows + pixel) * TAPS + 3 * age + channel
            value += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        value = (value + tl.load(bias_ptr + channel).to(tl.float32)) * 0.5 + 0.5
        value = tl.minimum(tl.maximum(value, 0.0), 1.0)
        tl.store(out_ptr + (frame * 3 + channel) * frame_rows + pixel, value, mask=inside)


def tile_sizes(channels: int) -> dict[str, int]:
    """Return the constants of a kernel whose programs hold all channels of some pixels."""
    channel_block = triton.next_power_of_2(channels)
    return {"CHANNELS": channels, "CHANNEL_BLOCK": channel_block, "BLOCK_ROWS": max(1, TILE // channel_block)}


def launch_add_norm_silu(
    x: Tensor, residual: Tensor | None, bias: Tensor, gamma: Tensor | None, out: Tensor | None, epsilon: float
) -> Tensor:
    """Return residual + x + bias (x where there is no residual); with ``gamma`` write its norm to ``out``."""
    _, frames, height, width, channels = x.shape
    x, total = x.contiguous(), x
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    tile, rows = tile_sizes(channels), x.numel() // channels
    add_norm_silu_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]),)](
        x, x if residual is None else residual, bias, bias if gamma is None else gamma, total, x if out is None else out,
        rows, frames, height * width, 0 if out is None else out.stride(0), 0 if out is None else out.stride(1), epsilon,
        HAS_RESIDUAL=residual is not None, HAS_NORM=gamma is not None, num_warps=4, **tile,
    )  # fmt: skip
    return total


def norm_silu(x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor, epsilon: float) -> None:
    launch_add_norm_silu(x, None, bias, gamma, out, epsilon)


def add_norm_silu(residual: Tensor, x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor, epsilon: float) -> Tensor:
    return launch_add_norm_silu(x, residual, bias, gamma, out, epsilon)


def add(residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return launch_add_norm_silu(x, residual, bias, None, None, 0.0)


def unshuffle_add(groups: Tensor, bias: Tensor) -> Tensor:
    frames, height, width, *_, channels = groups.shape
    height, width = 2 * (height - 1), 2 * (width - 1)
    out = groups.new_empty(frames, height, width, channels)
    tile, rows = tile_sizes(channels), frames * height * width
    unshuffle_add_kernel[(triton.cdiv(rows, tile["BLOCK_ROWS"]),)](
        groups.contiguous(), bias, out, rows, height, width, num_warps=4, **tile
    )
    return out


def to_pixels(taps: Tensor, bias: Tensor) -> Tensor:
    batch, frames, height, width, channels = taps.shape
    out = torch.empty(batch, frames - 2, 3, height, width, device=taps.device, dtype=torch.float32)
    grid = (triton.cdiv(height * width, PIXELS), batch * (frames - 2))
    to_pixels_kernel[grid](
        taps.contiguous(), bias, out, frames - 2, height * width, TAPS=channels, PIXELS=PIXELS, num_warps=4
    )
    return out
