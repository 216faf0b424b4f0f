"""Which key of a `qconfig_dict` decides about a module.

`""` is the default. Any other key is a module's dotted name, or the last part of one, and covers what is below it. The
longest match wins, counted in parts of the name (`ffn.net.2` has three); of equally long ones a full name wins over a
last part, then the one nearest to the module.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Value = TypeVar("Value")


def matching_modules(model: nn.Module, key: str) -> list[str]:
    """Return the names of the modules of `model` that `key` names; what is below them it covers too."""
    return [name for name, _ in model.named_modules(remove_duplicate=False) if names(key, name)]


def deciding_key(name: str, keys: Mapping[str, object]) -> str | None:
    """Return which of `keys` decides about the module `name`; None if none covers it."""
    parts = name.split(".")
    above = [".".join(parts[:n]) for n in range(len(parts) + 1)]  # from the root to the module itself
    rank = {}
    for key in keys:
        covered = [depth for depth, ancestor in enumerate(above) if names(key, ancestor)]
        if covered:
            length = len(key.split(".")) if key else 0
            rank[key] = length, key in above, covered[-1]
    return max(rank, key=rank.__getitem__, default=None)


def lookup(name: str, qconfig_dict: Mapping[str, Value | None]) -> Value | None:
    """Return the QConfig of the module `name` by `qconfig_dict`; None: keep it in float."""
    key = deciding_key(name, qconfig_dict)
    return None if key is None else qconfig_dict[key]


def names(key: str, name: str) -> bool:
    """Return whether `key` is the dotted name `name`, or the last part of it."""
    return name == key or bool(key) and name.endswith("." + key)
