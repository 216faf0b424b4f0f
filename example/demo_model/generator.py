"""Training of the embedded model's causal transformer by teacher forcing, and sampling from it as the pipelines do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import UMT5EncoderModel

from inferix.models.attention import attention
from inferix.models.causal_attention import QKVBuffers
from inferix.models.config import TransformerConfig
from inferix.models.kv_cache import KVCache, WindowConfig
from inferix.models.rope import rope_table
from inferix.models.scheduler import DenoisingStep, FlowMatchScheduler
from inferix.models.transformer import CausalWanTransformer, RotaryEmb
from text import TEXT_LEN
from vae import half_precision

CONFIG = TransformerConfig(
    dim=128, ffn_dim=512, freq_dim=128, text_dim=64, text_len=TEXT_LEN, num_heads=4, num_layers=6
)
SCHEDULES = {
    "self_forcing": FlowMatchScheduler(5.0).steps([1000, 750, 500, 250], warp=True),
    "causvid": FlowMatchScheduler(8.0).steps([1000, 757, 522], warp=False),
}
NUM_FRAMES = 21
BLOCK = 3  # latent frames
WINDOW = 12  # latent frames of LongLive's window, of which the first ``BLOCK`` are sinks
PERIOD = 16  # latent frames after which an object is where it was


def video_blocks(image: bool) -> tuple[tuple[int, int], ...]:
    """Start and end of every block; after an image, which is a block of its own, the last block is cut short."""
    starts = [0, *range(1, NUM_FRAMES, BLOCK)] if image else range(0, NUM_FRAMES, BLOCK)
    return tuple(zip(starts, [*starts[1:], NUM_FRAMES]))


@dataclass
class World:
    """Every video of the world as latents, and every prompt as tokens."""

    latents: Tensor  # [prompts, starts, F, 16, h, w], normalised
    tokens: Tensor  # [prompts, TEXT_LEN]
    mask: Tensor  # [prompts, TEXT_LEN]

    def draw(self, batch: int, first: bool) -> tuple[Tensor, Tensor]:
        """Random prompts and starts, each [B]; ``first``: of clips that no other came before."""
        (prompts, starts), device = self.latents.shape[:2], self.latents.device
        start = torch.randint(1 if first else starts, (batch,), device=device)
        return torch.randint(prompts, (batch,), device=device), start

    def embed(self, encoder: UMT5EncoderModel, prompt: Tensor) -> Tensor:
        """Prompt embeddings [B, TEXT_LEN, text_dim], those of the padding zero."""
        mask = self.mask[prompt]
        return encoder(self.tokens[prompt], attention_mask=mask).last_hidden_state * mask[..., None]


def attention_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class TeacherForcing:
    """Self-attention over [clean frames | noisy frames], in the place of ``CausalSelfAttention``: all blocks at once.

    A clean block sees the clean frames up to itself; a noisy block sees the clean frames before it, and itself. Every block
    has an attention of its own: one masked attention would compute all pairs, of which more than half are not seen.
    """

    only_cache = False

    def __init__(self, blocks: tuple[tuple[int, int], ...], tokens_per_frame: int, device: torch.device):
        self.blocks = [(start * tokens_per_frame, end * tokens_per_frame) for start, end in blocks]
        self.device = device

    def qkv_buffers(self, shape: tuple[int, int, int, int]) -> QKVBuffers:
        """Return new memory for queries, keys and values of ``shape`` [B, T, H, d], since gradients flow through it."""
        dtype = attention_dtype(self.device)
        return QKVBuffers(*(torch.empty(shape, device=self.device, dtype=dtype) for _ in range(3)), None)

    @torch.compiler.disable
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, _) -> Tensor:
        (clean_q, noisy_q), (clean_k, noisy_k), (clean_v, noisy_v) = (x.chunk(2, dim=1) for x in (query, key, value))
        clean = [attention(clean_q[:, s:e], clean_k[:, :e], clean_v[:, :e]) for s, e in self.blocks]
        noisy = [
            attention(
                noisy_q[:, s:e],
                torch.cat([clean_k[:, :s], noisy_k[:, s:e]], 1),
                torch.cat([clean_v[:, :s], noisy_v[:, s:e]], 1),
            )
            for s, e in self.blocks
        ]
        return torch.cat([*clean, *noisy], 1)


def teacher_forced_flow(
    model: CausalWanTransformer,
    latents: Tensor,
    timestep: Tensor,
    rotary_emb: RotaryEmb,
    text: Tensor,
    blocks: tuple[tuple[int, int], ...],
) -> Tensor:
    """Return the flow [B, 2F, 16, h, w] of latents [B, 2F, 16, h, w], the clean frames and then the noisy ones.

    The same as the model's ``forward``, with another self-attention.
    """
    embedding, temb = model.condition_embedder.embed_time(timestep)
    hidden_states = model.patchify(latents)
    batch, frames, tokens, _ = hidden_states.shape
    shape = (batch, frames * tokens, model.config.num_heads, model.config.head_dim)
    self_attention = TeacherForcing(blocks, tokens, latents.device)
    for block, encoder_kv in zip(model.blocks, model.embed_text(text)):
        buffers = self_attention.qkv_buffers(shape)
        hidden_states = block(hidden_states, temb, rotary_emb, encoder_kv, self_attention, buffers)
    return model.unpatchify(model.project_out(hidden_states, embedding), latents)


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
    # computed on the device, as a CUDA graph cannot copy from the host
    positions = torch.arange(frames, device=x0.device).repeat(2)
    rotary_emb = rope_table(positions, height // 2, width // 2, model.config.head_dim)
    timestep = torch.cat([torch.zeros_like(level[0]), level[0]], 1)
    with half_precision(x0.device):
        both = torch.cat([context, noisy], 1)
        flow = teacher_forced_flow(model, both, timestep, rotary_emb, text, blocks)[:, frames:]
    sigma = level[1, :, :, None, None, None]
    return (noisy - sigma * flow.float() - x0)[:, given:].square().mean()


def per_frame(blocks: tuple[tuple[int, int], ...], level: Tensor) -> Tensor:
    """Values of the blocks [..., blocks] repeated for their frames [..., F]."""
    return torch.cat([level[..., i : i + 1].expand(*level.shape[:-1], e - s) for i, (s, e) in enumerate(blocks)], -1)


def random_levels(batch: int, blocks: int, device: torch.device) -> Tensor:
    """Timestep and sigma of every block, [2, B, blocks]: half of them the few steps of the samplers, half in between."""
    steps = [step for schedule in SCHEDULES.values() for step in schedule]
    few = torch.tensor(steps, device=device).T[:, torch.randint(len(steps), (batch, blocks), device=device)]
    uniform = torch.rand(batch, blocks, device=device)
    sigma = 5 * uniform / (1 + 4 * uniform)
    return torch.where(torch.rand(batch, blocks, device=device) < 0.5, few, torch.stack([1000 * sigma, sigma]))


def random_given() -> int:
    """How many frames a clip starts with: an image, the block that a CausVid rollout takes over, or mostly none."""
    kind = torch.rand(()).item()
    return 1 if kind < 0.15 else BLOCK if kind < 0.35 else 0


@dataclass
class Batch:
    """What one step trains on; see ``x0_error``."""

    given: int
    blocks: tuple[tuple[int, int], ...]
    prompt: Tensor  # [B]
    context: Tensor
    noisy: Tensor
    x0: Tensor
    level: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.prompt, self.context, self.noisy, self.x0, self.level]


def add_noise(given: int, blocks: tuple[tuple[int, int], ...], prompt: Tensor, x0: Tensor, level: Tensor) -> Batch:
    """Put noise of ``level`` [2, B, F] on the frames that are generated, and a little on those that they see."""
    sigma, noise = level[1, :, :, None, None, None], torch.randn_like(x0)
    context = x0 + 0.2 * torch.rand(len(x0), 1, 1, 1, 1, device=x0.device) * torch.randn_like(x0)
    return Batch(given, blocks, prompt, context, (1 - sigma) * x0 + sigma * noise, x0, level)


def noisy_batch(
    world: World, size: int, given: int, blocks: tuple[tuple[int, int], ...], from_noise=0.0, turning=0.0
) -> Batch:
    """True videos with noise on them.

    Args:
        given: frames at the start that are not generated.
        blocks: start and end of every block.
        from_noise: for this share of them the first block starts from noise alone.
        turning: for this share of them the given frames are another prompt's; what follows is as if they were not.
    """
    prompt, start = world.draw(size, first=given == 0)
    device, frames = prompt.device, blocks[-1][1]
    level = random_levels(size, len(blocks), device)
    level[:, : int(from_noise * size), 0] = level.new_tensor([1000.0, 1.0])[:, None]
    turned = int(turning * size)
    start[:turned] = 0
    x0 = world.latents[prompt, start, :frames].float()
    x0[:turned, :given] = world.latents[world.draw(turned, first=False)][:, :given].float()
    return add_noise(given, blocks, prompt, x0, per_frame(blocks, level))


def clip_batch(world: World, size: int) -> Batch:
    """Whole clips, of which a part starts from given frames."""
    given = random_given()
    return noisy_batch(world, size, given, video_blocks(image=given == 1), from_noise=0.5 * (given == 0))


def opening_batch(world: World, size: int) -> Batch:
    """First blocks alone: all that a clip takes from the prompt is there, for a seventh of the work."""
    return noisy_batch(world, size, 0, ((0, BLOCK),), from_noise=0.5)


def turning_batch(world: World, size: int) -> Batch:
    """Whole clips that go on from a block, half of them from another prompt's: what a new prompt in CausVid does."""
    return noisy_batch(world, size, BLOCK, video_blocks(image=False), turning=0.5)


def video_frames(world: World, prompt: Tensor, start: Tensor, frames: Tensor) -> Tensor:
    """Return latents [B, F, 16, h, w] of videos that go on for ever: ``frames`` [B, F] of prompts and starts [B]."""
    periodic = NUM_FRAMES - PERIOD
    frames = torch.where(frames < NUM_FRAMES, frames, periodic + (frames - periodic) % PERIOD)
    return world.latents[prompt[:, None], start[:, None], frames].float()


def switching_batch(world: World, size: int) -> Batch:
    """Windows of an endless video, in three of four of which a new prompt takes over at a random block.

    As in the pipelines, the frames before the switch are seen under the new prompt, all at once. What follows is the new
    prompt's video from its second block on. Half of the windows are LongLive's, which begin with sinks of a third prompt.
    """
    sinks = BLOCK * int(torch.randint(2, ()))
    length = WINDOW if sinks else NUM_FRAMES
    given = BLOCK * int(torch.randint(1, length // BLOCK, ()))
    splits = sorted({0, sinks, *range(given, length + 1, BLOCK)})
    blocks = tuple(zip(splits, splits[1:]))
    (prompt, start), (old, old_start) = world.draw(size, first=True), world.draw(size, first=False)
    device, same = prompt.device, size // 4
    old[:same], old_start[:same] = prompt[:same], start[:same]
    offset = torch.randint(2 * PERIOD, (size, 1), device=device) * torch.randint(2, (size, 1), device=device)
    begun = offset + given
    begun[same:] = BLOCK
    frames = torch.arange(length, device=device)
    before = video_frames(world, old, old_start, offset + frames[:given])
    x0 = torch.cat([before, video_frames(world, prompt, start, begun + frames[: length - given])], 1)
    x0[:, :sinks] = world.latents[world.draw(size, first=True)][:, :sinks].float()
    level = random_levels(size, len(blocks), device)
    level[:, : size // 2, -(length - given) // BLOCK] = level.new_tensor([1000.0, 1.0])[:, None]
    return add_noise(given, blocks, prompt, x0, per_frame(blocks, level))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # not worth compiling for its many shapes
def rollout(
    model: CausalWanTransformer, text: Tensor, steps: Sequence[DenoisingStep], noise: Tensor, given: Tensor, blocks
) -> Tensor:
    """Sample block by block as the pipelines do.

    Args:
        text: prompt embeddings.
        steps: of the sampler.
        noise: [B, F, 16, h, w].
        given: clean latents [B, f, 16, h, w] that the video starts with; f may be 0.

    Returns:
        The clean latents [B, F, 16, h, w].
    """
    (batch, frames, _, height, width), device = noise.shape, noise.device
    config, dtype, scheduler = model.config, attention_dtype(device), FlowMatchScheduler
    shape = (batch, frames, height * width // 4, config.num_heads, config.head_dim)
    cache = KVCache(config.num_layers, shape, WindowConfig(frames, block_size=BLOCK), device, dtype, dtype)
    encoder_kv = model.embed_text(text)
    done = torch.cat([given, noise[:, given.shape[1] :]], 1)
    for start, end in blocks:
        cache.set_positions(range(start, end))
        rotary_emb = model.rotary_emb(range(start, end), height, width)

        def flow(latents: Tensor, timestep: float) -> Tensor:
            timesteps = torch.full(latents.shape[:2], timestep, device=device)
            return model(latents, timesteps, rotary_emb, encoder_kv, cache)

        if start >= given.shape[1]:
            x0 = None
            for timestep, sigma in steps:
                fresh = noise[:, start:end]
                latents = fresh if x0 is None else scheduler.add_noise(x0, torch.randn_like(fresh), sigma)
                x0 = scheduler.pred_x0(latents, flow(latents, timestep), sigma)
            done[:, start:end] = x0
        if end < frames:
            flow(done[:, start:end], 0.0)
    return done


class TrainingStep:
    """One step of AdamW on a batch.

    On a GPU, launching its thousands of small kernels takes longer than running them: it is captured in a CUDA graph,
    once for each kind of batch, and replayed. The learning rate is a tensor for that reason.
    """

    def __init__(self, model: CausalWanTransformer, encoder, world: World, parameters: list[Tensor]):
        self.model, self.encoder, self.world, self.parameters = model, encoder, world, parameters
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=torch.tensor(0.0, device=parameters[0].device),
            betas=(0.9, 0.98),
            weight_decay=0.01,
            capturable=parameters[0].is_cuda,
        )
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, tuple[Tensor, Tensor]]] = {}

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the norm of its gradient, both before the step."""
        self.optimizer.zero_grad()
        text = self.world.embed(self.encoder, batch.prompt)
        loss = x0_error(self.model, text, batch.context, batch.noisy, batch.x0, batch.level, batch.blocks, batch.given)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach(), norm

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not batch.x0.is_cuda:
            return self.run(batch)
        if (batch.blocks, batch.given) not in self.captured:
            self.captured[batch.blocks, batch.given] = self.capture(batch)
        graph, static, result = self.captured[batch.blocks, batch.given]
        torch._foreach_copy_(static.tensors(), batch.tensors())
        graph.replay()
        return result

    def capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, tuple[Tensor, Tensor]]:
        """Capture the step, after a few ordinary ones that compile it and plan its memory."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                self.run(batch)
        torch.cuda.synchronize()
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.run(batch)
        return graph, batch, result


def fit(step: TrainingStep, batches: Iterator[Batch], steps: int, learning_rate: float, log, decay: float = 0.99):
    """Train, and leave in the parameters their moving average."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(step.optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    averaged = [parameter.detach().clone() for parameter in step.parameters]
    for number, batch in zip(range(steps), batches):
        loss, norm = step(batch)
        schedule.step()
        weight = 1 - min(decay, (number + 1) / (number + 10))
        torch._foreach_lerp_(averaged, [parameter.detach() for parameter in step.parameters], weight)
        log(number, steps, mse=loss, gradient=norm)
    for parameter, mean in zip(step.parameters, averaged):
        parameter.data.copy_(mean)
