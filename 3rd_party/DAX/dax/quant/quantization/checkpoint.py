"""Saved 8-bit models: a folder with `model.safetensors` and `qconfig.json`, which says how each layer is quantized."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dax.quant.nn import dynamic, quantized
from dax.quant.nn.linear import QuantizedLinear
from dax.quant.quantization.qconfig import QConfig, read_qconfig_dict
from dax.quant.quantization.quantize import match, replace_modules

WEIGHTS, QCONFIG = "model.safetensors", "qconfig.json"
HASH = "qconfig_sha256"
"""Under this name the header of the weights holds the SHA-256 of the file QCONFIG that belongs to them."""

CODED = ("qweight", "_scale")
"""How the names of those tensors end whose type is the format's, not the model's."""


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Writes the 8-bit `model` to `folder`, made if it is not there: codes and scales as they are, the rest in its dtype.

    Each file appears under its name only when it is complete. Raises ValueError for a model without an 8-bit layer,
    OSError where `folder` cannot be written.
    """
    qconfig_dict = describe(model)
    if not any(qconfig_dict.values()):
        raise ValueError(f"{type(model).__name__} has no quantized layer to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: None if qconfig is None else qconfig.to_dict() for name, qconfig in qconfig_dict.items()}
    text = json.dumps(fields, indent=1).encode()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    partial = {name: folder / f".{name}.partial" for name in (WEIGHTS, QCONFIG)}
    try:
        save_file(state, partial[WEIGHTS], {HASH: hashlib.sha256(text).hexdigest()})
        partial[QCONFIG].write_bytes(text)
        partial[WEIGHTS].chmod(partial[QCONFIG].stat().st_mode)  # safetensors makes it for the owner alone
        for name, path in partial.items():
            os.replace(path, folder / name)
    except SafetensorError as error:  # its only words for a full disk
        raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Turns the float `model` into the 8-bit one that `save_quantized` wrote to `folder`, and returns it.

    The float weights are never looked at: let `model` be on the meta device, and none is ever in memory. The saved
    tensors are mapped from the file, on the CPU: each is read when it is first used.

    Raises ValueError, and leaves `model` as it was, where a file is missing, damaged or of another model.
    """
    folder = Path(folder)
    qconfig_dict, state = read_checkpoint(folder)
    if unknown := qconfig_dict.keys() - {name for name, _ in model.named_modules()}:
        raise ValueError(f"{folder} is of another model: this one has no module {min(unknown)}")
    float_type = next((tensor.dtype for name, tensor in state.items() if not name.endswith(CODED)), None)
    layers = {
        name: empty_layer(model.get_submodule(name), qconfig, float_type)
        for name, qconfig in match(model, qconfig_dict, {nn.Linear}).items()
    }
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    for prefix, layer in layers.items():
        expected |= {f"{prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}
    check(state, expected, folder)
    replace_modules(model, layers, lambda _, layer: layer)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def read_checkpoint(folder: Path) -> tuple[dict[str, QConfig | None], dict[str, Tensor]]:
    """The `qconfig_dict` and the tensors in `folder`. Raises ValueError where they are not what was saved together."""
    try:
        text = (folder / QCONFIG).read_bytes()
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"{folder} is no saved 8-bit model: it needs {QCONFIG} and {WEIGHTS}") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged file ({error}): save it again") from None
    if metadata.get(HASH) != hashlib.sha256(text).hexdigest():
        raise ValueError(f"{folder / QCONFIG} is not the one that {WEIGHTS} was saved with (its SHA-256 differs)")
    return read_qconfig_dict(json.loads(text)), state


def check(state: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError where a tensor is missing, unknown, of another shape, or codes or scales are of another type."""
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what = f"lacks {min(missing)}" if missing else f"has {min(unknown)}, which this model has not"
        raise ValueError(f"{folder / WEIGHTS} {what}: it is damaged or of another model")
    for name, tensor in expected.items():
        given, fixed = state[name], name.endswith(CODED)
        if given.shape != tensor.shape or given.dtype != tensor.dtype and (fixed or not given.is_floating_point()):
            found, wanted = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (given, tensor))
            raise ValueError(f"{folder} is of another model: {name} is {found}, not {wanted}")


def describe(model: nn.Module, name: str = "") -> dict[str, QConfig | None]:
    """The `qconfig_dict`, of as few full names as it takes, that says how the Linear layers of `model` are quantized."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | QuantizedLinear)]
    kinds = {linear.qconfig if isinstance(linear, QuantizedLinear) else None for linear in linears}
    if len(kinds) <= 1:
        return dict.fromkeys([name] * len(kinds), *kinds)
    result = {}
    for child, module in model.named_children():
        result |= describe(module, f"{name}.{child}" if name else child)
    return result


def empty_layer(linear: nn.Linear, qconfig: QConfig, dtype: torch.dtype | None) -> QuantizedLinear:
    """The 8-bit layer that takes the place of `linear`, on the meta device, in a model of `dtype`."""
    kind = quantized.Linear if qconfig.static else dynamic.Linear
    layer = kind(
        linear.in_features, linear.out_features, linear.bias is not None, qconfig=qconfig, device="meta", dtype=dtype
    )
    return layer.requires_grad_(linear.weight.requires_grad).train(linear.training)
