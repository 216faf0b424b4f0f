"""Which Linear layers of a model become 8-bit, and how."""

from dax.quant.quantization.qconfig import QConfig
from dax.quant.quantization.quantize import convert, prepare, quantize_dynamic

__all__ = ["QConfig", "convert", "prepare", "quantize_dynamic"]
