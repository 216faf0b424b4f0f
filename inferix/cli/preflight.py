"""What can be found wrong with a command line before PyTorch is imported, which takes seconds."""

import math
import os
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

from inferix.background import in_background
from inferix.checkpoints.hashes import begin_hash
from inferix.checkpoints.weight_files import find_weights
from inferix.cli.arguments import parse_causvid, parse_self_forcing
from inferix.cli.file_names import entry_names
from inferix.cli.model_paths import default_vae, find_config, find_tiny_vae, resolve_model_paths
from inferix.cli.prompt_file import COLUMNS, PromptEntry, entry_args, read_prompt_file, with_defaults
from inferix.cli.prompts import example_prompt, read_prompts, storyboard_of
from inferix.config import ParallelConfig, PipelineConfig
from inferix.errors import InputError
from inferix.webrtc.address import check_address


def parse_arguments(model: str, argv: list[str] | None = None) -> Namespace:
    """Return the flags of the runner of ``model``, ``self_forcing`` or ``causvid``. Raises InputError as ``check`` does."""
    args = {"self_forcing": parse_self_forcing, "causvid": parse_causvid}[model](argv)
    check(args)
    return args


def check(args: Namespace) -> None:
    """Raises InputError where a path, a config, a prompt file, a length or the page's address cannot work."""
    paths, _ = resolve_model_paths(args)
    config = find_config(args, paths)
    args.vae = args.vae or default_vae(args, paths)
    find_tiny_vae(args, paths)
    if args.model == "self_forcing":
        check_frames(args, config)
    else:
        check_rollouts(args, config)
    if args.storyboard:
        storyboard_of(args, config)
    args.entries = prompt_entries(args, config)
    single_node = (
        os.environ.get("NNODES") or "1"
    ) == "1"  # of several, one serves the page, whose address the rest lack
    if args.enable_webrtc and single_node and "RANK" not in os.environ:  # before the ranks, one of which takes the port
        check_address(args.webrtc_host, args.webrtc_port)


def prompt_entries(args: Namespace, config: PipelineConfig) -> list[PromptEntry] | None:
    """Return the videos of a batch: those of ``--prompt_file``, or with ``--data_parallel`` of ``--prompt``; else None.

    Raises InputError where the file is malformed, an entry cannot be made, or two have one file name.
    """
    if args.prompt_file:
        entries = read_prompt_file(args.prompt_file, COLUMNS[args.model], args.extended_prompt_file)
    elif args.data_parallel:
        entries = [PromptEntry(prompt) for prompt in args.prompts or [example_prompt(config)]]
    else:
        return None
    entries, first = with_defaults(args, entries), dict[str, int]()
    for entry, names in zip(entries, entry_names(args, entries)):
        if args.model == "self_forcing":
            try:
                check_frames(entry_args(args, entry), config)
            except InputError as error:
                raise InputError(
                    f"{args.prompt_file}, line {entry.line}: {error}" if entry.line else str(error)
                ) from None
        for name in names:
            if first.setdefault(name, entry.line) != entry.line:
                raise InputError(
                    f"{args.prompt_file}, line {entry.line}: its file name is that of line {first[name]}, {name}.mp4: "
                    "give the prompts ids (JSON Lines or CSV), or leave one out"
                )
    return entries


def read_ahead(args: Namespace) -> None:
    """Begin to read the weights that the flags name into the page cache, while the program imports its libraries."""
    base = resolve_model_paths(args)[0].base
    files = chain(
        checkpoint_files(args),
        base.glob("*.pth"),
        *(base.glob(f"{part}/*.safetensors") for part in ("text_encoder", "vae")),
    )
    if hasattr(os, "posix_fadvise"):
        in_background(_read_files, list(files))  # because the system may make the caller wait


def _read_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError), path.open("rb") as file:  # a file that cannot be read is reported where it is needed
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def begin_hashing(args: Namespace, world_size: int) -> None:
    """Begin to hash the checkpoint where this process, of so many, will write records: a batch needs the hash to begin."""
    group = parallel_sizes(args.data_parallel, args.ulysses_size, args.ring_size, world_size)
    if int(os.environ.get("RANK", 0)) % group.world_size == 0:
        begin_hash(*checkpoint_files(args))


def checkpoint_files(args: Namespace) -> list[Path]:
    """Return the files of the checkpoint; none where they are not complete, which is reported where they are loaded."""
    with suppress(InputError, OSError):
        return find_weights(resolve_model_paths(args)[0].checkpoint)
    return []


def check_processes(args: Namespace, world_size: int) -> None:
    """Raises InputError where the sizes given do not make up the number of processes."""
    parallel_sizes(args.data_parallel, args.ulysses_size, args.ring_size, world_size)


def parallel_sizes(
    data_parallel: int | str | None,
    ulysses_size: int | None,
    ring_size: int | None,
    world_size: int,
    num_heads: int = 0,
) -> ParallelConfig:
    """Return the sizes of a job of ``world_size`` processes.

    A size that is None is chosen: Ulysses over as many processes of a group as the ``num_heads`` attention heads allow (0: all),
    ring over the rest. ``all``: as many groups as there are processes for.

    Raises InputError where the sizes do not make up the number of processes.
    """
    groups = data_parallel or 1
    if isinstance(groups, str):
        groups = max(1, world_size // ((ulysses_size or 1) * (ring_size or 1)))
        ulysses_size, ring_size = ulysses_size or 1, ring_size or 1
    group_size = max(1, world_size // groups)
    if ulysses_size is None:
        ulysses_size = math.gcd(group_size, num_heads) if ring_size is None else max(1, group_size // max(1, ring_size))
    if ring_size is None:
        ring_size = max(1, group_size // max(1, ulysses_size))
    if world_size != groups * ulysses_size * ring_size and groups > 1:
        raise InputError(
            f"data_parallel {groups} x ulysses_size {ulysses_size} x ring_size {ring_size} is not the number of processes "
            f"({world_size}); start that many with NPROC, or change the sizes"
        )
    return ParallelConfig(ulysses_size, ring_size, world_size=group_size, data_parallel_size=groups)


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
