"""The Wan 2.1 video VAE: diffusers' encoder and a streaming decoder.

Latents are normalised, [B, F, 16, h, w]; pixels are [B, T, 3, 8h, 8w] with T = 4*(F-1) + 1.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from inferix.checkpoints.files import StateDict, load_pickle, load_strict
from inferix.checkpoints.keys import vae_name
from inferix.distributed.context_parallel import ContextParallel
from inferix.errors import InputError
from inferix.models.clip_decoder import ClipDecoder
from inferix.models.vae_decoder import VAEDecoder

FRAMES_AT_ONCE = 3
"""Latent frames that are decoded together, which bounds the memory."""
BASE_DIM = 96
"""Channels of the published VAE's widest activations."""
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
"""Of the Wan 2.1 VAE's latents, one number a channel."""
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Their standard deviation."""


@dataclass(frozen=True)
class DecodeRequest:
    """What the main process of a job sends to the other ranks before it decodes latents together with them."""

    stream: int
    """Number of the ``StreamingDecoder`` that is called."""
    shape: tuple[int, ...]
    """Of the latents."""
    ended: tuple[int, ...]
    """Streams that have ended since the last request."""


def vae_config(state: StateDict) -> dict:
    """Return the config inferred from the tensors (original names); the file has none."""
    try:
        base_dim = state["encoder.conv1.weight"].shape[0]
        widest = state["encoder.middle.0.residual.2.weight"].shape[0]
        return {
            "base_dim": base_dim,
            "z_dim": state["conv2.weight"].shape[0],
            "dim_mult": [1, 2, widest // base_dim, widest // base_dim],
        }
    except (KeyError, AttributeError, IndexError):
        raise InputError("the VAE file does not hold a Wan 2.1 VAE; download Wan2.1_VAE.pth again") from None


class VAE(ABC):
    """Encodes pixels, and decodes latents as a whole or as a stream: a ``WanVAE`` or a ``TinyVAE``."""

    can_share = False
    """Whether the decoder takes part of a frame's rows on each rank of a job."""

    model: Any = None
    """The network with its encoder; None where nothing was encoded yet, and on the ranks that never encode."""
    base_dim: int
    """Channels of the widest activations."""
    num_encoder_parameters: int

    def __init__(self, decoder: Any, mean: Tensor, std: Tensor):
        """Take over a decoder.

        Args:
            decoder: a module that ``ClipDecoder`` calls, as ``VAEDecoder.forward``.
            mean: of the network's own latents, one number a channel.
            std: their standard deviation, one number a channel.
        """
        self.decoder = decoder
        self.mean, self.std = mean.view(1, 1, -1, 1, 1), std.view(1, 1, -1, 1, 1)
        self.low_memory = False
        """Decode fewer frames at a time, and without CUDA graphs, whose memory stays allocated."""
        self.pool: list[ClipDecoder] = []
        """Decoders of streams that have ended, for the next stream: their memory and the graphs that belong to it."""
        self.context_parallel: ContextParallel | None = None
        self.numbers = count()
        self.ended: list[int] = []
        """In the main process: numbers of the shared streams that have ended since the last request."""
        self.streams: dict[int, StreamingDecoder] = {}
        """On the other ranks: this rank's part of the main process's streams."""

    def share(self, context_parallel: ContextParallel) -> None:
        """Decode together with all ranks of a job from now on."""
        self.context_parallel = context_parallel

    def take_part(self, request: DecodeRequest) -> None:
        """Decode this rank's rows of what the main process decodes: what the others do with its requests."""
        assert self.context_parallel is not None  # only then are there requests
        for number in request.ended:
            self.streams.pop(number, None)
        stream = self.streams.setdefault(request.stream, StreamingDecoder(self))
        stream.decode(self.context_parallel.broadcast(torch.empty(request.shape, device=self.device, dtype=self.dtype)))

    @property
    def device(self) -> torch.device:
        return self.std.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        self.pool.clear()
        self.decoder.to(device, dtype)
        if self.model is not None:
            nn.Module.to(self.model, device, dtype)  # past diffusers' warning about modules it keeps in float32
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @abstractmethod
    def load_encoder(self) -> None:
        """Load what ``encode`` needs, which it does itself where that was not done before."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """Return latents [B, F, 16, H/8, W/8], not normalised, of pixels [B, T, 3, H, W] in [-1, 1]."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents [B, F, 16, H/8, W/8] of pixels [B, T, 3, H, W] in [-1, 1]."""
        self.load_encoder()
        latents = self._encode(pixels.to(self.device, self.dtype))
        return ((latents.float() - self.mean) / self.std).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, T, 3, 8h, 8w] in [0, 1], float32, of latents [B, F, 16, h, w]."""
        return self.streaming_decoder()(latents)

    def streaming_decoder(self) -> "StreamingDecoder":
        """Return a decoder for one clip that is called with its latents piece by piece."""
        return StreamingDecoder(self)

    @abstractmethod
    def warm_up(self, shape: Sequence[int]) -> None:
        """Prepare a GPU for latents of ``shape`` [B, F, 16, h, w], as far as that takes no compiler."""

    def acquire(self, shape: tuple[int, int, int]) -> ClipDecoder:
        """Return a decoder for a new clip of (B, h, w), to be put back to ``pool``; those of another kind are dropped.

        Ranks share its work unless a frame has fewer rows than there are ranks, or the job has been closed.
        """
        parallel = self.context_parallel
        if parallel is not None and (parallel.closed or shape[1] < parallel.world_size):
            parallel = None
        kind = (shape, self.low_memory, parallel)
        self.pool[:] = [d for d in self.pool if (d.shape, d.low_memory, d.context_parallel) == kind]
        decoder = self.pool.pop() if self.pool else ClipDecoder(self.decoder, *kind)
        decoder.feat_cache.restart()
        return decoder

    def release(self, decoder: ClipDecoder, number: int) -> None:
        """Keep the decoder of the stream of this number, which has ended, for the next."""
        self.pool.append(decoder)
        if decoder.context_parallel is not None:
            self.ended.append(number)


class WanVAE(VAE):
    """The Wan 2.1 VAE.

    Args:
        state: weights under the names of diffusers' ``AutoencoderKLWan``. The decoder's are copied, the encoder's kept as
            they are until something is encoded.
        config: that class's arguments; what is missing is the published VAE's.
        source: where they are from, for error messages.

    Raises InputError where this is another VAE.
    """

    can_share = True

    def __init__(self, state: StateDict, config: dict[str, Any], source: Path = Path("the VAE")):
        if config.get("is_residual"):
            raise InputError("this is the Wan 2.2 VAE; the models here go with the Wan 2.1 VAE")
        try:
            decoder = VAEDecoder(state)
        except KeyError as error:
            raise InputError(f"{source} {error.args[0]}: it is not the kind of VAE expected here") from None
        mean, std = config.get("latents_mean", LATENTS_MEAN), config.get("latents_std", LATENTS_STD)
        super().__init__(decoder, torch.tensor(mean), torch.tensor(std))
        self.config, self.base_dim, self.source = config, config.get("base_dim", BASE_DIM), source
        self.encoder_state = {k: v for k, v in state.items() if not k.startswith(("decoder.", "post_quant_conv."))}
        self.num_encoder_parameters = sum(tensor.numel() for tensor in self.encoder_state.values())

    @classmethod
    def from_file(cls, path: Path) -> "WanVAE":
        """Load ``Wan2.1_VAE.pth``, of any width."""
        state = load_pickle(path)
        config = vae_config(state)
        return cls({vae_name(name): tensor for name, tensor in state.items()}, config, path)

    @torch.no_grad()
    def warm_up(self, shape: Sequence[int]) -> None:
        """Load the kernels and let cuDNN choose its algorithms, which it keeps for the calling thread.

        Ranks that decode together call it together.
        """
        if self.low_memory:
            return
        batch, frames, channels, height, width = shape
        piece = torch.zeros(batch, min(frames, FRAMES_AT_ONCE), channels, height, width)
        decoder = self.acquire((batch, height, width))
        decoder.warm_up(piece.to(self.device, self.dtype))
        self.pool.append(decoder)

    def load_encoder(self) -> None:
        """Build diffusers' network without its decoder. Raises InputError where the weights do not fit it."""
        if self.model is not None:
            return
        from diffusers import AutoencoderKLWan  # takes most of a second

        with torch.device("meta"):
            model: Any = AutoencoderKLWan.from_config(self.config)
        model.decoder = model.post_quant_conv = None
        load_strict(model, self.encoder_state, self.source)
        self.model = nn.Module.to(model.eval().requires_grad_(False), self.device, self.dtype)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the mean of the distribution."""
        return self.model.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)


class StreamingDecoder:
    """Decode one clip piece by piece: the results, joined, equal one call with all latents.

    The first latent frame of the clip becomes one pixel frame, every other four.
    """

    def __init__(self, vae: VAE):
        self.vae, self.number = vae, next(vae.numbers)
        self.decoder: ClipDecoder | None = None

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels [B, t, 3, 8h, 8w] in [0, 1], float32, of latents [B, F, 16, h, w].

        In a job the main process calls it, and the other ranks compute their part.
        """
        vae, shape = self.vae, tuple(latents.shape)
        latents = (latents.to(vae.device).float() * vae.std + vae.mean).to(vae.dtype)
        parallel = self.clip_decoder(latents).context_parallel
        if parallel is None:
            return self.decode(latents)
        if parallel.closed:
            raise RuntimeError("the other ranks of the job have ended in the middle of the clip")
        ended, vae.ended = tuple(vae.ended), []
        parallel.in_block = True
        parallel.broadcast_object(DecodeRequest(self.number, shape, ended))
        pixels = self.decode(parallel.broadcast(latents))
        parallel.in_block = False
        return pixels

    def clip_decoder(self, latents: Tensor) -> ClipDecoder:
        """Return the clip's decoder, which the first latents determine."""
        if self.decoder is None:
            self.decoder = self.vae.acquire((latents.shape[0], *latents.shape[-2:]))
            weakref.finalize(self, self.vae.release, self.decoder, self.number)
        return self.decoder

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels of latents that are not normalised; in a job on all ranks at once, whole in the main process."""
        decoder = self.clip_decoder(latents)
        pieces = [decoder(piece) for piece in latents.split(1 if self.vae.low_memory else FRAMES_AT_ONCE, dim=1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
