"""The key-value cache in host memory."""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from inferix.models.kv_cache import KVCache, contiguous_ranges

Pair = tuple[Tensor, Tensor]
"""Keys and values of a layer."""


class OffloadedKVCache(KVCache):
    """A cache in pinned host memory; the device holds two layers in transit and every ``RESIDENT``-th layer for good.

    While a layer is computed, the next one's earlier frames are copied in on a stream of their own, and what the layer has
    added is copied out on another. The first layer is resident, so that no forward begins by waiting. For Wan 1.3B and 21
    frames of 480x832 in bfloat16 a layer has 201 MB: of 6.04 GB, 2 resident layers and 2 in transit leave 0.81 GB on the
    device. At a full window 28 layers x 172 MB come in for each forward: 4.8 GB, about 90 ms on a PCIe 5 bus.
    """

    RESIDENT = 15

    def allocate(self) -> None:
        def pair(device: torch.device | str, **options: Any) -> Pair:
            keys, values = (torch.zeros(self.shape, device=device, dtype=self.dtype, **options) for _ in range(2))
            return keys, values

        cuda = self.device.type == "cuda"
        self.resident = {n: pair(self.device) for n in range(0, self.num_layers, self.RESIDENT)}
        self.host = {
            n: pair(torch.device("cpu"), pin_memory=cuda) for n in range(self.num_layers) if n not in self.resident
        }
        self.order = list(self.host)
        self.staging_buffers = [pair(self.device) for _ in range(2)]
        self.h2d_stream, self.d2h_stream = (torch.cuda.Stream(self.device) if cuda else None for _ in range(2))
        self.h2d_events: dict[int, torch.cuda.Event] = {}
        self.d2h_events: dict[int, torch.cuda.Event] = {}

    def layer(self, layer: int) -> Pair:
        return self.resident[layer] if layer in self.resident else self.staging(layer)

    def staging(self, layer: int) -> Pair:
        """Return the buffers on the device [B, F, S, H, d] that an offloaded layer's keys and values are in."""
        return self.staging_buffers[self.order.index(layer) % 2]

    def kv_slots(self, layer: int) -> Pair:
        if layer == 0:
            for first in self.order[:2]:
                self.prefetch(first)
        elif layer in self.host and (index := self.order.index(layer)) >= 2:
            self.wait(self.d2h_events, self.order[index - 2])  # its new frames are still in this buffer
        return super().kv_slots(layer)

    def wait_prefetch(self, layer: int) -> None:
        if layer in self.host:
            self.wait(self.h2d_events, layer)

    def release(self, layer: int) -> None:
        if layer in self.host:
            self.offload(layer)
            if following := self.order[self.order.index(layer) + 2 :]:
                self.prefetch(following[0])
        if layer == self.num_layers - 1:
            for stream in (self.h2d_stream, self.d2h_stream):
                if stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(stream)

    def prefetch(self, layer: int) -> None:
        """Copy the layer's earlier frames to the device, after all work that was submitted so far."""
        earlier = [slot for slot in range(self.num_valid_frames) if slot not in self.slots]
        self.copy(self.host[layer], self.staging(layer), earlier, self.h2d_stream, self.h2d_events, layer)

    def offload(self, layer: int) -> None:
        """Copy the layer's current frames to host memory."""
        self.copy(self.staging(layer), self.host[layer], sorted(self.slots), self.d2h_stream, self.d2h_events, layer)

    def write_sinks(self, layer: int, keys: Tensor) -> None:
        super().write_sinks(layer, keys)
        if layer in self.host:
            sinks = keys.shape[1]
            self.host[layer][0][:, :sinks].copy_(self.staging(layer)[0][:, :sinks])

    def copy(
        self,
        source: Pair,
        target: Pair,
        slots: list[int],
        stream: torch.cuda.Stream | None,
        events: dict[int, torch.cuda.Event],
        layer: int,
    ) -> None:
        """Copy these frames in contiguous pieces, which a GPU's copy engines move without its multiprocessors."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for pair, batch, (frames, _) in product(range(2), range(self.shape[0]), contiguous_ranges(slots)):
                target[pair][batch, frames].copy_(source[pair][batch, frames], non_blocking=True)
        if stream is not None:
            events[layer] = stream.record_event()

    def wait(self, events: dict[int, torch.cuda.Event], layer: int) -> None:
        """Make the current stream wait until this copy is complete."""
        if self.h2d_stream is not None:
            torch.cuda.current_stream(self.device).wait_event(events[layer])
