"""Row parallelism: ranks that share one frame, each with some of its rows, in a network of convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix.distributed.context_parallel import ContextParallel


class RowParallel:
    """This rank's rows of every frame, and the exchange of rows with the other ranks.

    Every rank has consecutive rows, rank 0 the uppermost ones; where they cannot be split evenly, the first ranks have one
    more. Where a layer doubles the height, each rank's rows double. All methods are collective, have static shapes and do
    not synchronize with the host, as CUDA graphs require.

    Args:
        context_parallel: the ranks.
        height: rows of a frame where it is split, at least one for each rank.
    """

    def __init__(self, context_parallel: ContextParallel, height: int):
        ranks = context_parallel.world_size
        if height < ranks:
            raise ValueError(f"{height} rows cannot be split over {ranks} ranks")
        self.parallel, self.rank = context_parallel, context_parallel.rank
        self.heights = [height // ranks + (rank < height % ranks) for rank in range(ranks)]

    def shard(self, frames: Tensor, dim: int) -> Tensor:
        """Return this rank's rows of whole frames, whose rows are in dimension ``dim``."""
        return frames.split(self.heights, dim)[self.rank]

    def fill_halos(self, frames: Tensor) -> None:
        """Fill the first and the last row of [B, T, 1+h+1, W, C] with the neighbours' rows, or zeros outside of the frame.

        A convolution of three rows then computes the ``h`` rows in between as it would in the whole frame.
        """
        edges = self.parallel.all_gather_stacked(torch.stack([frames[:, :, 1], frames[:, :, -2]]))  # [N, 2, B, T, W, C]
        above, below = frames[:, :, 0], frames[:, :, -1]
        above.copy_(edges[self.rank - 1, 1]) if self.rank else above.zero_()
        below.copy_(edges[self.rank + 1, 0]) if self.rank + 1 < len(self.heights) else below.zero_()

    def all_gather(self, frames: Tensor) -> Tensor:
        """Return whole frames [B, T, H, W, C] on every rank, from each one's rows [B, T, h, W, C]."""
        return self._join(self.parallel.all_gather_stacked(self._pad(frames, dim=2)), dim=2)

    def gather(self, pixels: Tensor) -> Tensor:
        """Return whole frames [B, T, C, H, W] in the main process, from each rank's rows [B, T, C, h, W].

        Returns ``pixels`` itself on the other ranks.
        """
        gathered = self.parallel.gather_stacked(self._pad(pixels, dim=3))
        return pixels if gathered is None else self._join(gathered, dim=3)

    def _pad(self, x: Tensor, dim: int) -> Tensor:
        """Return ``x`` with as many rows as the rank with the most has."""
        height = x.shape[dim]
        missing = height // self.heights[self.rank] * self.heights[0] - height
        return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x

    def _join(self, parts: Tensor, dim: int) -> Tensor:
        """Join the ranks' rows [N, ...], padded, along dimension ``dim`` of a rank's."""
        scale = parts.shape[dim + 1] // self.heights[0]
        return torch.cat([part.narrow(dim, 0, scale * rows) for part, rows in zip(parts, self.heights)], dim)
