"""Weights in host memory that are copied to the device for each call."""

from itertools import chain

import torch
from torch import Tensor, nn


class OnDemandOffload:
    """Copy a module's parameters and buffers to ``device`` before every call of it, and free them after it."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self.host_tensors: list[tuple[Tensor, Tensor]] = []
        module.register_forward_pre_hook(self.load)
        module.register_forward_hook(self.unload)

    def load(self, module: nn.Module, _: object) -> None:
        self.host_tensors = [(tensor, tensor.data) for tensor in chain(module.parameters(), module.buffers())]
        for tensor, data in self.host_tensors:
            tensor.data = data.to(self.device)

    def unload(self, *_: object) -> None:
        for tensor, data in self.host_tensors:
            tensor.data = data
        self.host_tensors = []
