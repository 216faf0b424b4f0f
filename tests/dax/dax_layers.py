"""Layers, models and settings that the tests of `dax` share."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dax.quant import per_tensor_symmetric, per_token_symmetric
from dax.quant.nn import dynamic
from dax.quant.quantization import QConfig, quantize_dynamic
from dax.quant.quantization.qconfig import (
    get_default_dynamic_fp8_qconfig,
    get_default_dynamic_int8_qconfig,
    get_default_fp8_qconfig,
    get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
    get_dynamic_int8_per_channel_weight_qconfig,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    get_fp8_per_channel_weight_qconfig,
)

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
FP8_TOKEN = get_dynamic_fp8_per_token_act_per_channel_weight_qconfig()
INT8_TOKEN = get_dynamic_int8_per_token_act_per_channel_weight_qconfig()
DYNAMIC = {
    "fp8": FP8_TOKEN,
    "fp8-tensor": get_default_dynamic_fp8_qconfig(),
    "fp8-e5m2": get_dynamic_fp8_per_token_act_per_channel_weight_qconfig(activation_dtype=E5M2),
    "fp8-mixed": QConfig(E4M3, weight_scheme=per_tensor_symmetric, activation_scheme=per_token_symmetric),
    "int8": INT8_TOKEN,
    "int8-tensor": get_default_dynamic_int8_qconfig(),
    "int8-channel": get_dynamic_int8_per_channel_weight_qconfig(),
    "fp8-rotation": QConfig(E4M3, rotation=True),
    "int8-rotation": QConfig(INT8, rotation=True),
}
STATIC = {"static": get_default_fp8_qconfig(), "static-channel": get_fp8_per_channel_weight_qconfig()}

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
every_qconfig = pytest.mark.parametrize("qconfig", DYNAMIC.values(), ids=DYNAMIC)
both_types = pytest.mark.parametrize("qconfig", [FP8_TOKEN, INT8_TOKEN], ids=["fp8", "int8"])
both_static = pytest.mark.parametrize("qconfig", STATIC.values(), ids=STATIC)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch before every test of a module that imports this fixture."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Turn gradients off in every test of a module that imports this fixture."""
    with torch.no_grad():
        yield


def quantize(linear: nn.Linear, qconfig: QConfig) -> dynamic.Linear:
    return quantize_dynamic(copy.deepcopy(linear), {"": qconfig})


def layer(
    k: int, n: int, qconfig: QConfig, device: str = "cpu", dtype: torch.dtype = torch.float32, bias: bool = True
) -> dynamic.Linear:
    return quantize(nn.Linear(k, n, bias, device=device, dtype=dtype), qconfig)


def product64(layer: dynamic.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `layer(x)` is by definition, in float64, and the sum of the magnitudes that went into it."""
    xq, x_scale = layer.quantize_input(x)
    x, w = xq.double() * x_scale.double(), layer.qweight.double() * layer.weight_scale.double()
    bias = torch.zeros(1).double() if layer.bias is None else layer.bias.double()
    return x @ w.t() + bias.to(x), x.abs() @ w.abs().t() + bias.abs().to(x)


def model() -> nn.ModuleDict:
    """Return a model with names like the real one's: a conditioner, blocks that repeat, an output projection."""

    def block() -> nn.ModuleDict:
        attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})
        return nn.ModuleDict({"attn1": attention, "ffn": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))})

    return nn.ModuleDict(
        {
            "condition_embedder": nn.ModuleDict({"time_embedder": nn.Linear(8, 8)}),
            "blocks": nn.ModuleList([block(), block()]),
            "proj_out": nn.Linear(8, 4),
        }
    )


def mlp(k: int = 40, hidden: int = 72, n: int = 24) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(k), nn.Linear(k, hidden), nn.GELU(), nn.Linear(hidden, n, bias=False))


def kinds(model: nn.Module) -> dict[str, torch.dtype | None]:
    """Map the dotted name of each linear layer to the type of its weight, None for a float one."""
    return {
        name: module.qconfig.dtype if isinstance(module, dynamic.Linear) else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | dynamic.Linear)
    }
