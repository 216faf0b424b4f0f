"""Saved 8-bit models: a folder with `model.safetensors` and `qconfig.json`.

`qconfig.json` says how each layer is quantized and, under `__metadata__`, what the caller wants to know of the folder.
The header of `model.safetensors` holds its SHA-256 (`qconfig_sha256`) and the names of tensors that are saved once under
another name (`tied`: JSON, name → the name it is saved under).
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dax.quant.nn import dynamic, quantized
from dax.quant.nn.linear import QuantizedLinear
from dax.quant.quantization.matching import lookup
from dax.quant.quantization.qconfig import METADATA, QConfig, read_qconfig_dict
from dax.quant.quantization.quantize import match
from dax.quant.quantization.replace import check_hooks, named_errors, replace_module

WEIGHTS, QCONFIG = "model.safetensors", "qconfig.json"
HASH, TIED = "qconfig_sha256", "tied"

FIXED_TYPE = ("qweight", "_scale")
"""How the names of those tensors end whose type is the format's, not the model's."""


def save_quantized(model: nn.Module, folder: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the 8-bit `model` to `folder`, made if it is not there: qdata and scales as they are, the rest in its dtype.

    Tensors that are tied, and those of a module that is used twice, are saved once. Buffers that a state dict leaves
    out (`persistent=False`) are saved too, so that a model on the meta device can be loaded. Each file appears under
    its name only when it is complete.

    Args:
        metadata: what `read_metadata(folder)` will return: text about the model, such as where it came from.

    Raises:
        ValueError: the model has no 8-bit layer, or something that cannot be saved.
        OSError: `folder` cannot be written.
    """
    qconfig_dict = describe(model)
    if not any(qconfig_dict.values()):
        raise ValueError(f"{type(model).__name__} has no quantized layer to save")
    state, tied = tensors_to_save(model)
    fields: dict[str, object] = {METADATA: check_metadata(metadata)} if metadata else {}
    fields |= {name: None if qconfig is None else qconfig.to_dict() for name, qconfig in qconfig_dict.items()}
    text = json.dumps(fields, indent=1).encode()
    header = {HASH: hashlib.sha256(text).hexdigest()} | ({TIED: json.dumps(tied)} if tied else {})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in (WEIGHTS, QCONFIG)}
    try:
        save_file(state, partial[WEIGHTS], header)
        partial[QCONFIG].write_bytes(text)
        partial[WEIGHTS].chmod(partial[QCONFIG].stat().st_mode)  # safetensors makes it for the owner alone
        for name, path in partial.items():
            os.replace(path, folder / name)
    except SafetensorError as error:  # all that it says of a full disk, for one
        raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from None
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Turn the float `model` into the 8-bit one that `save_quantized` wrote to `folder`, and return it.

    The float weights are never looked at: let `model` be on the meta device, and none is ever in memory. The 8-bit
    weights are mapped from the file, on the CPU: each is read when it is first used. Of the buffers that a state dict
    leaves out, those on the meta device are loaded; the others stay as the model's constructor made them.

    Raises ValueError, and leaves `model` as it was, where a file is missing, damaged or of another model.
    """
    folder = Path(folder)
    saved = read_checkpoint(folder)
    layers = empty_layers(model, saved, folder)
    expected = expected_tensors(model, layers)
    local = local_buffers(model)
    state = {name: tensor for name, tensor in saved.state.items() if name not in local}
    on_meta = {name: tensor for name, tensor in local.items() if tensor.is_meta}
    if lost := sorted(on_meta.keys() - saved.state.keys()):
        raise ValueError(
            f"{folder} lacks the buffers {', '.join(lost)}, which are on the meta device: "
            "construct them on the CPU, or save the folder again"
        )
    buffers = {name: saved.state[name] for name in on_meta}
    check(state | buffers, expected | on_meta, folder)
    state = tie(state, expected, folder)
    for name, layer in layers.items():
        model = replace_module(model, name, layer)
    model.load_state_dict(state, strict=True, assign=True)
    for name, buffer in buffers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffer)
    return model


def read_metadata(folder: str | Path) -> dict[str, str]:
    """Return the `metadata` that `save_quantized` was given; {} for a folder without. Reads no weights.

    Raises ValueError where a file is missing or damaged.
    """
    return read_checkpoint(Path(folder), tensors=False).metadata


class Checkpoint(NamedTuple):
    """What a folder holds."""

    qconfig_dict: dict[str, QConfig | None]
    metadata: dict[str, str]
    state: dict[str, Tensor]
    """Every name of the saved model's state dict, tied ones included, and the buffers that it leaves out."""

    def float_type(self, layer: str) -> torch.dtype | None:
        """Return the type that the model has around the 8-bit `layer`: its bias's, or else any float tensor's."""
        if (bias := self.state.get(f"{layer}.bias" if layer else "bias")) is not None:
            return bias.dtype
        floats = (tensor for name, tensor in self.state.items() if not name.endswith(FIXED_TYPE))
        return next((tensor.dtype for tensor in floats if tensor.is_floating_point()), None)


def read_checkpoint(folder: Path, tensors: bool = True) -> Checkpoint:
    """Read `folder`, without its tensors where those are not wanted.

    Raises ValueError where the files are not what was saved together.
    """
    try:
        text = (folder / QCONFIG).read_bytes()
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: aligned(name, file.get_tensor(name)) for name in file.keys()} if tensors else {}
    except FileNotFoundError:
        raise ValueError(f"{folder} is no saved 8-bit model: it needs {QCONFIG} and {WEIGHTS}") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged file ({error}): save it again") from None
    if header.get(HASH) != hashlib.sha256(text).hexdigest():
        raise ValueError(f"{folder / QCONFIG} is not the one that {WEIGHTS} was saved with (its SHA-256 differs)")
    try:
        content, tied = json.loads(text), check_metadata(json.loads(header.get(TIED, "{}")))
        qconfig_dict = read_qconfig_dict(content)
        metadata = check_metadata(content.get(METADATA, {}))
    except ValueError as error:
        raise ValueError(f"{folder} holds a damaged file ({error}): save it again") from None
    if tensors:
        if tied.keys() & state.keys() or set(tied.values()) - state.keys():
            raise ValueError(f"{folder / WEIGHTS} ties tensors that it does not hold: save it again")
        state |= {name: state[owner] for name, owner in tied.items()}
    return Checkpoint(qconfig_dict, metadata, state)


def aligned(name: str, tensor: Tensor) -> Tensor:
    """Return `tensor`, copied if it is a float one that lies askew in the file.

    The rounding of a float product depends on the alignment of its operands, to 64 bytes where torch allocates them.
    """
    return tensor if name.endswith(FIXED_TYPE) or tensor.data_ptr() % 64 == 0 else tensor.clone()


def check_metadata(metadata: object) -> dict[str, str]:
    """Return `metadata` as a dict. Raises ValueError if it does not map text to text."""
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for pair in metadata.items() for text in pair
    ):
        raise ValueError(f"metadata has to map text to text, and is {metadata!r}")
    return dict(metadata)


def tensors_to_save(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of `model` by name, and the names left out, each with the name of the same tensor.

    Raises ValueError for what is no tensor, or on the meta device.
    """
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owners: dict[tuple, str] = {}
    for name, tensor in (model.state_dict() | local_buffers(model)).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise ValueError(f"{name} is {'on the meta device' if isinstance(tensor, Tensor) else 'no tensor'}")
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )
        owner = owners.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            state[name] = tensor.contiguous()
        else:
            tied[name] = owner
    separate_overlaps(state)
    return state, tied


def separate_overlaps(state: dict[str, Tensor]) -> None:
    """Copy tensors that share some memory with another without being the same: safetensors would refuse them."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in state.items()
        if tensor.numel()
    )
    reached = 0
    for start, end, name in spans:
        if start < reached:
            state[name] = state[name].clone()
        reached = max(reached, end)


def local_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `model` that its state dict leaves out, but for those that 8-bit layers make themselves."""
    result = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedLinear):
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    result[f"{prefix}.{name}" if prefix else name] = buffer
    return result


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    """Raises ValueError where a tensor is missing, unknown, of another shape, or qdata or scales are of another type."""
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        what = f"lacks {min(missing)}" if missing else f"has {min(unknown)}, which this model has not"
        raise ValueError(f"{folder / WEIGHTS} {what}: it is damaged or of another model")
    for name, tensor in expected.items():
        given = state[name]
        any_float = given.is_floating_point() and tensor.is_floating_point() and not name.endswith(FIXED_TYPE)
        if given.shape != tensor.shape or given.dtype != tensor.dtype and not any_float:
            found, wanted = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (given, tensor))
            raise ValueError(f"{folder} is of another model: {name} is {found}, not {wanted}")


def tie(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return `state` with one parameter for all names that share a tensor, in the file or in the model.

    Raises ValueError where the model shares what differs in the file.
    """
    owners: dict[int, str] = {}
    parameters: dict[int, nn.Parameter] = {}
    result = {}
    for name, like in expected.items():
        owner = owners.setdefault(id(like), name)
        tensor = state[owner]
        if tensor is not state[name] and not torch.equal(as_bytes(tensor), as_bytes(state[name])):
            raise ValueError(f"{folder} is of another model: {owner} and {name} are tied in this one")
        if isinstance(like, nn.Parameter):
            tensor = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=like.requires_grad))
        result[name] = tensor
    return result


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of `tensor`: NaNs compare equal, and fp8 compares at all."""
    return tensor.contiguous().flatten().view(torch.uint8)


def describe(model: nn.Module) -> dict[str, QConfig | None]:
    """Return the `qconfig_dict`, of as few full names as it takes, that says how the Linears of `model` are quantized."""
    exact = {
        name: module.qconfig if isinstance(module, QuantizedLinear) else None
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | QuantizedLinear)
    }
    short = shorten("", exact)
    return short if all(lookup(name, short) == qconfig for name, qconfig in exact.items()) else exact


def shorten(prefix: str, exact: dict[str, QConfig | None]) -> dict[str, QConfig | None]:
    """Return the fewest of the modules at and below `prefix` that say the same of all layers in `exact`, all below it."""
    if len(set(exact.values())) <= 1:
        return dict.fromkeys([prefix] if exact else [], *set(exact.values()))
    depth = len(prefix.split(".")) if prefix else 0
    children: dict[str, dict[str, QConfig | None]] = defaultdict(dict)
    for name, qconfig in exact.items():
        children[".".join(name.split(".")[: depth + 1])][name] = qconfig
    return {name: qconfig for child, below in children.items() for name, qconfig in shorten(child, below).items()}


def empty_layers(model: nn.Module, saved: Checkpoint, folder: Path) -> dict[str, QuantizedLinear]:
    """Return the 8-bit layers, on the meta device, that take the place of Linears of `model`: one for one used twice.

    Raises ValueError where `saved` names modules that `model` has not, or a layer cannot be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := saved.qconfig_dict.keys() - modules.keys():
        raise ValueError(f"{folder} is of another model: this one has no module {min(unknown)}")
    layers: dict[str, QuantizedLinear] = {}
    built: dict[tuple[int, QConfig], QuantizedLinear] = {}
    for name, qconfig in match(model, saved.qconfig_dict, {nn.Linear}).items():
        linear = modules[name]
        with named_errors(name or type(model).__name__):
            check_hooks(linear)
        if (key := (id(linear), qconfig)) not in built:
            kind = quantized.Linear if qconfig.static else dynamic.Linear
            biased, dtype = linear.bias is not None, saved.float_type(name)
            layer = kind(linear.in_features, linear.out_features, biased, qconfig=qconfig, device="meta", dtype=dtype)
            built[key] = layer.requires_grad_(linear.weight.requires_grad).train(linear.training)
        layers[name] = built[key]
    return layers


def expected_tensors(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Return the state dict, of parameters themselves, that `model` has once `layers` are in their places."""
    state = model.state_dict(keep_vars=True)
    result = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in layers}
    for prefix, layer in layers.items():
        result |= layer.state_dict(prefix=f"{prefix}." if prefix else "", keep_vars=True)
    return result
