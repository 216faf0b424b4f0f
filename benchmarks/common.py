"""What the benchmarks share: models of random weights, a clock, latents."""

import os
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from checkout import ROOT
from diffusers import AutoencoderKLWan
from torch import Tensor

from inferix.config import PipelineConfig
from inferix.models.config import TransformerConfig
from inferix.models.transformer import CausalWanTransformer
from inferix.models.vae import WanVAE
from inferix.pipelines.causal_inference import CausalInferencePipeline

OUTPUT_FOLDER = Path(os.environ.get("OUTPUT_FOLDER") or ROOT / "outputs")

SAMPLERS = {
    "self_forcing": PipelineConfig((1000, 750, 500, 250), warp_denoising_step=True, timestep_shift=5.0),
    "causvid": PipelineConfig((1000, 757, 522), timestep_shift=8.0),
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model and of its videos."""

    transformer: TransformerConfig
    vae_base_dim: int
    config: PipelineConfig
    reference_dtype: torch.dtype = torch.float32
    """What errors are relative to."""


GEOMETRIES = {
    "1.3b": Geometry(TransformerConfig(), 96, SAMPLERS["self_forcing"]),
    "14b": Geometry(
        TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
        96,
        SAMPLERS["self_forcing"],
        reference_dtype=torch.bfloat16,  # 57 GB of float32 weights and 54 GB of cache fit no GPU of 80 GB
    ),
    "demo": Geometry(
        TransformerConfig(dim=128, ffn_dim=512, freq_dim=128, text_dim=64, text_len=64, num_heads=4, num_layers=6),
        8,
        replace(SAMPLERS["self_forcing"], image_or_video_shape=(1, 21, 16, 16, 16)),
    ),
}


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of the programs that measure one model's clips."""
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.3b" if torch.cuda.is_available() else "demo")
    parser.add_argument("--model", choices=SAMPLERS, default="self_forcing", help="whose sampler")
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames of a clip (default: 21)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)


def find_geometry(args: Namespace) -> Geometry:
    """Return the geometry that ``--geometry``, ``--model`` and ``--num_frames`` describe."""
    return with_sampler(GEOMETRIES[args.geometry], args.model, args.num_frames)


def with_sampler(geometry: Geometry, model: str, num_frames: int) -> Geometry:
    """Return ``geometry`` with the sampler of ``model`` and clips of ``num_frames`` latent frames."""
    batch, _, *shape = geometry.config.image_or_video_shape
    config = replace(SAMPLERS[model], image_or_video_shape=(batch, num_frames, *shape))
    return replace(geometry, config=config)


class RandomCheckpoint:
    """A base model of random weights, in the place of ``WanCheckpoint``.

    The spread of the weights is that of a trained network: linear layers 1.2 / sqrt(fan-in), norms 1 +- 0.1, biases 0.05,
    modulation 0.2. Every layer's values then have a mean of 1.4 times their spread.
    """

    def __init__(self, geometry: Geometry, device: torch.device, dtype: torch.dtype):
        self.geometry, self.device, self.dtype = geometry, device, dtype

    def transformer(self) -> CausalWanTransformer:
        with torch.device("meta"):
            model = CausalWanTransformer(self.geometry.transformer).to(self.dtype)
        model.to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, weight in model.named_parameters():
            random = torch.randn(weight.shape, generator=generator, device=self.device)
            if name.endswith("scale_shift_table"):
                value = random * 0.2
            elif name.endswith("bias"):
                value = random * 0.05
            elif weight.ndim == 1:
                value = 1 + random * 0.1
            else:
                value = random * 1.2 / weight[0].numel() ** 0.5
            weight.data.copy_(value.bfloat16())  # the same numbers in every dtype
        return model.eval().requires_grad_(False)

    def vae(self) -> WanVAE:
        torch.manual_seed(0)
        model = AutoencoderKLWan(base_dim=self.geometry.vae_base_dim)
        return WanVAE(model.state_dict(), dict(model.config))

    def text_encoder(self) -> None:
        return None


def random_prompt(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return embeddings [1, L, text_dim] in the place of an encoded prompt."""
    sizes = geometry.transformer
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, sizes.text_len, sizes.text_dim, generator=generator).to(device, dtype)


def default_device() -> tuple[torch.device, torch.dtype]:
    """Return the GPU and bfloat16, or the CPU and float32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


class Clock:
    """Milliseconds between points on the device's own time line."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)


def timed(function: Callable[[], object], clock: Clock) -> float:
    """Return the milliseconds of one call."""
    start = clock.now()
    function()
    return clock.between(start, clock.now())


def repeat(function: Callable[[], object], clock: Clock, times: int) -> list[float]:
    """Return the milliseconds of each call, after one that is not counted."""
    function()
    return [timed(function, clock) for _ in range(times)]


@torch.no_grad()
def block_functions(pipeline: CausalInferencePipeline, embeds: Tensor) -> Iterator[Callable[[], None]]:
    """Yield what computes one block, all steps and the cache update, at each place in the window.

    On several ranks all of them call the same function. It is valid until the next one is asked for.
    """
    shape = pipeline.config.image_or_video_shape
    plan = pipeline.plan(shape, 0, shape[1])
    kv_cache = pipeline.new_cache(plan)
    pipeline.generator.set_prompt(embeds, kv_cache)
    for start, size in plan.blocks():
        rotary_emb = pipeline.set_positions(range(start, start + size), plan, kv_cache)
        noise = pipeline.randn((shape[0], size, *shape[2:]), None)

        def block(noise=noise, rotary_emb=rotary_emb):
            x0 = pipeline.denoise_block(noise, pipeline.generator.steps, rotary_emb, kv_cache, None)
            pipeline.generator.predict_flow(x0, pipeline.config.context_noise, rotary_emb, kv_cache)

        yield block


@torch.no_grad()
def time_blocks(pipeline: CausalInferencePipeline, embeds: Tensor, clock: Clock, repeats: int) -> list[list[float]]:
    """Return the milliseconds of one block at each place in the window, run by run."""
    return [repeat(block, clock, repeats) for block in block_functions(pipeline, embeds)]


@torch.no_grad()
def clip_latents(pipeline: CausalInferencePipeline, embeds: Tensor, seed: int = 0) -> list[Tensor]:
    """Return a clip's latents [B, b, C, h, w], block by block, in float32 on the CPU.

    All draws come from one float32 generator on the CPU, so that they are the same for every dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline.draw

    def draw(shape: Sequence[int], _) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(pipeline.device, pipeline.dtype)

    pipeline.draw = draw
    try:
        noise = draw(pipeline.config.image_or_video_shape, None)
        return [block.float().cpu() for block in pipeline.denoise(noise, embeds.to(pipeline.device, pipeline.dtype))]
    finally:
        pipeline.draw = drawn


@torch.no_grad()
def reference_latents(geometry: Geometry, device: torch.device) -> list[Tensor]:
    """Return the latents of ``clip_latents`` computed in the geometry's ``reference_dtype``, not compiled."""
    dtype = geometry.reference_dtype
    pipeline = CausalInferencePipeline(geometry.config, RandomCheckpoint(geometry, device, dtype), device, dtype)
    pipeline.generator.model.to(device)
    return clip_latents(pipeline, random_prompt(geometry, device, dtype))


def median_seconds(milliseconds: list[float]) -> float:
    return statistics.median(milliseconds) / 1000
