"""Names of the videos: what tells one run's from another's."""

import hashlib
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from inferix.cli.model_paths import DEMO, REAL
from inferix.cli.prompt_file import PromptEntry, entry_args
from inferix.file_name import safe_file_name

MAX_BYTES = 80
"""Of the part of a name that comes from the prompt."""


def prompt_stem(prompt: str) -> str:
    """Return a prompt as a part of a file name; a long one is cut, and told from others by a hash."""
    stem = safe_file_name(prompt, limit=MAX_BYTES)
    if stem != safe_file_name(prompt, limit=10 * len(prompt) + MAX_BYTES):
        stem += "-" + hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return stem


def prompt_stems(prompts: list[str], with_index: bool) -> list[str]:
    """Return a stem for every prompt: its number, or its words, with the number where two prompts share the words."""
    if with_index:
        return [str(index) for index in range(len(prompts))]
    stems = [prompt_stem(prompt) for prompt in prompts]
    return [f"{stem}-{index}" if stems.count(stem) > 1 else stem for index, stem in enumerate(stems)]


def video_names(args: Namespace, stem: str, samples: Iterable[int] | None = None) -> list[str]:
    """Return the names, without suffix, of the videos of a prompt: by seed, sample and settings."""
    if args.model == "causvid":
        return [f"{stem}-{args.seed}{settings_suffix(args)}"]
    samples = range(args.num_samples) if samples is None else samples
    return [f"{stem}-{args.seed}-{sample}{settings_suffix(args)}" for sample in samples]


def entry_names(args: Namespace, entries: list[PromptEntry]) -> list[list[str]]:
    """Return the names, without suffix, of the videos of each entry, by sample: its id, else as ``video_names``."""
    prompts, num_samples = [entry.prompt for entry in entries], getattr(args, "num_samples", 1)
    with_index = getattr(args, "save_with_index", False)
    # prompts of the command line may come out as one name, for which they are numbered
    stems = map(prompt_stem, prompts) if args.prompt_file and not with_index else prompt_stems(prompts, with_index)
    names = []
    for entry, stem in zip(entries, stems):
        if entry.id is None:
            names.append(video_names(entry_args(args, entry), stem))
        else:
            names.append([entry.id] if num_samples == 1 else [f"{entry.id}-{sample}" for sample in range(num_samples)])
    return names


def settings_suffix(args: Namespace) -> str:
    """Return ``-setting`` for each of model, quantization, length and image that is not the default."""
    parts = [*model_parts(args), *quantization_parts(args)]
    if args.model == "self_forcing":
        usual = args.endless or args.num_output_frames == (19 if args.i2v else 21)
        parts += ["endless"] if args.endless else []
        parts += [] if usual else [f"latents-{args.num_output_frames}"]
        parts += [f"from-{safe_file_name(args.image_path.stem, limit=MAX_BYTES)}"] if args.i2v else []
    else:
        parts += [f"rollouts-{args.num_rollout}"] if args.num_rollout else []
        parts += [f"overlap-{args.num_overlap_frames}"] if args.num_overlap_frames != 3 else []
    return "".join(f"-{part}" for part in parts)


def model_parts(args: Namespace) -> list[str]:
    """Return the names of config, checkpoint, LoRAs and VAE, and the size, where they are not the default ones."""
    checkpoint = args.checkpoint_path if args.model == "self_forcing" else args.checkpoint_folder
    parts = []
    for part, path in (("config", args.config_path), ("checkpoint", checkpoint)):
        defaults = [getattr(known[args.model], part) for known in (REAL, DEMO)]
        defaults += [default.parent for default in defaults if args.model == "causvid" and part == "checkpoint"]
        if path is not None and path.resolve() not in defaults:
            parts.append(safe_file_name(path.stem if path.suffix else path.name))
    parts = list(dict.fromkeys(parts))  # a config is often named like its checkpoint
    for lora, strength in args.lora_path or ():
        parts.append(f"lora-{safe_file_name(lora.stem)}" + (f"-{strength:g}" if strength != 1 else ""))
    parts += ["tiny-vae"] if args.vae == "tiny" else []
    return parts + [f"{name}-{size}" for name in ("height", "width") if (size := getattr(args, name))]


def quantization_parts(args: Namespace) -> list[str]:
    """Return what is not fp8 per token, with keys and values in the model's own type."""
    file: Path | None = args.qconfig or args.load_quantized
    parts = {
        "full-precision": args.no_quantize,
        safe_file_name(file.stem) if file else "": file,
        "int8": args.quant_type == "int8",
        "per-tensor": args.quant_granularity == "per_tensor" and not args.no_quantize,
        "fp8-cache": args.kv_cache_dtype == "fp8",
        "low-memory": args.low_memory,
        "8-bit-text": args.quantize_text_encoder,
    }
    return [part for part, applies in parts.items() if applies]
