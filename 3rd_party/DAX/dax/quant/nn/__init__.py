"""Linear layers with 8-bit weights: `dynamic` scales activations as they come, `quantized` by a calibrated scale."""

from dax.quant.nn import dynamic, quantized

__all__ = ["dynamic", "quantized"]
