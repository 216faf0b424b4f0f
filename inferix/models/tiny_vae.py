"""TAEHV (https://github.com/madebyollin/taehv), a small autoencoder that takes the place of the Wan 2.1 VAE.

``TAEHV`` is the network under the names of its file, ``taew2_1.pth``, and computes whole clips. ``TinyDecoder`` computes
what its decoder does, faster, and piece by piece; ``TinyVAE`` is what a pipeline holds.

Latents are [B, F, 16, h, w]; pixels are [B, T, 3, 8h, 8w] with T = 4*(F-1) + 1.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.checkpoints.files import StateDict, load_pickle, load_safetensors, load_strict
from inferix.errors import InputError
from inferix.models.clip_decoder import FeatCache
from inferix.models.vae import LATENTS_MEAN, LATENTS_STD, VAE
from inferix.models.vae_decoder import conv3d, frozen
from inferix.runtime.memory import num_parameters

FRAMES_PER_LATENT = 4
LATENT_CHANNELS = 16
STAGE_FRAMES = (1, 2, 2)
"""How many frames each stage of the decoder makes of one; the encoder's stages take as many in the opposite order."""


class Tanh3(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return 3*tanh(x/3), in float32: latents softly limited to (-3, 3)."""
        return (3 * torch.tanh(x.float() / 3)).to(x.dtype)


class MemoryBlock(nn.Module):
    """A residual block of three convolutions that sees every frame together with the frame before it."""

    def __init__(self, width: int):
        super().__init__()
        first, second, third = (nn.Conv2d(n * width, width, 3, padding=1) for n in (2, 1, 1))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, H, W] to the same; the frame before the first is zeros."""
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        residual = self.conv(torch.cat([x, previous], dim=2).flatten(0, 1)).view_as(x)
        return F.relu(x + residual)


class TemporalPool(nn.Module):
    """Makes one frame of ``num`` by a 1x1 convolution."""

    def __init__(self, width: int, num: int):
        super().__init__()
        self.num = num
        self.conv = nn.Conv2d(num * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num*T, C, H, W] to [B, T, C, H, W]."""
        groups = x.unflatten(1, (-1, self.num)).flatten(2, 3)
        return self.conv(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])


class TemporalGrow(nn.Module):
    """Makes ``num`` frames of one by a 1x1 convolution."""

    def __init__(self, width: int, num: int):
        super().__init__()
        self.num = num
        self.conv = nn.Conv2d(width, num * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, H, W] to [B, num*T, C, H, W]."""
        grown = self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return grown.unflatten(2, (self.num, -1)).flatten(1, 2)


class VideoSequential(nn.Sequential):
    """Layers one after the other on videos [B, T, C, H, W], of which most take single frames."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, (MemoryBlock, TemporalPool, TemporalGrow)):
                x = layer(x)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x


class TAEHV(nn.Module):
    """The network, with the names of the public files.

    Args:
        encoder_width: channels of all of the encoder; 64 in ``taew2_1``.
        decoder_widths: channels of the decoder's three stages and of its last layer; 256, 128, 64, 64.
    """

    def __init__(self, encoder_width: int, decoder_widths: Iterable[int]):
        super().__init__()
        width, widths = encoder_width, tuple(decoder_widths)
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for num in reversed(STAGE_FRAMES):
            layers += [TemporalPool(width, num), nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
            layers += [MemoryBlock(width) for _ in range(3)]
        self.encoder = VideoSequential(*layers, nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1))
        layers = [Tanh3(), nn.Conv2d(LATENT_CHANNELS, widths[0], 3, padding=1), nn.ReLU()]
        for num, width, after in zip(STAGE_FRAMES, widths, widths[1:]):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TemporalGrow(width, num)]
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False)]
        self.decoder = VideoSequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    @classmethod
    def from_state(cls, state: StateDict, source: Path) -> "TAEHV":
        """Build the network that ``state``, read from ``source``, holds the weights of.

        Raises InputError where they are another network's.
        """
        try:
            encoder_width = state["encoder.0.weight"].shape[0]
            decoder_widths = [state[f"decoder.{i}.weight"].shape[0] for i in (1, 8, 14, 20)]
        except (KeyError, AttributeError, IndexError):
            raise InputError(f"{source} holds no TAEHV, such as taew2_1.pth; is it another VAE?") from None
        with torch.device("meta"):
            model = cls(encoder_width, decoder_widths)
        load_strict(model, state, source)
        return model.float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, T, 3, H, W] in [0, 1] to latents [B, ceil(T/4), 16, H/8, W/8].

        The last frame is repeated until their number is a multiple of four.
        """
        missing = -pixels.shape[1] % FRAMES_PER_LATENT
        return self.encoder(torch.cat([pixels, *[pixels[:, -1:]] * missing], dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, 16, h, w] to pixels [B, T, 3, 8h, 8w] around [0, 1], not clamped."""
        return self.decoder(latents)[:, FRAMES_PER_LATENT - 1 :]


def as_base(tensor: Tensor) -> Tensor:
    """Return a tensor on the same memory that is not a view: of views, each base shape would be compiled anew.

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


def rows(x: Tensor) -> Tensor:
    """[B, T, H, W, C] as [B, N, C]; a slice in time stays a view of the larger tensor."""
    return x.flatten(1, 3)


@compiled_on_gpu
def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU(x + bias); x [B, N, C]."""
    return (x.float() + bias.float()).relu_().to(x.dtype)


@compiled_on_gpu
def add_bias_relu(residual: Tensor, x: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write ReLU(residual + x + bias) to ``out``; all [B, N, C]."""
    out.copy_((residual.float() + (x.float() + bias.float())).relu_())


@compiled_on_gpu
def copy(x: Tensor, out: Tensor) -> None:
    """Write x to ``out``, whatever their strides."""
    out.copy_(x)


@compiled_on_gpu
def copy_relu(x: Tensor, out: Tensor) -> None:
    """Write ReLU(x) to ``out``, whatever their strides."""
    out.copy_(F.relu(x))


@compiled_on_gpu
def to_pixels(x: Tensor, bias: Tensor) -> Tensor:
    """Add the bias, clamp to [0, 1] and lay out as pictures: [N, H, W, 2, 2, 3] to [N, 3, H, 2, W, 2], float32."""
    return (x.float() + bias.float()).clamp(0, 1).permute(0, 5, 1, 3, 2, 4).contiguous()


def conv2d(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Convolve every frame, without a bias: [B, T, H, W, C] to [B, T, H', W', C']."""
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, padding=padding).permute(0, 2, 3, 1)
    return y.contiguous().unflatten(0, x.shape[:2])


def channels_last(weight: Tensor) -> nn.Parameter:
    """Return a copy of a 2D convolution's weights in the layout that ``conv2d`` reads without converting it."""
    return nn.Parameter(weight.detach().clone(memory_format=torch.channels_last), requires_grad=False)


class FusedMemoryBlock(nn.Module):
    """``MemoryBlock`` with memory; its first convolution, of two frames joined, is a 3D convolution over time."""

    def __init__(self, source: MemoryBlock):
        super().__init__()
        convs: Any = source.conv
        first, _, second, _, third = convs
        current, previous = first.weight.chunk(2, dim=1)
        weight = torch.stack([previous, current], dim=2)  # [C, C, 2, 3, 3]
        self.weight1 = frozen(weight.contiguous(memory_format=torch.channels_last_3d))
        self.weight2, self.weight3 = channels_last(second.weight), channels_last(third.weight)
        self.bias1, self.bias2, self.bias3 = (frozen(conv.bias) for conv in (first, second, third))

    def forward(self, frames: Tensor, feat_cache: FeatCache, out: Tensor) -> None:
        """Read [B, 1+T, H, W, C], which ``feat_cache.prepend`` returned, and fill ``out`` [B, T, H, W, C]."""
        feat_cache.store(self, frames)
        x = conv3d(frames.permute(0, 4, 1, 2, 3), self.weight1, None, (0, 1, 1)).permute(0, 2, 3, 4, 1)
        x = conv2d(bias_relu(rows(x), self.bias1).view_as(x), self.weight2, padding=1)
        x = conv2d(bias_relu(rows(x), self.bias2).view_as(x), self.weight3, padding=1)
        add_bias_relu(rows(frames[:, 1:]), rows(x), self.bias3, rows(out))


class FusedStage(nn.Module):
    """Three memory blocks, and what makes their frames larger and more.

    Nearest-neighbour upsampling, the 1x1 convolution that makes n frames of one, and the 3x3 convolution after it have
    no bias and nothing between them: they are one 2x2 convolution at the low resolution, since each output pixel of a
    2x2 group sees only 2x2 different input pixels.
    """

    def __init__(self, blocks: Iterable[MemoryBlock], grow: TemporalGrow, conv: nn.Conv2d):
        super().__init__()
        self.blocks = nn.ModuleList(FusedMemoryBlock(block) for block in blocks)
        self.out = (grow.num, conv.out_channels)
        # fold[a, p, k] = 1 where row k of the 3x3 kernel falls on input row p of the two that output row a sees
        fold = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
        grow_weight = grow.conv.weight.flatten(1).unflatten(0, (grow.num, -1))  # [n, C, C]
        weight = torch.einsum("apk,bql,omkl,nmc->abnocpq", fold, fold, conv.weight, grow_weight)
        self.weight = channels_last(weight.flatten(0, 3))  # [2*2*n*C', C, 2, 2]

    def forward(self, frames: Tensor, feat_cache: FeatCache) -> Tensor:
        """[B, 1+T, H, W, C] to [B, T, H+1, W+1, 2, 2, n, C'].

        Element (y, x, a, b) is output pixel (2y - a, 2x - b); those outside of the frame are to be left out.
        """
        for block, following in zip(self.blocks, [*self.blocks[1:], None]):
            # the last block's output, which nothing remembers, has the others' layout: one kernel serves all
            after = (
                torch.empty_like(frames) if following is None else feat_cache.prepend(following, frames[:, 1:], num=1)
            )
            block(frames, feat_cache, after[:, 1:])
            frames = after
        return conv2d(frames[:, 1:], self.weight, padding=1).unflatten(-1, (2, 2, *self.out))


def to_frames(groups: Tensor, reader: FusedMemoryBlock, feat_cache: FeatCache) -> Tensor:
    """Map [B, T, H+1, W+1, 2, 2, n, C] of a ``FusedStage`` to [B, 1+n*T, 2*H, 2*W, C], the frame cached for ``reader`` first."""
    batch, time, height, width, _, _, num, channels = groups.shape
    height, width = height - 1, width - 1
    frames = feat_cache.prepend(reader, groups, num=1, shape=(batch, num * time, 2 * height, 2 * width, channels))
    clips, frame, row, column, a, b, part, channel = groups.stride()
    pixels = groups.as_strided(
        (batch, time, num, height, 2, width, 2, channels),
        (clips, frame, part, row, row + a, column, column + b, channel),
    )
    copy(pixels, frames[:, 1:].unflatten(1, (time, num)).unflatten(3, (height, 2)).unflatten(5, (width, 2)))
    return frames


class FusedHead(nn.Module):
    """The last ReLU and 3x3 convolution, on groups of 2x2 pixels as they leave the last ``FusedStage``.

    A 2x2 group of output pixels sees the 4x4 pixels of 2x2 such groups: the 3x3 convolution to 3 channels is a 2x2
    convolution from 4*C to 12, which keeps the hardware busier, and the pixels need not be put in order before it.
    """

    def __init__(self, conv: Any):
        super().__init__()
        # fold[a, p, g, k] = 1 where row k of the 3x3 kernel for output row a falls on row g of input group p
        fold = torch.zeros(2, 2, 2, 3)
        for a in range(2):
            for k in range(3):
                p, g = divmod(a + k, 2)
                fold[a, p, 1 - g, k] = 1
        weight = torch.einsum("apgk,bqhl,ockl->aboghcpq", fold, fold, conv.weight).flatten(3, 5).flatten(0, 2)
        weight = F.pad(weight, (0, 0) * 3 + (0, 4))  # sixteen channels: tensor cores want a multiple of eight
        self.weight = channels_last(weight)  # [2*2*3 and 4, 2*2*C, 2, 2]
        self.bias = frozen(conv.bias)

    def forward(self, groups: Tensor, skip: int) -> Tensor:
        """[B, T, H+1, W+1, 2, 2, n, C] to pixels [B, n*T - skip, 3, 2*H, 2*W] in [0, 1], without the first ``skip``."""
        batch, time, height, width, _, _, num, channels = groups.shape
        x = groups.new_empty(batch, num * time, height, width, 2, 2, channels)
        source = groups.view(batch * time, -1, num, channels).transpose(1, 2)
        copy_relu(source, x.view(batch * time, num, -1, channels))
        for outside in (x[:, :, 0, :, 1], x[:, :, -1, :, 0], x[:, :, :, 0, :, 1], x[:, :, :, -1, :, 0]):
            outside.zero_()  # the convolution's padding
        x = conv2d(x.flatten(4)[:, skip:], self.weight, padding=0)[..., :12].unflatten(-1, (2, 2, 3))
        return to_pixels(x.flatten(0, 1), self.bias).flatten(4, 5).flatten(2, 3).unflatten(0, (batch, -1))


class TinyDecoder(nn.Module):
    """The decoder of ``model``, with copies of its weights, for ``ClipDecoder``.

    Activations are [B, T, H, W, C], and all frames of a call go through together, as in ``VAEDecoder``. Its state
    between calls is the last frame that each memory block read.
    """

    def __init__(self, model: TAEHV):
        super().__init__()
        layers: Any = model.decoder
        self.weight, self.bias = channels_last(layers[1].weight), frozen(layers[1].bias)
        self.stages: Any = nn.ModuleList(
            FusedStage(layers[i : i + 3], layers[i + 4], layers[i + 5]) for i in (3, 9, 15)
        )
        self.head = FusedHead(layers[22])

    def forward(self, latents: Tensor, feat_cache: FeatCache, frame_by_frame: bool = False) -> Tensor:
        """Latents [B, F, 16, h, w] to pixels [B, t, 3, 8h, 8w] in [0, 1], float32.

        The clip's first latent frame becomes one pixel frame, every other four. ``frame_by_frame``, latent frames go
        through one after the other, which takes less memory.
        """
        pixels = []
        for piece in latents.split(1 if frame_by_frame else latents.shape[1], dim=1):
            pixels.append(self.decode(piece, feat_cache))
            feat_cache.first = False
        return pixels[0] if len(pixels) == 1 else torch.cat(pixels, dim=1)

    def decode(self, latents: Tensor, feat_cache: FeatCache) -> Tensor:
        limited = Tanh3()(latents.float()).to(self.weight.dtype)
        x = conv2d(limited.permute(0, 1, 3, 4, 2), self.weight, padding=1)
        frames = feat_cache.prepend(self.stages[0].blocks[0], x, num=1)
        frames[:, 1:] = bias_relu(rows(x), self.bias).view_as(x)
        for stage, following in zip(self.stages, self.stages[1:]):
            frames = to_frames(stage(frames, feat_cache), following.blocks[0], feat_cache)
        return self.head(self.stages[-1](frames, feat_cache), skip=FRAMES_PER_LATENT - 1 if feat_cache.first else 0)


class TinyVAE(VAE):
    """TAEHV in the place of ``WanVAE``.

    Args:
        model: whose weights are taken over.
        normalized: whether the network's own latents are normalised, as the diffusion model's are.
    """

    def __init__(self, model: TAEHV, normalized: bool = True):
        mean, std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
        if normalized:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        super().__init__(TinyDecoder(model), mean, std)
        self.model = model.eval().requires_grad_(False)
        self.model.decoder = None  # of which ``TinyDecoder`` has copies
        self.base_dim = self.model.encoder[0].out_channels
        self.num_encoder_parameters = num_parameters(model)

    @classmethod
    def from_file(cls, path: Path) -> "TinyVAE":
        """Load ``taew2_1.pth`` or ``.safetensors``, of any width.

        A file with ``lighttae`` in its name (LightX2V's ``lighttaew2_1``) was trained on latents that are not normalised.

        Raises InputError where the file is missing, damaged or holds another network.
        """
        path = Path(path)
        state = load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
        return cls(TAEHV.from_state(state, path), normalized="lighttae" not in path.name.lower())

    def warm_up(self, shape: Sequence[int]) -> None:
        """Do nothing: its functions are compiled when the first clip calls them."""

    def load_encoder(self) -> None:
        """Do nothing: the network is small and loaded."""

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels / 2 + 0.5)
