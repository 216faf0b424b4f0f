"""From a float model to one with 8-bit Linear layers."""

import copy
import warnings
from collections.abc import Callable, Collection

from torch import nn

from dax.quant.nn import dynamic, quantized
from dax.quant.quantization.observer import AbsMaxObserver, observe_input
from dax.quant.quantization.qconfig import QConfig


def quantize_dynamic(
    model: nn.Module,
    qconfig_dict: dict[str, QConfig | None],
    mapping: dict[type, type] | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Replaces the Linear layers of `model` by 8-bit ones that scale each activation by what it holds.

    Args:
        qconfig_dict: module name → how to quantize what is at and below it; None keeps it in float. "" is the default
            (None, if not given). Any other key is a module's dotted name (`blocks.0`), or the last part of one
            (`proj_out`, `attn1.to_q`), which stands for every module that ends so. The longest match decides: a full
            name before a last part, and among either the module nearest to the layer.
        mapping: float type → quantized type with a classmethod `from_float(module, qconfig)`; exact types, not
            subclasses. `{nn.Linear: dax.quant.nn.dynamic.Linear}` unless given.
        inplace: False leaves `model` alone and works on a copy.

    Returns: the model; another object only with `inplace=False`, or where it is itself one of the mapped types.

    Warns if a key matches no module, or if nothing was quantized. Raises ValueError for a static QConfig, or, naming
    the layer, for a weight that is not finite; RuntimeError for fp8 on a GPU that cannot multiply it.
    """
    mapping = mapping or {nn.Linear: dynamic.Linear}
    qconfigs = match(model, qconfig_dict, mapping)
    if any(qconfig.static for qconfig in qconfigs.values()):
        raise ValueError("a static QConfig needs calibration: prepare, run the model, convert")
    model = model if inplace else copy.deepcopy(model)
    return replace_modules(model, qconfigs, lambda module, qconfig: mapping[type(module)].from_float(module, qconfig))


def prepare(model: nn.Module, qconfig_dict: dict[str, QConfig | None], inplace: bool = True) -> nn.Module:
    """Marks the Linear layers to quantize (`qconfig_dict` as in `quantize_dynamic`; it may mix static and dynamic)
    and observes the inputs of the static ones. Run the model on calibration data next, then `convert` it."""
    qconfigs = match(model, qconfig_dict, {nn.Linear})
    model = model if inplace else copy.deepcopy(model)
    for name, linear in model.named_modules():
        if (qconfig := qconfigs.get(name)) is None:
            continue
        linear.qconfig = qconfig
        if qconfig.static:
            linear.activation_observer = AbsMaxObserver(linear.weight.device)
            linear.register_forward_pre_hook(observe_input)
    return model


def convert(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replaces what `prepare` marked by 8-bit layers; returns, warns and raises as `quantize_dynamic` does, and raises
    ValueError for a layer whose inputs calibration never showed."""
    model = model if inplace else copy.deepcopy(model)
    linears = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear
    }
    return replace_modules(
        model,
        {name: linear.qconfig for name, linear in linears.items() if hasattr(linear, "qconfig")},
        lambda linear, qconfig: (quantized if qconfig.static else dynamic).Linear.from_float(linear, qconfig),
    )


def match(model: nn.Module, qconfig_dict: dict[str, QConfig | None], types: Collection[type]) -> dict[str, QConfig]:
    """Names of the modules of `types` to quantize, each with its QConfig; a shared module has several names."""
    for key, qconfig in qconfig_dict.items():
        if not isinstance(qconfig, QConfig | None):
            raise TypeError(f"qconfig_dict[{key!r}] is {qconfig!r}: give a QConfig, or None to keep float")
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in qconfig_dict:
        if not any(name == key or name.endswith("." + key) for name in modules):
            warnings.warn(f"qconfig_dict: {key!r} matches no module of {type(model).__name__}", stacklevel=3)
    chosen = {name: lookup(name, qconfig_dict) for name, module in modules.items() if type(module) in types}
    return {name: qconfig for name, qconfig in chosen.items() if qconfig is not None}


def lookup(name: str, qconfig_dict: dict[str, QConfig | None]) -> QConfig | None:
    """What `qconfig_dict` says of the module `name`, by the rules of `quantize_dynamic`."""
    parts = name.split(".")
    ancestors = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]  # itself first
    for ancestor in ancestors:
        if ancestor in qconfig_dict:
            return qconfig_dict[ancestor]
    for ancestor in ancestors:
        matching = [key for key in qconfig_dict if key and ancestor.endswith("." + key)]
        if matching:
            return qconfig_dict[max(matching, key=len)]
    return qconfig_dict.get("")


def replace_modules(
    model: nn.Module, qconfigs: dict[str, QConfig], build: Callable[[nn.Module, QConfig], nn.Module]
) -> nn.Module:
    """Puts `build(module, qconfig)` in the place of each named module, once for a module that has several names."""
    if not qconfigs:
        warnings.warn(f"no layer of {type(model).__name__} was quantized", stacklevel=3)
    built = {}
    for name, qconfig in qconfigs.items():
        module = model.get_submodule(name)
        key = id(module), qconfig  # not the module itself: that would keep every float weight until the end
        if key not in built:
            try:
                built[key] = build(module, qconfig)
            except ValueError as error:
                raise ValueError(f"{name or type(model).__name__}: {error}") from error
        if not name:
            return built[key]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, built[key])
    return model
