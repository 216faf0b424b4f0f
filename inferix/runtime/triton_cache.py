"""Where Triton keeps compiled kernels, and the hash that it looks them up by."""

import os

import torch

from inferix.background import in_background


def prepare(device: torch.device) -> None:
    """Choose one folder for all kernels of ``device``, and begin to compute the hash of Triton's own files in a thread.

    Inductor sets the folder when it first compiles something in a process. Kernels that ran before that are in Triton's own
    folder, where a process that compiles nothing looks for all of them. The hash takes 0.7 s, in which other threads run.
    """
    try:
        from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
        from triton.runtime.cache import triton_key
    except ImportError:  # private: then each finds its own folder, and the first kernel computes the hash
        return
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
    in_background(triton_key)
