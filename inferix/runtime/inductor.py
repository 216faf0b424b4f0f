"""Settings of ``torch.compile`` for a GPU."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

try:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V
except ImportError as error:  # private modules: they may change with any release
    InductorChoices, UNAVAILABLE = object, str(error)
else:
    UNAVAILABLE = ""

LONGEST_ROW = 16384
OPTIONS: dict[str, Any] = {"comprehensive_padding": False}
"""With padding the maxima of a frame's 1560 rows would be 1568 apart: the kernel that uses them would not be fused with the
one that computes them."""


class PersistentReductions(InductorChoices):
    """Let one thread block hold a row of up to ``LONGEST_ROW`` values in its registers.

    From 1024 values on, Inductor reads a row once for its mean or maximum and again to use it. A row of this network's
    hidden state, 1536 values, and of its feed-forward, 8960, fits: a norm or an activation and the quantization after it
    become one kernel that reads its input once.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if features.get_reduction_hint() != ReductionHint.OUTER and not cooperative_reduction:
            return V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def persistent_reductions(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """Compile with Inductor, ``PersistentReductions`` and ``OPTIONS``: a backend of ``torch.compile``."""
    with V.set_choices_handler(PersistentReductions()):
        return compile_fx(graph, inputs, config_patches=OPTIONS)


def backend() -> str | Callable:
    """Return the backend to compile with; Inductor with its own settings, and a warning, if its private parts changed."""
    if not UNAVAILABLE:
        return persistent_reductions
    warnings.warn(f"this PyTorch's Inductor cannot be configured ({UNAVAILABLE}): compiling without it", stacklevel=2)
    return "inductor"


def is_disabled() -> bool:
    """Return whether PyTorch's compiler or its caches are off, by ``set_stance``, a config or a variable, or unknown to us."""
    if UNAVAILABLE or torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return True
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)  # private, without a public getter
    return torch._inductor.config.force_disable_caches or getattr(stance, "stance", "default") != "default"


def aot_compile(function: Callable, args: tuple) -> Any:
    """Return ``function`` compiled for arguments like ``args`` ahead of its first call, to be kept in a file.

    By Inductor under its own name: of another backend PyTorch 2.11 keeps nothing.
    """
    torch._dynamo.config.enable_aot_compile = True  # 2.11 asks for it
    with V.set_choices_handler(PersistentReductions()):
        compiled: Any = torch.compile(function, fullgraph=True, options=OPTIONS)
        return compiled.aot_compile((args, {}))
