"""How one layer is quantized. Names follow torch.ao.quantization where it has them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from dax.quant.qscheme import QScheme, per_channel_symmetric, per_tensor_symmetric, per_token_symmetric

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

NAMES = {str(value).removeprefix("torch."): value for value in (*FP8, torch.int8)} | {q.value: q for q in QScheme}
"""Names of the types and the schemes in files."""


@dataclass(frozen=True)
class QConfig:
    """Type and scales of one layer's weight and activations. Raises ValueError for a combination that has no product."""

    dtype: torch.dtype = torch.float8_e4m3fn
    """Type of the stored weight: torch.float8_e4m3fn or torch.int8."""
    activation_dtype: torch.dtype = None  # type: ignore[assignment]
    """Type of the activations, the weight's unless given; float8_e5m2 reaches further with one mantissa bit less."""
    weight_scheme: QScheme = per_channel_symmetric
    """per_tensor_symmetric or per_channel_symmetric."""
    activation_scheme: QScheme = per_token_symmetric
    """per_tensor_symmetric or per_token_symmetric."""
    static: bool = False
    """False: activation scales come from each input. True: from calibration (fp8 per tensor; prepare, run, convert)."""
    rotation: bool = False
    """Quantize activations and weights in a rotated basis, where outliers are spread out: int8 gains, fp8 does not."""

    def __post_init__(self) -> None:
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
        if self.static and self.rotation:
            raise ValueError("QConfig: rotation is for dynamic quantization")

    def to_dict(self) -> dict[str, str | bool]:
        """Return every field as a JSON or YAML file can hold it; `from_dict` reads it."""
        spelled = {value: name for name, value in NAMES.items()}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field: value if isinstance(value, bool) else spelled[value] for field, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, str | bool]) -> "QConfig":
        """Return a QConfig of some or all fields, the others at their defaults.

        Raises ValueError for an unknown field or value.
        """
        known = [field.name for field in fields(cls)]
        for field, value in values.items():
            if field not in known:
                raise ValueError(f"{field!r} is none of {', '.join(known)}")
            switch = field in ("static", "rotation")
            if switch != isinstance(value, bool) or not switch and not (isinstance(value, str) and value in NAMES):
                wanted = "true or false" if switch else f"one of {', '.join(NAMES)}"
                raise ValueError(f"{field} is {value!r}: it must be {wanted}")
        arguments: dict[str, Any] = {field: NAMES.get(str(value), value) for field, value in values.items()}
        return cls(**arguments)


def get_default_dynamic_fp8_qconfig(activation_dtype: torch.dtype = torch.float8_e4m3fn) -> QConfig:
    """Return fp8 with one scale for each activation tensor and one for each weight."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_tensor_symmetric, per_tensor_symmetric)


def get_dynamic_fp8_per_token_act_per_channel_weight_qconfig(
    activation_dtype: torch.dtype = torch.float8_e4m3fn,
) -> QConfig:
    """Return fp8 with a scale for each token and each output channel: nearest to full precision."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_channel_symmetric, per_token_symmetric)


def get_default_dynamic_int8_qconfig() -> QConfig:
    """Return int8 with one scale for each activation tensor and one for each weight."""
    return QConfig(torch.int8, torch.int8, per_tensor_symmetric, per_tensor_symmetric)


def get_dynamic_int8_per_channel_weight_qconfig() -> QConfig:
    """Return int8 with one scale for each activation tensor, one for each output channel of a weight."""
    return QConfig(torch.int8, torch.int8, per_channel_symmetric, per_tensor_symmetric)


def get_dynamic_int8_per_token_act_per_channel_weight_qconfig() -> QConfig:
    """Return int8 with a scale for each token and each output channel: nearest to full precision."""
    return QConfig(torch.int8, torch.int8, per_channel_symmetric, per_token_symmetric)


def get_default_fp8_qconfig(activation_dtype: torch.dtype = torch.float8_e4m3fn) -> QConfig:
    """Return static fp8: a calibrated scale for each layer's activations, one scale for each weight."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_tensor_symmetric, per_tensor_symmetric, static=True)


def get_fp8_per_channel_weight_qconfig(activation_dtype: torch.dtype = torch.float8_e4m3fn) -> QConfig:
    """Return static fp8: a calibrated scale for each layer's activations, one for each output channel of a weight."""
    return QConfig(torch.float8_e4m3fn, activation_dtype, per_channel_symmetric, per_tensor_symmetric, static=True)


SHORT = {"fp8": QConfig(torch.float8_e4m3fn), "int8": QConfig(torch.int8)}
"""Short names for files: each has a scale for every token and every output channel."""

METADATA = "__metadata__"
"""Key of a file's metadata, which stands beside the module names (as in a safetensors header)."""


def read_qconfig_dict(content: object) -> dict[str, QConfig | None]:
    """Return the `qconfig_dict` of a JSON or YAML file: module name → null, `fp8`, `int8`, or the fields of a QConfig.

    Raises ValueError, naming the module, for anything else.
    """
    entries = {name: value for name, value in content.items() if name != METADATA} if isinstance(content, dict) else {}
    if not entries:
        raise ValueError("it must map module names to null, fp8, int8 or the fields of a QConfig")
    return {name: read_entry(name, value) for name, value in entries.items()}


def read_entry(name: object, value: object) -> QConfig | None:
    """Return the QConfig that a file has for the module `name`. Raises ValueError, naming it, for a malformed entry."""
    if not isinstance(name, str):
        raise ValueError(f"{name!r}: the name of a module is text (quote it)")
    if value is None:
        return None
    try:
        if isinstance(value, dict):
            return QConfig.from_dict(value)
        if isinstance(value, str) and value in SHORT:
            return SHORT[value]
        raise ValueError(f"{value!r} is not null, fp8, int8 or the fields of a QConfig")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r}: {error}") from None
