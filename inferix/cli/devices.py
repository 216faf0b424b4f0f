"""Where a run takes place: how processes share it, and how much of a GPU's memory it may take."""

import math
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inferix.config import ParallelConfig
from inferix.models.base_model import BaseModel

if TYPE_CHECKING:
    from inferix.pipelines.base import Pipeline


def num_attention_heads(base_model: Path) -> int:
    """Return the transformer's number of heads. Raises InputError where the folder holds no base model."""
    return BaseModel(base_model).config.num_heads


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


def low_memory(args: Namespace, pipeline: "Pipeline") -> bool:
    """Return ``--low_memory``; where it is not given, whether the run needs more GPU memory than is free, and say so."""
    if args.low_memory is not None or pipeline.device.type != "cuda":
        return bool(args.low_memory)
    free, _ = torch.cuda.mem_get_info(pipeline.device)
    needed, small = (sum(pipeline.pipeline.gpu_memory(low).values()) for low in (False, True))
    parallel, scarce = pipeline.pipeline.parallel, needed > free
    if not (parallel.any(scarce) if parallel else scarce):  # all ranks do the same
        return False
    print(
        f"{needed / 1e9:.1f} GB of GPU memory are needed and {free / 1e9:.1f} GB free: "
        f"low memory, which takes about {small / 1e9:.1f} GB (--low_memory false: try without)"
    )
    return True
