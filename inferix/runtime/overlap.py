"""Help for what runs in threads beside each other while a pipeline starts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_switch_interval() -> Iterator[None]:
    """Let threads that mostly wait for the GPU have the interpreter at once; beside one that computes each call waits 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
