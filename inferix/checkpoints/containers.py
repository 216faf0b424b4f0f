"""Read a causal Wan transformer's checkpoint, in any published container, as weights under diffusers' names.

Containers: ``.pt`` files with ``generator`` and ``generator_ema`` (Self-Forcing, CausVid, LongLive, Causal-Forcing)
or with the weights themselves (Reward-Forcing); ``.safetensors`` with or without prefixes (Krea Realtime), in shards, and
diffusers' folders; and 8-bit files: LightX2V's (``weight_scale``, one for each output channel) and ComfyUI's
(``scale_weight``, one for each tensor, or float8 without a scale).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inferix.checkpoints.files import StateDict, load_sharded
from inferix.checkpoints.keys import diffusers_names, strip_prefixes
from inferix.checkpoints.weight_files import find_weights
from inferix.errors import InputError

SCALES = (".weight_scale", ".scale_weight")
"""Suffixes of the names of a weight's scales: LightX2V's, ComfyUI's."""
NO_WEIGHTS = ("scaled_fp8", ".scale_input", ".input_scale")
"""Suffixes of names in ComfyUI's fp8 files that are no weights: a marker, and scales of activations."""
LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", "_lora.down.")
OTHER_MODELS = {
    "encoder.conv1.weight": "a VAE",
    "encoder.conv_in.weight": "a VAE",
    "encoder.0.weight": "a tiny VAE",
    "token_embedding.weight": "a text encoder",
    "shared.weight": "a text encoder",
}
"""Names of weights by which another model is recognised, and what it is."""


class QuantizedWeight(NamedTuple):
    """An 8-bit weight; its value is ``qweight * weight_scale``."""

    qweight: Tensor
    """[out, in], float8_e4m3fn or int8."""
    weight_scale: Tensor
    """[out, 1], float32."""


@dataclass
class Checkpoint:
    """The weights of one transformer as they are in the file, memory-mapped."""

    path: Path
    state: StateDict
    """Tensors under diffusers' names, in the file's dtypes. 8-bit weights are multiplied by ``scales``."""
    scales: StateDict = field(default_factory=dict)
    """Name of a module to the scales of its weight, float32 [out, 1]; {} where no weight is in 8 bits."""


def load_checkpoint(path: str | Path, use_ema: bool = False) -> Checkpoint:
    """Read a transformer's checkpoint; its container is recognised by its content.

    Args:
        path: a file, an index of shards, or a folder that holds one checkpoint; see ``find_weights``.
        use_ema: take the averaged weights, ``generator_ema``. Ignored where the file has only one set.

    Raises InputError where it is missing, damaged, ambiguous, or no transformer.
    """
    path = Path(path)
    files = find_weights(path)
    path = files[0] if len(files) == 1 else path
    state = read_transformer(_select(load_sharded(files), path, use_ema), path)
    if "patch_embedding.weight" not in state:
        _refuse(state, path)
    return _split_scales(state, path)


def _select(content: dict, path: Path, use_ema: bool) -> StateDict:
    """Return the transformer's weights in the content of a file."""
    keys = ("generator_ema", "generator", "model") if use_ema else ("generator", "generator_ema", "model")
    key = next((key for key in keys if key in content), None)
    if key is not None:
        content = content[key]
        if not _is_state_dict(content):
            raise InputError(f"{path} does not hold named weights under '{key}'; is it the right checkpoint?")
    elif not _is_state_dict(content):
        _refuse(content, path)
    return content


def _is_state_dict(content: Any) -> bool:
    """Return whether ``content`` is a dictionary of named tensors, one at least."""
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    return named and bool(content) and all(isinstance(tensor, Tensor) for tensor in content.values())


def _refuse(content: dict, path: Path) -> None:
    """Raises InputError for a file that is no transformer's, and names what it holds instead."""
    if "generator_lora" in content or any(part in str(name) for name in content for part in LORA_PARTS):
        raise InputError(f"{path} is a LoRA, not a checkpoint: give it as LORA_PATH={path}, beside a checkpoint")
    for name, kind in OTHER_MODELS.items():
        if name in content:
            raise InputError(f"{path} is {kind}, not a transformer: it is not the kind of model expected here")
    found = ", ".join(map(str, list(content)[:4])) or "nothing"
    raise InputError(f"{path} holds no Wan transformer (it holds: {found}): it is not the kind of model expected here")


def read_transformer(state: StateDict, source: Path | str = "the checkpoint") -> StateDict:
    """Return the weights of a transformer under diffusers' names; those of ``state`` may have any published spelling.

    Raises InputError, naming ``source``, where two tensors would get the same name.
    """
    names = diffusers_names(map(strip_prefixes, state))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{source} holds {twice} twice, under different names; is it the right checkpoint?")
    return dict(zip(names, state.values()))


def _split_scales(state: StateDict, path: Path) -> Checkpoint:
    """Separate scales from weights, and check that each scale belongs to a weight."""
    if any(name.endswith(".comfy_quant") for name in state):
        raise InputError(f"{path} is in ComfyUI's mixed-precision format (comfy_quant), which is not supported")
    checkpoint = Checkpoint(path, {})
    for name, tensor in state.items():
        if module := next((name.removesuffix(end) for end in SCALES if name.endswith(end)), None):
            checkpoint.scales[module] = _scale_column(state.get(f"{module}.weight"), tensor, name, path)
        elif not name.endswith(NO_WEIGHTS):
            checkpoint.state[name] = tensor
    for name, tensor in checkpoint.state.items():
        quantized = tensor.dtype == torch.int8 and name.removesuffix(".weight") in checkpoint.scales
        if not tensor.is_floating_point() and not quantized:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{path} holds {name} as {dtype} without a scale that is understood; use another file of it"
            )
    return checkpoint


def _scale_column(weight: Tensor | None, scale: Tensor, name: str, path: Path) -> Tensor:
    """Return the ``scale`` of a ``weight`` [out, in], one for each row or one for all, as float32 [out, 1]."""
    if weight is None or weight.ndim != 2:
        raise InputError(f"{path} holds {name} without a matrix that it belongs to; is the file whole?")
    rows = weight.shape[0]
    plain = scale.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not plain or scale.numel() != 1 and scale.shape not in ((rows,), (rows, 1)):
        what = f"{list(scale.shape)} of {scale.dtype} for a weight of {list(weight.shape)}"
        raise InputError(f"{path}: {name} is {what}; scales are supported for a row or a whole weight alone")
    return scale.float().reshape(-1, 1).expand(rows, 1).contiguous()


def dequantize(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> StateDict:
    """Return the weights of ``checkpoint`` in float.

    8-bit weights are multiplied by their scales in float32 and come in ``dtype``; all else stays as it is.
    """
    state = dict(checkpoint.state)
    for name, tensor in state.items():
        scale = checkpoint.scales.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scale is not None:
            state[name] = (tensor.float() * scale).to(dtype)
        elif tensor.is_floating_point() and tensor.itemsize == 1:  # float8, the numbers themselves
            state[name] = tensor.to(dtype)
    return state


def quantized_weights(checkpoint: Checkpoint) -> dict[str, QuantizedWeight]:
    """Return the 8-bit weights of ``checkpoint`` as they are, by the names of their modules; {} where it has none.

    A quantized layer of the same format (``qweight`` of the same dtype, one float32 scale for each output channel)
    can take them over instead of quantizing the dequantized weight again.
    """
    weights = {name: QuantizedWeight(checkpoint.state[f"{name}.weight"], s) for name, s in checkpoint.scales.items()}
    return {name: w for name, w in weights.items() if w.qweight.dtype in (torch.float8_e4m3fn, torch.int8)}


def infer_sizes(state: StateDict) -> dict[str, int]:
    """Return a transformer's sizes, inferred from its weights (diffusers' names), where there is no ``config.json``.

    The number of heads cannot be inferred: all published Wan models have heads of 128.

    Returns:
        Arguments of ``TransformerConfig``.

    Raises InputError where the weights are not those of a whole transformer.
    """
    try:
        dim, in_dim = state["patch_embedding.weight"].shape[:2]
        sizes = {
            "dim": dim,
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "in_dim": in_dim,
            "out_dim": state["proj_out.weight"].shape[0] // 4,
            "num_heads": dim // 128,
            "num_layers": _count_blocks(state),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"the sizes of the transformer cannot be read off its weights ({error} is missing)") from None
    if dim % 128:
        raise InputError(f"a transformer of width {dim} has no heads of 128: the base folder needs its config.json")
    return sizes


def _count_blocks(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})
