"""Linear whose activation scales are computed from each input: nothing to calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dax.quant import functional as QF
from dax.quant.nn.linear import QuantizedLinear, is_empty
from dax.quant.qscheme import per_token_symmetric

if TYPE_CHECKING:
    from typing import Self

    from torch.distributed import ProcessGroup


class Linear(QuantizedLinear):
    __doc__ = QuantizedLinear.__doc__

    process_group: ProcessGroup | None = None
    """Ranks that each hold some rows of every activation and share one per-tensor scale for all rows. The group belongs
    to a run: neither saved nor copied with the layer."""

    @classmethod
    def fuse(cls, linears: Sequence[Self]) -> Self:
        fused = super().fuse(linears)
        fused.process_group = linears[0].process_group
        return fused

    def _quantize_input(self, x: Tensor, in_float: bool = False) -> tuple[Tensor, Tensor]:
        """Return qdata [..., in] and float32 scales: [..., 1] per token, [] per tensor."""
        dtype = self.qconfig.activation_dtype
        if self.qconfig.rotation:
            x = QF.rotate(x, self.in_features)
        if self.qconfig.activation_scheme is per_token_symmetric:
            return QF.quantize_per_token(x, dtype, in_float)
        return QF.quantize_per_tensor(x, dtype, self.process_group, in_float)

    def forward_gelu(self, x: Tensor) -> Tensor:
        """Return `self(gelu(x))`, GELU in its tanh form; on a GPU, GELU and a quantization per token are one kernel.

        `x` is as for `forward`, which raises for the same inputs.
        """
        if QF.in_autocast(x) or torch.is_grad_enabled() and x.requires_grad:
            return self.forward(QF.gelu(x))
        return self._call(self._forward_gelu, x)

    def _forward_gelu(self, x: Tensor) -> Tensor:
        if self.qconfig.activation_scheme is not per_token_symmetric or self.qconfig.rotation or is_empty(x):
            return self._forward(QF.gelu(x))
        dtype = self.qconfig.activation_dtype
        xq, x_scale = QF.quantize_gelu_per_token(x, dtype, QF.float_product(dtype, x.device))
        return self._product(xq, x_scale, x.dtype)

    def _fuse_key(self) -> tuple:
        return *super()._fuse_key(), self.process_group

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "process_group"}
