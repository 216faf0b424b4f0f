"""Choose how processes share a run, and check that it fits into the GPU's memory."""

import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch

from inferix.checkpoints.containers import infer_sizes, load_checkpoint
from inferix.cli.model_paths import ModelPaths, find_config, find_tiny_vae
from inferix.cli.preflight import parallel_sizes
from inferix.cli.presets import parameter_counts
from inferix.config import ParallelConfig, PipelineConfig
from inferix.distributed.context_parallel import check_sizes
from inferix.errors import InputError
from inferix.models.base_model import WanCheckpoint
from inferix.models.config import TransformerConfig
from inferix.models.kv_offload import OffloadedKVCache
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.pipelines.pipeline import Pipeline
from inferix.runtime.memory import num_parameters

CONTEXT = 10**9
"""Bytes that CUDA and its libraries take."""


def transformer_config(paths: ModelPaths) -> TransformerConfig:
    """Return the transformer's sizes: from the base model's ``config.json``, or else from the checkpoint's tensors.

    Raises InputError where neither can be read.
    """
    base = WanCheckpoint(paths.base, transformer_weights=False)
    return base.config if base.has_config else TransformerConfig(**infer_sizes(load_checkpoint(paths.checkpoint).state))


def pipeline_options(args: Namespace, paths: ModelPaths) -> dict:
    """Return the keyword arguments of the pipeline that the flags stand for.

    Raises InputError where the processes cannot share the video, or it does not fit into memory.
    """
    model, config = transformer_config(paths), find_config(args, paths)
    parallel = parallel_config(args.ulysses_size, args.ring_size, model.num_heads, args.data_parallel)
    check_sizes(parallel, model.num_heads, config.image_or_video_shape[-2] * config.image_or_video_shape[-1] // 4)
    check_memory(args, model, config, parallel)
    return {
        "default_config_path": args.default_config_path,
        "enable_kv_offload": args.enable_kv_offload and torch.cuda.is_available(),  # else the device is the host
        "parallel_config": parallel,
        "transformer_weights": False,  # a checkpoint takes their place
        "vae": args.vae,
        "tiny_vae_path": find_tiny_vae(args, paths),
        "height": args.height,
        "width": args.width,
    }


def parallel_config(
    ulysses_size: int | None, ring_size: int | None, num_heads: int, data_parallel: int | str | None = None
) -> ParallelConfig:
    """Return how this process takes part in a ``torchrun`` job, from the variables that torchrun sets.

    Sizes that are None are chosen as ``parallel_sizes`` says. The ranks of a group follow each other.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    sizes = parallel_sizes(data_parallel, ulysses_size, ring_size, world_size, num_heads)
    group, rank = divmod(rank, sizes.world_size)
    return replace(sizes, local_rank=local_rank, rank=rank, data_parallel_rank=group)


def clip_memory(
    model: TransformerConfig,
    config: PipelineConfig,
    batch: int,
    itemsize: int,
    offloaded: bool = False,
    ranks: int = 1,
) -> dict[str, int]:
    """Return the bytes that a clip will take on the device, by part, weights and VAE aside.

    The cache is computed exactly; activations are a conservative estimate.
    """
    _, clip, _, height, width = config.image_or_video_shape
    tokens = height * width // 4 // ranks
    layer = 2 * batch * min(clip, config.window_frames) * tokens * model.dim * itemsize
    resident = 2 + -(-model.num_layers // OffloadedKVCache.RESIDENT)  # layers on the device, two in transit among them
    block = batch * config.num_frame_per_block * tokens
    return {
        "key-value cache": layer * (min(resident, model.num_layers) if offloaded else model.num_layers),
        "activations": 4 * block * (model.ffn_dim + 8 * model.dim) * itemsize,
    }


def gpu_memory(pipeline: CausalInferencePipeline, low_memory: bool, batch: int | None = None) -> dict[str, int]:
    """Return the bytes that a clip of ``batch`` videos will take on the device, by part (default: the config's batch)."""
    transformer, config = pipeline.generator.model, pipeline.config
    batch = batch or config.image_or_video_shape[0]
    ranks = 1 if pipeline.context_parallel is None else pipeline.context_parallel.world_size
    item, offloaded = pipeline.dtype.itemsize, pipeline.enable_kv_offload or low_memory
    parts = {"transformer": num_parameters(transformer) * item}
    parts |= clip_memory(transformer.config, config, batch, item, offloaded, ranks)
    if pipeline.device.type == "cuda" and not low_memory:
        parts["CUDA graphs"] = 3 * parts["activations"] // 2  # of every position in the window; they share most of it
    if pipeline.is_main_process:
        encoder: Any = pipeline.text_encoder.model
        parts["text encoder"] = num_parameters(encoder.encoder.block[0] if low_memory else encoder) * item
    if pipeline.vae is not None:
        vae = pipeline.vae
        parts["VAE"] = (vae.num_encoder_parameters + num_parameters(vae.decoder)) * item
        activations = vae_memory(config, batch, vae.base_dim, item, low_memory)
        parts["VAE's activations"] = activations // (ranks if vae.can_share else 1)
    return parts


def vae_memory(config: PipelineConfig, batch: int, base_dim: int, itemsize: int, low_memory: bool) -> int:
    """Return the bytes of the VAE's activations.

    Estimated in frames of its widest layer: its convolutions cache 23, and each frame decoded at a time takes 8.5.
    """
    height, width = config.image_or_video_shape[-2:]
    return (23 + 17 * (1 if low_memory else 12) // 2) * batch * 64 * height * width * base_dim * itemsize


def available_memory() -> int:
    """Return the bytes of this process's GPU that are free, or, where there is none, those of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(args: Namespace, model: TransformerConfig, config: PipelineConfig, parallel: ParallelConfig) -> None:
    """Raises InputError where weights and one clip need more memory than there is, even with ``--low_memory``.

    A lower bound: the weights in 8 bits unless they stay as they are, the cache and the activations.
    """
    cuda = torch.cuda.is_available()
    low = args.low_memory or (cuda and args.low_memory is None)
    weights, _, others = parameter_counts(model)
    item, batch = 2 if cuda else 4, least_batch(args)
    needed = weights * (item if args.no_quantize else 1) + others * item
    cache_item = 1 if low or args.kv_cache_dtype == "fp8" else item
    offloaded = cuda and (low or args.enable_kv_offload)
    clip = clip_memory(model, config, batch, item, offloaded, parallel.world_size)
    needed += clip["key-value cache"] * cache_item // item + clip["activations"]
    if (available := available_memory()) < needed:
        height, width = (8 * size for size in config.image_or_video_shape[-2:])
        raise InputError(
            f"{batch} x {width}x{height} needs {needed / 1e9:.1f} GB of memory at least, of which there are {available / 1e9:.1f} GB: "
            "choose a smaller HEIGHT and WIDTH (--height, --width), fewer samples or a smaller model"
        )


def least_batch(args: Namespace) -> int:
    """Return how many videos must fit into memory at once: with the page all samples, else as many as do fit."""
    return args.num_samples if args.enable_webrtc and args.model == "self_forcing" else 1


def fitting_batch(args: Namespace, pipeline: Pipeline, num_samples: int) -> int:
    """Return how many of ``num_samples`` videos of a prompt fit into the free memory at once, at least 1.

    The weights are in place; what a clip takes is ``gpu_memory``'s estimate.
    """
    if num_samples == 1:
        return 1
    clip = gpu_memory(pipeline.pipeline, pipeline.pipeline.low_memory, batch=1)
    needed = sum(clip[part] for part in ("key-value cache", "activations", "VAE's activations"))
    free = available_memory()
    if pipeline.device.type == "cuda":  # and what PyTorch's allocator holds without using it
        free += torch.cuda.memory_reserved(pipeline.device) - torch.cuda.memory_allocated(pipeline.device)
    return max(1, min(num_samples, free // needed))


def low_memory(args: Namespace, pipeline: Pipeline) -> bool:
    """Return ``--low_memory``; where it is not given, whether the run needs more GPU memory than is free, and say so."""
    if args.low_memory is not None or pipeline.device.type != "cuda":
        return bool(args.low_memory)
    free, _ = torch.cuda.mem_get_info(pipeline.device)
    batch = least_batch(args)
    needed, small = (gpu_memory(pipeline.pipeline, low, batch) for low in (False, True))
    loading = needed["transformer"] + needed.get("text encoder", 0)
    if not args.no_quantize:
        for parts in (needed, small):
            parts["transformer"] //= pipeline.dtype.itemsize
    if args.kv_cache_dtype == "fp8":
        needed["key-value cache"] //= pipeline.dtype.itemsize
    total, least = (CONTEXT + sum(parts.values()) * 21 // 20 for parts in (needed, small))  # a twentieth: fragmentation
    total = max(total, CONTEXT + loading)  # in low memory the transformer is quantized on its way to the GPU
    parallel, scarce = pipeline.pipeline.context_parallel, total > free
    if not (parallel.any_rank(scarce) if parallel else scarce):  # all ranks do the same
        return False
    print(
        f"{total / 1e9:.1f} GB of GPU memory are needed and {free / 1e9:.1f} GB free: "
        f"low memory, which takes about {least / 1e9:.1f} GB (--low_memory false: try without)"
    )
    return True
