"""What the causal transformer remembers of the frames before."""

import torch
from torch import Tensor

from inferix.models.transformer import TransformerConfig, attention


class KVCache:
    """Keys and values of every layer, preallocated for ``num_frames`` latent frames.

    A block of frames is placed with ``place`` and then run several times (the denoising steps, and once more when it is
    clean): every run overwrites the block's keys and values, and attends to them and to all before.

    Beyond ``num_frames`` the cache rolls: a new frame takes the slot of the oldest one that is not among the first
    ``sink_frames``. Attention does not depend on the order of keys, and their positions are rotated into them, so that
    nothing has to be moved.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        num_frames: int,
        tokens_per_frame: int,
        device: torch.device,
        dtype: torch.dtype,
        sink_frames: int = 0,
    ):
        shape = (config.num_layers, batch, num_frames, tokens_per_frame, config.num_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.num_frames = num_frames
        self.sink_frames = sink_frames
        self.text: list[tuple[Tensor, Tensor]] = []
        """Every layer's cross-attention keys and values [B, L, H, d]: ``CausalWanTransformer.embed_text``."""

    def slot(self, frame: int) -> int:
        """Where the frame at absolute position ``frame`` is kept."""
        if frame < self.num_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.num_frames - self.sink_frames)

    def place(self, start_frame: int, num_frames: int) -> None:
        """Say which absolute frames the next runs are about."""
        self.slots = [self.slot(start_frame + i) for i in range(num_frames)]
        self.valid_frames = min(start_frame + num_frames, self.num_frames)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, T, H, d] of the placed frames, and let q [B, T, H, d] see all that is stored: [B, T, H*d]."""
        keys, values = self.keys[layer], self.values[layer]
        for store, new in ((keys, k), (values, v)):
            frames = new.unflatten(1, (len(self.slots), -1))
            for i, slot in enumerate(self.slots):
                store[:, slot].copy_(frames[:, i])
        return attention(q, keys[:, : self.valid_frames].flatten(1, 2), values[:, : self.valid_frames].flatten(1, 2))
