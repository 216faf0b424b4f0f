"""What the main process of a job tells the other ranks, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inferix.distributed.context_parallel import ContextParallel
from inferix.models.vae import VAE, DecodeRequest


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """The embeddings [B, L, text_dim] of a block's prompt. The same object again means that it has not changed."""

    embeds: Tensor
    switch: str | None = None
    """What changes with them, ``recache`` or ``cross_attention``; None: as the config says."""


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

    Args:
        context_parallel: the ranks; None: one process.
        device: this rank's.
        dtype: of the tensors that are sent.
        vae: what decodes together with the main process's, where ranks share that.
    """

    def __init__(
        self, context_parallel: ContextParallel | None, device: torch.device, dtype: torch.dtype, vae: VAE | None
    ):
        self.parallel, self.device, self.dtype, self.vae = context_parallel, device, dtype, vae
        self.is_main_process = context_parallel is None or context_parallel.is_main_process

    def broadcast(self, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Return the main process's ``tensor``, of ``shape``, on every rank."""
        if not self.is_main_process:
            tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        assert tensor is not None
        return tensor if self.parallel is None else self.parallel.broadcast(tensor)

    def broadcast_object(self, message: object = None) -> Any:
        """Return on every rank what the main process passes, and decode on the others what it decodes before that."""
        assert self.parallel is not None
        received = self.parallel.broadcast_object(message)
        while isinstance(received, DecodeRequest):
            assert self.vae is not None  # else the main process's VAE would not ask
            self.vae.take_part(received)
            received = self.parallel.broadcast_object()
        return received

    def start_clip(self, plan: ClipPlan | None = None) -> ClipPlan | None:
        """Begin a clip and return its plan; None on a worker once the main process has closed the job."""
        if self.parallel is None:
            return plan
        self.parallel.in_block = True
        return self.broadcast_object(plan)

    def prompts(self, embeds: Iterator[PromptEmbeds] | None) -> Iterator[PromptEmbeds]:
        """Yield the prompts of block after block, as the main process's ``embeds`` gives them."""
        if self.parallel is None:
            yield from embeds or ()
            return
        current = None
        while True:
            new = None if embeds is None else next(embeds, None)
            changed = None if new is None or new is current else (tuple(new.embeds.shape), new.switch)
            more, change = self.broadcast_object((new is not None, changed))
            if not more:
                self.parallel.in_block = False
                return
            if change is not None:
                shape, switch = change
                sent = self.broadcast(None if new is None else new.embeds, shape)
                current = new if self.is_main_process else PromptEmbeds(sent, switch)
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
        return bool(self.broadcast_object(proceed))
