"""Linear with a fixed scale for its activations, found by calibration: no reduction over them while running."""

import torch
from torch import Tensor

from dax.quant import functional as QF
from dax.quant.nn.linear import QuantizedLinear


class Linear(QuantizedLinear):
    """A `QuantizedLinear` with one more buffer, `input_scale`: float32, shape []. Values beyond it saturate."""

    def __init__(self, in_features, out_features, bias=True, *, qconfig, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, qconfig=qconfig, device=device, dtype=dtype)
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device))

    @classmethod
    def from_float(cls, linear, qconfig):
        """As in `QuantizedLinear`, for a `linear` with an `activation_observer` that has seen its inputs."""
        new = super().from_float(linear, qconfig)
        new.input_scale = linear.activation_observer.scale(qconfig.activation_dtype)
        return new

    @classmethod
    def fuse(cls, linears):
        fused = super().fuse(linears)
        fused.input_scale = linears[0].input_scale.clone()
        return fused

    def _fuse_key(self):
        return *super()._fuse_key(), self.input_scale.item()

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [..., in] → codes [..., in] and the float32 scale, []."""
        scale = self.input_scale
        q = QF.quantize(x, scale, self.qconfig.activation_dtype)
        if not x.is_cuda:
            # On a GPU the code for NaN goes through the product; the CPU's cannot carry it, so the scale does.
            scale = torch.where(x.amax().isnan(), torch.nan, scale)
        return q, scale
