"""Linear layers with 8-bit weights: activation scales from each input (`dynamic`) or from calibration (`quantized`)."""

from dax.quant.nn import dynamic, quantized

__all__ = ["dynamic", "quantized"]
