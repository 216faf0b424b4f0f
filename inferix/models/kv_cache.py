"""Keys and values of the frames in the attention window."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inferix.models.attention import FP8, Part, saturating_cast
from inferix.runtime.cuda_graphs import CUDAGraphs


@dataclass(frozen=True)
class WindowConfig:
    """Which latent frames self-attention sees."""

    num_frames: int
    """Frames in the window, those of the current block included."""
    sink_size: int = 0
    """First frames of the video, which the window keeps when it rolls."""
    block_size: int = 3
    """Frames that are generated together, whose values have a common mean."""
    relative_positions: bool = False
    """Place the sink frames right before the oldest other frame in the window, instead of where they are in the video."""

    def slot(self, frame: int) -> int:
        """Return where in the cache the frame at this position in the video is stored.

        Frames that no longer fit replace the oldest one that is not a sink. Attention does not depend on the order of the
        keys, so nothing is ever moved.
        """
        if frame < self.num_frames:
            return frame
        return self.sink_size + (frame - self.sink_size) % (self.num_frames - self.sink_size)

    def sink_position(self, end: int) -> int:
        """Return the position of the first sink frame once the frames before ``end`` are in the window.

        Attention depends on differences of positions only, so the other frames keep their positions in the video.
        """
        return max(0, end - self.num_frames) if self.relative_positions else 0


class KVCache:
    """Keys and values of every layer for the frames in the window, preallocated.

    ``set_positions`` says which frames the following forwards compute; every forward overwrites their keys and values, so
    that a block can be run once for each denoising step.

    8-bit values are stored without their mean over the tokens of a block, which is kept beside them in float32: sums of 8-bit
    products lose magnitude where the values have a mean.

    Args:
        num_layers: layers of the transformer.
        shape: [B, F, S, H, d]: batch, frames in the window, tokens of a frame, heads, size of a head; of this rank.
        window: which frames are kept.
        device: where the cache is.
        dtype: of the stored keys and values.
        compute_dtype: of the model.
    """

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int, int],
        window: WindowConfig,
        device: torch.device,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ):
        self.num_layers, self.shape, self.window = num_layers, shape, window
        self.device, self.dtype, self.compute_dtype = device, dtype, compute_dtype
        self.reset()
        batch, num_frames, tokens, heads, head_dim = shape
        self.value_means: Tensor | None = None
        """[L, F, B, H, d] float32 with an 8-bit cache."""
        if dtype == FP8:
            self.value_means = torch.zeros(num_layers, num_frames, batch, heads, head_dim, device=device)
        self.sink_keys: Tensor | None = None
        """The sink frames' keys before rotation [L, B, K, S, H, d], where their positions change."""
        if window.relative_positions and window.sink_size:
            sinks = (num_layers, batch, window.sink_size, tokens, heads, head_dim)
            self.sink_keys = torch.zeros(sinks, device=device, dtype=compute_dtype)
        self.graphs = CUDAGraphs() if device.type == "cuda" else None
        """Captured forwards that read and write this cache."""
        self.prepared_plans: set[Hashable] = set()
        """Plans of clips for which all graphs are captured."""
        self.recached = False
        """Whether a whole window has been recomputed once; the first time compiles."""
        self.allocate()

    def allocate(self) -> None:
        """Allocate the keys and values, each [L, B, F, S, H, d]."""
        stored = (self.num_layers, *self.shape)
        self.keys, self.values = (torch.zeros(stored, device=self.device, dtype=self.dtype) for _ in range(2))

    def reset(self) -> None:
        """Begin a new video: no frame is in the window. Memory and graphs stay."""
        self.slots: list[int] = []
        self.num_valid_frames = 0
        self.sink_position = 0
        self.blocks: list[list[int]] = []
        """Slots of the frames in the window, grouped by common means of their values."""
        self.num_groups = 1
        """Groups of the current frames."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values [B, F, S, H, d] on the device. Call ``wait_prefetch`` before reading them."""
        return self.keys[layer], self.values[layer]

    def wait_prefetch(self, layer: int) -> None:
        """Wait until the layer's keys and values of earlier frames are on the device."""

    def release(self, layer: int) -> None:
        """Mark the layer's keys and values as read; an offloaded layer is copied back to host memory."""

    def set_positions(self, frames: Sequence[int], keep_sinks: bool = True) -> None:
        """Set which frames of the video the following forwards compute.

        Args:
            frames: consecutive positions, the last ones in the window.
            keep_sinks: False stores the first ``sink_size`` of ``frames``, a whole window, as the new sink frames.
        """
        window, end = self.window, frames[-1] + 1
        self.num_valid_frames = min(end, window.num_frames)
        sinks = 0 if keep_sinks else window.sink_size
        self.slots = [*range(sinks), *(window.slot(frame) for frame in frames[sinks:])]
        self.sink_position = window.sink_position(end)
        kept = ([slot for slot in block if slot not in self.slots] for block in self.blocks)
        size = window.block_size if len(frames) % window.block_size == 0 else 1
        self.num_groups = len(frames) // size
        new = [sorted(self.slots[i : i + size]) for i in range(0, len(frames), size)]
        self.blocks = [block for block in kept if block] + new

    @property
    def graph_key(self) -> tuple[tuple, tuple]:
        """Return a key for the memory that a forward for the current frames reads and writes, and one for the shapes."""
        parts = self.parts() if self.value_means is not None else []
        memory = (*self.slots, self.num_valid_frames, *parts)
        lengths = tuple(part.length for part in parts)
        return memory, (self.num_valid_frames, len(contiguous_ranges(self.slots)), self.has_sinks(), lengths)

    def kv_slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return where the current frames' keys and values [B, T, H, d] may be written ahead of ``update``.

        That is their place in the cache, or a staging buffer where a rolling window's end and start are not contiguous.
        """
        ranges = contiguous_ranges(self.slots)
        if len(ranges) == 1:
            keys, values = (tensor[:, ranges[0].slots].flatten(1, 2) for tensor in self.layer(layer))
            return keys, values
        shape = (self.shape[0], len(self.slots) * self.shape[2], *self.shape[3:])
        keys, values = (torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        return keys, values

    def update(self, layer: int, key: Tensor, value: Tensor, value_mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Store the current frames' keys and values and return those of the whole window.

        Args:
            layer: number of the layer.
            key, value: [B, T, H, d]; what ``kv_slots`` gave is not copied if it is in the cache already.
            value_mean: [B, G, H, d], what was subtracted from the values of each of ``num_groups`` groups of the current
                frames; required with an 8-bit cache.

        Returns:
            Keys and values [B, K, H, d] of the frames in the window, in no particular order of frames.
        """
        stored = self.layer(layer)
        ranges = contiguous_ranges(self.slots)
        for tensor, new in zip(stored, (key, value)):
            new = new.unflatten(1, (len(self.slots), -1))
            for slots, source in ranges:
                if tensor[:, slots].data_ptr() != new[:, source].data_ptr():
                    frames = new[:, source]
                    tensor[:, slots].copy_(
                        frames if frames.dtype == self.dtype else saturating_cast(frames, self.dtype)
                    )
        if self.value_means is not None:
            assert value_mean is not None
            means = value_mean.repeat_interleave(len(self.slots) // self.num_groups, dim=1).transpose(0, 1)
            for slots, source in ranges:
                self.value_means[layer, slots].copy_(means[source])
        self.wait_prefetch(layer)
        keys, values = (tensor[:, : self.num_valid_frames].flatten(1, 2) for tensor in stored)
        return keys, values

    def parts(self) -> list[Part]:
        """Return the parts of the window's keys, in order, whose values have one mean: contiguous, of one group."""
        ranges = [r.slots for block in self.blocks for r in contiguous_ranges(block)]
        tokens = self.shape[2]
        return sorted(Part(r.start * tokens, (r.stop - r.start) * tokens) for r in ranges)

    def part_means(self, layer: int) -> Tensor | None:
        """Return what was subtracted from the values of each of ``parts`` [P, B, H, d]; None where nothing was."""
        if self.value_means is None:
            return None
        return torch.stack([self.value_means[layer, part.start // self.shape[2]] for part in self.parts()])

    def store_sinks(self, layer: int, key: Tensor) -> None:
        """Keep the current frames' keys before rotation [B, T, H, d], of those among them that are sink frames."""
        assert self.sink_keys is not None
        frames = key.unflatten(1, (len(self.slots), -1))
        for i, slot in enumerate(self.slots):
            if slot < self.window.sink_size:
                self.sink_keys[layer][:, slot].copy_(frames[:, i])

    def has_sinks(self) -> bool:
        """Return whether ``store_sinks`` has to be called for the current frames."""
        return self.sink_keys is not None and min(self.slots) < self.window.sink_size

    def write_sinks(self, layer: int, keys: Tensor) -> None:
        """Replace the sink frames' stored keys by ``keys`` [B, K, S, H, d], rotated to their new positions."""
        self.layer(layer)[0][:, : self.window.sink_size].copy_(saturating_cast(keys, self.dtype))


class SlotRange(NamedTuple):
    """Consecutive slots of the cache, and which of the current frames belong there."""

    slots: slice
    source: slice


def contiguous_ranges(slots: Sequence[int]) -> list[SlotRange]:
    """Return the runs of consecutive ascending numbers in ``slots``, in order."""
    starts = [i for i, slot in enumerate(slots) if i == 0 or slot != slots[i - 1] + 1]
    ends = [*starts[1:], len(slots)]
    return [SlotRange(slice(slots[i], slots[j - 1] + 1), slice(i, j)) for i, j in zip(starts, ends)]
