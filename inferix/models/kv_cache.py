"""What the causal transformer remembers of the frames before."""

import torch
from torch import Tensor

from inferix.models.attention import cache_attention
from inferix.models.transformer import TransformerConfig


class KVCache:
    """Keys and values of every layer, preallocated for a number of latent frames.

    A block of frames is placed with ``place`` and then run several times (the denoising steps, and once more when it is
    clean): every run overwrites the block's keys and values, and attends to them and to all before.

    Beyond that number the cache rolls: a new frame takes the slot of the oldest one that is not among the first
    ``sink_frames``. Attention does not depend on the order of keys, and their positions are rotated into them, so that
    nothing has to be moved.

    Args:
        config: the transformer's sizes.
        shape: batch, latent frames, tokens a frame.
        device: where it is kept.
        dtype: what keys and values are kept in, and queries are compared to them in.
        compute_dtype: what attention's results are in.
        sink_frames: first frames that are never rolled over.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        sink_frames: int = 0,
    ):
        self.shape = shape
        self.num_frames = shape[1]
        self.sink_frames = sink_frames
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        layers = (config.num_layers, *shape, config.num_heads, config.head_dim)
        self.keys, self.values = (torch.zeros(layers, device=device, dtype=dtype) for _ in range(2))
        self.loose: list[Tensor] = []
        self.text: list[tuple[Tensor, Tensor]] = []
        """Every layer's cross-attention keys and values [B, L, H, d]."""

    def set_text(self, text: list[tuple[Tensor, Tensor]]) -> None:
        """Take what ``CausalWanTransformer.embed_text`` gives, in the same place in memory every time."""
        if not self.text:
            self.text = text
        for old, new in zip(self.text, text):
            for stored, tensor in zip(old, new):
                stored.copy_(tensor)

    def slot(self, frame: int) -> int:
        """Where the frame at absolute position ``frame`` is kept."""
        if frame < self.num_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.num_frames - self.sink_frames)

    def place(self, start_frame: int, num_frames: int) -> None:
        """Say which absolute frames the next runs are about."""
        self.slots = [self.slot(start_frame + i) for i in range(num_frames)]
        self.valid_frames = min(start_frame + num_frames, self.num_frames)

    def room(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where the keys and the values [B, T, H, d] of the placed frames are to be written."""
        first, frames = self.slots[0], len(self.slots)
        if self.slots == list(range(first, first + frames)):
            return tuple(stored[layer][:, first : first + frames].flatten(1, 2) for stored in (self.keys, self.values))
        shape = (self.shape[0], frames, *self.keys.shape[3:])  # a rolling window's end and start: ``attend`` moves them
        self.loose = [torch.empty(shape, device=self.keys.device, dtype=self.dtype) for _ in range(2)]
        return tuple(loose.flatten(1, 2) for loose in self.loose)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Let q [B, T, H, d] see all keys and values stored, those of the placed frames included: [B, T, H*d]."""
        for stored, loose in zip((self.keys, self.values), self.loose):
            for i, slot in enumerate(self.slots):
                stored[layer][:, slot].copy_(loose[:, i])
        self.loose = []
        keys, values = (stored[layer][:, : self.valid_frames].flatten(1, 2) for stored in (self.keys, self.values))
        return cache_attention(q, keys, values, self.compute_dtype)
