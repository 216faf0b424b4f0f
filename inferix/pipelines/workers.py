"""What the main process of a job tells the other ranks, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inferix.distributed.context_parallel import ContextParallel


@dataclass(frozen=True)
class ClipPlan:
    """Which frames a clip consists of."""

    batch: int
    num_context_frames: int
    """Frames that are given, clean, before those that are generated."""
    num_frames: int | None
    """All frames, those given included; None: without end."""
    block_size: int
    latent_shape: tuple[int, int, int]
    """Channels, height and width of a latent frame."""
    prompts_change: bool = False
    """Whether the prompt may change between two blocks."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield first frame and number of frames of every block. A lone first frame (an image) is a block of its own."""
        size = self.block_size
        lone = self.num_context_frames % size if size > 1 else 0
        start = 0
        while self.num_frames is None or start < self.num_frames:
            length = lone if start == 0 and lone else size
            yield start, length
            start += length


class Workers:
    """The other ranks of a job, which compute what the main process computes.

    The main process calls the methods with what it knows; the others call them in the same order and are told. With one
    process nothing is sent, so that the block loop reads the same for one rank and for eight.
    """

    def __init__(self, context_parallel: ContextParallel | None, device: torch.device, dtype: torch.dtype):
        self.parallel, self.device, self.dtype = context_parallel, device, dtype
        self.is_main_process = context_parallel is None or context_parallel.is_main_process

    def broadcast(self, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Return the main process's ``tensor``, of ``shape``, on every rank."""
        if not self.is_main_process:
            tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        assert tensor is not None
        return tensor if self.parallel is None else self.parallel.broadcast(tensor)

    def start_clip(self, plan: ClipPlan | None = None) -> ClipPlan | None:
        """Begin a clip and return its plan; None on a worker once the main process has closed the job."""
        if self.parallel is None:
            return plan
        self.parallel.in_block = True
        return self.parallel.broadcast_object(plan)

    def prompts(self, embeds: Iterator[Tensor] | None) -> Iterator[Tensor]:
        """Yield the prompt embeddings [B, L, text_dim] of block after block, as the main process's ``embeds`` gives them.

        The same tensor object again means that the prompt has not changed.
        """
        if self.parallel is None:
            yield from embeds or ()
            return
        current = None
        while True:
            new = None if embeds is None else next(embeds, None)
            changed = None if new is None or new is current else tuple(new.shape)
            more, shape = self.parallel.broadcast_object((new is not None, changed))
            if not more:
                self.parallel.in_block = False
                return
            if shape is not None:
                sent = self.broadcast(new, shape)
                current = new if self.is_main_process else sent
            assert current is not None  # the first message has a prompt
            yield current

    def end_block(self) -> None:
        """Say that the main process may be interrupted now: the others wait for ``next_block``."""
        if self.parallel is not None:
            self.parallel.in_block = False

    def next_block(self, proceed: bool = True) -> bool:
        """Return on every rank whether the main process goes on with the clip."""
        if self.parallel is None:
            return proceed
        self.parallel.in_block = proceed
        return bool(self.parallel.broadcast_object(proceed))
