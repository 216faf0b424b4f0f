"""Which Linear layers of a model become 8-bit, and how."""

from dax.quant.quantization.checkpoint import load_quantized, read_metadata, save_quantized
from dax.quant.quantization.matching import lookup, matching_modules
from dax.quant.quantization.qconfig import QConfig, read_qconfig_dict
from dax.quant.quantization.quantize import convert, prepare, quantize_dynamic, set_process_group

__all__ = [
    "QConfig",
    "convert",
    "load_quantized",
    "lookup",
    "matching_modules",
    "prepare",
    "quantize_dynamic",
    "read_metadata",
    "read_qconfig_dict",
    "save_quantized",
    "set_process_group",
]
