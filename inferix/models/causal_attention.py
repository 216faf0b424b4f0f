"""Self-attention of the current block of frames over the window in the key-value cache, on one rank or several."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inferix.distributed.context_parallel import ContextParallel, scatter_qkv, tokens_by_frame
from inferix.models.attention import PartialAttention, merge_partials, partial_attention, saturating_cast
from inferix.models.kv_cache import KVCache
from inferix.models.rope import apply_rope

MEAN_STRIDE = 8
"""Every so many tokens are averaged: the mean only has to be near, as what is subtracted is added back."""


class QKVBuffers(NamedTuple):
    """Where a block writes its projections, so that they need not be copied; H may be split in two dimensions."""

    query: Tensor
    """[B, T, H, d]"""
    key: Tensor
    """[B, T, H, d], rotated."""
    value: Tensor | None
    """[B, T, H, d]; None: the values are passed on as they were computed."""
    key_unrotated: Tensor | None
    """[B, T, H, d]; None: not needed."""


class CausalSelfAttention:
    """Self-attention of one layer over the frames in the cache.

    ``torch.compile`` does not trace into it: which slots are written and read changes with every block, and the compiled
    code around it does not. (A ``torch.library.custom_op`` could not be given the cache's own memory to write to: the
    compiler would make it a copy of the keys and values first.)
    """

    def __init__(
        self, layer: int, kv_cache: KVCache, context_parallel: ContextParallel | None, only_cache: bool = False
    ):
        self.layer, self.kv_cache, self.context_parallel = layer, kv_cache, context_parallel
        self.only_cache = only_cache
        """Store the keys and values, and attend to nothing."""

    def qkv_buffers(self, shape: tuple[int, int, int, int]) -> QKVBuffers:
        """Return the buffers for projections of ``shape`` [B, T, H, d]."""
        kv_cache, context_parallel = self.kv_cache, self.context_parallel
        eight_bit = kv_cache.value_means is not None
        self.kv_slots = kv_cache.kv_slots(self.layer)
        if context_parallel is None:
            query = torch.empty(shape, device=kv_cache.device, dtype=kv_cache.dtype)
            key, value = self.kv_slots
        else:
            self.sent = context_parallel.send_buffers(shape, 3, kv_cache.device, kv_cache.dtype)
            query, key, value = self.sent
        unrotated = None
        if kv_cache.has_sinks():
            unrotated = torch.empty(shape, device=kv_cache.device, dtype=kv_cache.compute_dtype)
        return QKVBuffers(query, key, None if eight_bit else value, unrotated)

    @torch.compiler.disable
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, key_unrotated: Tensor | None) -> Tensor:
        """Return the attention of the current frames to the window [B, T, H*d], H*d in two dimensions on several ranks.

        The arguments are the filled ``qkv_buffers``. With ``only_cache`` the result has no meaning.
        """
        value_mean = None
        if self.kv_cache.value_means is not None:
            value, value_mean = self._subtract_mean(value)
        if self.context_parallel is not None:
            return self._call_parallel(self.context_parallel, key_unrotated, value_mean)
        if key_unrotated is not None:
            self.kv_cache.store_sinks(self.layer, key_unrotated)
        keys, values = self.kv_cache.update(self.layer, key, value, value_mean)
        if not self.only_cache:
            query = merge_partials(self._attend(query, keys, values), self.kv_cache.compute_dtype)
        self.kv_cache.release(self.layer)
        return query

    def _call_parallel(
        self, parallel: ContextParallel, key_unrotated: Tensor | None, value_mean: Tensor | None
    ) -> Tensor:
        kv_cache = self.kv_cache
        frames = len(kv_cache.slots)
        if key_unrotated is not None:
            batch, tokens, heads, head_dim = key_unrotated.shape
            sent = parallel.send_buffers((batch, tokens, heads, head_dim), 1, key_unrotated.device, key_unrotated.dtype)
            sent[0].copy_(key_unrotated.view(sent.shape[1:]))
            received = parallel.all_to_all_heads(sent)[:, 0]
            kv_cache.store_sinks(self.layer, tokens_by_frame(received.unflatten(2, (frames, -1))).flatten(1, 3))
        received = parallel.all_to_all_heads(self.sent)
        query = on_device(scatter_qkv, received)(received.unflatten(3, (frames, -1)), *self.kv_slots)
        keys, values = kv_cache.update(self.layer, *self.kv_slots, value_mean)
        if self.only_cache:
            kv_cache.release(self.layer)
            return query
        if parallel.ring_size == 1:
            partials = self._attend(query, keys, values)
        else:
            partials = self._attend(parallel.gather_queries(query), keys, values)
            batch, _, heads, head_dim = query.shape
            out = merge_partials(partials, kv_cache.compute_dtype).view(batch, -1, heads, head_dim)
            lse = partials.lse.logsumexp(0)
            partials = PartialAttention(*parallel.exchange_partials(out, lse))
        kv_cache.release(self.layer)
        return parallel.all_to_all_tokens(merge_partials(partials, kv_cache.compute_dtype))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> PartialAttention:
        means = self.kv_cache.part_means(self.layer)
        return partial_attention(query, keys, values, self.kv_cache.compute_dtype, self.kv_cache.parts(), means)

    def _subtract_mean(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract from ``value`` [B, T, H, d] its mean over the tokens of all ranks, block by block of frames.

        Returns:
            The values where they are stored or sent from, and the means of this rank's heads [B, G, H, d], float32.
        """
        parallel, slots = self.context_parallel, self.kv_slots[1]
        value = value.unflatten(1, (self.kv_cache.num_groups, -1))
        if parallel is None:
            return slots, on_device(centre, value)(value, slots)
        mean = parallel.mean(on_device(token_mean, value)(value))
        on_device(subtract, value)(value, mean, self.sent[2])
        return self.sent[2], parallel.local_heads(mean)


def rotate_sinks(kv_cache: KVCache, rotary_emb: tuple[Tensor, Tensor]) -> None:
    """Rotate every layer's sink keys, which are kept unrotated, to the positions of ``rotary_emb``."""
    assert kv_cache.sink_keys is not None
    rotate = on_device(rotate_frames, rotary_emb[0])
    for layer in range(kv_cache.num_layers):
        kv_cache.write_sinks(layer, rotate(kv_cache.sink_keys[layer], *rotary_emb))


def rotate_frames(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate keys [B, F, S, H, d] by a table for F*S tokens."""
    return apply_rope(keys.flatten(1, 2), (cos, sin)).view_as(keys)


def token_mean(value: Tensor) -> Tensor:
    """Return the mean [B, G, H, d] over every ``MEAN_STRIDE``-th token of each group in ``value`` [B, G, T/G, H, d], in float32."""
    return value[:, :, ::MEAN_STRIDE].float().mean(2)


def subtract(value: Tensor, mean: Tensor, out: Tensor) -> None:
    """Write ``value`` [B, G, T/G, H, d] minus ``mean`` [B, G, H, d] to ``out`` [B, T, H, d], whose H may be split in two."""
    centred = value.float() - mean[:, :, None]
    out.copy_(saturating_cast(centred.flatten(1, 2), out.dtype).view(out.shape))


def centre(value: Tensor, out: Tensor) -> Tensor:
    """Write ``value`` [B, G, T/G, H, d] minus its ``token_mean`` to ``out`` [B, T, H, d], and return the means."""
    mean = token_mean(value)
    subtract(value, mean, out)
    return mean


def on_device(function: Callable, tensor: Tensor) -> Callable:
    """Return ``function`` for tensors on the device of ``tensor``: compiled for a GPU."""
    if not tensor.is_cuda:
        return function
    from inferix.runtime.compile_cache import compiled  # takes seconds to import

    return compiled(function)
