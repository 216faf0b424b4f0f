"""CUDA graphs of a function, captured as they are needed."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inferix.distributed.context_parallel import GRAPHS


class CUDAGraphs:
    """Captures a function once for each key and replays it. The graphs share one memory pool and are dropped with this object.

    The functions' results share memory too: use a result before the next call.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, CapturedGraph] = {}
        self.warmed_up: set[Hashable] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, shapes: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return ``function(*inputs)``.

        Args:
            key: which memory the function reads and writes besides ``inputs``. It must stay where it is.
            shapes: calls with equal ``shapes`` run the same kernels, of which the first call is a warm-up.
            function: what to capture.
            inputs: its arguments.
        """
        self.capture(key, shapes, function, *inputs)
        return self.graphs[key](*inputs)

    def capture(self, key: Hashable, shapes: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Capture what a call with the same arguments would replay, unless that was done before."""
        if key not in self.graphs:
            self.graphs[key] = CapturedGraph(function, inputs, self.pool, warm_up=shapes not in self.warmed_up)
            self.warmed_up.add(shapes)


class CapturedGraph:
    """One call of a function as a CUDA graph with static inputs and output."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: Any, warm_up: bool):
        # contiguous, so that compiled code does not see a view's strides
        self.inputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t) for t in inputs]
        stream = capture_stream(self.inputs[0].device)
        if warm_up:  # compiling and choosing kernels must not be captured
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do, such as NCCL's watchdog, does not end the capture
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = function(*self.inputs)
        if dist.is_initialized():
            GRAPHS.add(self.graph)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static, tensor in zip(self.inputs, inputs):
            static.copy_(tensor)
        self.graph.replay()
        return self.output


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures on ``device``.

    cuBLAS keeps 34 MB for every stream that it was used on, and PyTorch's default is the first device's for all.
    """
    return torch.cuda.Stream(device)


def signature(model: nn.Module) -> tuple:
    """Return what a captured forward of ``model`` depends on besides its inputs: its weights' memory and its settings."""
    return tuple(
        (
            *(tensor.data_ptr() for tensor in (*m._parameters.values(), *m._buffers.values()) if tensor is not None),
            vars(m).get("qconfig"),  # a module without one would search its weights for it
            id(vars(m).get("process_group")),
        )
        for m in model.modules()
    )
