"""What run_benchmark.py times beside ours where it is installed: torchao's fp8 on our model, flashdreams' own transformer."""

import statistics
import time
from dataclasses import asdict

import torch
from torch import Tensor, nn

from inferix.config import PipelineConfig
from inferix.models.config import TransformerConfig
from inferix.runtime.memory import num_bytes
from quantization import HIGH_PRECISION


def quantize_with_torchao(transformer: nn.Module) -> None:
    """The layers that we quantize, fp8 by row; the compiler's settings stay as they are for everything else."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def wanted(module, name):
        return isinstance(module, nn.Linear) and not name.startswith(tuple(HIGH_PRECISION))

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(transformer, config, filter_fn=wanted)


def block_figures(times: list[list[float]]) -> dict:
    """Of the milliseconds of each block, run by run: medians, the fastest and the slowest, all blocks' sum, and the last's."""
    medians = [statistics.median(runs) for runs in times]
    return {
        "block_ms": medians,
        "block_spread_ms": [[min(runs), max(runs)] for runs in times],
        "seven_blocks_s": sum(medians) / 1000,
        "full_window_block_ms": medians[-1],
    }


@torch.no_grad()
def measure_flashdreams(
    sizes: TransformerConfig, config: PipelineConfig, device: torch.device, dtype: torch.dtype, clock, repeats: int
) -> dict:
    """Figures of its recipe for Wan 2.1 1.3B with random weights: chunks of a block, a window of a clip.

    It is compiled, and replayed from a CUDA graph once the window is full: the block at full window is one of
    those that follow the clip. It needs a GPU: its rotary embedding and its attention have no other code.
    """
    from flashdreams.recipes.wan.transformer.impl.network import WanDiTNetwork1pt3BConfig
    from flashdreams.recipes.wan.transformer.wan21 import Wan21Transformer, Wan21TransformerConfig

    batch, frames, _, height, width = config.image_or_video_shape
    began = time.perf_counter()
    peer = Wan21TransformerConfig(
        network=WanDiTNetwork1pt3BConfig(**asdict(sizes)),  # whose fields have the same names
        dtype=dtype,
        len_t=config.num_frame_per_block,
        window_size_t=frames,
    )
    model = Wan21Transformer(peer).to(device, dtype).eval()
    text = torch.randn(batch, sizes.text_len, sizes.text_dim, device=device, dtype=dtype)
    timesteps = [torch.full((batch,), float(t), device=device) for t in (*config.denoising_step_list, 0)]

    def blocks(first: int, last: int, cache) -> list[float]:
        """Milliseconds of each: as many forwards as ours, the last of which updates the cache."""
        return [block(model, cache, index, timesteps, clock) for index in range(first, last)]

    def new_cache():
        return model.initialize_autoregressive_cache(height=height, width=width, text_embeddings=text)

    count = frames // config.num_frame_per_block
    blocks(0, count, new_cache())
    cold = time.perf_counter() - began
    runs = [blocks(0, count, cache := new_cache()) for _ in range(repeats)]
    blocks(count, count + 2, cache)  # warms up, and captures
    full = statistics.median(blocks(count + 2, count + 2 + repeats, cache))
    return {
        "weights_gb": num_bytes(model) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "cold_start_s": cold,
        **block_figures(list(zip(*runs))),
        "full_window_block_ms": full,
    }


def block(model, cache, index: int, timesteps: list[Tensor], clock) -> float:
    latent = torch.randn(model.latent_shape, device=timesteps[0].device, dtype=model.config.dtype)
    start = clock.now()
    cache.start(index)
    for timestep in timesteps:
        model.predict_flow(latent, timestep, cache)
    cache.finalize(index)
    return clock.between(start, clock.now())
