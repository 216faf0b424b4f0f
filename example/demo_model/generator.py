"""Training of the embedded model's causal transformer: teacher forcing, then few-step tuning on its own rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from inferix.models.attention import attention
from inferix.models.kv_cache import KVCache
from inferix.models.transformer import CausalWanTransformer, TransformerConfig
from inferix.scheduler import FlowMatchScheduler
from text import TEXT_LEN
from vae import half_precision
from world import FIRST_STARTS

CONFIG = TransformerConfig(
    dim=128, ffn_dim=512, freq_dim=128, text_dim=64, text_len=TEXT_LEN, num_heads=4, num_layers=6
)
SCHEDULES = {
    "self_forcing": FlowMatchScheduler(5.0, [1000, 750, 500, 250], warp=True),
    "causvid": FlowMatchScheduler(8.0, [1000, 757, 522], warp=False),
}
NUM_FRAMES = 21
BLOCK = 3  # latent frames


def video_blocks(image: bool) -> list[tuple[int, int]]:
    """Start and end of every block; after an image, which is a block of its own, the last block is cut short."""
    starts = [0, *range(1, NUM_FRAMES, BLOCK)] if image else range(0, NUM_FRAMES, BLOCK)
    return list(zip(starts, [*starts[1:], NUM_FRAMES]))


@dataclass
class World:
    """Every video of the world as latents, and every prompt as tokens."""

    latents: Tensor  # [prompts, starts, F, 16, h, w], normalised
    tokens: Tensor  # [prompts, TEXT_LEN]
    mask: Tensor  # [prompts, TEXT_LEN]

    def draw(self, batch: int, first: bool) -> tuple[Tensor, Tensor]:
        """Random prompts and starts, each [B]; ``first``: of clips that no other came before."""
        prompts, starts = self.latents.shape[:2]
        device = self.latents.device
        starts = min(starts, FIRST_STARTS) if first else starts
        return torch.randint(prompts, (batch,), device=device), torch.randint(starts, (batch,), device=device)

    def first_blocks(self, prompt: Tensor) -> Tensor:
        """The first block of the prompts' clips from every one of FIRST_STARTS: [B, starts, BLOCK*16*h*w]."""
        return self.latents[prompt, :FIRST_STARTS, :BLOCK].flatten(2).float()

    def nearest_start(self, prompt: Tensor, block: Tensor) -> Tensor:
        """The starts [B] that first blocks [B, BLOCK, 16, h, w] are nearest to."""
        return torch.cdist(block.flatten(1)[:, None], self.first_blocks(prompt))[:, 0].argmin(-1)

    def matching_start(self, prompt: Tensor, noise: Tensor) -> Tensor:
        """The starts [B] whose first blocks correlate most with noise [B, BLOCK, 16, h, w]."""
        return (self.first_blocks(prompt) @ noise.flatten(1)[:, :, None])[..., 0].argmax(-1)

    def embed(self, encoder: UMT5EncoderModel, prompt: Tensor) -> Tensor:
        """Prompt embeddings [B, TEXT_LEN, text_dim], those of the padding zero."""
        mask = self.mask[prompt]
        return encoder(self.tokens[prompt], attention_mask=mask).last_hidden_state * mask[..., None]


def attention_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@cache
def teacher_forcing_mask(blocks: tuple[tuple[int, int], ...], tokens: int, device: torch.device) -> Tensor:
    """Who sees whom among [clean frames | noisy frames], [2*F*S, 2*F*S], for S tokens a frame.

    A clean block sees the clean frames up to itself; a noisy block sees the clean frames before it, and itself.
    """
    index = torch.tensor([i for i, (start, end) in enumerate(blocks) for _ in range(start, end)], device=device)
    index = index.repeat_interleave(tokens)
    before, same = index[:, None] > index, index[:, None] == index
    none = torch.zeros_like(same)
    return torch.cat([torch.cat([before | same, none], 1), torch.cat([before, same], 1)], 0)


class TeacherForcing:
    """Takes the place of the KV cache where all blocks are trained at once on [clean frames | noisy frames]."""

    def __init__(self, text: list[tuple[Tensor, Tensor]], blocks: list[tuple[int, int]], tokens_per_frame: int):
        self.text = text
        device = text[0][0].device
        self.dtype = attention_dtype(device)
        self.mask = teacher_forcing_mask(tuple(blocks), tokens_per_frame, device)

    def room(self, layer: int) -> list[Tensor]:
        """Where this layer's keys and values [B, T, H, d] are written to: new memory, since gradients flow through."""
        batch, _, heads, head_dim = self.text[layer][0].shape
        shape = (batch, len(self.mask), heads, head_dim)
        self.new = [torch.empty(shape, device=self.mask.device, dtype=self.dtype) for _ in range(2)]
        return self.new

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return attention(q, *self.new, mask=self.mask)


def x0_error(
    model: CausalWanTransformer,
    text: Tensor,
    context: Tensor,
    noisy: Tensor,
    x0: Tensor,
    level: Tensor,
    blocks,
    given: int,
) -> Tensor:
    """Mean squared error of the denoised estimate.

    Args:
        text: prompt embeddings.
        context: clean latents [B, F, 16, h, w] that later blocks see.
        noisy: what the blocks are denoised from, of the same shape.
        x0: what they should become.
        level: timestep and sigma of every frame, [2, B, F].
        blocks: start and end of every block.
        given: frames at the start that are not generated.
    """
    frames, (height, width) = x0.shape[1], x0.shape[-2:]
    rope = model.rope(torch.arange(frames, device=x0.device).repeat(2), height, width)
    timestep = torch.cat([torch.zeros_like(level[0]), level[0]], 1)
    with half_precision(x0.device):
        cache = TeacherForcing(model.embed_text(text), blocks, height * width // 4)
        flow = model(torch.cat([context, noisy], 1), timestep, rope, cache)[:, frames:]
    sigma = level[1, :, :, None, None, None]
    return (noisy - sigma * flow.float() - x0)[:, given:].square().mean()


def per_frame(blocks: list[tuple[int, int]], level: Tensor) -> Tensor:
    """Values of the blocks [..., blocks] repeated for their frames [..., F]."""
    return torch.cat([level[..., i : i + 1].expand(*level.shape[:-1], e - s) for i, (s, e) in enumerate(blocks)], -1)


def random_levels(batch: int, blocks: int, device: torch.device) -> Tensor:
    """Timestep and sigma of every block, [2, B, blocks]: half of them the few steps of the samplers, half in between."""
    steps = [(t, s) for x in SCHEDULES.values() for t, s in zip(x.denoising_timesteps, x.denoising_sigmas)]
    few = torch.tensor(steps, device=device).T[:, torch.randint(len(steps), (batch, blocks), device=device)]
    uniform = torch.rand(batch, blocks, device=device)
    sigma = 5 * uniform / (1 + 4 * uniform)
    return torch.where(torch.rand(batch, blocks, device=device) < 0.5, few, torch.stack([1000 * sigma, sigma]))


def random_given() -> int:
    """How many frames a clip starts with: an image, the block that a CausVid rollout takes over, or mostly none."""
    kind = torch.rand(()).item()
    return 1 if kind < 0.15 else BLOCK if kind < 0.35 else 0


def base_loss(model: CausalWanTransformer, encoder, world: World, batch: int, from_noise: float = 0.5) -> Tensor:
    """Teacher forcing on true videos; for a share ``from_noise`` of them the first block starts from noise alone.

    From noise alone no start is to be seen. So that the answer is one crisp scene rather than the mean of all, noise is
    paired with the start whose first block correlates most with it.
    """
    given = random_given()
    blocks = video_blocks(image=given == 1)
    prompt, start = world.draw(batch, first=given == 0)
    device = prompt.device
    level = random_levels(batch, len(blocks), device)
    noise = torch.randn(batch, *world.latents.shape[2:], device=device)
    if given == 0:
        level[:, : int(from_noise * batch), 0] = level.new_tensor([1000.0, 1.0])[:, None]
        matched = world.matching_start(prompt, noise[:, :BLOCK])
        start = torch.where(level[1, :, 0] == 1, matched, start)
    x0 = world.latents[prompt, start].float()
    level = per_frame(blocks, level)
    sigma = level[1, :, :, None, None, None]
    context = x0 + 0.2 * torch.rand(batch, 1, 1, 1, 1, device=device) * torch.randn_like(x0)
    noisy = (1 - sigma) * x0 + sigma * noise
    return x0_error(model, world.embed(encoder, prompt), context, noisy, x0, level, blocks, given)


def rollout(
    model: CausalWanTransformer, text: Tensor, schedule: FlowMatchScheduler, noise: Tensor, given: Tensor, blocks
) -> tuple[Tensor, Tensor]:
    """Sample block by block as the pipelines do.

    Args:
        noise: [B, F, 16, h, w].
        given: clean latents [B, f, 16, h, w] that the video starts with; f may be 0.

    Returns:
        The clean latents [B, F, 16, h, w], and what every step started from [steps, B, F, 16, h, w].
    """
    height, width, device = *noise.shape[-2:], noise.device
    dtype = attention_dtype(device)
    cache = KVCache(model.config, (*noise.shape[:2], height * width // 4), device, dtype, dtype)
    cache.set_text(model.embed_text(text))
    done = torch.cat([given, noise[:, given.shape[1] :]], 1)
    inputs = noise.expand(len(schedule.denoising_sigmas), *noise.shape).clone()
    for start, end in blocks:
        cache.place(start, end - start)
        rope = model.rope(torch.arange(start, end, device=device), height, width)

        def flow(latents: Tensor, timestep: float) -> Tensor:
            return model(latents, torch.full(latents.shape[:2], timestep, device=device), rope, cache)

        if start >= given.shape[1]:
            x0 = None
            for i, (timestep, sigma) in enumerate(zip(schedule.denoising_timesteps, schedule.denoising_sigmas)):
                if x0 is not None:
                    inputs[i, :, start:end] = schedule.add_noise(x0, torch.randn_like(x0), sigma)
                latents = inputs[i, :, start:end]
                x0 = schedule.to_x0(latents, flow(latents, timestep), sigma)
            done[:, start:end] = x0
        if end < noise.shape[1]:
            flow(done[:, start:end], 0.0)
    return done, inputs


def rollout_losses(
    model: CausalWanTransformer, encoder, world: World, schedule: FlowMatchScheduler, batch: int, passes: int
):
    """Yield losses on the model's own rollout: from where its steps led it, to the scene that its first block chose.

    A part of the rollouts starts from given frames: an image, or the frames that a CausVid rollout takes over.
    """
    given = random_given()
    blocks = video_blocks(image=given == 1)
    prompt, start = world.draw(batch, first=given == 0)
    noise = torch.randn(batch, *world.latents.shape[2:], device=prompt.device)
    first = world.latents[prompt, start, :given].float()
    with torch.no_grad(), half_precision(noise.device):
        text = world.embed(encoder, prompt)
        own, inputs = rollout(model, text, schedule, noise, first, blocks)
    if not given:
        start = world.nearest_start(prompt, own[:, :BLOCK])
    x0 = world.latents[prompt, start].float()
    steps = torch.tensor([schedule.denoising_timesteps, schedule.denoising_sigmas], device=prompt.device)
    for _ in range(passes):
        step = torch.randint(steps.shape[1], (batch, len(blocks)), device=prompt.device)
        step = per_frame(blocks, step)
        noisy = inputs.gather(0, step[None, :, :, None, None, None].expand_as(inputs[:1]))[0]
        yield x0_error(model, text, own, noisy, x0, steps[:, step], blocks, given)


def fit(parameters: list[Tensor], losses, steps: int, learning_rate: float, log, ema_decay: float = 0.99) -> None:
    """Minimise ``losses``, an iterator, and leave in ``parameters`` their moving average."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    averaged = [parameter.detach().clone() for parameter in parameters]
    for step, loss in zip(range(steps), losses):
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [parameter.detach() for parameter in parameters], 1 - decay)
        log(step, steps, mse=loss, gradient=norm)
    for parameter, mean in zip(parameters, averaged):
        parameter.data.copy_(mean)
