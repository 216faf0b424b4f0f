"""The embedded model as it was written, in float32, for what is trained on top of it: ``tiny_vae.py`` and ``lora.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import UMT5EncoderModel

import generator
import vae as wan_vae
from export import BASE
from generator import BLOCK, SCHEDULES, World
from inferix.checkpoints.files import load_pickle, load_strict
from inferix.models.base_model import WanCheckpoint
from inferix.models.vae import vae_config
from vae import half_precision
from world import STARTS, Scene, render_many


@dataclass
class EncodedWorld(World):
    """The same, with the prompts' embeddings: the text encoder is not trained here."""

    embeds: Tensor  # [prompts, TEXT_LEN, text_dim]

    def embed(self, encoder: UMT5EncoderModel, prompt: Tensor) -> Tensor:
        """Return prompt embeddings [B, TEXT_LEN, text_dim]."""
        return self.embeds[prompt]


class DemoModel:
    """The embedded model's parts.

    Args:
        weights: the folder ``weights/demo``, or one of its layout.
        device: where the parts are put.
    """

    def __init__(self, weights: Path, device: torch.device):
        self.device = device
        base = WanCheckpoint(weights / BASE)
        text_encoder = base.text_encoder()
        self.transformer = base.transformer().to(device, torch.float32)
        self.text_encoder, self.tokenize = text_encoder.model.to(device, torch.float32), text_encoder.tokenize
        path = weights / BASE / "Wan2.1_VAE.pth"
        state = load_pickle(path)
        self.vae = AutoencoderKLWan(**vae_config(state))
        load_strict(self.vae, convert_wan_vae_to_diffusers(state), path)
        self.vae = wan_vae.whole_clip(self.vae).to(device, torch.float32).eval().requires_grad_(False)
        mean, std = self.vae.config.latents_mean, self.vae.config.latents_std
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def encode(self, pixels: Tensor, batch: int = 16) -> Tensor:
        """Return the normalised latents [B, F, 16, h, w] of pixels [B, T, 3, 8h, 8w] in [0, 1]."""
        latents = torch.cat([wan_vae.encode(self.vae, part) for part in pixels.split(batch)])
        return (latents.transpose(1, 2) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 8) -> Tensor:
        """Return the pixels [B, T, 3, 8h, 8w] in [0, 1] of normalised latents [B, F, 16, h, w]."""
        latents = (latents * self.std + self.mean).transpose(1, 2)
        return torch.cat([wan_vae.decode(self.vae, part).clamp(0, 1) for part in latents.split(batch)])

    def world(self, scenes: list[Scene], starts: int) -> EncodedWorld:
        """Return the scenes' videos from ``starts`` places, as latents, and the prompts."""
        frames = torch.arange(4 * generator.NUM_FRAMES - 3, device=self.device)
        chosen = STARTS[:: len(STARTS) // starts][:starts]
        latents = torch.stack([self.encode(render_many([scene] * starts, chosen, frames)[0]) for scene in scenes])
        return EncodedWorld(latents, *self.encode_prompts([scene.prompt for scene in scenes]))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prompts' tokens and mask, both [B, TEXT_LEN], and embeddings [B, TEXT_LEN, text_dim]."""
        ids, mask = (tensor.to(self.device) for tensor in self.tokenize(prompts))
        return ids, mask, self.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    @torch.no_grad()
    def generate(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        """Return the latents [B, F, 16, h, w] of the prompts' videos, sampled by Self-Forcing's rule."""
        text = self.encode_prompts(prompts)[2]
        noise = torch.randn(len(prompts), num_frames, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
        blocks = [(start, start + BLOCK) for start in range(0, num_frames, BLOCK)]
        with half_precision(self.device):
            noise = noise.to(self.device)
            return generator.rollout(self.transformer, text, SCHEDULES["self_forcing"], noise, noise[:, :0], blocks)
