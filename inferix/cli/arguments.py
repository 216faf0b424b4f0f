"""Command line flags of the programs with a model. Imports nothing heavy."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

from inferix.cli.presets import PRESETS, apply_preset, either_spelling, preset_table
from inferix.cli.prompt_file import DEFAULT_FRAMES
from inferix.cli.prompts import split_prompts
from inferix.errors import InputError

CONTRADICTIONS = {
    "no_quantize": ("load_quantized", "qconfig", "save_quantized"),
    "load_quantized": ("quant_type", "quant_granularity", "qconfig", "save_quantized")
    + ("checkpoint_path", "checkpoint_folder", "lora_path"),
    "qconfig": ("quant_type", "quant_granularity"),
    "diff_prompt_file": ("prompt", "is_interactive"),
    "storyboard": ("prompt", "diff_prompt", "diff_prompt_file", "is_interactive"),
    "endless": ("num_output_frames",),
    "prompt_file": (
        "prompt",
        "storyboard",
        "diff_prompt",
        "diff_prompt_file",
        "is_interactive",
        "endless",
        "enable_webrtc",
    ),
    "data_parallel": ("storyboard", "diff_prompt", "diff_prompt_file", "is_interactive", "endless", "enable_webrtc"),
}
"""Flags that exclude each other."""


class Parser(argparse.ArgumentParser):
    """Parse the flags that all programs with a model have. Raises InputError, one line, instead of printing the usage."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        self.set_defaults(height=None, width=None)
        add = self.add_argument
        add("--config_path", type=existing_path, help="YAML config of the sampler")
        add("--default_config_path", type=existing_path, help="YAML config that --config_path is laid over")
        add("--wan_base_model_path", type=existing_path, help="folder of the base model")
        add("--prompt", help="what to show; several prompts are separated by ;")
        add("--output_folder", type=Path, help="where the files go (default: outputs/)")
        add("--seed", type=seed, default=0, help="the same seed gives the same video")

    def add_switch(self, flag: str, default: bool | None = False, **options: Any) -> None:
        """Add a flag that stands alone (true) or takes true, false, 1 or 0."""
        self.add_argument(flag, type=boolean, nargs="?", const=True, default=default, metavar="true|false", **options)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Return the flags, and ``prompts``: the list that ``--prompt`` holds, None where it is not given."""
        args = super().parse_args(argv)
        args.prompts = None if args.prompt is None else split_prompts(args.prompt)
        return args

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


class RunnerParser(Parser):
    """``Parser`` with the flags that both runners have.

    Args:
        model: ``self_forcing`` or ``causvid``; becomes ``args.model``.
        description: for ``--help``.
        offload: default of ``--enable_kv_offload``.
    """

    def __init__(self, model: str, description: str, offload: bool = False):
        super().__init__(description)
        self.set_defaults(model=model, entries=None)
        add = self.add_argument
        add(
            "--preset", type=preset, metavar="NAME", help="a published model, which sets the paths; list: print a table"
        )
        add(
            "--storyboard", type=existing_path, metavar="FILE", help="YAML file of prompts that change within one video"
        )
        add(
            "--prompt_file",
            type=existing_path,
            metavar="FILE",
            help="videos to make: text, one prompt a line, or JSON Lines or CSV; those that are complete are not made again",
        )
        add(
            "--extended_prompt_file",
            type=existing_path,
            metavar="FILE",
            help="what the model is given for each line of it",
        )
        self.add_switch(
            "--overwrite", help="make all videos of --prompt_file again, in place of those that are complete"
        )
        add(
            "--lora_path",
            type=loras,
            metavar="FILE[:STRENGTH][;...]",
            help="LoRAs to merge into the weights before they are quantized, in this order (default strength: 1)",
        )
        add(
            "--vae",
            choices=("full", "tiny"),
            help="tiny: decode with TAEHV, faster and less exact (default: full, but for the page without a GPU)",
        )
        add("--tiny_vae_path", type=existing_path, help="TAEHV's file (default: taew2_1.pth under weights/)")
        add("--height", type=pixels, help="of the video, a multiple of 16 (default: the config's)")
        add("--width", type=pixels, help="of the video, a multiple of 16 (default: the config's)")
        add("--quant_type", choices=("fp8", "int8"), help="8-bit format of weights and activations (default: fp8)")
        add(
            "--quant_granularity",
            choices=("per_token", "per_tensor"),
            help="per_token: a scale for every token and every weight channel (default); per_tensor: one for each tensor",
        )
        add(
            "--qconfig",
            type=existing_path,
            help="YAML file that says how each module is quantized, instead of these two",
        )
        add("--save_quantized", type=Path, metavar="DIR", help="save the quantized transformer there")
        add("--load_quantized", type=existing_path, metavar="DIR", help="start from what --save_quantized wrote there")
        add(
            "--kv_cache_dtype",
            choices=("auto", "fp8"),
            default="auto",
            help="fp8: keys and values in 8 bits, half the cache; a Hopper GPU with fa3-fwd or nvidia-cudnn-frontend attends in 8 bits",
        )
        self.add_switch("--no_quantize", help="run in full precision, for comparison")
        add(
            "--data_parallel",
            type=group_count,
            metavar="N|all",
            help="groups of processes that each make videos of their own (default: 1; all: as many as fit)",
        )
        add("--ulysses_size", type=positive, help="processes that share the attention heads (default: as many as fit)")
        add("--ring_size", type=positive, help="processes that share the keys and values (default: the rest)")
        self.add_switch("--enable_kv_offload", default=offload, help="keep the key-value cache in host memory")
        self.add_switch(
            "--low_memory",
            default=None,
            help="fit a small GPU: cache and text encoder in host memory, keys, values and text encoder in 8 bits "
            "(default: where the GPU has less free memory than the run needs)",
        )
        self.add_switch("--quantize_text_encoder", help="the text encoder in 8 bits too")
        self.add_switch("--enable_webrtc", help="show the video in a browser while it is made")
        add("--webrtc_host", default="127.0.0.1", help="address the page is served at")
        add("--webrtc_port", type=port, default=8000, help="port the page is served at")
        self.add_switch("--webrtc_exit", help="end after the last frame instead of going on serving the page")
        self.add_switch("--webrtc_wait", help="begin when the first viewer has come")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Return the flags as ``Parser`` does. Raises InputError where two of them contradict each other."""
        args = super().parse_args(argv)
        for flag, others in CONTRADICTIONS.items():
            both = [other for other in others if getattr(args, other, None)]
            if getattr(args, flag, None) and both:
                hint = "; a LoRA is merged before --save_quantized saves" if both[0] == "lora_path" else ""
                raise InputError(
                    f"--{flag} and --{both[0]} ({flag.upper()} and {both[0].upper()}): leave one out{hint}"
                )
        if not args.prompt_file and (args.extended_prompt_file or args.overwrite):
            flag = "extended_prompt_file" if args.extended_prompt_file else "overwrite"
            raise InputError(f"--{flag} ({flag.upper()}) goes with --prompt_file (PROMPT_FILE)")
        if args.tiny_vae_path and args.vae != "tiny":
            raise InputError("--tiny_vae_path needs --vae tiny (VAE=tiny)")
        if args.preset:
            apply_preset(args, "checkpoint_folder" if "checkpoint_folder" in args else "checkpoint_path")
        if not args.load_quantized and not args.qconfig:
            args.quant_type, args.quant_granularity = args.quant_type or "fp8", args.quant_granularity or "per_token"
        return args


def parse_self_forcing(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the Self-Forcing runner."""
    parser = RunnerParser(
        "self_forcing", "Text or image to video with Self-Forcing, its transformer quantized to 8 bits."
    )
    add = parser.add_argument
    add("--checkpoint_path", type=existing_path, help="the transformer: a file, or a folder with one")
    add("--num_output_frames", type=int, help="latent frames: 3k, with --i2v 3k+1 (default: 21, 19)")
    parser.add_switch("--endless", help="a video without end, in files of a minute each")
    add("--num_samples", type=positive, default=1, help="videos of each prompt")
    parser.add_switch(
        "--use_ema", None, help="load the averaged weights, 'generator_ema' (default: as the preset says)"
    )
    parser.add_switch("--save_with_index", help="name files after the prompt's number instead of its words")
    parser.add_switch("--i2v", help="image to video: start from --image_path")
    add("--image_path", type=existing_path, help="the first frame, for --i2v")
    parser.add_switch(
        "--enable_profiling", help="say how long start-up, text encoding, each block and its decoding took"
    )
    args = parser.parse_args(argv)
    if args.i2v != (args.image_path is not None):
        raise InputError("--i2v and --image_path (I2V=1 IMAGE_PATH=...) go together: one of them is missing")
    if args.endless and len(args.prompts or []) > 1:
        raise InputError("--endless shows one prompt without end: give one, or a --storyboard with prompts over time")
    args.default_frames = args.num_output_frames is None
    if args.default_frames and not args.endless:
        args.num_output_frames = DEFAULT_FRAMES[args.i2v]
    return args


def parse_causvid(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the CausVid runner."""
    parser = RunnerParser(
        "causvid", "Text to video of any length with CausVid, its transformer quantized to 8 bits.", True
    )
    add = parser.add_argument
    add("--checkpoint_folder", type=existing_path, help="the transformer: a file, or a folder with one")
    add("--num_rollout", type=positive, help="rollouts (default: 3, or as many as there are prompts)")
    add("--num_overlap_frames", type=int, default=3, help="latent frames that rollouts share")
    parser.add_switch("--diff_prompt", help="one video whose rollouts follow the prompts in turn")
    add("--diff_prompt_file", type=existing_path, help="the same, the prompts from a file, one a line")
    parser.add_switch("--is_interactive", help="the same, the prompts typed in while the video is made")
    return parser.parse_args(argv)


def existing_path(text: str) -> Path:
    """A path that exists; CausVid's folder in either spelling, ``weights/causvid`` or ``weights/CausVid``."""
    path = either_spelling(Path(text))
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} not found: check the path")
    return path


def preset(text: str) -> str:
    """The name of a preset; ``list`` prints them all and ends the program."""
    if text == "list":
        print(preset_table())
        sys.exit(0)
    if text not in PRESETS:
        raise argparse.ArgumentTypeError(f"there is no preset {text}; PRESET=list lists them")
    return text


def loras(text: str) -> list[tuple[Path, float]]:
    """LoRA files, each with its strength, in ``a.safetensors:0.8;b.pt``."""
    return [lora(part.strip()) for part in text.split(";") if part.strip()] or [lora("")]


def lora(text: str) -> tuple[Path, float]:
    """A LoRA file and its strength, 1 where no number follows a colon."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        name, number = text, "1"
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not name or not Path(name).exists():
        raise argparse.ArgumentTypeError(f"{name or 'the LoRA'} not found: check the path")
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"the strength of {name} must be a number, not '{number}'")
    return Path(name), strength


def pixels(text: str) -> int:
    """A height or a width of a video."""
    if not text.isdecimal() or int(text) < 16 or int(text) % 16:
        raise argparse.ArgumentTypeError(f"it must be a multiple of 16, not '{text}'")
    return int(text)


def boolean(text: str) -> bool:
    """Return the boolean for one of the words 1, true, yes, on, 0, false, no, off."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def positive(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a number from 1, not '{text}'")
    return int(text)


def group_count(text: str) -> int | str | None:
    """A number of groups from 2, ``all``, or None for a single one."""
    if text.lower() == "all":
        return "all"
    return None if positive(text) == 1 else int(text)


def port(text: str) -> int:
    """A TCP port; 0 stands for any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 65535")
    return int(text)


def seed(text: str) -> int:
    """A seed that ``torch.Generator`` takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 2**63 - 1")
    return int(text)
