"""Sequence parallelism: ranks that share one clip, each with some of its tokens.

Every frame's tokens are split over all ranks. Self-attention needs more than a rank's own tokens, and gets it two ways:

- Ulysses (arXiv 2309.14509): the ranks of a group exchange tokens for heads, so that each has all the group's tokens of
  some heads.
- Ring (arXiv 2310.01889), in the form that passes queries (arXiv 2411.01783): keys and values stay where they are, every
  rank's queries visit them, and the partial results travel back and are merged. A block's queries are a seventh of the
  keys that they see, and less.

So the cache is sharded both ways: a rank keeps its heads of its ring part's tokens. Rank r * ulysses_size + u is number r
of its ring and number u of its Ulysses group.

Rank 0 leads: it has the text encoder, the VAE and whoever watches, and tells the others what to denoise.
"""

import atexit
from contextlib import suppress
from datetime import timedelta
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from inferix.config import ParallelConfig
from inferix.errors import InputError

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name for the same

PATIENCE = timedelta(days=365)
"""How long a rank waits for the next clip. Who leads may wait for a person; that it died is noticed at once all the same."""

GRAPHS: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
"""CUDA graphs in which ranks communicate. NCCL waits until they are gone before it ends."""


def check_sizes(config: ParallelConfig, num_heads: int, tokens_per_frame: int) -> None:
    """Raises InputError, with the sizes that would work, where heads or tokens cannot be split evenly."""
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


class SequenceParallel:
    """This process's part in a ``torchrun`` job.

    Everything but ``leads`` is collective: all ranks call the same in the same order.
    """

    def __init__(self, config: ParallelConfig, device: torch.device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(leave_the_job)
        self.rank, self.world_size = config.rank, config.world_size
        self.ulysses_size, self.ring_size = config.ulysses_size, config.ring_size
        ranks = torch.arange(config.world_size).view(config.ring_size, config.ulysses_size)
        self.ulysses = dist.new_subgroups_by_enumeration(ranks.tolist())[0]
        self.ring = dist.new_subgroups_by_enumeration(ranks.T.tolist())[0]
        self.group = dist.group.WORLD
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.leads = config.rank == 0
        self.closed = False
        self.busy = False
        """In the middle of a block, where the others do not listen to ``tell``."""
        if self.leads:
            atexit.register(self.close)

    # --- between the blocks ---

    def tell(self, message: object = None) -> object:
        """What the leading rank says here, on every rank; None is its last word, after which nobody listens."""
        if self.closed:
            return None
        messages = [message]
        dist.broadcast_object_list(messages, src=0, group=self.control)
        self.closed = messages[0] is None
        return messages[0]

    def close(self) -> None:
        """Let the other ranks end; those of a job that is broken already are ended by ``torchrun``."""
        if not self.busy:
            with suppress(RuntimeError):  # they have ended themselves
                self.tell(None)

    def any(self, mine: bool) -> bool:
        """Whether it is so for any rank."""
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def share(self, tensor: Tensor) -> Tensor:
        """Fill ``tensor`` with what the leading rank has in it."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    # --- inside the transformer: static shapes, nothing that waits for the GPU, so that CUDA graphs can hold it ---

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's tokens [B, F, s, D] of all frames' [B, F, S, D]."""
        return tokens.chunk(self.world_size, dim=2)[self.rank]

    def whole(self, tokens: Tensor) -> Tensor:
        """All frames' tokens [B, F, S, D], put together from every rank's ``own`` [B, F, s, D]."""
        gathered = tokens.new_empty(self.world_size, *tokens.shape)
        all_gather(gathered.flatten(0, 1), tokens.contiguous())
        return gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def tokens_for_heads(self, sent: Tensor) -> Tensor:
        """Own tokens by who gets their heads, [U, ..., H/U, d], to this rank's heads of the Ulysses group's tokens, by owner."""
        return sent if self.ulysses_size == 1 else self._exchange(sent, self.ulysses)

    def heads_for_tokens(self, attended: Tensor) -> Tensor:
        """The way back, for attention's result [B, U*T, H/U*d] by owner: [B, T, U, H/U*d], all heads of own tokens."""
        sent = attended.unflatten(1, (self.ulysses_size, -1)).transpose(0, 1).contiguous()
        return self.tokens_for_heads(sent).permute(1, 2, 0, 3)

    def visiting(self, q: Tensor) -> Tensor:
        """The queries [B, R*T, H, d] of all ring ranks for this one's keys, from each one's [B, T, H, d]."""
        gathered = q.new_empty(self.ring_size, *q.shape)
        all_gather(_as_bytes(gathered.flatten(0, 1)), _as_bytes(q.contiguous()), group=self.ring)
        return gathered.transpose(0, 1).flatten(1, 2)

    def returned(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Results [B, R*T, H, d] for visiting queries, and log-sum-exps [B, H, R*T], back to whose queries they were.

        Returns:
            What every ring rank's keys gave for this rank's queries: [R, B, T, H, d] and float32 [R, B, H, T].
        """
        lse = lse.float().transpose(1, 2)[..., None].contiguous().view(out.dtype)  # travels as one or two more columns
        sent = torch.cat([out, lse], dim=-1).unflatten(1, (self.ring_size, -1)).transpose(0, 1).contiguous()
        out, lse = self._exchange(sent, self.ring).split([out.shape[-1], lse.shape[-1]], dim=-1)
        return out, lse.contiguous().view(torch.float32).squeeze(-1).transpose(2, 3)

    @staticmethod
    def _exchange(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Send ``sent[i]`` to rank i of ``group``; returns what each one sent here."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(_as_bytes(received), _as_bytes(sent), group=group)
        return received


def leave_the_job() -> None:
    """End the threads of the process groups before the interpreter takes apart what they use."""
    for graph in GRAPHS:
        graph.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def _as_bytes(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes, which every backend can send."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
