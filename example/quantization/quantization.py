"""Where DAX and the pipelines meet: how the runners quantize the transformer, from flags, a file or saved weights."""

import filecmp
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from torch import Tensor, nn

from dax.quant.nn.linear import QuantizedLinear, check_device
from dax.quant.quantization import (
    QConfig,
    convert,
    load_quantized,
    matching_modules,
    prepare,
    quantize_dynamic,
    read_metadata,
    read_qconfig_dict,
    save_quantized,
    set_process_group,
)
from dax.quant.quantization.qconfig import (
    get_default_dynamic_fp8_qconfig,
    get_default_dynamic_int8_qconfig,
    get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
)
from inferix.checkpoints.hashes import file_hash
from inferix.checkpoints.weight_files import find_weights
from inferix.cli.model_paths import display_path, resolve_model_paths
from inferix.cli.prompts import example_prompt
from inferix.cli.report import quantization_name
from inferix.errors import InputError
from inferix.models.text_encoder import TextEncoder
from inferix.pipelines.pipeline import Pipeline

QConfigDict = dict[str, QConfig | None]
HIGH_PRECISION: QConfigDict = {"condition_embedder": None, "proj_out": None}
"""The modules that are not quantized by default: their precision matters and their time does not."""
CALIBRATION_SEED = 1_000_000
"""Far from the seeds that people take for the videos they look at."""


def quantize_transformer(
    transformer: nn.Module,
    quant_type: str = "fp8",
    granularity: str = "per_token",
    device: torch.device | None = None,
) -> None:
    """Quantize every Linear of ``transformer`` but those of ``HIGH_PRECISION``, moved to ``device`` one after the other."""
    qconfigs = {
        ("fp8", "per_token"): get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
        ("fp8", "per_tensor"): get_default_dynamic_fp8_qconfig,
        ("int8", "per_token"): get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
        ("int8", "per_tensor"): get_default_dynamic_int8_qconfig,
    }
    quantize_dynamic(transformer, {"": qconfigs[quant_type, granularity](), **HIGH_PRECISION}, device=device)


def check_quantization(args: Namespace) -> None:
    """Raises InputError for flags that cannot work on this GPU, and for a file that does not say how to quantize."""
    fp8 = args.quant_type == "fp8" and not args.no_quantize
    if fp8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise InputError(
            f"{torch.cuda.get_device_name()} has no fp8 arithmetic: use QUANT_TYPE=int8 (--quant_type int8)"
        )
    if args.qconfig:
        read_qconfig_file(args.qconfig)


def quantize(pipeline: Pipeline, args: Namespace) -> None:
    """Quantize the transformer as the flags say, and with it what else they name: text encoder and key-value cache.

    Raises InputError for a module that is not there, for saved weights that do not fit, and where a folder cannot be
    written.
    """
    transformer = pipeline.transformer
    if args.qconfig:
        prompt = args.prompts[0] if args.prompts else example_prompt(pipeline.config)
        quantize_with(pipeline, read_qconfig_file(args.qconfig), [prompt])
    elif not args.load_quantized and not args.no_quantize:
        quantize_transformer(transformer, args.quant_type, args.quant_granularity, pipeline.device)
    take_over_weights(pipeline)
    set_process_group(transformer, pipeline.process_group)
    pipeline.pipeline.set_kv_cache_dtype(args.kv_cache_dtype)
    if not pipeline.is_main_process:  # the other ranks have no text encoder
        return
    if not args.no_quantize and (pipeline.pipeline.low_memory or args.quantize_text_encoder):
        quantize_text_encoder(pipeline.pipeline.text_encoder, args.quant_type or "int8")
    if args.save_quantized and pipeline.parallel.data_parallel_rank == 0:
        save_transformer(transformer, args.save_quantized, describe_model(args))


@contextmanager
def input_errors(source: Path | str) -> Iterator[None]:
    """Raises InputError, naming ``source``, where DAX finds that it cannot be used."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None


def check_devices(qconfigs: list[QConfig | None], device: torch.device) -> None:
    """Raises InputError where ``device`` cannot multiply one of the types."""
    for dtype in {qconfig.dtype for qconfig in qconfigs if qconfig is not None}:
        try:
            check_device(dtype, device)
        except RuntimeError as error:
            raise InputError(str(error)) from None


# --- settings from a file


def read_qconfig_file(path: Path) -> QConfigDict:
    """Return the ``qconfig_dict`` in a YAML file. Raises InputError where it cannot be read, or says something else."""
    return parse_qconfig_dict(read_yaml(path), path)


def read_yaml(path: Path):
    """Return what a YAML file holds. Raises InputError where it cannot be read."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def parse_qconfig_dict(content, source: Path | str) -> QConfigDict:
    """Return the ``qconfig_dict`` that a file's content stands for. Raises InputError, naming ``source``."""
    with input_errors(source):
        return read_qconfig_dict(content)


def quantize_with(pipeline: Pipeline, qconfig_dict: QConfigDict, prompts: list[str]) -> None:
    """Quantize the transformer by ``qconfig_dict``; static layers are calibrated on a clip of each prompt.

    Raises InputError for a module that is not there, and for fp8 on a GPU without it.
    """
    transformer = pipeline.transformer
    check_devices(list(qconfig_dict.values()), pipeline.device)
    static = any(qconfig and qconfig.static for qconfig in qconfig_dict.values())
    if static and pipeline.process_group is not None:
        raise InputError(
            "qconfig: calibrate in one process (NPROC=1 SAVE_QUANTIZED=...), then LOAD_QUANTIZED in several"
        )
    for key in qconfig_dict:
        if key and not matching_modules(transformer, key):
            raise InputError(f"qconfig: there is no module {key}; example/quantization/README.md has the names")
    prepare(transformer, qconfig_dict)
    if static:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call the observers
            for number, prompt in enumerate(prompts):
                generate_clip(pipeline, prompt, CALIBRATION_SEED + number)
    with input_errors("qconfig"):
        convert(transformer, device=pipeline.device)


def generate_clip(pipeline: Pipeline, prompt: str, seed: int, num_frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Return one clip of either model: its video [1, T, 3, H, W] in [0, 1] and its latents [1, F, 16, h, w].

    ``num_frames`` counts latent frames; None: as many as the config says.
    """
    frames, *shape = pipeline.config.image_or_video_shape[1:]
    generator = pipeline.seeded(seed)
    noise = pipeline.pipeline.randn((1, num_frames or frames, *shape), generator)
    return pipeline.pipeline.inference(noise, [prompt], generator=generator, return_latents=True)


# --- 8-bit checkpoints, several processes, text encoder, saved weights


def take_over_weights(pipeline: Pipeline) -> None:
    """Give quantized layers the checkpoint's 8-bit weights, as they are, where the two are of one format.

    A format is the type of the weights and a scale for each output channel. The others keep what they have made of the
    dequantized weights. Prints how many there are; then the pipeline lets go of the checkpoint's.
    """
    weights, count = pipeline.quantized_weights, 0
    for name, (qweight, weight_scale) in weights.items():
        layer = pipeline.transformer.get_submodule(name)
        if not isinstance(layer, QuantizedLinear) or layer.qconfig.rotation or layer.qweight.dtype != qweight.dtype:
            continue
        if layer.weight_scale.shape == weight_scale.shape:
            layer.load_state_dict({"qweight": qweight, "weight_scale": weight_scale}, strict=False)
            count += 1
    if weights and pipeline.is_main_process:
        print(f"8-bit checkpoint   {count} of {len(weights)} weights taken over as they are")
    pipeline.quantized_weights = {}


def quantize_text_encoder(text_encoder: TextEncoder, quant_type: str) -> None:
    """Quantize every Linear of ``text_encoder``, one block after the other, so that a small GPU holds one at a time."""
    qconfigs = {
        "fp8": get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
        "int8": get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    }
    for block in text_encoder.blocks():
        quantize_dynamic(block, {"": qconfigs[quant_type]()})


def describe_model(args: Namespace) -> dict[str, str]:
    """Return which model a saved transformer is of: model family, checkpoint and its SHA-256, LoRAs, and settings."""
    paths, _ = resolve_model_paths(args)
    return {
        "model": args.model,
        "checkpoint": paths.checkpoint.name,
        "checkpoint_sha256": file_hash(*find_weights(paths.checkpoint)),
        "loras": ";".join(f"{path.name}:{strength}" for path, strength in args.lora_path or ()),
        "quantization": quantization_name(args),
    }


def save_transformer(transformer: nn.Module, folder: Path, metadata: dict[str, str]) -> None:
    """Save a quantized transformer, with ``metadata`` that ``load_transformer`` checks.

    Raises InputError where ``folder`` cannot be written, or holds one that was made from other weights or settings.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            with input_errors(folder):
                save_quantized(transformer, temporary, metadata)
            files = {path: folder / path.name for path in Path(temporary).iterdir()}
            if any(old.exists() and not filecmp.cmp(new, old, shallow=False) for new, old in files.items()):
                raise InputError(f"{folder} holds another quantized model: choose another folder, or remove it first")
            folder.mkdir(exist_ok=True)
            for new, old in files.items():
                new.replace(old)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from None
    print(f"quantized weights  saved in {display_path(folder)}")


def load_transformer(pipeline: Pipeline, checkpoint: Path, args: Namespace) -> None:
    """Load the transformer's weights: a checkpoint's, LoRAs merged, or what was saved in a ``--load_quantized`` folder.

    Raises InputError where a file is damaged or does not fit.
    """
    if not args.load_quantized:
        pipeline.load_checkpoint(checkpoint, use_ema=bool(getattr(args, "use_ema", False)))
        for path, strength in getattr(args, "lora_path", None) or ():
            pipeline.load_lora(path, strength)
        return
    with input_errors(args.load_quantized):
        metadata = read_metadata(args.load_quantized)
        model = metadata.get("model", args.model)  # folders of earlier versions say nothing
        if model != args.model:
            raise ValueError(f"it was made of {model}, not of {args.model}: load it with {model}_quantized.sh")
        transformer = load_quantized(pipeline.transformer, args.load_quantized)
    if metadata and pipeline.is_main_process:
        parts = ("checkpoint", "loras", "quantization")
        print(f"saved weights      {', '.join(text for part in parts if (text := metadata.get(part)))}")
    check_devices([getattr(module, "qconfig", None) for module in transformer.modules()], pipeline.device)
