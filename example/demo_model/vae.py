"""The embedded model's VAE: Wan 2.1's architecture, a sixth as wide, trained on the synthetic world."""

from __future__ import annotations

from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import Tensor, nn

from world import SCENES, SIZE, render

BASE_DIM = 16  # Wan 2.1: 96


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def build_vae() -> AutoencoderKLWan:
    """A VAE whose residual branches start at zero and whose resampling starts near the identity.

    From PyTorch's own initialisation this narrow network hardly learns to reproduce eight pictures in a hundred steps;
    from this one it does.
    """
    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if not isinstance(module.conv_shortcut, nn.Identity):
                near_identity(module.conv_shortcut)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, WanResample):
            for convolution in module.modules():
                if isinstance(convolution, (nn.Conv2d, nn.Conv3d)):
                    near_identity(convolution)
    return vae


@torch.no_grad()
def near_identity(convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Let every output channel pass on one input channel: its middle in space, in time its newest frame."""
    weight = convolution.weight.mul_(0.1)
    middle = [size // 2 for size in weight.shape[2:]]
    if len(middle) == 3:
        middle[0] = weight.shape[2] - 1
    for channel in range(weight.shape[0]):
        weight[(channel, channel % weight.shape[1], *middle)] += 1
    nn.init.zeros_(convolution.bias)


def resample_whole_clip(self: WanResample, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    """What WanResample computes piece by piece with a cache, for a whole clip [B, C, T, H, W] at once.

    The first frame is never resampled in time.
    """
    if self.mode == "upsample3d" and x.shape[2] > 1:
        later = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # [B, 2, C, T-1, H, W]
        x = torch.cat([x[:, :, :1], later.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    batch, frames = x.shape[0], x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


def whole_clip(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let the VAE's encoder and decoder take whole clips without caches: the same numbers, much faster to train."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(resample_whole_clip, module)
    return vae


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Pixels [B, T, 3, H, W] in [0, 1] to the means of the latents [B, 16, F, h, w], not normalised."""
    return vae.quant_conv(vae.encoder(pixels.transpose(1, 2) * 2 - 1)).chunk(2, 1)[0]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents [B, 16, F, h, w], not normalised, to pixels [B, T, 3, H, W] around [0, 1], not clamped."""
    return vae.decoder(vae.post_quant_conv(latents)).transpose(1, 2) / 2 + 0.5


def random_clips(batch: int, frames: int, device: torch.device) -> Tensor:
    """Clips [B, T, 3, 128, 128] of random scenes that start anywhere."""
    time = torch.arange(frames, device=device)
    picks = torch.randint(len(SCENES), (batch,)).tolist()
    starts = (torch.rand(batch, 2) * SIZE).tolist()
    return torch.stack([render(SCENES[i], start, time) for i, start in zip(picks, starts)])


def train_vae(vae: AutoencoderKLWan, image_steps: int, steps: int, batch: int, log) -> None:
    """Train a ``whole_clip`` VAE: on single pictures, which is cheap, then on clips, every fourth time on whole ones."""
    fit_vae(vae, image_steps, 3e-3, lambda step: random_clips(2 * batch, 1, vae.device), log)

    def clips(step: int) -> Tensor:
        whole = step % 4 == 3 and steps >= 100
        return random_clips(max(1, batch // 5) if whole else batch, 81 if whole else 17, vae.device)

    fit_vae(vae, steps, 2e-3, clips, log)


def fit_vae(vae: AutoencoderKLWan, steps: int, learning_rate: float, clips, log) -> None:
    """Minimise the error of ``clips(step)`` [B, T, 3, 128, 128] there and back; the decoder sees latents with noise on them."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        pixels = clips(step)
        with half_precision(vae.device):
            latents = encode(vae, pixels).float()
            # the transformer's latents will be a little off: noise up to a quarter of their spread
            spread = latents.detach().std((0, 2, 3, 4), keepdim=True).clamp(min=0.05)
            level = 0.25 * torch.rand(len(latents), 1, 1, 1, 1, device=vae.device)
            decoded = decode(vae, latents + level * spread * torch.randn_like(latents)).float()
        error = decoded - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(step, steps, loss=loss, l1=error.abs().mean(), mse=error.square().mean())


@torch.no_grad()
def normalize(vae: AutoencoderKLWan) -> None:
    """Make the latents of the world look like Wan's: fold an affine map into the layers on both sides of them.

    Wan's pipelines subtract ``latents_mean`` and divide by ``latents_std``; afterwards every channel has zero mean and
    unit variance. A channel that hardly varies is left small rather than blown up.
    """
    device = vae.device
    latents = torch.cat([encode(vae, random_clips(4, 41, device)).float() for _ in range(8)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp(min=std.median() / 4)
    wan_mean, wan_std = (torch.tensor(vae.config[name], device=device) for name in ("latents_mean", "latents_std"))
    scale = wan_std / std
    shift = wan_mean - mean * scale
    out, inp = vae.quant_conv, vae.post_quant_conv
    out.weight[:16] *= scale.view(-1, 1, 1, 1, 1)
    out.bias[:16] = out.bias[:16] * scale + shift
    inp.bias -= inp.weight.flatten(1) @ (shift / scale)
    inp.weight /= scale.view(1, -1, 1, 1, 1)
