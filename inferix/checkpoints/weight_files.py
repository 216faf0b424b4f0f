"""Find the files of a checkpoint, without PyTorch: its path may be a file, an index of shards or a folder."""

import re
from pathlib import Path
from typing import NoReturn

from inferix.checkpoints.json_files import load_json
from inferix.errors import InputError, input_errors

MAX_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors format allows."""
SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
SHARD = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d+)\.\w+")


def read_head(path: Path) -> bytes:
    """Return a file's first bytes, by which its kind is known. Raises InputError where it cannot be read."""
    with input_errors(path, OSError), path.open("rb") as file:
        return file.read(9)


def is_safetensors(head: bytes) -> bool:
    """Return whether ``head``, a file's first bytes, is the length of a safetensors header and its opening brace."""
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


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
        return complete_shards(sorted(path.parent.glob(f"{shard['stem']}-*-of-{shard['count']}*"))) if shard else [path]
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
    files = [path for path in files if path.suffix in SUFFIXES or is_safetensors(read_head(path))]
    # A base model has its VAE and its text encoder beside the transformer, which always has this name.
    files = [path for path in files if path.name.startswith("diffusion_pytorch_model")] or files
    names = {shard["stem"] if (shard := SHARD.fullmatch(path.name)) else path.name for path in files}
    if len(names) > 1:
        _refuse_several(folder, sorted(names))
    return complete_shards(files) if files and SHARD.fullmatch(files[0].name) else files


def complete_shards(shards: list[Path]) -> list[Path]:
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
