"""Read files of tensors: recognised by their first bytes, memory-mapped, without running code.

Pickles are opened with ``weights_only``; everything else is safetensors. Only the tensors that are used are read.
"""

import hashlib
import json
import mmap
import pickle
import re
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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
MAX_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors format allows."""
SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
SHARD = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d+)\.\w+")


def _head(path: Path) -> bytes:
    with input_errors(path, OSError), path.open("rb") as file:
        return file.read(9)


def _is_safetensors(head: bytes) -> bool:
    """Return whether ``head``, a file's first bytes, is the length of a safetensors header and its opening brace."""
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def load_weights(path: Path) -> dict:
    """Read a PyTorch or safetensors file, whichever ``path`` is.

    Raises InputError where it is missing, truncated, of another kind, or a pickle that would run code.
    """
    head = _head(path)
    if not head:
        raise InputError(f"{path} is empty: a truncated download; download it again")
    if _is_safetensors(head):
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
    head = _head(path)
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
    if not _is_safetensors(_head(path)):
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
    return load_sharded(_complete(shards)) if shards else load_safetensors(folder / f"{stem}.safetensors")


def load_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError where ``path`` is missing or no such object."""
    with input_errors(path, OSError, UnicodeDecodeError, hint=DAMAGED):
        text = path.read_text()
    return parse_json(text, path)


def parse_json(text: str, source: Path | str) -> dict:
    """Return ``text`` parsed as a JSON object. Raises InputError, naming ``source``, where it is no such object."""
    with input_errors(source, ValueError, hint="is not a valid JSON object; download it again"):
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError
    return content


def file_hash(*paths: Path) -> str:
    """Return the SHA-256 of files, one after the other. Files that have not changed since are not read again."""
    return _hash(*((path, path.stat().st_mtime_ns) for path in paths))


@cache
def _hash(*versions: tuple[Path, int]) -> str:
    digest = hashlib.sha256()
    for path, _ in versions:
        if path.stat().st_size:  # an empty file cannot be mapped
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # in one call: beside a thread that computes, each call would wait for Python's lock
                digest.update(content)
    return digest.hexdigest()


def find_weights(path: Path) -> list[Path]:
    """Return the files that make up the checkpoint at ``path``: one, or all of its shards.

    Args:
        path: a file, one shard of several, an index of shards (``*.index.json``), or a folder. A folder may hold one
            checkpoint, or have it in ``transformer`` (diffusers), ``autoregressive_checkpoint`` (CausVid) or its only
            other subfolder with one.

    Raises InputError where there is none, where there are several, and where a shard is missing.
    """
    if not path.is_dir():
        if path.name.endswith(".index.json"):
            return _indexed_shards(path)
        shard = SHARD.fullmatch(path.name)
        return _complete(sorted(path.parent.glob(f"{shard['stem']}-*-of-{shard['count']}*"))) if shard else [path]
    if (path / "transformer").is_dir():
        return _files_in(path / "transformer") or _no_checkpoint(path / "transformer")
    if files := _files_in(path):
        return files
    subfolders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    if preferred := path / "autoregressive_checkpoint" in subfolders:
        subfolders = [path / "autoregressive_checkpoint"]
    found = [files for folder in subfolders if (files := _files_in(folder))]
    if len(found) > 1:
        _refuse_several(path, [files[0].relative_to(path) for files in found])
    return found[0] if found else _no_checkpoint(subfolders[0] if preferred else path)


def _no_checkpoint(folder: Path) -> NoReturn:
    raise InputError(f"{folder} holds no checkpoint (a .safetensors or .pt file); see weights/README.md")


def _refuse_several(folder: Path, names: list) -> NoReturn:
    listed = ", ".join(map(str, names[:4])) + (", ..." if len(names) > 4 else "")
    raise InputError(f"{folder} holds {len(names)} checkpoints ({listed}); give the path of one of them")


def _files_in(folder: Path) -> list[Path]:
    """Return the files of the checkpoint directly in ``folder``; [] where there is none."""
    if indices := sorted(folder.glob("*.index.json")):
        return _indexed_shards(indices[0]) if len(indices) == 1 else _refuse_several(folder, [i.name for i in indices])
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    files = [path for path in files if path.suffix in SUFFIXES or _is_safetensors(_head(path))]
    # A base model has its VAE and its text encoder beside the transformer, which always has this name.
    files = [path for path in files if path.name.startswith("diffusion_pytorch_model")] or files
    names = {shard["stem"] if (shard := SHARD.fullmatch(path.name)) else path.name for path in files}
    if len(names) > 1:
        _refuse_several(folder, sorted(names))
    return _complete(files) if files and SHARD.fullmatch(files[0].name) else files


def _complete(shards: list[Path]) -> list[Path]:
    """Return ``shards``. Raises InputError where some are missing."""
    shard = SHARD.fullmatch(shards[0].name)
    if shard and len(shards) != int(shard["count"]):
        counted = f"{len(shards)} of {int(shard['count'])} shards of {shard['stem']}"
        raise InputError(f"{shards[0].parent} holds {counted}; download the missing ones")
    return shards


def _indexed_shards(index: Path) -> list[Path]:
    """Return the shards that a ``*.index.json`` lists, which lie beside it."""
    weight_map = load_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index} does not list the shards of a checkpoint; download it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards of a checkpoint, such as {missing[0]}; "
            "download the missing ones"
        )
    return [index.parent / name for name in names]


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
