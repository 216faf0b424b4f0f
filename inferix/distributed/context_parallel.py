"""Context parallelism: ranks that share one clip, each with some tokens of every frame.

Self-attention needs more than a rank's own tokens and gets them in two ways:

- Ulysses (arXiv 2309.14509): the ranks of a group exchange tokens for heads, so that each has all tokens of the group for
  some of the heads.
- Ring (arXiv 2310.01889), in the form that passes queries (arXiv 2411.01783): keys and values stay where they are, the
  queries of all ranks are gathered, and the partial results are sent back and merged. The queries of a block are at most
  a seventh of the keys.

The cache is sharded both ways: a rank keeps its heads of its ring part's tokens. Rank r * ulysses_size + u is number r of
its ring and number u of its Ulysses group.

Rank 0 of the group is the main process: it has the text encoder and the VAE's encoder and tells the others what to denoise and
decode.
"""

import atexit
import os
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from inferix.config import ParallelConfig
from inferix.errors import InputError

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name for the same function

CONTROL_TIMEOUT = timedelta(days=365)
"""How long a rank waits for the next message. The main process may wait for a person; its death is noticed at once."""

GRAPHS: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
"""CUDA graphs that contain communication. NCCL does not shut down before they are gone."""


def check_sizes(config: ParallelConfig, num_heads: int, tokens_per_frame: int) -> None:
    """Raise InputError, naming the sizes that work, if heads or tokens cannot be split evenly."""
    world = config.world_size
    if tokens_per_frame % world:
        sizes = ", ".join(str(n) for n in range(1, 2 * world) if tokens_per_frame % n == 0)
        raise InputError(
            f"the {tokens_per_frame} tokens of a frame cannot be split over {world} processes; these numbers work "
            f"(NPROC=...): {sizes}"
        )
    if num_heads % config.ulysses_size:
        works = [(n, world // n) for n in range(1, world + 1) if world % n == 0 and num_heads % n == 0]
        sizes = ", ".join(f"{ulysses} x {ring}" for ulysses, ring in works)
        raise InputError(
            f"ulysses_size {config.ulysses_size} does not divide the {num_heads} attention heads; with {world} "
            f"processes these sizes work (ulysses_size x ring_size): {sizes}"
        )


def init_process_group(backend: str) -> None:
    """Initialize the default process group, by the variables that torchrun sets.

    torchrun's store outlives a restart (``--max-restarts``), and with it the addresses of processes that are no more: every
    attempt has keys of its own.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


class ProcessGroups(NamedTuple):
    """The process groups that a rank is in."""

    ulysses: Any
    ring: Any
    clip: Any
    """All ranks that share a clip."""
    control: dist.ProcessGroup
    """The same ranks, for messages from the main process."""


@cache
def process_groups(ulysses_size: int, ring_size: int, data_parallel_size: int) -> ProcessGroups:
    """Return this rank's process groups, the same ones at every call: a group takes memory on the GPU."""
    ranks = torch.arange(data_parallel_size * ring_size * ulysses_size).view(
        data_parallel_size, ring_size, ulysses_size
    )
    ulysses_group = _subgroup(ranks.flatten(0, 1).tolist())
    ring_group = _subgroup(ranks.transpose(1, 2).flatten(0, 1).tolist())
    clip_ranks = ranks.flatten(1).tolist()
    clip_group = _subgroup(clip_ranks)
    control_group, _ = dist.new_subgroups_by_enumeration(clip_ranks, timeout=CONTROL_TIMEOUT, backend="gloo")
    return ProcessGroups(ulysses_group, ring_group, clip_group, control_group)


def _subgroup(partition: list[list[int]]) -> Any:
    """Return the group of this rank in a partition of all ranks, the default group where that is the only one."""
    return dist.group.WORLD if len(partition) == 1 else dist.new_subgroups_by_enumeration(partition)[0]


class ContextParallel:
    """This rank's part in a group that shares every clip: all of a ``torchrun`` job, or with data parallelism one of several.

    All methods are collective: every rank calls the same ones in the same order.
    """

    def __init__(self, config: ParallelConfig, device: torch.device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(shutdown)
        self.rank, self.world_size = config.rank, config.world_size
        self.ulysses_size, self.ring_size = config.ulysses_size, config.ring_size
        self.ulysses_rank = config.rank % config.ulysses_size
        groups = process_groups(config.ulysses_size, config.ring_size, config.data_parallel_size)
        self.ulysses_group, self.ring_group, self.group, self.control_group = groups
        self.is_main_process = config.rank == 0
        self.closed = False
        self.in_block = False
        """True while the other ranks are computing a block and do not receive messages."""
        if self.is_main_process:
            atexit.register(self.close)

    # --- messages between blocks ---

    def broadcast_object(self, message: object = None) -> Any:
        """Return on every rank what the main process passes; None ends the job, after which nobody receives."""
        if self.closed:
            return None
        messages = [message]
        dist.broadcast_object_list(messages, group=self.control_group, group_src=0)
        self.closed = messages[0] is None
        return messages[0]

    def close(self) -> None:
        """Let the other ranks end. If a rank has died in the middle of a block, ``torchrun`` ends the others."""
        if not self.in_block:
            with suppress(RuntimeError):  # the other ranks are gone
                self.broadcast_object(None)

    def any_rank(self, value: bool) -> bool:
        """Return whether ``value`` is true on any rank."""
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control_group)
        return bool(flag)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fill ``tensor`` with the main process's values and return it."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    # --- inside the networks: static shapes and no synchronization with the host, as CUDA graphs require ---

    def shard(self, tokens: Tensor) -> Tensor:
        """Return this rank's tokens [B, F, s, D] of all tokens [B, F, S, D]."""
        return tokens.chunk(self.world_size, dim=2)[self.rank]

    def ring_shard(self, tokens: Tensor) -> Tensor:
        """Return the tokens [B, F, s, D] that this rank keeps in its cache, of all tokens [B, F, S, D]."""
        return tokens.chunk(self.ring_size, dim=2)[self.rank // self.ulysses_size]

    def all_gather(self, tokens: Tensor) -> Tensor:
        """Return all tokens [B, F, S, D] from every rank's ``shard`` [B, F, s, D]."""
        return self.all_gather_stacked(tokens).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def all_gather_stacked(self, tensor: Tensor) -> Tensor:
        """Return every rank's ``tensor``, of one shape, as [N, ...]."""
        gathered = tensor.new_empty(self.world_size, *tensor.shape)
        _all_gather(gathered.flatten(0, 1), tensor.contiguous(), group=self.group)
        return gathered

    def gather_stacked(self, tensor: Tensor) -> Tensor | None:
        """Return every rank's ``tensor``, of one shape, as [N, ...] in the main process; None on the other ranks."""
        gathered = tensor.new_empty(self.world_size, *tensor.shape) if self.is_main_process else None
        dist.gather(tensor.contiguous(), None if gathered is None else list(gathered), group=self.group, group_dst=0)
        return gathered

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor.div_(self.world_size)

    def local_heads(self, tensor: Tensor) -> Tensor:
        """Return this rank's heads of ``tensor`` [..., H, d]."""
        return tensor.chunk(self.ulysses_size, dim=-2)[self.ulysses_rank]

    def send_buffers(
        self, shape: tuple[int, int, int, int], count: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return empty buffers [count, B, T, U, H/U, d] for tensors of ``shape`` [B, T, H, d], laid out by receiver."""
        batch, tokens, heads, head_dim = shape
        ranks = self.ulysses_size
        sent = torch.empty(ranks, count, batch, tokens, heads // ranks, head_dim, device=device, dtype=dtype)
        return sent.permute(1, 2, 3, 0, 4, 5)

    def all_to_all_heads(self, buffers: Tensor) -> Tensor:
        """Exchange this rank's tokens of all heads for all the group's tokens of this rank's heads.

        Args:
            buffers: what ``send_buffers`` gave, filled [N, B, T, U, H/U, d].

        Returns:
            [U, N, B, T, H/U, d], by the rank that the tokens belong to.
        """
        sent = buffers.permute(3, 0, 1, 2, 4, 5)
        return sent if self.ulysses_size == 1 else _all_to_all(sent, self.ulysses_group)

    def all_to_all_tokens(self, attn_output: Tensor) -> Tensor:
        """Exchange back: attention's result [B, U*T, H/U*d], by owner, to all heads of this rank's tokens [B, T, U, H/U*d]."""
        sent = attn_output.unflatten(1, (self.ulysses_size, -1)).transpose(0, 1).contiguous()
        received = sent if self.ulysses_size == 1 else _all_to_all(sent, self.ulysses_group)
        return received.permute(1, 2, 0, 3)

    def gather_queries(self, query: Tensor) -> Tensor:
        """Return the queries [B, R*T, H, d] of all ring ranks, from each one's [B, T, H, d]."""
        gathered = query.new_empty(self.ring_size, *query.shape)
        _all_gather(_as_bytes(gathered.flatten(0, 1)), _as_bytes(query.contiguous()), group=self.ring_group)
        return gathered.transpose(0, 1).flatten(1, 2)

    def exchange_partials(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Send results for gathered queries back to the ranks that the queries came from.

        Args:
            out: [B, R*T, H, d].
            lse: log-sum-exps [B, H, R*T].

        Returns:
            For this rank's queries, the results over every ring rank's keys [R, B, T, H, d] and their log-sum-exps
            [R, B, H, T], float32.
        """
        lse = lse.float().transpose(1, 2)[..., None].contiguous().view(out.dtype)  # travels as one or two more columns
        sent = torch.cat([out, lse], dim=-1).unflatten(1, (self.ring_size, -1)).transpose(0, 1).contiguous()
        out, lse = _all_to_all(sent, self.ring_group).split([out.shape[-1], lse.shape[-1]], dim=-1)
        return out, lse.contiguous().view(torch.float32).squeeze(-1).transpose(2, 3)


def scatter_qkv(received: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Sort what ``all_to_all_heads`` returned for queries, keys and values, as [U, 3, B, F, t, H, d].

    Write ``keys`` and ``values`` [B, U*F*t, H, d], the tokens of a frame together; return the queries, by owner, alike.
    """
    query, key, value = received.unbind(1)
    sources = [query.transpose(0, 1), tokens_by_frame(key), tokens_by_frame(value)]
    queries = torch.empty_like(keys, memory_format=torch.contiguous_format)
    targets = [target.view(source.shape) for target, source in zip((queries, keys, values), sources)]
    torch._foreach_copy_(targets, sources)  # one kernel when compiled
    return queries


def tokens_by_frame(received: Tensor) -> Tensor:
    """Return a view [B, F, U, t, H, d] of received tokens [U, B, F, t, H, d]."""
    return received.permute(1, 2, 0, 3, 4, 5)


def shutdown() -> None:
    """End the process groups' threads before the interpreter is torn down."""
    for graph in GRAPHS:
        graph.reset()
    process_groups.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send ``sent[i]`` to rank i of ``group``; return what each rank sent here."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(_as_bytes(received), _as_bytes(sent), group=group)
    return received


def _as_bytes(tensor: Tensor) -> Tensor:
    """View 8-bit floats as bytes, which every backend can send."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
