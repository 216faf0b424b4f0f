"""From a float model to one with 8-bit Linear layers."""

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dax.quant.nn import dynamic, quantized
from dax.quant.qscheme import per_token_symmetric
from dax.quant.quantization.matching import lookup, matching_modules
from dax.quant.quantization.observer import AbsMaxObserver, observe_input
from dax.quant.quantization.qconfig import QConfig
from dax.quant.quantization.replace import Plan, quantize_modules


def quantize_dynamic(
    model: nn.Module,
    qconfig_dict: Mapping[str, QConfig | None],
    mapping: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    inplace: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Replace the Linear layers of `model` by 8-bit ones that compute activation scales from each input.

    Forward and backward hooks are carried over. `nn.TransformerEncoder`'s fast path, which multiplies in float without
    calling the layers, is turned off where it would bypass a quantized one. Linears that share a weight share the
    quantized one.

    Args:
        qconfig_dict: module name → how to quantize what is at and below it; None keeps it in float. "" is the default
            (None, if not given). Any other key is a module's dotted name (`blocks.0`), or the last part of one
            (`proj_out`, `attn1.to_q`), which stands for every module that ends so. The longest match wins (see
            `dax.quant.quantization.matching`).
        mapping: float type → quantized type with a classmethod `from_float(module, qconfig)`; exact types, not
            subclasses. `{nn.Linear: dax.quant.nn.dynamic.Linear}` unless given.
        inplace: False leaves `model` alone and works on a copy.
        device: where to quantize. Each layer is moved there before it is replaced, and the rest of the model at the end,
            so that `device` never holds more than one float weight. None: where the model is.

    Returns:
        The model; another object only with `inplace=False`, or where it is itself one of the mapped types.

    Warns:
        A key matches no module; nothing was quantized; a Linear stays in float because its type is a subclass, or
        because a parametrization or a hook computes its weight.

    Raises:
        ValueError: a static QConfig; or, naming the layer, a weight that is empty or not finite, or a layer whose
            hooks or `forward` cannot be carried over. The model is then as it was.
        RuntimeError: fp8 on a GPU that cannot multiply it. The model is then as it was.
    """
    mapping = {nn.Linear: dynamic.Linear} if mapping is None else mapping
    qconfigs = match(model, qconfig_dict, mapping)
    if any(qconfig.static for qconfig in qconfigs.values()):
        raise ValueError("a static QConfig needs calibration: prepare, run the model, convert")
    model = model if inplace else copy.deepcopy(model)
    kinds = {name: mapping[type(model.get_submodule(name))] for name in qconfigs}
    return quantize_modules(model, {name: (kinds[name], qconfig) for name, qconfig in qconfigs.items()}, device)


def prepare(model: nn.Module, qconfig_dict: Mapping[str, QConfig | None], inplace: bool = True) -> nn.Module:
    """Mark the Linear layers to quantize and observe the inputs of the static ones.

    Run the model on calibration data next, then `convert` it. `qconfig_dict` is as in `quantize_dynamic`; it may mix
    static and dynamic.
    """
    qconfigs = match(model, qconfig_dict, {nn.Linear})
    model = model if inplace else copy.deepcopy(model)
    for name, linear in model.named_modules():
        if (qconfig := qconfigs.get(name)) is None:
            continue
        linear.qconfig = qconfig
        if qconfig.static:
            linear.activation_observer = AbsMaxObserver(linear.weight.device)
            linear.register_forward_pre_hook(observe_input, with_kwargs=True)
    return model


def convert(model: nn.Module, inplace: bool = True, device: torch.device | str | None = None) -> nn.Module:
    """Replace what `prepare` marked by 8-bit layers; take `device`, return, warn and raise as `quantize_dynamic` does.

    Raises ValueError too for a layer whose inputs calibration never showed.
    """
    model = model if inplace else copy.deepcopy(model)
    plan: Plan = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and hasattr(module, "qconfig"):
            qconfig: Any = module.qconfig
            plan[name] = (quantized.Linear if qconfig.static else dynamic.Linear), qconfig
    return quantize_modules(model, plan, device)


def set_process_group(model: nn.Module, group: torch.distributed.ProcessGroup | None) -> None:
    """Let the ranks of `group` share the per-tensor activation scales of the dynamic layers of `model`.

    It is for models whose ranks each hold some rows of every activation: a scale is then that of all their rows. All
    ranks have to call the layers in the same order. None turns sharing off. Call `fuse` and `torch.compile` again
    after it. Layers with a scale for each row have nothing to share, and get no group.
    """
    for module in model.modules():
        if isinstance(module, dynamic.Linear):
            per_tensor = module.qconfig.activation_scheme is not per_token_symmetric
            module.process_group = group if per_tensor else None


def match(
    model: nn.Module, qconfig_dict: Mapping[str, QConfig | None], types: Collection[type[nn.Module]]
) -> dict[str, QConfig]:
    """Return the names of the modules of `types` to quantize, each with its QConfig; a shared module has several names.

    Warns if a key matches no module, and once about Linears that stay in float against what `qconfig_dict` says.
    """
    for key, qconfig in qconfig_dict.items():
        if not isinstance(qconfig, QConfig | None):
            raise TypeError(f"qconfig_dict[{key!r}] is {qconfig!r}: give a QConfig, or None to keep float")
    chosen, float_layers = {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        kinds: tuple[type[nn.Module], ...] = tuple(types)
        if not isinstance(module, kinds) or (qconfig := lookup(name, qconfig_dict)) is None:
            continue
        if type(module) in types and not has_computed_weight(module):
            chosen[name] = qconfig
        else:
            float_layers.append(f"{name or 'the model'} ({type(module).__name__})")
    for key in qconfig_dict:
        if not matching_modules(model, key):
            warnings.warn(f"qconfig_dict: {key!r} matches no module of {type(model).__name__}", stacklevel=3)
    if float_layers:
        warnings.warn(
            f"only plain {', '.join(sorted(kind.__name__ for kind in types))} layers are quantized; of a subclass, or "
            f"with a weight that is computed (weight_norm, parametrize), and so kept in float: {', '.join(float_layers)}",
            stacklevel=3,
        )
    return chosen


def has_computed_weight(module: nn.Module) -> bool:
    """Return whether a hook sets the weight of `module` anew for every call (`torch.nn.utils.weight_norm`, pruning)."""
    return isinstance(module, nn.Linear) and "weight" not in module._parameters
