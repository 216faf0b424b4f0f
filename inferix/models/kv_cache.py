"""What the causal transformer remembers of the frames before."""

from collections.abc import Callable
from functools import cache, partial
from itertools import groupby, product

import torch
from torch import Tensor

from inferix.models.attention import attention_with_lse, cache_attention, merge_parts
from inferix.models.transformer import TransformerConfig
from inferix.parallel import SequenceParallel


class KVCache:
    """Keys and values of every layer, preallocated for a number of latent frames.

    A block of frames is placed with ``place`` and then run several times (the denoising steps, and once more when it is
    clean): every run overwrites the block's keys and values, and attends to them and to all before.

    Beyond that number the cache rolls: a new frame takes the slot of the oldest one that is not among the first
    ``sink_frames``. Attention does not depend on the order of keys, and their positions are rotated into them, so that
    nothing has to be moved.

    With ``parallel`` it holds this rank's share: some of the heads, some of every frame's tokens.

    Args:
        config: the transformer's sizes.
        shape: batch, latent frames, tokens a frame.
        device: where it is kept.
        dtype: what keys and values are kept in, and queries are compared to them in.
        compute_dtype: what attention's results are in.
        sink_frames: first frames that are never rolled over.
        parallel: the ranks that share it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        sink_frames: int = 0,
        parallel: SequenceParallel | None = None,
    ):
        batch, self.num_frames, tokens = self.shape = shape
        self.sink_frames = sink_frames
        self.device = device
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.parallel = parallel
        self.heads = (config.num_heads, config.head_dim)
        stored = (batch, self.num_frames, tokens, *self.heads)
        if parallel is not None:
            heads = config.num_heads // parallel.ulysses_size
            stored = (batch, self.num_frames, tokens // parallel.ring_size, heads, config.head_dim)
        self.loose: list[Tensor] = []
        self.text: list[tuple[Tensor, Tensor]] = []
        """Every layer's cross-attention keys and values [B, L, H, d]."""
        self.allocate(config.num_layers, stored)

    def allocate(self, num_layers: int, stored: tuple[int, ...]) -> None:
        """Make room for every layer's keys and values, each of the shape ``stored`` [B, F, S, H, d]."""
        self.keys, self.values = (
            torch.zeros(num_layers, *stored, device=self.device, dtype=self.dtype) for _ in range(2)
        )

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values [B, F, S, H, d] on the device; written to, and read when ``ready`` was called."""
        return self.keys[layer], self.values[layer]

    def ready(self, layer: int) -> None:
        """To be called before the layer's keys and values of earlier frames are read."""

    def done(self, layer: int) -> None:
        """To be called after they were read."""

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

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the queries, the keys and the values [B, T, H, d] of the placed frames are to be written.

        With ``parallel``, T counts this rank's own tokens, they lie in the same place for every layer, and H comes in two:
        the Ulysses group's ranks, and the heads of each.
        """
        batch, _, tokens = self.shape
        heads, head_dim = self.heads
        new = partial(torch.empty, device=self.device, dtype=self.dtype)
        if self.parallel is None:
            if layer == 0:  # by each forward: a CUDA graph keeps what was made while it was captured
                self.queries = new(batch, len(self.slots) * tokens, heads, head_dim)
            return self.queries, *self.slots_of(layer)
        if layer == 0:
            own, ranks = len(self.slots) * tokens // self.parallel.world_size, self.parallel.ulysses_size
            self.sent = new(ranks, 3, batch, own, heads // ranks, head_dim)  # by who gets them
        return tuple(self.sent.permute(1, 2, 3, 0, 4, 5))

    def slots_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of the placed frames [B, T, H, d], to be written."""
        first, frames = self.slots[0], len(self.slots)
        stored = self.layer(layer)
        if self.slots == list(range(first, first + frames)):
            return tuple(tensor[:, first : first + frames].flatten(1, 2) for tensor in stored)
        shape = (self.shape[0], frames, *stored[0].shape[2:])  # a rolling window's end and start: ``seen`` moves them
        self.loose = [torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2)]
        return tuple(loose.flatten(1, 2) for loose in self.loose)

    def seen(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values stored [B, K, H, d], those of the placed frames included."""
        stored = self.layer(layer)
        for tensor, loose in zip(stored, self.loose):
            for i, slot in enumerate(self.slots):
                tensor[:, slot].copy_(loose[:, i])
        self.loose = []
        self.ready(layer)
        return tuple(tensor[:, : self.valid_frames].flatten(1, 2) for tensor in stored)

    def attend(self, layer: int) -> Tensor:
        """Let the queries in ``room`` see all keys and values stored, those of the placed frames included: [B, T, H*d].

        With ``parallel``, of all ranks together, the last dimension comes in two: [B, T, U, H/U*d].
        """
        if self.parallel is not None:
            return self.attend_together(layer)
        attended = cache_attention(self.queries, *self.seen(layer), self.compute_dtype)
        self.done(layer)
        return attended

    def attend_together(self, layer: int) -> Tensor:
        """``attend`` of all ranks, each with the queries of its own tokens."""
        parallel = self.parallel
        received = parallel.tokens_for_heads(self.sent)
        q = (compiled_arrange() if received.is_cuda else arrange)(received, *self.slots_of(layer), len(self.slots))
        keys, values = self.seen(layer)
        if parallel.ring_size == 1:
            attended = cache_attention(q, keys, values, self.compute_dtype)
        else:
            visited = attention_with_lse(parallel.visiting(q), keys, values, self.compute_dtype)
            attended = merge_parts(*parallel.returned(*visited), self.compute_dtype)
        self.done(layer)
        return parallel.heads_for_tokens(attended)


def arrange(received: Tensor, keys: Tensor, values: Tensor, frames: int) -> Tensor:
    """Sort what ranks sent of their tokens, [U, 3, B, T, H, d]: queries, keys and values.

    ``keys`` and ``values`` [B, U*T, H, d] are written, a frame's tokens together, whoever had them; the queries
    [B, U*T, H, d] are returned, by owner.
    """
    q, *fresh = received.unbind(1)
    sources = [q.transpose(0, 1), *(new.unflatten(2, (frames, -1)).permute(1, 2, 0, 3, 4, 5) for new in fresh)]
    queries = torch.empty_like(keys, memory_format=torch.contiguous_format)
    targets = [target.view(source.shape) for target, source in zip((queries, keys, values), sources)]
    torch._foreach_copy_(targets, sources)  # compiled, it is one kernel; three copies would stay three
    return queries


@cache
def compiled_arrange() -> Callable:
    return torch.compile(arrange, dynamic=False)


class OffloadedKVCache(KVCache):
    """A cache whose keys and values are in host memory, pinned; on the device are those of two layers at a time.

    While a layer is worked on, the earlier frames of the next one come in on a stream of their own, and what the layer
    adds goes out on another. Every ``RESIDENT``-th layer stays on the device, the first one among them, so that no
    forward begins by waiting. For Wan 1.3B and 21 frames of 480x832 in bfloat16 that is 201 MB a layer: of 6.04 GB,
    2 resident layers and 2 in transit leave 0.81 GB on the device. At a full window 28 layers x 172 MB come in for each
    forward: 4.8 GB, the PCIe bus's work of about 90 ms.
    """

    RESIDENT = 15

    def allocate(self, num_layers: int, stored: tuple[int, ...]) -> None:
        def pair(device, **options) -> Tensor:
            return torch.zeros(2, *stored, device=device, dtype=self.dtype, **options)

        cuda = self.device.type == "cuda"
        self.last = num_layers - 1
        self.resident = {n: pair(self.device) for n in range(0, num_layers, self.RESIDENT)}
        self.host = {n: pair("cpu", pin_memory=cuda) for n in range(num_layers) if n not in self.resident}
        self.order = list(self.host)
        self.windows = [pair(self.device) for _ in range(2)]
        self.incoming, self.outgoing = (torch.cuda.Stream(self.device) if cuda else None for _ in range(2))
        self.arrived: dict[int, torch.cuda.Event] = {}
        self.left: dict[int, torch.cuda.Event] = {}

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return tuple(self.resident[layer] if layer in self.resident else self.window(layer))

    def window(self, layer: int) -> Tensor:
        """Where on the device the keys and values [2, B, F, S, H, d] of an offloaded layer are while it is worked on."""
        return self.windows[self.order.index(layer) % 2]

    def room(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        if layer == 0:
            for first in self.order[:2]:
                self.fetch(first)
        return super().room(layer)

    def slots_of(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.host and (place := self.order.index(layer)) >= 2:
            self.wait(self.left, self.order[place - 2])  # whose new frames lie where this layer's are to be written
        return super().slots_of(layer)

    def ready(self, layer: int) -> None:
        if layer in self.host:
            self.wait(self.arrived, layer)

    def done(self, layer: int) -> None:
        if layer in self.host:
            self.store(layer)
            if following := self.order[self.order.index(layer) + 2 :]:
                self.fetch(following[0])
        if layer == self.last and self.incoming is not None:
            for stream in (self.incoming, self.outgoing):
                torch.cuda.current_stream(self.device).wait_stream(stream)

    def fetch(self, layer: int) -> None:
        """Bring in the layer's earlier frames, when what has been asked of the device so far is done."""
        earlier = [slot for slot in range(self.valid_frames) if slot not in self.slots]
        self.move(self.host[layer], self.window(layer), earlier, self.incoming, self.arrived, layer)

    def store(self, layer: int) -> None:
        """Bring out the layer's placed frames."""
        self.move(self.window(layer), self.host[layer], self.slots, self.outgoing, self.left, layer)

    def move(self, source: Tensor, target: Tensor, slots: list[int], stream, events: dict, layer: int) -> None:
        """Copy these frames from one memory to the other: contiguous pieces, which a GPU's copy engines move alone."""
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for pair, batch in product(range(2), range(self.shape[0])):
                for run in runs(slots):
                    target[pair, batch, run].copy_(source[pair, batch, run], non_blocking=True)
        if stream is not None:
            events[layer] = stream.record_event()

    def wait(self, events: dict, layer: int) -> None:
        """Let the device go on when this copy is complete."""
        if self.incoming is not None:
            torch.cuda.current_stream(self.device).wait_event(events[layer])


def runs(slots: list[int]) -> list[slice]:
    """The stretches of consecutive numbers in an ascending list."""
    groups = groupby(enumerate(sorted(slots)), key=lambda pair: pair[1] - pair[0])
    stretches = [[slot for _, slot in group] for _, group in groups]
    return [slice(stretch[0], stretch[-1] + 1) for stretch in stretches]
