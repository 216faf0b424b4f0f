"""How one layer is quantized. Names follow torch.ao.quantization where it has them."""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from dax.quant.qscheme import QScheme, per_channel_symmetric, per_tensor_symmetric, per_token_symmetric

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class QConfig:
    """Raises ValueError for a combination that has no product."""

    dtype: torch.dtype = torch.float8_e4m3fn
    """Type of the stored weight: torch.float8_e4m3fn or torch.int8."""
    activation_dtype: torch.dtype | None = None
    """Type of the activations, the weight's unless given; float8_e5m2 reaches further with one mantissa bit less."""
    weight_scheme: QScheme = per_channel_symmetric
    """per_tensor_symmetric or per_channel_symmetric."""
    activation_scheme: QScheme = per_token_symmetric
    """per_tensor_symmetric or per_token_symmetric."""
    static: bool = False
    """False: activation scales come from each input. True: from calibration (fp8 per tensor; prepare, run, convert)."""
    process_group: ProcessGroup | None = None
    """Ranks that each hold some rows of every activation: a dynamic per-tensor scale is then that of all their rows."""

    def __post_init__(self):
        if self.activation_dtype is None:
            object.__setattr__(self, "activation_dtype", self.dtype)
        if self.dtype not in (torch.float8_e4m3fn, torch.int8):
            raise ValueError(f"QConfig: weights are float8_e4m3fn or int8, not {self.dtype}")
        if self.activation_dtype not in (FP8 if self.dtype in FP8 else (torch.int8,)):
            raise ValueError(f"QConfig: {self.activation_dtype} activations do not multiply {self.dtype} weights")
        if self.weight_scheme not in (per_tensor_symmetric, per_channel_symmetric):
            raise ValueError(f"QConfig: weights are scaled per tensor or per channel, not {self.weight_scheme}")
        if self.activation_scheme not in (per_tensor_symmetric, per_token_symmetric):
            raise ValueError(f"QConfig: activations are scaled per tensor or per token, not {self.activation_scheme}")
        if self.static and (self.dtype == torch.int8 or self.activation_scheme is not per_tensor_symmetric):
            raise ValueError("QConfig: static quantization is fp8 with per-tensor activations")


def get_default_dynamic_fp8_qconfig(activation_dtype=torch.float8_e4m3fn) -> QConfig:
    """fp8, one scale for each activation tensor and one for each weight."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_tensor_symmetric, per_tensor_symmetric)


def get_dynamic_fp8_per_token_act_per_channel_weight_qconfig(activation_dtype=torch.float8_e4m3fn) -> QConfig:
    """fp8, a scale for each token and each output channel: nearest to full precision."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_channel_symmetric, per_token_symmetric)


def get_default_dynamic_int8_qconfig() -> QConfig:
    """int8, one scale for each activation tensor and one for each weight."""
    return QConfig(torch.int8, torch.int8, per_tensor_symmetric, per_tensor_symmetric)


def get_dynamic_int8_per_channel_weight_qconfig() -> QConfig:
    """int8, one scale for each activation tensor, one for each output channel of a weight."""
    return QConfig(torch.int8, torch.int8, per_channel_symmetric, per_tensor_symmetric)


def get_dynamic_int8_per_token_act_per_channel_weight_qconfig() -> QConfig:
    """int8, a scale for each token and each output channel: nearest to full precision."""
    return QConfig(torch.int8, torch.int8, per_channel_symmetric, per_token_symmetric)


def get_default_fp8_qconfig(activation_dtype=torch.float8_e4m3fn) -> QConfig:
    """Static fp8: a calibrated scale for each layer's activations, one scale for each weight."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_tensor_symmetric, per_tensor_symmetric, static=True)


def get_fp8_per_channel_weight_qconfig(activation_dtype=torch.float8_e4m3fn) -> QConfig:
    """Static fp8: a calibrated scale for each layer's activations, one for each output channel of a weight."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_channel_symmetric, per_tensor_symmetric, static=True)
