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


def hash_triton() -> None:
    """Compute the hash of Triton's own files, which the first kernel of a process needs: about 0.5 s, without Python's lock."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # private: then the first kernel computes it
        return
    triton_key()
