"""The settings that are measured, and pipelines of random weights with them."""

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Geometry, RandomCheckpoint
from peers import quantize_with_torchao
from torch import Tensor, nn

from dax.quant.quantization import qconfig as qconfigs
from dax.quant.quantization import quantize_dynamic
from inferix.config import ParallelConfig
from inferix.pipelines.causal_inference import CausalInferencePipeline
from quantization import HIGH_PRECISION


def dax(make_qconfig: Callable) -> Callable[[nn.Module], object]:
    """Return a function that quantizes a transformer as the scripts do."""
    return lambda model: quantize_dynamic(model, {"": make_qconfig(), **HIGH_PRECISION})


@dataclass(frozen=True)
class Setting:
    """One row of the tables."""

    quantize: Callable[[nn.Module], object] | None = None
    kv_cache_dtype: str = "auto"
    offload: bool = False
    low_memory: bool = False
    package: str | None = None
    """The other library that this row measures."""


FP8 = dax(qconfigs.get_dynamic_fp8_per_token_act_per_channel_weight_qconfig)
INT8 = dax(qconfigs.get_dynamic_int8_per_token_act_per_channel_weight_qconfig)
SETTINGS = {
    "bf16": Setting(),
    "fp8": Setting(FP8),
    "fp8+fp8kv": Setting(FP8, "fp8"),
    "bf16+fp8kv": Setting(None, "fp8"),
    "int8": Setting(INT8),
    "fp8-tensor": Setting(dax(qconfigs.get_default_dynamic_fp8_qconfig)),
    "int8-tensor": Setting(dax(qconfigs.get_default_dynamic_int8_qconfig)),
    "fp8+fp8kv+offload": Setting(FP8, "fp8", offload=True),
    "torchao-fp8": Setting(quantize_with_torchao, package="torchao"),
    "flashdreams": Setting(package="flashdreams"),
}


def missing(name: str) -> str | None:
    """Return why a setting cannot be run here; None if it can."""
    package = SETTINGS[name].package
    if package is None:
        return None
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install {package}, or leave {name} out of --settings"
    if not torch.cuda.is_available():
        return f"{name} is measured on a GPU alone; leave it out of --settings"
    return None


def free_memory(device: torch.device) -> None:
    """Free what the setting before has left on a GPU, and count its peak anew."""
    if device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()  # what was compiled refers to the model of the setting before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def build(
    geometry: Geometry,
    setting: Setting,
    device: torch.device,
    dtype: torch.dtype,
    parallel: ParallelConfig | None = None,
    checkpoint: type[RandomCheckpoint] = RandomCheckpoint,
) -> CausalInferencePipeline:
    """Return a pipeline of random weights, quantized, on the device."""
    base = checkpoint(geometry, device, dtype)
    pipeline = CausalInferencePipeline(geometry.config, base, device, dtype, parallel, setting.offload)
    pipeline.to_device(setting.low_memory)
    pipeline.set_kv_cache_dtype(setting.kv_cache_dtype)
    if setting.quantize is not None:
        setting.quantize(pipeline.generator.model)
    return pipeline


@torch.no_grad()
def denoise_clip(pipeline: CausalInferencePipeline, embeds: Tensor) -> None:
    """Compute a clip's latents."""
    generator = torch.Generator(pipeline.device).manual_seed(0)
    noise = pipeline.draw(pipeline.config.image_or_video_shape, generator)
    for _ in pipeline.denoise(noise, embeds, generator=generator):
        pass
