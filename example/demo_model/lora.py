"""Train a small LoRA that teaches the embedded model a shape that it does not know; see README.md.

    OMP_NUM_THREADS=1 python example/demo_model/lora.py

Ten minutes on one CPU core. The base model stays as it is: only the low-rank factors are trained, on clips of the new
shape, by teacher forcing as in ``generator.py``: one forward over [clean frames | noisy frames], in which a noisy block
sees the clean frames before it and itself. The file has the layout that diffusers and PEFT write.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from inferix import SelfForcingPipeline  # noqa: E402
from inferix.models.attention import attention  # noqa: E402
from inferix.models.causal_attention import QKVBuffers  # noqa: E402
from inferix.models.scheduler import FlowMatchScheduler  # noqa: E402
from inferix.models.transformer import CausalWanTransformer  # noqa: E402
from inferix.models.vae import VAE  # noqa: E402
from world import BACKGROUNDS, COLORS, DIRECTIONS, LORA_SHAPES, STARTS, Scene, render  # noqa: E402

DEMO = ROOT / "weights/demo"
BLOCK = 3  # latent frames
SCHEDULES = ((5.0, [1000, 750, 500, 250], True), (8.0, [1000, 757, 522], False))
"""Shift, steps and warping of Self-Forcing and CausVid: the noise levels that the samplers ask for."""


Clips = tuple[Tensor, Tensor]
"""Prompt embeddings [N, L, text_dim] and latents [N, F, 16, h, w]."""


class LowRank(nn.Module):
    """Parametrization of a weight [out, in]: the weight plus B @ A."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class TeacherForcing:
    """Self-attention over [clean frames | noisy frames], in the place of the key-value cache.

    A clean block sees the clean frames up to itself; a noisy block sees the clean frames before it, and itself.
    """

    def __init__(self, num_frames: int, tokens_per_frame: int):
        starts = range(0, num_frames, BLOCK)
        self.blocks = [(s * tokens_per_frame, (s + BLOCK) * tokens_per_frame) for s in starts]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, key_unrotated: None) -> Tensor:
        (clean_q, noisy_q), (clean_k, noisy_k), (clean_v, noisy_v) = (x.chunk(2, dim=1) for x in (query, key, value))
        clean = [attention(clean_q[:, s:e], clean_k[:, :e], clean_v[:, :e]) for s, e in self.blocks]
        noisy = []
        for s, e in self.blocks:
            keys, values = (
                torch.cat([clean_k[:, :s], noisy_k[:, s:e]], 1),
                torch.cat([clean_v[:, :s], noisy_v[:, s:e]], 1),
            )
            noisy.append(attention(noisy_q[:, s:e], keys, values))
        return torch.cat([*clean, *noisy], 1)


class SelfAttention:
    """Self-attention among all frames: what a clip's first block does."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, key_unrotated: None) -> Tensor:
        return attention(query, key, value)


def predict_flow(
    model: CausalWanTransformer, text: Tensor, clean: Tensor | None, noisy: Tensor, timestep: Tensor
) -> Tensor:
    """Return the flow of all noisy blocks at once, with gradients.

    Args:
        text: prompt embeddings [B, L, text_dim].
        clean: what later blocks see, [B, F, 16, h, w]; None: ``noisy`` is the first block alone.
        noisy: [B, F, 16, h, w].
        timestep: of every frame, [B, F].
    """
    frames, tokens = noisy.shape[1], noisy.shape[-2] * noisy.shape[-1] // 4
    latents, positions, attend = noisy, list(range(frames)), SelfAttention()
    if clean is not None:
        latents, positions = torch.cat([clean, noisy], 1), positions * 2
        timestep = torch.cat([torch.zeros_like(timestep), timestep], 1)
        attend = TeacherForcing(frames, tokens)
    embedding, temb = model.condition_embedder.embed_time(timestep)
    hidden_states = model.patchify(latents)
    rotary_emb = model.rotary_emb(positions, *latents.shape[-2:])
    shape = (len(latents), latents.shape[1] * tokens, model.config.num_heads, model.config.head_dim)
    for block, encoder_kv in zip(model.blocks, model.embed_text(text)):
        buffers = QKVBuffers(*(torch.empty(shape) for _ in range(3)), None)
        hidden_states = block(hidden_states, temb, rotary_emb, encoder_kv, attend, buffers)
    return model.unpatchify(model.project_out(hidden_states, embedding), latents)[:, -frames:]


def noise_levels(count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` random timesteps and their sigmas: a third pure noise, a third a sampler's steps, the rest between."""
    steps = torch.tensor([step for shift, *rest in SCHEDULES for step in FlowMatchScheduler(shift).steps(*rest)])
    few = steps[torch.randint(len(steps), (count,))]
    uniform = torch.rand(count)
    sigma = 5 * uniform / (1 + 4 * uniform)
    kind = torch.rand(count)[:, None]
    levels = torch.where(kind < 2 / 3, few, torch.stack([1000 * sigma, sigma], 1))
    levels = torch.where(kind < 1 / 3, torch.tensor([1000.0, 1.0]), levels)
    return levels[:, 0].float(), levels[:, 1].float()


def scenes(shape: str, trained: bool) -> list[Scene]:
    """Return the scenes with ``shape`` that are trained on, or the other half, which the LoRA never sees."""
    places = product(enumerate(COLORS), enumerate(DIRECTIONS), enumerate(BACKGROUNDS))
    return [Scene(color, shape, d, b) for (i, color), (j, d), (k, b) in places if (i + j + k) % 2 != trained]


@torch.no_grad()
def encode_clips(vae: VAE, chosen: list[Scene], num_latents: int) -> Tensor:
    """Return the first latents of each scene's clip, [B, F, 16, h, w]."""
    frames = torch.arange(4 * num_latents - 3)
    return torch.cat([vae.encode(render(scene, STARTS[0], frames)[None] * 2 - 1) for scene in chosen])


def add_low_rank(model: CausalWanTransformer, rank: int) -> dict[str, LowRank]:
    """Put a ``LowRank`` beside the weight of every Linear of the blocks; return them by the Linears' names."""
    added = {}
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, nn.Linear):
            added[name] = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", added[name])
    return added


def loss_of(model: CausalWanTransformer, text: Tensor, x0: Tensor) -> Tensor:
    """Return the mean squared error of the denoised estimate on whole blocks of clips [B, F, 16, h, w]."""
    batch, frames = x0.shape[:2]
    levels = noise_levels(batch * frames // BLOCK)
    timestep, sigma = (level.view(batch, -1).repeat_interleave(BLOCK, 1) for level in levels)
    level = sigma[:, :, None, None, None]
    noisy = (1 - level) * x0 + level * torch.randn_like(x0)
    clean = None if frames == BLOCK else x0 + 0.1 * torch.rand(batch, 1, 1, 1, 1) * torch.randn_like(x0)
    return (noisy - level * predict_flow(model, text, clean, noisy, timestep) - x0).square().mean()


def fit(model: CausalWanTransformer, parameters: list[Tensor], openings: Clips, clips: Clips, args) -> None:
    """Train on first blocks, and every fourth step on clips of three, which go on in what they began with."""
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)
    for step in range(args.steps):
        name, (text, latents) = ("clips", clips) if step % 4 == 3 else ("openings", openings)
        picked = torch.randint(len(text), (args.batch if name == "openings" else 2,))
        loss = loss_of(model, text[picked], latents[picked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 in (2, 3) or step == args.steps - 1:
            print(f"{step:4d}  {name:8}  {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)


def save(factors: dict[str, LowRank], path: Path) -> None:
    """Write the factors as diffusers does, in float16; without an alpha the product counts as it is."""
    state = {}
    for name, factor in factors.items():
        state[f"transformer.{name}.lora_A.weight"] = factor.down.detach().half()
        state[f"transformer.{name}.lora_B.weight"] = factor.up.detach().half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=LORA_SHAPES, default=LORA_SHAPES[0])
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch", type=int, default=12, help="first blocks of a step")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--clips", type=int, default=8, help="scenes of which more than the first block is encoded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: weights/demo/lora/SHAPE.safetensors")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    config, base = ROOT / "example/self_forcing/configs/self_forcing_demo.yaml", DEMO / "Wan2.1-T2V-demo"
    pipeline = SelfForcingPipeline(config, wan_base_model_path=base, device="cpu")
    pipeline.load_checkpoint(DEMO / "self_forcing/checkpoints/self_forcing_dmd.pt", use_ema=True)
    pipeline.setup_devices()
    chosen, vae = scenes(args.shape, trained=True), pipeline.pipeline.vae
    few = chosen[:: max(1, len(chosen) // args.clips)][: args.clips]
    start = time.perf_counter()
    with torch.no_grad():
        texts = {scene: pipeline.encode_prompts([scene.prompt]) for scene in chosen}
    openings, clips = (
        (torch.cat([texts[scene] for scene in which]), encode_clips(vae, which, count))
        for which, count in ((chosen, BLOCK), (few, 3 * BLOCK))
    )
    print(f"latents of {len(chosen)} openings and {len(few)} clips: {time.perf_counter() - start:.0f} s", flush=True)
    factors = add_low_rank(pipeline.transformer, args.rank)
    parameters = [parameter for factor in factors.values() for parameter in factor.parameters()]
    fit(pipeline.transformer, parameters, openings, clips, args)
    save(factors, args.output or DEMO / f"lora/{args.shape}.safetensors")


if __name__ == "__main__":
    main()
