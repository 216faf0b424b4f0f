"""Where a run takes place: how processes share it, and how much of a GPU's memory it may take."""

import math
import os
from argparse import Namespace
from pathlib import Path

import torch

from inferix.config import ParallelConfig
from inferix.models.base_model import WanCheckpoint
from inferix.models.kv_offload import OffloadedKVCache
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.pipelines.pipeline import Pipeline
from inferix.runtime.memory import num_parameters


def num_attention_heads(base_model: Path) -> int:
    """Return the transformer's number of heads. Raises InputError where the folder holds no base model."""
    return WanCheckpoint(base_model).config.num_heads


def parallel_config(ulysses_size: int | None, ring_size: int | None, num_heads: int) -> ParallelConfig:
    """Return how this process takes part in a ``torchrun`` job, from the variables that torchrun sets.

    A size that is None is chosen: Ulysses over as many ranks as the attention heads allow, ring over the rest.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if ulysses_size is None:
        ulysses_size = math.gcd(world_size, num_heads) if ring_size is None else max(1, world_size // max(1, ring_size))
    if ring_size is None:
        ring_size = max(1, world_size // max(1, ulysses_size))
    return ParallelConfig(ulysses_size, ring_size, local_rank, rank, world_size)


def gpu_memory(pipeline: CausalInferencePipeline, low_memory: bool) -> dict[str, int]:
    """Return the bytes that a clip will take on the device, by part.

    Weights and cache are counted; activations are a rule of thumb, on the safe side.
    """
    transformer, config = pipeline.generator.model, pipeline.config
    model, item = transformer.config, pipeline.dtype.itemsize
    batch, clip, _, height, width = config.image_or_video_shape
    ranks = 1 if pipeline.context_parallel is None else pipeline.context_parallel.world_size
    tokens = height * width // 4 // ranks
    layer = 2 * batch * min(clip, config.window_frames) * tokens * model.dim * item
    resident = 2 + -(-model.num_layers // OffloadedKVCache.RESIDENT)  # layers on the device, two in transit among them
    offloaded = pipeline.enable_kv_offload or low_memory
    block = batch * config.num_frame_per_block * tokens
    parts = {
        "transformer": num_parameters(transformer) * item,
        "key-value cache": layer * (resident if offloaded else model.num_layers),
        "activations": 4 * block * (model.ffn_dim + 8 * model.dim) * item,
    }
    if pipeline.is_main_process:
        encoder, vae = pipeline.text_encoder.model, pipeline.vae.model
        parts["text encoder"] = num_parameters(encoder.encoder.block[0] if low_memory else encoder) * item
        parts["VAE"] = (num_parameters(vae) + num_parameters(pipeline.vae.decoder)) * item
        # In pixel frames of the widest layer: what its convolutions keep, and seven for each frame that goes through.
        widest = 23 + 7 * (1 if low_memory else 12)
        parts["VAE's activations"] = widest * batch * 64 * height * width * vae.config.base_dim * item
    return parts


def low_memory(args: Namespace, pipeline: Pipeline) -> bool:
    """Return ``--low_memory``; where it is not given, whether the run needs more GPU memory than is free, and say so."""
    if args.low_memory is not None or pipeline.device.type != "cuda":
        return bool(args.low_memory)
    free, _ = torch.cuda.mem_get_info(pipeline.device)
    needed, small = (sum(gpu_memory(pipeline.pipeline, low).values()) for low in (False, True))
    parallel, scarce = pipeline.pipeline.context_parallel, needed > free
    if not (parallel.any_rank(scarce) if parallel else scarce):  # all ranks do the same
        return False
    print(
        f"{needed / 1e9:.1f} GB of GPU memory are needed and {free / 1e9:.1f} GB free: "
        f"low memory, which takes about {small / 1e9:.1f} GB (--low_memory false: try without)"
    )
    return True
