"""Which Linear layers of a model become 8-bit, and how."""

from dax.quant.quantization.checkpoint import load_quantized, save_quantized
from dax.quant.quantization.qconfig import QConfig, read_qconfig_dict
from dax.quant.quantization.quantize import convert, prepare, quantize_dynamic

__all__ = [
    "QConfig",
    "convert",
    "load_quantized",
    "prepare",
    "quantize_dynamic",
    "read_qconfig_dict",
    "save_quantized",
]
