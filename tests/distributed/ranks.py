"""What test_parallel.py starts under torchrun: golden clips by each way of sharing them, saved by the first rank.

python launch.py tests/ranks.py FOLDER ULYSSESxRING...
"""

import os
import sys
from pathlib import Path

import torch
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING
from safetensors.torch import save_file
from test_golden import PROMPTS

from inferix import CausVidPipeline, ParallelConfig, SelfForcingPipeline
from quantization import quantize_transformer, share_scales

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


def each_part(pipeline, results: dict, name: str, function) -> None:
    """``function``'s tensors under ``name``, where this rank leads; else take part in making them."""
    if pipeline.leads:
        results |= {f"{name}.{key}": tensor.contiguous() for key, tensor in function(pipeline).items()}
        if pipeline.pipeline.parallel:
            pipeline.pipeline.parallel.close()
    else:
        pipeline.pipeline.follow()


def self_forcing(pipeline, frames: int = 9) -> dict:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, frames, 16, 8, 12, generator=generator)
    video, latents = pipeline.pipeline.inference(noise, PROMPTS[:1], generator=generator, return_latents=True)
    return {"video": video, "latents": latents}


def causvid(pipeline) -> dict:
    pipeline.config = pipeline.pipeline.config
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 9, 16, 8, 12, generator=generator)
    video, latents = pipeline.pipeline.inference(noise, PROMPTS[:1], generator=generator, return_latents=True)
    start = torch.cat([pipeline.pipeline.vae.encode(video[:, -9:-8] * 2 - 1), latents[:, -2:]], dim=1)
    noise = torch.randn(1, 9, 16, 8, 12, generator=generator)
    _, following = pipeline.pipeline.inference(
        noise, PROMPTS[:1], start_latents=start, generator=generator, return_latents=True
    )
    return {"latents_0": latents, "latents_1": following}


def quantized(pipeline, quant_type: str, granularity: str) -> None:
    """Quantize, and keep the scales that the first layer's activations get."""
    transformer = pipeline.pipeline.generator.model
    quantize_transformer(transformer, quant_type, granularity)
    share_scales(pipeline)
    layer, pipeline.scales = transformer.blocks[0].attn2.to_out[0], []
    original = layer.quantize_input

    def remember(x):
        codes, scale = original(x)
        pipeline.scales.append(scale.flatten())
        return codes, scale

    layer.quantize_input = remember


def main(folder: Path, *ways: str) -> None:
    torch.set_grad_enabled(False)
    results: dict[str, torch.Tensor] = {}
    for way in ways:
        sizes = tuple(map(int, way.split("x")))
        each_part(build(SelfForcingPipeline, sizes), results, f"{way}.self_forcing", self_forcing)
        each_part(build(CausVidPipeline, sizes), results, f"{way}.causvid", causvid)
        for quant_type, granularity in (("fp8", "per_tensor"), ("int8", "per_token")):
            pipeline = build(SelfForcingPipeline, sizes, offload=True)
            quantized(pipeline, quant_type, granularity)

            def tensors(pipeline):
                return self_forcing(pipeline, 6) | {"scales": torch.cat(pipeline.scales)}

            each_part(pipeline, results, f"{way}.{quant_type}", tensors)
    if RANKS["rank"] == 0:
        save_file(results, folder / f"{RANKS['world_size']}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
