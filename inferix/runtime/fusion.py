"""Layers that can be computed together: several products of one input, an activation and the quantization after it."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn


class FusableLinear(Protocol):
    """What a linear layer implements so that its neighbours can be fused with it. DAX's layers do.

    A layer that does not is computed on its own, with the same result.
    """

    def forward_gelu(self, x: Tensor) -> Tensor:
        """Return ``self(gelu(x))``, GELU in its tanh form, for x [..., in]."""
        ...

    @classmethod
    def fuse(cls, linears: Sequence[Self]) -> Self:
        """Return one layer [out1 + out2 + ..., in] for several that read the same input; they become views of it."""
        ...


def is_fusable(kind: type) -> bool:
    """Return whether the layer type ``kind`` implements ``FusableLinear``."""
    return all(callable(getattr(kind, name, None)) for name in ("forward_gelu", "fuse"))


def has_fused_gelu(linear: nn.Module) -> bool:
    """Return whether ``linear.forward_gelu`` exists. ``torch.compile`` evaluates it while tracing."""
    return is_fusable(type(linear))


def data_ptrs(modules: Iterable[nn.Module]) -> list[int]:
    """Return the address of every parameter and buffer of ``modules``."""
    return [tensor.data_ptr() for module in modules for tensor in chain(module.parameters(), module.buffers())]


def can_fuse(linears: Sequence[nn.Module]) -> bool:
    """Return whether the layers have one type and one quantization, and no hooks."""
    kinds = {(type(linear), getattr(linear, "qconfig", None)) for linear in linears}
    return len(kinds) == 1 and not any(linear._forward_pre_hooks or linear._forward_hooks for linear in linears)


def fuse_linears(linears: Sequence[Any]) -> nn.Module:
    """Return one layer [out1 + out2 + ..., in] for several that read the same input; they become views of it."""
    kind = type(linears[0])
    if is_fusable(kind):
        return kind.fuse(linears)
    ends = list(accumulate(linear.out_features for linear in linears))
    weight, bias = (torch.cat([getattr(linear, name).data for linear in linears]) for name in ("weight", "bias"))
    for linear, end in zip(linears, ends):
        rows = slice(end - linear.out_features, end)
        linear.weight.data, linear.bias.data = weight[rows], bias[rows]
    fused = nn.Linear(linears[0].in_features, ends[-1], device="meta").requires_grad_(False)
    fused.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return fused.requires_grad_(False)
