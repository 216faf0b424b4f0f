"""Data parallelism: groups of ranks that each make videos of their own, and who makes which."""

import uuid

import torch.distributed as dist

from inferix.config import ParallelConfig


class WorkQueue:
    """Hands out numbered units of work, each to one group, through torch.distributed's store.

    A group takes the next unit when it is done with the last, so that none idles while there is work. A claim names the
    process that made it. Where torchrun has restarted a group (``--max-restarts``), the claims of its former process are
    void and the units are handed out again; the store, and with it what others have claimed, outlives the restart.

    One process at a time acts for a group: its main process.

    Args:
        config: how the ranks are divided into groups.
    """

    def __init__(self, config: ParallelConfig):
        if config.data_parallel_size == 1:
            store: dist.Store = dist.HashStore()
        else:
            store, _, _ = next(dist.rendezvous("env://"))
        self.store = dist.PrefixStore("work_queue", store)
        self.group, self.num_groups = config.data_parallel_rank, config.data_parallel_size
        self.name = f"{self.group}:{uuid.uuid4().hex}"
        self.store.set(f"process/{self.group}", self.name)

    def claim(self, unit: int) -> bool:
        """Return whether this group is to do ``unit``."""
        key, holder = f"unit/{unit}", ""
        while True:
            current = self.store.compare_set(key, holder, self.name).decode()
            if current == self.name:
                return True
            group = current.partition(":")[0]
            if self.store.get(f"process/{group}").decode() == current:
                return False
            holder = current  # of a process that is no more: take its place

    def agree(self, name: str, value: int) -> int:
        """Return the value that the first group to call this has passed."""
        return int(self.store.compare_set(f"agreed/{name}", "", str(value)))

    def request_stop(self) -> None:
        """Let no group begin another unit."""
        self.store.set("stop", "1")

    def stop_requested(self) -> bool:
        return self.store.check(["stop"])

    def end(self) -> None:
        """Say that this group has no more to do."""
        self.store.set(f"ended/{self.group}", self.name)

    def all_ended(self) -> bool:
        """Return whether every group has ended."""
        groups = range(self.num_groups)
        if not self.store.check([f"{kind}/{group}" for group in groups for kind in ("process", "ended")]):
            return False
        return all(self.store.get(f"ended/{group}") == self.store.get(f"process/{group}") for group in groups)
