"""Decoding clips piece by piece: what is kept of a clip from one piece to the next, and CUDA graphs of the calls."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from inferix.distributed.context_parallel import GRAPHS, ContextParallel
from inferix.distributed.row_parallel import RowParallel
from inferix.runtime.cuda_graphs import capture_stream

BENCHMARK_LIMIT = 4
"""Algorithms that cuDNN times for each convolution: of its usual 10 none after the fourth was faster, and each costs time."""


class FeatCache:
    """The last frames that each causal convolution read; zeros at the start of a clip.

    Args:
        row_parallel: the ranks that share the frames; a convolution of three rows then reads one more at either side.
    """

    def __init__(self, row_parallel: RowParallel | None = None) -> None:
        self.row_parallel = row_parallel
        self.halo = 0 if row_parallel is None else 1
        """Rows of the neighbouring ranks that a convolution of three rows reads at either side."""
        self.first = True
        """Whether no frame of the clip has been decoded yet."""
        self.last: dict[nn.Module, Tensor] = {}

    def restart(self) -> None:
        self.first = True
        if self.last:
            torch._foreach_zero_(list(self.last.values()))

    def prepend(self, reader: nn.Module, x: Tensor, num: int = 2, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a buffer [B, num+T, H, W, C] that begins with the ``num`` frames before x.

        ``shape`` is that of the frames to follow [B, T, H, W, C]; None: that of x.
        """
        batch, time, *rest = shape or x.shape
        if reader not in self.last:
            self.last[reader] = x.new_zeros(batch, num, *rest)
        frames = x.new_empty(batch, num + time, *rest)
        frames[:, :num] = self.last[reader]
        return frames

    def halo_buffer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a buffer for frames like x [B, T, H, W, C] and their halos, and the view of it that x belongs into."""
        if self.row_parallel is None:
            return (out := torch.empty_like(x)), out
        frames = x.new_empty(*x.shape[:2], x.shape[2] + 2, *x.shape[3:])
        return frames, frames[:, :, 1:-1]

    def fill_halos(self, frames: Tensor) -> None:
        """Fill the first and last row of [B, T, H+2, W, C] with the neighbours'; do nothing where no ranks share frames."""
        if self.row_parallel is not None:
            self.row_parallel.fill_halos(frames)

    def store(self, reader: nn.Module, frames: Tensor) -> None:
        self.last[reader].copy_(frames[:, -self.last[reader].shape[1] :])


class ClipDecoder:
    """Decode clips of one shape, one after the other; on a GPU from CUDA graphs, unless ``low_memory``.

    The first call of each kind runs as it is, which compiles and lets cuDNN choose its algorithms, and is then captured.

    Args:
        decoder: called with latents, a ``FeatCache`` and whether to go frame by frame, as ``VAEDecoder.forward``.
        shape: (B, h, w) of the latents.
        low_memory: decode frame by frame and capture nothing.
        context_parallel: ranks that share every frame; all of them then make the same calls.
    """

    def __init__(
        self,
        decoder: nn.Module,
        shape: tuple[int, int, int],
        low_memory: bool,
        context_parallel: ContextParallel | None = None,
    ):
        self.decoder = decoder
        self.shape, self.low_memory, self.context_parallel = shape, low_memory, context_parallel
        self.feat_cache = FeatCache(None if context_parallel is None else RowParallel(context_parallel, shape[1]))
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        """The graph, its input and its output, by number of latent frames and whether they begin the clip."""

    def __call__(self, latents: Tensor) -> Tensor:
        """As ``VAEDecoder.forward``."""
        if self.low_memory:
            return self.decoder(latents, self.feat_cache, frame_by_frame=True)
        if not latents.is_cuda:
            return self.decoder(latents, self.feat_cache)
        kind = (latents.shape[1], self.feat_cache.first)
        if kind not in self.graphs:
            with self.chosen_algorithms():
                pixels = self.decoder(latents, self.feat_cache)
                self.capture(latents, kind)
            return pixels
        graph, static, pixels = self.graphs[kind]
        static.copy_(latents)
        graph.replay()
        self.feat_cache.first = False
        return pixels.clone()

    def warm_up(self, latents: Tensor) -> None:
        """Decode latents as a clip's first and once more, for what later calls then need not wait for. Capture nothing."""
        with self.chosen_algorithms():
            for _ in range(2):
                self.decoder(latents, self.feat_cache)

    @staticmethod
    def chosen_algorithms() -> AbstractContextManager:
        """Let cuDNN time the algorithms of a convolution when it first sees it; TF32 stays as the caller has it."""
        cudnn = torch.backends.cudnn
        return cudnn.flags(True, benchmark=True, benchmark_limit=BENCHMARK_LIMIT, allow_tf32=cudnn.allow_tf32)

    def capture(self, latents: Tensor, kind: tuple[int, bool]) -> None:
        """Capture a call. Nothing runs, so that the feature cache stays as it is."""
        static, self.feat_cache.first = latents.clone(), kind[1]
        pool = next((graph.pool() for graph, *_ in self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        stream = capture_stream(static.device)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            pixels = self.decoder(static, self.feat_cache)
        self.graphs[kind] = (graph, static, pixels)
        if self.feat_cache.row_parallel is not None:
            GRAPHS.add(graph)
