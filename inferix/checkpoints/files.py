"""Read files of tensors: recognised by their first bytes, memory-mapped, without running code.

Pickles are opened with ``weights_only``; everything else is safetensors. Only the tensors that are used are read.
"""

import pickle
import struct
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from inferix.checkpoints.weight_files import complete_shards, is_safetensors, read_head
from inferix.errors import DAMAGED, InputError, input_errors

StateDict = dict[str, Tensor]

PICKLE_ERRORS = (
    OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError,
    struct.error,
)  # fmt: skip
"""What ``torch.load`` may raise for bytes that are no valid pickle, beside UnpicklingError."""

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
OTHER_KINDS = {
    b"GGUF": "is a GGUF file, which is not supported; use the model's .safetensors or .pt file",
    b"version ": "is a Git LFS pointer, not the file itself; fetch it with git lfs pull",
}


def load_weights(path: Path) -> dict:
    """Read a PyTorch or safetensors file, whichever ``path`` is.

    Raises InputError where it is missing, truncated, of another kind, or a pickle that would run code.
    """
    head = read_head(path)
    if not head:
        raise InputError(f"{path} is empty: a truncated download; download it again")
    if is_safetensors(head):
        return load_safetensors(path)
    if head.startswith((ZIP, PICKLE)):
        return load_pickle(path)
    for start, complaint in OTHER_KINDS.items():
        if head.startswith(start):
            raise InputError(f"{path} {complaint}")
    raise InputError(f"{path} is neither a PyTorch nor a safetensors file; download it again")


def load_pickle(path: Path) -> dict:
    """Read a ``.pt`` or ``.pth`` file, which may hold tensors and plain containers alone.

    Raises InputError where it is missing, truncated, or holds anything that would run code.
    """
    head = read_head(path)
    if not head.startswith((ZIP, PICKLE)):
        raise InputError(f"{path} {DAMAGED}")
    # Files from before PyTorch 1.6 are no zip archives; what is called .safetensors, torch.load goes by its name.
    mmap = head.startswith(ZIP) and path.suffix != ".safetensors"
    with input_errors(path, *PICKLE_ERRORS, hint=DAMAGED), warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore", UserWarning)  # about the pickle's protocol, before it is refused
        try:
            content = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            raise InputError(
                f"{path} is no file of plain tensors, and is not opened for safety; download it again"
            ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_safetensors(path: Path) -> StateDict:
    """Read a ``.safetensors`` file. Raises InputError where it is missing or damaged."""
    with input_errors(path, OSError, SafetensorError, hint=DAMAGED), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a ``.safetensors`` file; {} for a file of another kind."""
    if not is_safetensors(read_head(path)):
        return {}
    with input_errors(path, OSError, SafetensorError, hint=DAMAGED), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def load_sharded(paths: list[Path]) -> dict:
    """Read one file, or all shards of one, as one dictionary."""
    content: dict = {}
    for path in paths:
        content |= load_weights(path)
    return content


def load_sharded_safetensors(folder: Path, stem: str) -> StateDict:
    """Read ``stem.safetensors``, or all of ``stem-00001-of-0000N.safetensors``, in ``folder``."""
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    return load_sharded(complete_shards(shards)) if shards else load_safetensors(folder / f"{stem}.safetensors")


def load_strict(module: nn.Module, state: StateDict, source: Path) -> None:
    """Assign the tensors of ``state`` to ``module``, which may be on the meta device; nothing is copied.

    Raises InputError, and leaves ``module`` as it was, where a name or a shape differs, or a tensor is not floating-point.
    """
    expected = module.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        example = min(missing or unexpected)
        what = f"lacks {len(missing)} tensors and has {len(unexpected)} unknown ones, such as {example}"
        raise InputError(f"{source} {what}: it is not the kind of model expected here")
    for name, tensor in state.items():
        shape = getattr(tensor, "shape", ())
        if shape != expected[name].shape:
            shapes = f"{name} is {list(shape)}, not {list(expected[name].shape)}"
            raise InputError(
                f"{source} does not fit the base model ({shapes}): base and checkpoint must be of one size"
            )
        if expected[name].is_floating_point() and not tensor.is_floating_point():
            raise InputError(f"{source} holds {name} as {tensor.dtype}, which cannot be read; use another file of it")
    module.load_state_dict(state, strict=True, assign=True)
