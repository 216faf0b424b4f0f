"""Golden clips by each way to split them: what test_parallel.py calls in every rank."""

import os
from copy import deepcopy
from unittest import mock

import torch
from conftest import BASE, CAUSVID, GOLDEN, ROOT, SELF_FORCING

from dax.quant.quantization import set_process_group
from inferix import CausVidPipeline, ParallelConfig, SelfForcingPipeline
from inferix.distributed.context_parallel import shutdown
from inferix.models.base_model import WanCheckpoint
from quantization import quantize_transformer

PROMPTS = [
    "A red cat walks on the moon",
    "A blue robot dances in the forest, slowly",
    "A green bird flies over the sea",
]

RANKS = {name: int(os.environ.get(name.upper(), default)) for name, default in (("rank", 0), ("world_size", 1))}


def build(kind, sizes: tuple[int, int], offload: bool = False):
    name = "self_forcing/configs/self_forcing_dmd" if kind is SelfForcingPipeline else "causvid/configs/causvid"
    pipeline = kind(
        ROOT / f"example/{name}.yaml",
        wan_base_model_path=BASE,
        enable_kv_offload=offload,
        parallel_config=ParallelConfig(*sizes, **RANKS),
        device="cpu",
    )
    if kind is SelfForcingPipeline:
        pipeline.load_checkpoint(SELF_FORCING, use_ema=True)
    else:
        pipeline.load_checkpoint(CAUSVID)
    pipeline.setup_devices()
    return pipeline


def long_live(name: str, sizes: tuple[int, int], kv_cache_dtype: str):
    pipeline = SelfForcingPipeline(
        GOLDEN / f"configs/{name}.yaml",
        wan_base_model_path=BASE,
        parallel_config=ParallelConfig(*sizes, **RANKS),
        device="cpu",
    )
    pipeline.load_checkpoint(GOLDEN / "LongLive/models/longlive_base.pt")
    pipeline.load_lora(GOLDEN / "LongLive/models/lora.pt")
    pipeline.setup_devices()
    pipeline.pipeline.set_kv_cache_dtype(kv_cache_dtype)
    return pipeline


def collect(pipeline, results: dict, name: str, function) -> None:
    """Add the tensors of ``function`` under ``name`` in the main process; take part in computing them in the others."""
    if not pipeline.is_main_process:
        pipeline.worker_loop()
        return
    results |= {f"{name}.{key}": tensor.contiguous() for key, tensor in function(pipeline).items()}
    if pipeline.pipeline.context_parallel:
        pipeline.pipeline.context_parallel.close()


def latents_of(pipeline, noise: torch.Tensor, *args, **options) -> torch.Tensor:
    """Return a clip's latents; they are not decoded, which takes longer than to compute them."""
    pipeline.pipeline.vae.decode = lambda latents: latents
    return pipeline.pipeline.inference(noise, *args, **options)


def switched(pipeline, frames: int = 18) -> dict:
    """The first frames of 24, with the prompt switches among them."""
    generator = torch.Generator().manual_seed(32)
    noise = torch.randn(1, 24, 16, 8, 12, generator=generator)[:, :frames]
    indices = [index for index in (6, 16) if index < frames]
    prompts = {
        "text_prompts_list": [[prompt] for prompt in PROMPTS[: len(indices) + 1]],
        "switch_frame_indices": indices,
    }
    return {"latents": latents_of(pipeline, noise, generator=generator, **prompts)}


def rolling(pipeline) -> dict:
    """The first 15 frames of 21, of which the last 6 see a window that has moved on."""
    generator = torch.Generator().manual_seed(31)
    noise = torch.randn(1, 21, 16, 8, 12, generator=generator)[:, :15]
    return {"latents": latents_of(pipeline, noise, PROMPTS[:1], generator=generator)}


def two_blocks(pipeline) -> dict:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 6, 16, 8, 12, generator=generator)
    return {"latents": latents_of(pipeline, noise, PROMPTS[:1], generator=generator)}


def self_forcing(pipeline) -> dict:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 9, 16, 8, 12, generator=generator)
    video, latents = pipeline.pipeline.inference(noise, PROMPTS[:1], generator=generator, return_latents=True)
    return {"video": video, "latents": latents}


def causvid(pipeline) -> dict:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 9, 16, 8, 12, generator=generator)
    video, latents = pipeline.pipeline.inference(noise, PROMPTS[:1], generator=generator, return_latents=True)
    start = torch.cat([pipeline.pipeline.vae.encode(video[:, -9:-8] * 2 - 1), latents[:, -2:]], dim=1)
    noise = torch.randn(1, 9, 16, 8, 12, generator=generator)
    following = latents_of(pipeline, noise, PROMPTS[:1], start_latents=start, generator=generator)
    return {"latents_0": latents, "latents_1": following}


def quantized(pipeline, quant_type: str, granularity: str) -> None:
    """Quantize, and keep the scales that the first layer's activations get."""
    transformer = pipeline.transformer
    quantize_transformer(transformer, quant_type, granularity)
    set_process_group(transformer, pipeline.process_group)
    layer, pipeline.scales = transformer.blocks[0].attn2.to_out[0], []
    layer.register_forward_pre_hook(lambda _, args: pipeline.scales.append(layer.quantize_input(args[0])[1].flatten()))


LINEARS = {"fp8": "per_tensor", "int8": "per_token"}
"""Granularity by type. Only fp8's scales are computed by all ranks together."""


@torch.no_grad()
def golden_clips(*ways: str) -> dict[str, torch.Tensor]:
    """Return in the main process the clips by each way, Ulysses x ring.

    One process makes what the others' clips are compared with besides the golden data; two leave out what four test too
    and what does not depend on how attention is split.
    """
    results: dict[str, torch.Tensor] = {}
    vae = WanCheckpoint(BASE).vae()
    # each pipeline gets a copy, which takes a third of the time of loading
    with mock.patch.object(WanCheckpoint, "vae", lambda _: deepcopy(vae)):
        for way in ways:
            add_clips(way, results)
    shutdown()
    return results


def add_clips(way: str, results: dict[str, torch.Tensor]) -> None:
    """Make the clips by one way and add them to ``results`` in the main process."""
    sizes = tuple(map(int, way.split("x")))
    collect(build(SelfForcingPipeline, sizes), results, f"{way}.self_forcing", self_forcing)
    pipeline = long_live("longlive_interactive", sizes, "fp8")
    collect(pipeline, results, f"{way}.interactive.fp8", lambda pipeline: switched(pipeline, 12))
    if way != "1x1":
        collect(long_live("longlive_interactive", sizes, "auto"), results, f"{way}.interactive.auto", switched)
        collect(long_live("longlive_infinite", sizes, "auto"), results, f"{way}.infinite.auto", rolling)
    if RANKS["world_size"] != 2:
        collect(build(CausVidPipeline, sizes), results, f"{way}.causvid", causvid)
    for quant_type in LINEARS if RANKS["world_size"] != 2 else ("fp8",):
        pipeline = build(SelfForcingPipeline, sizes, offload=True)
        quantized(pipeline, quant_type, LINEARS[quant_type])

        def tensors(pipeline):
            return two_blocks(pipeline) | {"scales": torch.cat(pipeline.scales)}

        collect(pipeline, results, f"{way}.{quant_type}", tensors)
