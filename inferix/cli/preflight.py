"""What can be found wrong with a command line before PyTorch is imported, which takes seconds."""

import os
import threading
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

from inferix.cli.arguments import parse_causvid, parse_self_forcing
from inferix.cli.model_paths import find_config, find_tiny_vae, resolve_model_paths
from inferix.cli.prompts import read_prompts, storyboard_of
from inferix.config import ParallelConfig, PipelineConfig
from inferix.errors import InputError


def parse_arguments(model: str, argv: list[str] | None = None) -> Namespace:
    """Return the flags of the runner of ``model``, ``self_forcing`` or ``causvid``. Raises InputError as ``check`` does."""
    args = {"self_forcing": parse_self_forcing, "causvid": parse_causvid}[model](argv)
    check(args)
    return args


def check(args: Namespace) -> None:
    """Raises InputError where a path, a config, a prompt file or a length cannot work."""
    paths, _ = resolve_model_paths(args)
    config = find_config(args, paths)
    find_tiny_vae(args, paths)
    if args.model == "self_forcing":
        check_frames(args, config)
    else:
        check_rollouts(args, config)
    if args.storyboard:
        storyboard_of(args, config)


def read_ahead(args: Namespace) -> None:
    """Begin to read the weights that the flags name into the page cache, while the program imports its libraries."""
    paths, _ = resolve_model_paths(args)
    base = chain(
        paths.base.glob("*.pth"), *(paths.base.glob(f"{part}/*.safetensors") for part in ("text_encoder", "vae"))
    )
    checkpoint = paths.checkpoint.glob("*") if paths.checkpoint.is_dir() else [paths.checkpoint]
    if hasattr(os, "posix_fadvise"):
        # a thread, because the system may make the caller wait; nobody waits for it
        threading.Thread(target=_read_files, args=([*checkpoint, *base],), name="read_ahead", daemon=True).start()


def _read_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError), path.open("rb") as file:  # a file that cannot be read is reported where it is needed
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def check_processes(args: Namespace, world_size: int) -> None:
    """Raises InputError where ``--ulysses_size`` and ``--ring_size`` do not make up the number of processes."""
    if args.ulysses_size or args.ring_size:
        ulysses_size = args.ulysses_size or max(1, world_size // args.ring_size)
        ParallelConfig(ulysses_size, args.ring_size or max(1, world_size // ulysses_size), world_size=world_size)


def check_frames(args: Namespace, config: PipelineConfig) -> None:
    """Raises InputError where ``--num_output_frames`` is no whole number of blocks (and the image's frame), or the VAE is tiny."""
    if args.i2v and args.vae == "tiny":
        raise InputError("the tiny VAE cannot encode the image as the model expects it: leave VAE=tiny out with I2V=1")
    size, given, number = config.num_frame_per_block, 1 if args.i2v else 0, args.num_output_frames
    if number is not None and (number <= given or (number - given) % size):
        wanted = f"a multiple of {size}" + (" plus 1 for the image" if given else "")
        raise InputError(f"num_output_frames must be positive and {wanted}, not {number}")


def check_rollouts(args: Namespace, config: PipelineConfig) -> None:
    """Raises InputError where overlap, rollouts and prompts do not fit each other."""
    size, frames, overlap = config.num_frame_per_block, config.image_or_video_shape[1], args.num_overlap_frames
    if overlap < size or overlap % size or overlap >= frames:
        raise InputError(
            f"num_overlap_frames must be a multiple of {size}, from {size} to below the rollout's {frames}, not {overlap}"
        )
    prompts = read_prompts(args.diff_prompt_file) if args.diff_prompt_file else args.prompts or []
    one_video = args.diff_prompt or args.diff_prompt_file
    if one_video and args.num_rollout and len(prompts) not in (0, 1, args.num_rollout):
        rollouts = "1 rollout" if args.num_rollout == 1 else f"{args.num_rollout} rollouts"
        raise InputError(f"{len(prompts)} prompts for {rollouts}: give one prompt, or one for each (--num_rollout)")
