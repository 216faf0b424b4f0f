"""A streaming decoder for the Wan 2.1 video VAE with static memory.

It takes its weights from diffusers' ``AutoencoderKLWan`` and computes the same function, block by block. Why it is fast:

- Activations are [B, T, H, W, C] everywhere. A convolution reads them, permuted, as channels-last, so that no layout is
  ever converted, and the norm over channels is a norm over rows.
- All latent frames of a call go through together. A causal convolution reads them behind the last two frames of the call
  before: the norm in front of it writes into that place.
- A convolution's bias, and the sum with the residual, are added by the norm that reads the result, in the same pass.
- Nothing depends on data, so that a call can be captured in a CUDA graph.

Shapes: B batch, T frames, H x W pixels and C channels at the layer's place.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

EPSILON = 1e-24
"""Keeps the norm of an all-zero row from dividing by zero; too small to change any other."""


def as_base(tensor: Tensor) -> Tensor:
    """Return a tensor on the same memory that is not a view: for a view the compiler starts anew with every base shape.

    Parameters are returned as they are, so that the compiler takes their shape, the channels, as fixed.
    """
    return tensor if isinstance(tensor, nn.Parameter) else tensor.data


def compiled_on_gpu(function: Callable) -> Callable:
    """Compile ``function`` for calls whose first argument is on a GPU; on a CPU there may be no C++ compiler.

    With dynamic shapes: one kernel serves every resolution and length.
    """
    compiled = cache(lambda: torch.compile(function, dynamic=True))

    @wraps(function)
    def call(*tensors: Tensor) -> Any:
        return compiled()(*map(as_base, tensors)) if tensors[0].is_cuda else function(*tensors)

    return call


@compiled_on_gpu
def norm_silu(x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> None:
    """Write SiLU(RMS norm(x + bias) * gamma) to ``out``; x and out [B, N, C]."""
    x = x.float() + bias.float()
    out.copy_(F.silu(F.rms_norm(x, gamma.shape, gamma.float(), EPSILON)))


@compiled_on_gpu
def add_norm_silu(residual: Tensor, x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """Return residual + x + bias and write its norm to ``out``, as ``norm_silu`` does; all [B, N, C]."""
    total = residual.float() + (x.float() + bias.float())
    out.copy_(F.silu(F.rms_norm(total, gamma.shape, gamma.float(), EPSILON)))
    return total.to(x.dtype)


@compiled_on_gpu
def add(residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return (residual.float() + (x.float() + bias.float())).to(x.dtype)


@compiled_on_gpu
def add_bias(x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write x + bias to ``out``, whatever their strides."""
    out.copy_(x + bias)


@compiled_on_gpu
def to_pixels(taps: Tensor, bias: Tensor) -> Tensor:
    """Sum what three frames in a row give to the last of them: [B, 2+T, H, W, 9 or more] to [B, T, 3, H, W] in [0, 1]."""
    oldest, middle, newest = taps[:, :-2, ..., 0:3], taps[:, 1:-1, ..., 3:6], taps[:, 2:, ..., 6:9]
    pixels = oldest.float() + middle.float() + newest.float() + bias.float()
    return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 1, 4, 2, 3).contiguous()


def rows(x: Tensor) -> Tensor:
    """[B, T, H, W, C] as [B, N, C]; a slice in time of a larger tensor stays a view of it."""
    return x.flatten(1, 3)


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a copy that shares no memory with the source model, so that the model can be freed."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


class FeatCache:
    """The last frames that each causal convolution read; zeros at the start of a clip."""

    def __init__(self) -> None:
        self.first = True
        """Whether no frame of the clip has been decoded yet."""
        self.last: dict[nn.Module, Tensor] = {}

    def restart(self) -> None:
        self.first = True
        if self.last:
            torch._foreach_zero_(list(self.last.values()))

    def prepend(self, reader: nn.Module, x: Tensor, num: int = 2, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a buffer [B, num+T, H, W, C] that begins with the ``num`` frames before x.

        ``shape`` is that of the frames to follow [B, T, H, W, C]; None: that of x.
        """
        batch, time, *rest = shape or x.shape
        if reader not in self.last:
            self.last[reader] = x.new_zeros(batch, num, *rest)
        frames = x.new_empty(batch, num + time, *rest)
        frames[:, :num] = self.last[reader]
        return frames

    def store(self, reader: nn.Module, frames: Tensor) -> None:
        self.last[reader].copy_(frames[:, -self.last[reader].shape[1] :])


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int]) -> Tensor:
    """``F.conv3d``; for float32 on a CPU by oneDNN, where PyTorch left alone may take a path ten times slower."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride=(1, 1, 1), dilation=(1, 1, 1), groups=1)
    return F.conv3d(x, weight, bias, padding=padding)


class CausalConv3d(nn.Module):
    """Convolves every frame together with the two before it."""

    def __init__(self, source: Any, bias: bool):
        super().__init__()
        self.weight = frozen(source.weight.contiguous(memory_format=torch.channels_last_3d))
        self.bias = frozen(source.bias) if bias else None
        self.padding = (0, source.kernel_size[1] // 2, source.kernel_size[2] // 2)

    def forward(self, frames: Tensor, feat_cache: FeatCache) -> Tensor:
        """Convolve [B, 2+T, H, W, C], which ``feat_cache.prepend`` returned, to [B, T, H, W, C']."""
        feat_cache.store(self, frames)
        return conv3d(frames.permute(0, 4, 1, 2, 3), self.weight, self.bias, self.padding).permute(0, 2, 3, 4, 1)


class Norm(nn.Module):
    """RMS norm over channels and SiLU, in float32, of the sum of x, the bias that was not added to x yet, and the residual."""

    def __init__(self, source: Any, bias: Tensor | None):
        super().__init__()
        self.gamma = frozen(source.gamma.flatten())
        self.bias = frozen(torch.zeros_like(self.gamma) if bias is None else bias)

    def forward(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        """Fill ``out`` and return the sum; all [B, T, H, W, C]."""
        if residual is None:
            norm_silu(rows(x), self.bias, self.gamma, rows(out))
            return x
        return add_norm_silu(rows(residual), rows(x), self.bias, self.gamma, rows(out)).view_as(x)


class ResidualBlock(nn.Module):
    """Norm and convolution, twice, added to the input.

    The sum is left to the next layer: a layer takes and returns ``x`` and the ``residual`` to add to it, None if there is none.
    """

    def __init__(self, source: Any, bias: Tensor | None):
        """``bias`` is that of the convolution before, which has not been added to ``x`` yet."""
        super().__init__()
        self.norm1 = Norm(source.norm1, bias)
        self.conv1 = CausalConv3d(source.conv1, bias=False)
        self.norm2 = Norm(source.norm2, source.conv1.bias)
        self.conv2 = CausalConv3d(source.conv2, bias=False)
        self.shortcut = None
        if isinstance(source.conv_shortcut, nn.Conv3d):
            shortcut: Any = source.conv_shortcut
            self.shortcut = frozen(shortcut.weight.flatten(1))
            self.shortcut_bias = frozen(shortcut.bias)

    def forward(self, x: Tensor, residual: Tensor | None, feat_cache: FeatCache) -> tuple[Tensor, Tensor]:
        frames = feat_cache.prepend(self.conv1, x)
        residual = self.norm1(x, residual, frames[:, 2:])
        if self.shortcut is not None:
            residual = F.linear(residual, self.shortcut, self.shortcut_bias)
        x = self.conv1(frames, feat_cache)
        del frames  # so that its memory serves for the next
        frames = feat_cache.prepend(self.conv2, x)
        self.norm2(x, None, frames[:, 2:])
        return self.conv2(frames, feat_cache), residual


class Attention(nn.Module):
    """Self-attention with one head within every frame."""

    def __init__(self, source: Any, bias: Tensor):
        super().__init__()
        self.bias = frozen(bias)
        self.gamma = frozen(source.norm.gamma.flatten())
        self.qkv, self.qkv_bias = frozen(source.to_qkv.weight.flatten(1)), frozen(source.to_qkv.bias)
        self.proj, self.proj_bias = frozen(source.proj.weight.flatten(1)), frozen(source.proj.bias)

    def forward(self, x: Tensor, residual: Tensor, feat_cache: FeatCache) -> tuple[Tensor, None]:
        x = add(rows(residual), rows(x), self.bias).view_as(x)
        normed = F.rms_norm(x.float(), self.gamma.shape, self.gamma.float(), EPSILON).to(x.dtype)
        qkv = F.linear(normed, self.qkv, self.qkv_bias).flatten(0, 1).flatten(1, 2)[:, None]  # [B*T, 1, H*W, 3*C]
        query, key, value = qkv.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + F.linear(attended, self.proj, self.proj_bias).view_as(x), None


class Upsample(nn.Module):
    """Twice the height and width and half the channels; where there is a ``time_conv`` also twice the frames.

    Nearest-neighbour upsampling and the 3x3 convolution after it are one 2x2 convolution at the low resolution: every
    output pixel of a 2x2 group sees only 2x2 different input pixels. That is 4/9 of the arithmetic.
    """

    def __init__(self, source: Any, bias: Tensor):
        super().__init__()
        self.bias = frozen(bias)
        self.time_conv = CausalConv3d(source.time_conv, bias=True) if hasattr(source, "time_conv") else None
        conv = source.resample[1]
        # fold[a, p, k] = 1 where row k of the 3x3 kernel falls on input row p of the two that output row a sees
        fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
        weight = (
            torch.einsum("apk,bql,oikl->aboipq", fold, fold, conv.weight.float()).flatten(0, 2).to(conv.weight.dtype)
        )
        self.weight = frozen(weight.contiguous(memory_format=torch.channels_last))  # [2*2*C', C, 2, 2]
        self.conv_bias = frozen(conv.bias)

    def forward(self, x: Tensor, residual: Tensor, feat_cache: FeatCache) -> tuple[Tensor, None]:
        x = add(rows(residual), rows(x), self.bias).view_as(x)
        if self.time_conv is not None:
            if not feat_cache.first:
                x = self.double_frames(self.time_conv, x, feat_cache)
            elif x.shape[1] > 1:  # the clip's first frame stays one, and is not seen by those after it
                x = torch.cat([x[:, :1], self.double_frames(self.time_conv, x[:, 1:], feat_cache)], dim=1)
        return self.enlarge(x), None

    @staticmethod
    def double_frames(time_conv: CausalConv3d, x: Tensor, feat_cache: FeatCache) -> Tensor:
        """[B, T, H, W, C] to [B, 2*T, H, W, C]."""
        frames = feat_cache.prepend(time_conv, x)
        frames[:, 2:] = x
        pairs = time_conv(frames, feat_cache).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
        return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)

    def enlarge(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] to [B, T, 2*H, 2*W, C']."""
        batch, time, height, width, _ = x.shape
        channels = len(self.conv_bias)
        groups = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self.weight, padding=1).permute(0, 2, 3, 1).contiguous()
        # [B*T, H+1, W+1, 2, 2, C']: pixel (a, b) of the 2x2 group (y, x) was computed at (y + a, x + b)
        frame, row, column = groups.stride()[:3]
        shape = (batch * time, height, 2, width, 2, channels)
        pixels = groups.as_strided(shape, (frame, row, row + 2 * channels, column, column + channels, 1))
        out = x.new_empty(batch, time, 2 * height, 2 * width, channels)
        add_bias(pixels, self.conv_bias, out.view(shape))
        return out


class Head(nn.Module):
    """The last norm and convolution, to pixels.

    With three output channels a 3x3x3 convolution leaves the hardware idle. Here every frame is convolved once, for all
    three places in time that it can take (nine channels), and those nine are what is kept of a frame.
    """

    def __init__(self, norm: Any, conv: Any, bias: Tensor):
        super().__init__()
        self.norm = Norm(norm, bias)
        weight = conv.weight.permute(2, 0, 1, 3, 4).flatten(0, 1)  # [3*3, C, 3, 3], oldest frame first
        weight = F.pad(weight, (0, 0) * 3 + (0, 7))  # sixteen channels: tensor cores want a multiple of eight
        self.weight = frozen(weight.contiguous(memory_format=torch.channels_last))
        self.bias = frozen(conv.bias)

    def forward(self, x: Tensor, residual: Tensor, feat_cache: FeatCache) -> Tensor:
        """To pixels [B, T, 3, H, W] in [0, 1], float32."""
        normed = torch.empty_like(x)
        self.norm(x, residual, normed)
        taps = F.conv2d(normed.flatten(0, 1).permute(0, 3, 1, 2), self.weight, padding=1).permute(0, 2, 3, 1)
        taps = taps.unflatten(0, x.shape[:2])
        frames = feat_cache.prepend(self, taps)
        frames[:, 2:] = taps
        feat_cache.store(self, frames)
        return to_pixels(frames, self.bias)


class VAEDecoder(nn.Module):
    """The decoder of ``model``, with copies of its weights."""

    def __init__(self, model: AutoencoderKLWan):
        super().__init__()
        source = model.decoder
        self.post_quant, self.post_quant_bias = (
            frozen(model.post_quant_conv.weight.flatten(1)),
            frozen(model.post_quant_conv.bias),
        )
        self.conv_in = CausalConv3d(source.conv_in, bias=True)
        before, after = source.mid_block.resnets
        (attention,) = source.mid_block.attentions
        layers = [ResidualBlock(before, None), Attention(attention, before.conv2.bias), ResidualBlock(after, None)]
        bias = after.conv2.bias
        for block in source.up_blocks:
            for resnet in block.resnets:
                layers.append(ResidualBlock(resnet, bias))
                bias = resnet.conv2.bias
            if block.upsamplers is not None:
                layers.append(Upsample(block.upsamplers[0], bias))
                bias = None
        self.layers = nn.ModuleList(layers)
        self.last_upsample = max(i for i, layer in enumerate(layers) if getattr(layer, "time_conv", None)) + 1
        """The first layer behind the last one that doubles the frames."""
        self.head = Head(source.norm_out, source.conv_out, bias)

    def forward(self, latents: Tensor, feat_cache: FeatCache, frame_by_frame: bool = False) -> Tensor:
        """Latents [B, F, 16, h, w], not normalised, to pixels [B, t, 3, 8h, 8w] in [0, 1], float32.

        The clip's first latent frame becomes one pixel frame, every other four; ``frame_by_frame`` these go through the
        last layers, the ones that take the memory.
        """
        x = F.linear(latents.permute(0, 1, 3, 4, 2).to(self.post_quant.dtype), self.post_quant, self.post_quant_bias)
        frames = feat_cache.prepend(self.conv_in, x)
        frames[:, 2:] = x
        x, residual = self.conv_in(frames, feat_cache), None
        for layer in self.layers[: self.last_upsample]:
            x, residual = layer(x, residual, feat_cache)
        pixels = [self.finish(part, feat_cache) for part in x.split(1 if frame_by_frame else x.shape[1], dim=1)]
        feat_cache.first = False
        return pixels[0] if len(pixels) == 1 else torch.cat(pixels, dim=1)

    def finish(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        """Apply the layers from ``last_upsample`` on: [B, t, H, W, C] to pixels."""
        residual = None
        for layer in self.layers[self.last_upsample :]:
            x, residual = layer(x, residual, feat_cache)
        return self.head(x, residual, feat_cache)


class ClipDecoder:
    """Decode clips of one shape, one after the other; on a GPU from CUDA graphs, unless ``low_memory``.

    The first call of each kind runs as it is, which compiles and lets cuDNN choose its algorithms, and is then captured.
    """

    def __init__(self, decoder: VAEDecoder, shape: tuple[int, int, int], low_memory: bool):
        """``shape`` is (B, h, w)."""
        self.decoder = decoder
        self.shape = shape
        self.low_memory = low_memory
        self.feat_cache = FeatCache()
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        """The graph, its input and its output, by number of latent frames and whether they begin the clip."""

    def __call__(self, latents: Tensor) -> Tensor:
        """As ``VAEDecoder.forward``."""
        if self.low_memory:
            return self.decoder(latents, self.feat_cache, frame_by_frame=True)
        if not latents.is_cuda:
            return self.decoder(latents, self.feat_cache)
        kind = (latents.shape[1], self.feat_cache.first)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            if kind not in self.graphs:
                pixels = self.decoder(latents, self.feat_cache)
                self.capture(latents, kind)
                return pixels
        graph, static, pixels = self.graphs[kind]
        static.copy_(latents)
        graph.replay()
        self.feat_cache.first = False
        return pixels.clone()

    def capture(self, latents: Tensor, kind: tuple[int, bool]) -> None:
        """Capture a call. Nothing runs, so that the feature cache stays as it is."""
        static, self.feat_cache.first = latents.clone(), kind[1]
        pool = next((graph.pool() for graph, *_ in self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            pixels = self.decoder(static, self.feat_cache)
        self.graphs[kind] = (graph, static, pixels)
