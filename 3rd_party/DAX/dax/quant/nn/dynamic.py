"""Linear that scales each activation by what it holds: nothing to calibrate."""

from torch import Tensor

from dax.quant import functional as QF
from dax.quant.nn.linear import QuantizedLinear
from dax.quant.qscheme import per_token_symmetric


class Linear(QuantizedLinear):
    __doc__ = QuantizedLinear.__doc__

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [..., in] → codes [..., in] and float32 scales: [..., 1] per token, [] per tensor."""
        if self.qconfig.rotation:
            x = QF.rotate(x)
        if self.qconfig.activation_scheme is per_token_symmetric:
            return QF.quantize_per_token(x, self.qconfig.activation_dtype)
        return QF.quantize_per_tensor(x, self.qconfig.activation_dtype, self.qconfig.process_group)

    def forward_gelu(self, x: Tensor) -> Tensor:
        """`forward` of GELU(`x`), the tanh form; on a GPU, GELU and a quantization per token are one kernel."""
        if self.qconfig.activation_scheme is per_token_symmetric and not self.qconfig.rotation:
            xq, x_scale = QF.quantize_gelu_per_token(x, self.qconfig.activation_dtype)
        else:
            xq, x_scale = self.quantize_input(QF.gelu(x))
        return self.forward_quantized(xq, x_scale, x.dtype)
