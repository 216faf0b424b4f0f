"""Moving a model's weights from host memory to a GPU as fast as the bus allows."""

from itertools import cycle

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 * 2**20


def move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Do as ``module.to(device, dtype)``, several times as fast where weights go from host memory to a GPU.

    They are read, and converted, by all cores into page-locked memory, while the part before is copied from there. CUDA's
    own copy from pageable memory, which weights in a mapped file are, is bound by one core.
    """
    if device.type != "cuda":
        module.to(device, dtype)
    else:
        module._apply(Staging(device, dtype))


class Staging:
    """Copies tensors to ``device``, floating ones in ``dtype``, through two page-locked buffers in turns."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.buffers = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])

    def __call__(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < CHUNK_BYTES // 64:
            return tensor.to(self.device, dtype)
        copy = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        size = CHUNK_BYTES // max(dtype.itemsize, tensor.itemsize)
        for source, target in zip(tensor.detach().flatten().split(size), copy.flatten().split(size)):
            buffer, copied = next(self.buffers)
            copied.synchronize()
            staged = buffer[: target.nbytes].view(dtype).copy_(source)
            target.copy_(staged, non_blocking=True)
            copied.record(torch.cuda.current_stream(self.device))
        return copy
