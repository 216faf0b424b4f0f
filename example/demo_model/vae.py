"""The embedded model's VAE: Wan 2.1's architecture, a sixth as wide, trained on the synthetic world."""

from __future__ import annotations

from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import Tensor, nn

from world import SCENES, SIZE, centers, render_many

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


def random_clips(batch: int, frames: int, device: torch.device, window: int = SIZE) -> tuple[Tensor, Tensor]:
    """Clips [B, T, 3, window, window] of random scenes that start anywhere, and where their object is [B, T, 1, ...].

    A window smaller than the frame is laid near the object's middle.
    """
    scenes = [SCENES[i] for i in torch.randint(len(SCENES), (batch,)).tolist()]
    starts = [tuple(start) for start in (torch.rand(batch, 2) * SIZE).tolist()]
    pixels, cover = render_many(scenes, starts, torch.arange(frames, device=device))
    if window == SIZE:
        return pixels, cover
    corners = []
    for scene, start in zip(scenes, starts):
        middle = centers(scene, start, torch.tensor([frames / 2]))[0] + torch.randint(-16, 17, (2,))
        corners.append((middle - window / 2).clamp(0, SIZE - window).int().tolist())
    return tuple(
        torch.stack([clip[..., y : y + window, x : x + window] for clip, (x, y) in zip(clips, corners)])
        for clips in (pixels, cover)
    )


def train_on_images(vae: AutoencoderKLWan, steps: int, batch: int, log) -> None:
    """Train a ``whole_clip`` VAE on windows of single pictures: cheap, and all that colours and shapes need."""
    fit_vae(vae, steps, 4e-3, lambda step: random_clips(batch, 1, vae.device, window=64), log)


def train_on_clips(vae: AutoencoderKLWan, steps: int, batch: int, log) -> None:
    """Train a ``whole_clip`` VAE that has seen pictures on clips of 17 frames, and at last of 33."""
    fit_vae(vae, steps, 1e-3, lambda step: random_clips(batch, 17 if step < 0.75 * steps else 33, vae.device), log)


def fit_vae(vae: AutoencoderKLWan, steps: int, learning_rate: float, clips, log) -> None:
    """Minimise the error of ``clips(step)`` there and back; the decoder sees latents with noise on them.

    Colour counts more than brightness, and the object more than the background: without that the network is content
    with a gray object for hundreds of steps.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        pixels, cover = clips(step)
        with half_precision(vae.device):
            latents = encode(vae, pixels).float()
            # the transformer's latents will be a little off: noise up to a fifth of their spread
            spread = latents.detach().std((0, 2, 3, 4), keepdim=True).clamp(min=0.05)
            level = 0.2 * torch.rand(len(latents), 1, 1, 1, 1, device=vae.device)
            decoded = decode(vae, latents + level * spread * torch.randn_like(latents)).float()
        error = decoded - pixels
        colour = (error - error.mean(2, keepdim=True)).abs().mean()
        brightness = error.abs().mean() + 2 * error.square().mean()
        loss = brightness + 3 * colour + 2 * (cover * error.abs()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log(step, steps, l1=error.abs().mean(), mse=error.square().mean(), colour=colour)


@torch.no_grad()
def normalize(vae: AutoencoderKLWan) -> None:
    """Make the latents of the world look like Wan's: fold an affine map into the layers on both sides of them.

    Wan's pipelines subtract ``latents_mean`` and divide by ``latents_std``; afterwards every channel has zero mean and
    unit variance. A channel that hardly varies is left small rather than blown up.
    """
    device = vae.device
    latents = torch.cat([encode(vae, random_clips(4, 41, device)[0]).float() for _ in range(8)])
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
