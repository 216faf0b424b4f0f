"""Quantization: what to store in 8 bits (`quantization`), the modules that compute with it (`nn`), the arithmetic."""

from dax.quant.qscheme import QScheme, per_channel_symmetric, per_tensor_symmetric, per_token_symmetric

__all__ = ["QScheme", "per_channel_symmetric", "per_tensor_symmetric", "per_token_symmetric"]
