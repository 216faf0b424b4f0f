"""A streaming decoder for the Wan 2.1 video VAE with static memory.

It takes the weights of diffusers' ``AutoencoderKLWan`` and computes the same function, block by block. Why it is fast:

- Activations are [B, T, H, W, C] everywhere. A convolution reads them, permuted, as channels-last, so that no layout is
  ever converted, and the norm over channels is a norm over rows.
- All latent frames of a call go through together. A causal convolution reads them from a buffer that begins with
  the last two frames of the previous call; the norm before it writes into that buffer.
- A convolution's bias, and the sum with the residual, are added by the norm that reads the result, in the same pass.
- Nothing depends on data, so that a call can be captured in a CUDA graph.

Shapes: B batch, T frames, H x W pixels and C channels at the layer's place.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.checkpoints.files import StateDict
from inferix.models.clip_decoder import FeatCache

EPSILON = 1e-24
"""Keeps the norm of an all-zero row from dividing by zero; too small to change any other."""


class Weights(dict[str, Any]):
    """A layer's tensors, and the ``Weights`` of its parts, by name."""

    def __init__(self, prefix: str = ""):
        super().__init__()
        self.prefix = prefix

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"lacks {self.prefix}{name}")

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """Return the tensor of this name. Raises KeyError where it is missing, or its sizes are not these (None: any)."""
        tensor = self[name]
        if len(tensor.shape) != len(shape) or any(want not in (None, size) for want, size in zip(shape, tensor.shape)):
            raise KeyError(f"has {self.prefix}{name} {list(tensor.shape)}, which does not fit its neighbours")
        return tensor

    def linear(self, out: int, channels: int, dimensions: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return weight [out, channels] and bias of a convolution of single pixels in so many ``dimensions``."""
        weight = self.tensor("weight", out, channels, *[1] * dimensions)
        return frozen(weight.flatten(1)), frozen(self.tensor("bias", out))

    @classmethod
    def of(cls, state: StateDict) -> "Weights":
        """Sort the tensors of ``state`` into layers, numbered ones in their order."""
        root = cls()
        for name in sorted(state, key=lambda name: [part.zfill(3) for part in name.split(".")]):
            *parts, last = name.split(".")
            weights = root
            for part in parts:
                weights = weights.setdefault(part, cls(f"{weights.prefix}{part}."))
            weights[last] = state[name]
        return root


def kernel_on_gpu(function: Callable) -> Callable:
    """Call the Triton kernel of the same name in ``vae_kernels`` where the first argument is on a GPU."""

    @wraps(function)
    def call(*args: Any) -> Any:
        if not args[0].is_cuda:
            return function(*args)
        from inferix.models import vae_kernels  # needs Triton, which machines without a GPU may lack

        return getattr(vae_kernels, function.__name__)(*args)

    return call


@kernel_on_gpu
def norm_silu(x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor, epsilon: float) -> None:
    """Write SiLU(RMS norm(x + bias) * gamma) to ``out``; x and out [B, T, H, W, C]."""
    x = x.float() + bias.float()
    out.copy_(F.silu(F.rms_norm(x, gamma.shape, gamma.float(), epsilon)))


@kernel_on_gpu
def add_norm_silu(residual: Tensor, x: Tensor, bias: Tensor, gamma: Tensor, out: Tensor, epsilon: float) -> Tensor:
    """Return residual + x + bias and write its norm to ``out``, as ``norm_silu`` does; all [B, T, H, W, C]."""
    total = residual.float() + (x.float() + bias.float())
    out.copy_(F.silu(F.rms_norm(total, gamma.shape, gamma.float(), epsilon)))
    return total.to(x.dtype)


@kernel_on_gpu
def add(residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Return residual + x + bias; residual and x [B, T, H, W, C]."""
    return (residual.float() + (x.float() + bias.float())).to(x.dtype)


@kernel_on_gpu
def unshuffle_add(groups: Tensor, bias: Tensor) -> Tensor:
    """Return pixels + bias [N, 2*H, 2*W, C] of groups [N, H+1, W+1, 2, 2, C].

    Pixel (a, b) of the 2x2 group (y, x) stands at (y + a, x + b, a, b).
    """
    frames, height, width, *_, channels = groups.shape
    frame, row, column = groups.stride()[:3]
    shape = (frames, height - 1, 2, width - 1, 2, channels)
    pixels = groups.as_strided(shape, (frame, row, row + 2 * channels, column, column + channels, 1))
    return (pixels + bias).flatten(3, 4).flatten(1, 2)


@kernel_on_gpu
def to_pixels(taps: Tensor, bias: Tensor) -> Tensor:
    """Sum what three consecutive frames add to the last of them: [B, 2+T, H, W, 9 or more] to [B, T, 3, H, W] in [0, 1]."""
    oldest, middle, newest = taps[:, :-2, ..., 0:3], taps[:, 1:-1, ..., 3:6], taps[:, 2:, ..., 6:9]
    pixels = oldest.float() + middle.float() + newest.float() + bias.float()
    return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 1, 4, 2, 3).contiguous()


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a copy that shares no memory with the tensor, so that what it belongs to can be freed."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int]) -> Tensor:
    """``F.conv3d``; for float32 on a CPU by oneDNN, because PyTorch's own choice may be ten times slower."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride=(1, 1, 1), dilation=(1, 1, 1), groups=1)
    return F.conv3d(x, weight, bias, padding=padding)


def conv2d(frames: Tensor, weight: Tensor, feat_cache: FeatCache) -> Tensor:
    """Convolve every frame [B, T, H, W, C], with halos where ranks share it, to [B*T, H', W', C']."""
    padding = (1 - feat_cache.halo, 1)
    return F.conv2d(frames.flatten(0, 1).permute(0, 3, 1, 2), weight, padding=padding).permute(0, 2, 3, 1)


class CausalConv3d(nn.Module):
    """Convolves every frame together with the two before it.

    Args:
        channels: of what it reads.
        out: channels of what it returns; None: as many as the weight has.
        size: of the kernel in space.
        add_bias: do so; otherwise the next layer does.
    """

    def __init__(self, weights: Weights, channels: int, out: int | None = None, size: int = 3, add_bias: bool = False):
        super().__init__()
        weight = weights.tensor("weight", out, channels, 3, size, size)
        self.weight = frozen(weight.contiguous(memory_format=torch.channels_last_3d))
        bias = weights.tensor("bias", len(weight))
        self.bias = frozen(bias) if add_bias else None
        self.padding = (0, size // 2, size // 2)

    def buffer(self, x: Tensor, feat_cache: FeatCache) -> tuple[Tensor, Tensor]:
        """Return what ``forward`` takes for frames like x [B, T, H, W, C], and the view of it that they belong into.

        It begins with the two frames before x, and has halos where ranks share the frames: [B, 2+T, H or H+2, W, C].
        """
        halo, (batch, time, height, *rest) = min(feat_cache.halo, self.padding[1]), x.shape
        frames = feat_cache.prepend(self, x, shape=(batch, time, height + 2 * halo, *rest))
        return frames, frames[:, 2:, halo : halo + height]

    def forward(self, frames: Tensor, feat_cache: FeatCache) -> Tensor:
        """Convolve what ``buffer`` returned, filled, to [B, T, H, W, C']."""
        depth, height, width = self.padding
        if height:
            feat_cache.fill_halos(frames[:, 2:])
            height -= feat_cache.halo
        feat_cache.store(self, frames)
        padding = (depth, height, width)
        return conv3d(frames.permute(0, 4, 1, 2, 3), self.weight, self.bias, padding).permute(0, 2, 3, 4, 1)


class Norm(nn.Module):
    """RMS norm over channels and SiLU, in float32, of the sum of x, the bias that was not added to x yet, and the residual."""

    def __init__(self, weights: Weights, channels: int, bias: Tensor | None):
        super().__init__()
        self.gamma = frozen(weights.tensor("gamma", channels, 1, 1, 1).flatten())
        self.bias = frozen(torch.zeros_like(self.gamma) if bias is None else bias)

    def forward(self, x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        """Fill ``out`` and return the sum; all [B, T, H, W, C]."""
        if residual is None:
            norm_silu(x, self.bias, self.gamma, out, EPSILON)
            return x
        return add_norm_silu(residual, x, self.bias, self.gamma, out, EPSILON)


class ResidualBlock(nn.Module):
    """Norm and convolution, twice, added to the input.

    The sum is left to the next layer: a layer takes and returns ``x`` and the ``residual`` to add to it, None if there is none.
    """

    def __init__(self, weights: Weights, channels: int, bias: Tensor | None):
        """``bias`` is that of the convolution before, which has not been added to ``x`` [.., channels] yet."""
        super().__init__()
        self.norm1 = Norm(weights["norm1"], channels, bias)
        self.conv1 = CausalConv3d(weights["conv1"], channels)
        out = len(self.conv1.weight)
        self.norm2 = Norm(weights["norm2"], out, weights["conv1"]["bias"])
        self.conv2 = CausalConv3d(weights["conv2"], out, out if "conv_shortcut" in weights else channels)
        self.shortcut = None
        if "conv_shortcut" in weights:
            self.shortcut, self.shortcut_bias = weights["conv_shortcut"].linear(out, channels, 3)

    def forward(self, x: Tensor, residual: Tensor | None, feat_cache: FeatCache) -> tuple[Tensor, Tensor]:
        frames, new = self.conv1.buffer(x, feat_cache)
        residual = self.norm1(x, residual, new)
        if self.shortcut is not None:
            residual = F.linear(residual, self.shortcut, self.shortcut_bias)
        x = self.conv1(frames, feat_cache)
        del frames, new  # so that their memory serves for the next
        frames, new = self.conv2.buffer(x, feat_cache)
        self.norm2(x, None, new)
        return self.conv2(frames, feat_cache), residual


class Attention(nn.Module):
    """Self-attention with one head within every frame."""

    def __init__(self, weights: Weights, channels: int, bias: Tensor):
        super().__init__()
        self.bias = frozen(bias)
        self.gamma = frozen(weights["norm"].tensor("gamma", channels, 1, 1).flatten())
        self.qkv, self.qkv_bias = weights["to_qkv"].linear(3 * channels, channels, 2)
        self.proj, self.proj_bias = weights["proj"].linear(channels, channels, 2)

    def forward(self, x: Tensor, residual: Tensor, feat_cache: FeatCache) -> tuple[Tensor, None]:
        x = add(residual, x, self.bias)
        normed = F.rms_norm(x.float(), self.gamma.shape, self.gamma.float(), EPSILON).to(x.dtype)
        channels = x.shape[-1]
        query, key_value = F.linear(normed, self.qkv, self.qkv_bias).split([channels, 2 * channels], dim=-1)
        if feat_cache.row_parallel is not None:
            key_value = feat_cache.row_parallel.all_gather(key_value)
        query, key_value = (tensor.flatten(0, 1).flatten(1, 2)[:, None] for tensor in (query, key_value))
        attn_output = F.scaled_dot_product_attention(query, *key_value.chunk(2, dim=-1))  # [B*T, 1, H*W, C]
        return x + F.linear(attn_output, self.proj, self.proj_bias).view_as(x), None


class Upsample(nn.Module):
    """Twice the height and width and half the channels; where there is a ``time_conv`` also twice the frames.

    Nearest-neighbour upsampling and the 3x3 convolution after it are one 2x2 convolution at the low resolution: every
    output pixel of a 2x2 group sees only 2x2 different input pixels. That is 4/9 of the arithmetic.
    """

    def __init__(self, weights: Weights, channels: int, bias: Tensor):
        super().__init__()
        self.bias = frozen(bias)
        self.time_conv = None
        if "time_conv" in weights:
            self.time_conv = CausalConv3d(weights["time_conv"], channels, 2 * channels, size=1, add_bias=True)
        conv = weights["resample"]["1"].tensor("weight", None, channels, 3, 3)
        # fold[a, p, k] = 1 where row k of the 3x3 kernel falls on input row p of the two that output row a sees
        fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
        weight = torch.einsum("apk,bql,oikl->aboipq", fold, fold, conv.float()).flatten(0, 2).to(conv.dtype)
        self.weight = frozen(weight.contiguous(memory_format=torch.channels_last))  # [2*2*C', C, 2, 2]
        self.conv_bias = frozen(weights["resample"]["1"].tensor("bias", len(conv)))

    def forward(self, x: Tensor, residual: Tensor, feat_cache: FeatCache) -> tuple[Tensor, None]:
        x = add(residual, x, self.bias)
        if self.time_conv is not None:
            if not feat_cache.first:
                x = self.double_frames(self.time_conv, x, feat_cache)
            elif x.shape[1] > 1:  # the clip's first frame stays one, and is not seen by those after it
                x = torch.cat([x[:, :1], self.double_frames(self.time_conv, x[:, 1:], feat_cache)], dim=1)
        return self.enlarge(x, feat_cache), None

    @staticmethod
    def double_frames(time_conv: CausalConv3d, x: Tensor, feat_cache: FeatCache) -> Tensor:
        """[B, T, H, W, C] to [B, 2*T, H, W, C]."""
        frames, new = time_conv.buffer(x, feat_cache)
        new.copy_(x)
        pairs = time_conv(frames, feat_cache).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
        return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)

    def enlarge(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        """[B, T, H, W, C] to [B, T, 2*H, 2*W, C']."""
        frames = x
        if feat_cache.row_parallel is not None:
            frames, new = feat_cache.halo_buffer(x)
            new.copy_(x)
            feat_cache.fill_halos(frames)
        groups = conv2d(frames, self.weight, feat_cache).contiguous()
        groups = groups.unflatten(-1, (2, 2, -1))  # [B*T, H+1, W+1, 2, 2, C']
        return unshuffle_add(groups, self.conv_bias).unflatten(0, x.shape[:2])


class Head(nn.Module):
    """The last norm and convolution, to pixels.

    With three output channels a 3x3x3 convolution leaves the hardware idle. Here every frame is convolved once, for all
    three positions in time that it can have (nine channels), and those nine channels are cached.
    """

    def __init__(self, norm: Weights, conv: Weights, channels: int, bias: Tensor):
        super().__init__()
        self.norm = Norm(norm, channels, bias)
        weight = conv.tensor("weight", 3, channels, 3, 3, 3)
        weight = weight.permute(2, 0, 1, 3, 4).flatten(0, 1)  # [3*3, C, 3, 3], oldest frame first
        weight = F.pad(weight, (0, 0) * 3 + (0, 7))  # sixteen channels: tensor cores want a multiple of eight
        self.weight = frozen(weight.contiguous(memory_format=torch.channels_last))
        self.bias = frozen(conv.tensor("bias", 3))

    def forward(self, x: Tensor, residual: Tensor, feat_cache: FeatCache) -> Tensor:
        """To pixels [B, T, 3, H, W] in [0, 1], float32."""
        normed, new = feat_cache.halo_buffer(x)
        self.norm(x, residual, new)
        feat_cache.fill_halos(normed)
        taps = conv2d(normed, self.weight, feat_cache).unflatten(0, x.shape[:2])
        frames = feat_cache.prepend(self, taps)
        frames[:, 2:] = taps
        feat_cache.store(self, frames)
        return to_pixels(frames, self.bias)


class VAEDecoder(nn.Module):
    """The decoder, with copies of its weights.

    Args:
        state: the whole VAE's weights under the names of diffusers' ``AutoencoderKLWan``.

    Raises KeyError, which says what the weights lack or have in excess, where they are not those of one decoder.
    """

    def __init__(self, state: StateDict):
        super().__init__()
        root = Weights.of(state)
        weights, post_quant = root["decoder"], root["post_quant_conv"]
        size = len(post_quant.tensor("bias", None))
        self.post_quant, self.post_quant_bias = post_quant.linear(size, size, 3)
        self.conv_in = CausalConv3d(weights["conv_in"], size, add_bias=True)
        before, after = weights["mid_block"]["resnets"].values()
        channels, bias = len(self.conv_in.weight), before["conv2"]["bias"]
        attention = Attention(weights["mid_block"]["attentions"]["0"], channels, bias)
        layers: list[nn.Module] = [
            ResidualBlock(before, channels, None),
            attention,
            ResidualBlock(after, channels, None),
        ]
        bias = after["conv2"]["bias"]
        for block in weights["up_blocks"].values():
            for resnet in block["resnets"].values():
                layers.append(ResidualBlock(resnet, channels, bias))
                bias = resnet["conv2"]["bias"]
                channels = len(bias)
            if "upsamplers" in block:
                upsample = Upsample(block["upsamplers"]["0"], channels, bias)
                layers.append(upsample)
                channels, bias = len(upsample.conv_bias), None
        self.layers = nn.ModuleList(layers)
        self.last_upsample = max(i for i, layer in enumerate(layers) if getattr(layer, "time_conv", None)) + 1
        """Index of the first layer after the last one that doubles the frames."""
        self.head = Head(weights["norm_out"], weights["conv_out"], channels, bias)

    def forward(self, latents: Tensor, feat_cache: FeatCache, frame_by_frame: bool = False) -> Tensor:
        """Latents [B, F, 16, h, w], not normalised, to pixels [B, t, 3, 8h, 8w] in [0, 1], float32.

        The clip's first latent frame becomes one pixel frame, every other four; ``frame_by_frame`` these go through the
        last layers, the ones that take the memory. Where ranks share the frames, each passes whole latents, and the main
        process alone gets whole pixels.
        """
        row_parallel = feat_cache.row_parallel
        if row_parallel is not None:
            latents = row_parallel.shard(latents, dim=3)
        x = F.linear(latents.permute(0, 1, 3, 4, 2).to(self.post_quant.dtype), self.post_quant, self.post_quant_bias)
        frames, new = self.conv_in.buffer(x, feat_cache)
        new.copy_(x)
        x, residual = self.conv_in(frames, feat_cache), None
        for layer in self.layers[: self.last_upsample]:
            x, residual = layer(x, residual, feat_cache)
        parts = [self.finish(part, feat_cache) for part in x.split(1 if frame_by_frame else x.shape[1], dim=1)]
        feat_cache.first = False
        pixels = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return pixels if row_parallel is None else row_parallel.gather(pixels)

    def finish(self, x: Tensor, feat_cache: FeatCache) -> Tensor:
        """Apply the layers from ``last_upsample`` on: [B, t, H, W, C] to pixels."""
        residual = None
        for layer in self.layers[self.last_upsample :]:
            x, residual = layer(x, residual, feat_cache)
        return self.head(x, residual, feat_cache)
