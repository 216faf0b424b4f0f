"""Sizes of modules and tensors in memory."""

import torch
from torch import Tensor, nn


def num_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers as they are stored.

    A tensor subclass made of other tensors, such as torchao's quantized ones, counts as what it is made of.
    """

    def size(tensor: Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.nbytes

    return sum(size(tensor) for tensor in (*model.parameters(), *model.buffers()))


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters of ``model``."""
    return sum(weight.numel() for weight in model.parameters())


def use_expandable_segments() -> None:
    """Let the CUDA allocator use what is freed in small pieces for larger ones (``expandable_segments``).

    Weights that are quantized one after the other leave gaps of the size of their 16-bit form: of 14B 4 GB.
    """
    # PyTorch has no public setter besides PYTORCH_ALLOC_CONF, which is read when the process starts
    if setter := getattr(torch._C, "_accelerator_setAllocatorSettings", None):
        setter("expandable_segments:True")
