"""Where DAX and the engine meet, for all programs in this folder: settings from a file, calibration, saved 8-bit weights.

What DAX finds wrong with a file or a setting is an InputError here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from inferix import cli
from inferix.errors import InputError
from inferix.models.text_encoder import TextEncoder
from inferix.pipelines.base import Pipeline


@contextmanager
def refusing(source: Path | str) -> Iterator[None]:
    """Turns what DAX raises about ``source`` (bad input, or a GPU without fp8) into InputError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None


def read(path: Path) -> dict:
    """The ``qconfig_dict`` in a YAML file (or in the qconfig.json of saved weights).

    Raises InputError where it cannot be read, or says something else.
    """
    return parse(content(path), path)


def content(path: Path):
    """What a YAML file holds. Raises InputError where it cannot be read."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def parse(content, source: Path | str) -> dict:
    """The ``qconfig_dict`` that such a file's content stands for. Raises InputError, naming ``source``."""
    from dax.quant.quantization import read_qconfig_dict

    with refusing(source):
        return read_qconfig_dict(content)


def quantize(pipeline: Pipeline, qconfig_dict: dict, prompts: list[str]) -> None:
    """Quantize the transformer as ``qconfig_dict`` says; what is static in it is calibrated on a clip of each prompt.

    Raises InputError for a module that is not there, and for fp8 on a GPU without it.
    """
    from dax.quant.quantization import convert, prepare

    static = any(qconfig and qconfig.static for qconfig in qconfig_dict.values())
    if static and pipeline.process_group is not None:
        raise InputError(
            "qconfig: calibrate in one process (NPROC=1 SAVE_QUANTIZED=...), then LOAD_QUANTIZED in several"
        )
    transformer = pipeline.pipeline.generator.model
    names = [name for name, _ in transformer.named_modules()]
    for key in qconfig_dict:
        if key and not any(name == key or name.endswith(f".{key}") for name in names):
            raise InputError(f"qconfig: there is no module {key}; example/quantization/README.md has the names")
    prepare(transformer, qconfig_dict)
    if static:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call the observers
            for number, prompt in enumerate(prompts):
                clip(pipeline, prompt, CALIBRATION_SEED + number)
    with refusing("qconfig"):
        convert(transformer)


def share_scales(pipeline: Pipeline) -> None:
    """Where several processes share a video, let a dynamic per-tensor scale be that of all their tokens."""
    from dax.quant.quantization import set_process_group

    set_process_group(pipeline.pipeline.generator.model, pipeline.process_group)


def quantize_text_encoder(text_encoder: TextEncoder, quant_type: str) -> None:
    """Quantize every Linear of ``text_encoder``, block by block, so that a small GPU does with one at a time."""
    from dax.quant.quantization import qconfig, quantize_dynamic

    choices = {
        "fp8": qconfig.get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
        "int8": qconfig.get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    }
    for block in text_encoder.blocks():
        quantize_dynamic(block, {"": choices[quant_type]()})


CALIBRATION_SEED = 1_000_000
"""Far from the seeds that people take for what they look at."""


def clip(pipeline: Pipeline, prompt: str, seed: int, num_frames: int | None = None) -> tuple[Tensor, Tensor]:
    """One clip of either model: its video [1, T, 3, H, W] in [0, 1] and its latents [1, F, 16, h, w].

    ``num_frames`` counts latent frames; None: as many as the config says.
    """
    frames, *shape = pipeline.config.image_or_video_shape[1:]
    generator = pipeline.seeded(seed)
    noise = pipeline.pipeline.randn((1, num_frames or frames, *shape), generator)
    return pipeline.pipeline.inference(noise, [prompt], generator=generator, return_latents=True)


def save(transformer: nn.Module, folder: Path) -> None:
    """Save a quantized transformer. Raises InputError where ``folder`` cannot be written."""
    from dax.quant.quantization import save_quantized

    try:
        with refusing(folder):
            save_quantized(transformer, folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from None
    print(f"quantized weights  saved in {cli.shown(folder)}")


def load(pipeline: Pipeline, folder: Path) -> None:
    """Load what ``save`` wrote, instead of a checkpoint. Raises InputError where it is damaged or does not fit."""
    from dax.quant.nn.linear import check_device
    from dax.quant.quantization import load_quantized

    with refusing(folder):
        transformer = load_quantized(pipeline.pipeline.generator.model, folder)
        for dtype in {tensor.dtype for name, tensor in transformer.named_buffers() if name.endswith("qweight")}:
            check_device(dtype, pipeline.device)
