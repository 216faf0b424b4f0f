"""The Wan 2.1 video VAE, loaded from the original file: diffusers' encoder and a streaming decoder.

Latents are normalised, [B, F, 16, h, w]; pixels are [B, T, 3, 8h, 8w] with T = 4*(F-1) + 1.
"""

import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn

from inferix.checkpoints.files import StateDict, load_pickle, load_strict
from inferix.errors import InputError
from inferix.models.vae_decoder import ClipDecoder, VAEDecoder

FRAMES_AT_ONCE = 3
"""Latent frames that go through the decoder together; bounds its memory, however long the piece."""


def vae_config(state: StateDict) -> dict:
    """Read the widths off the tensors (original names): the file comes without a config."""
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

    def __init__(self, model: Any, decoder: Any, mean: Tensor, std: Tensor):
        """Keep the encoder of ``model`` and free its decoder, whose weights ``decoder`` has copied.

        Args:
            model: a module with the halves ``encoder`` and ``decoder``.
            decoder: a module that ``ClipDecoder`` calls, as ``VAEDecoder.forward``.
            mean: of ``model``'s latents, one number a channel.
            std: their standard deviation, one number a channel.
        """
        self.model = model.eval().requires_grad_(False)
        self.model.decoder = None
        self.decoder = decoder
        self.mean, self.std = mean.view(1, 1, -1, 1, 1), std.view(1, 1, -1, 1, 1)
        self.low_memory = False
        """Decode fewer frames at a time, and without CUDA graphs, which keep the memory that they work in."""
        self.pool: list[ClipDecoder] = []
        """Decoders of streams that have ended, for the next stream: their memory and the graphs that belong to it."""

    @property
    def device(self) -> torch.device:
        return self.std.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        self.pool.clear()
        self.decoder.to(device, dtype)
        nn.Module.to(self.model, device, dtype)  # past diffusers' warning about modules it keeps in float32
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """Return latents [B, F, 16, H/8, W/8], not normalised, of pixels [B, T, 3, H, W] in [-1, 1]."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents [B, F, 16, H/8, W/8] of pixels [B, T, 3, H, W] in [-1, 1]."""
        latents = self._encode(pixels.to(self.device, self.dtype))
        return ((latents.float() - self.mean) / self.std).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, T, 3, 8h, 8w] in [0, 1], float32, of latents [B, F, 16, h, w]."""
        return self.streaming_decoder()(latents)

    def streaming_decoder(self) -> "StreamingDecoder":
        """Return a decoder for one clip that is called with its latents piece by piece."""
        return StreamingDecoder(self)

    def acquire(self, shape: tuple[int, int, int]) -> ClipDecoder:
        """Return a decoder for a new clip of (B, h, w), to be put back to ``pool``; those of another kind are dropped."""
        self.pool[:] = [
            decoder for decoder in self.pool if (decoder.shape, decoder.low_memory) == (shape, self.low_memory)
        ]
        decoder = self.pool.pop() if self.pool else ClipDecoder(self.decoder, shape, self.low_memory)
        decoder.feat_cache.restart()
        return decoder


class WanVAE(VAE):
    """The Wan 2.1 VAE."""

    def __init__(self, model: AutoencoderKLWan):
        """Keep the encoder of ``model`` and free its decoder, whose weights are copied to a ``VAEDecoder``."""
        if model.config.is_residual:
            raise InputError("this is the Wan 2.2 VAE; the models here go with the Wan 2.1 VAE")
        mean, std = torch.tensor(model.config.latents_mean), torch.tensor(model.config.latents_std)
        super().__init__(model, VAEDecoder(model), mean, std)

    @classmethod
    def from_file(cls, path: Path) -> "WanVAE":
        """Load ``Wan2.1_VAE.pth``, of any width."""
        state = load_pickle(path)
        with torch.device("meta"):
            model = AutoencoderKLWan(**vae_config(state))
        load_strict(model, convert_wan_vae_to_diffusers(state), path)
        return cls(model)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the mean of the distribution."""
        return self.model.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)


class StreamingDecoder:
    """Decode one clip piece by piece: the results, joined, equal one call with all latents.

    The first latent frame of the clip becomes one pixel frame, every other four.
    """

    def __init__(self, vae: VAE):
        self.vae = vae
        self.decoder: ClipDecoder | None = None

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels [B, t, 3, 8h, 8w] in [0, 1], float32, of latents [B, F, 16, h, w]."""
        if self.decoder is None:
            self.decoder = self.vae.acquire((latents.shape[0], *latents.shape[-2:]))
            weakref.finalize(self, self.vae.pool.append, self.decoder)
        latents = (latents.to(self.vae.device).float() * self.vae.std + self.vae.mean).to(self.vae.dtype)
        pieces = [self.decoder(piece) for piece in latents.split(1 if self.vae.low_memory else FRAMES_AT_ONCE, dim=1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
