"""Linear whose activation scale is fixed, found by calibration: no reduction over the activations while running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dax.quant import functional as QF
from dax.quant.nn.linear import QuantizedLinear

if TYPE_CHECKING:
    from typing import Self

    from dax.quant.quantization.qconfig import QConfig


class Linear(QuantizedLinear):
    """A `QuantizedLinear` with one more buffer, `input_scale`: float32, shape []. Values beyond it saturate."""

    input_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        qconfig: QConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, qconfig=qconfig, device=device, dtype=dtype)
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device))

    @classmethod
    def validate(cls, linear: nn.Linear, qconfig: QConfig) -> None:
        """Raises as in `QuantizedLinear`, and ValueError if `linear.activation_observer` saw nothing or a NaN."""
        super().validate(linear, qconfig)
        observer: Any = linear.activation_observer
        observer.scale(qconfig.activation_dtype)

    @classmethod
    def from_float(cls, linear: nn.Linear, qconfig: QConfig) -> Self:
        """As in `QuantizedLinear`, for a `linear` with an `activation_observer` that has seen its inputs."""
        new = super().from_float(linear, qconfig)
        observer: Any = linear.activation_observer
        new.input_scale = observer.scale(qconfig.activation_dtype)
        return new

    @classmethod
    def fuse(cls, linears: Sequence[Self]) -> Self:
        fused = super().fuse(linears)
        fused.input_scale = linears[0].input_scale.clone()
        return fused

    def _fuse_key(self) -> tuple:
        return *super()._fuse_key(), self.input_scale.item()

    def _quantize_input(self, x: Tensor, in_float: bool = False) -> tuple[Tensor, Tensor]:
        """Return qdata [..., in] and the float32 scale, []."""
        scale = self.input_scale
        q = QF.quantize(x, scale, self.qconfig.activation_dtype, in_float)
        if not x.is_cuda and not in_float:
            # On a GPU and in float32 a NaN goes through the product; in a CPU's fp8 it cannot, so the scale carries it.
            scale = torch.where(x.amax().isnan(), torch.nan, scale)
        return q, scale
