"""Replacing modules of a model: all are checked first, so that an error leaves the model as it was."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from dax.quant.devices import check_device
from dax.quant.nn import dynamic, quantized
from dax.quant.nn.linear import QuantizedLinear
from dax.quant.quantization.observer import observe_input
from dax.quant.quantization.qconfig import QConfig

Plan: TypeAlias = dict[str, tuple[Any, QConfig]]
"""Module name → the type to put in its place, a Module with `from_float(module, qconfig)`, and how to quantize it."""

CALL_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
STATE_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def quantize_modules(model: nn.Module, plan: Plan, device: torch.device | str | None = None) -> nn.Module:
    """Put `kind.from_float(module, qconfig)` in the place of each module of `plan`, once for one with several names.

    With a `device` each module is moved there first, and the rest of the model at the end.

    Returns the model, or what replaces it where it is itself in `plan`. Raises ValueError, naming the layer, or
    RuntimeError, before anything is replaced; only running out of memory can end it half-way, because each float weight
    is given back as soon as its layer is replaced.
    """
    if not plan:
        warnings.warn(f"no layer of {type(model).__name__} was quantized", stacklevel=3)
    plan = {name: entry for name, entry in plan.items() if not any(is_below(name, other) for other in plan)}
    layer_keys, weight_keys, built = {}, {}, {}
    for name, (kind, qconfig) in plan.items():
        module = model.get_submodule(name)
        layer_keys[name] = id(module), kind, qconfig  # an id is a key as long as all modules are there: until below
        weight_keys[name] = id(getattr(module, "weight", module)), kind, qconfig
        with named_errors(name or type(model).__name__):
            check_hooks(module)
            if kind in (dynamic.Linear, quantized.Linear):
                kind.validate(module, qconfig)
                if device is not None:
                    check_device(qconfig.dtype, torch.device(device))
            elif layer_keys[name] not in built:  # what a type that is not ours refuses shows by building it
                built[layer_keys[name]] = kind.from_float(module, qconfig)
    weights: dict[tuple, QuantizedLinear] = {}
    for name, (kind, qconfig) in plan.items():
        if layer_keys[name] not in built:
            layer = kind.from_float(model.get_submodule(name).to(device), qconfig)
            layer.share_weight(weights.setdefault(weight_keys[name], layer))
            built[layer_keys[name]] = layer
        model = replace_module(model, name, built[layer_keys[name]])
    return model.to(device)


def is_below(name: str, other: str) -> bool:
    """Return whether the module `name` is inside of the module `other`."""
    return name != other and (not other or name.startswith(f"{other}."))


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Put the layer's name before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_hooks(module: nn.Module) -> None:
    """Raises ValueError if `module` has a hook or a replaced `forward` that its 8-bit layer cannot take over."""
    if "forward" in vars(module):
        raise ValueError("its forward was replaced (accelerate and diffusers do so): quantize before that, or undo it")
    if hooked := [attribute for attribute in STATE_HOOKS if getattr(module, attribute, None)]:
        raise ValueError(f"its {hooked[0].strip('_')} are for a float weight: remove them first")


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the module `name`, with its hooks; return the model, `new` where `name` is the root."""
    old = model.get_submodule(name)
    if old is not new:
        move_hooks(old, new)
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    disable_fast_path(model, name)
    return model


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move forward and backward hooks, all but calibration's, so that their handles still remove them."""
    for number in [number for number, hook in old._forward_pre_hooks.items() if hook is observe_input]:
        del old._forward_pre_hooks[number]
        old._forward_pre_hooks_with_kwargs.pop(number, None)
    for attribute in CALL_HOOKS:
        if hooks := getattr(old, attribute, None):
            setattr(new, attribute, hooks)  # the very dict, which a handle refers to


def disable_fast_path(model: nn.Module, name: str) -> None:
    """Let the `nn.TransformerEncoder`s and their layers above `name` call their Linears, not multiply by their weights."""
    parts = name.split(".")
    for depth in range(len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
