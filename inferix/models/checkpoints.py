"""Reading weights: every file layout of the public checkpoints, at any size.

Nothing here runs code from a file: pickles are opened with ``weights_only``, everything else is safetensors. Files are
memory-mapped, so that what is not used is not read.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from inferix.errors import InputError

StateDict = dict[str, Tensor]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a library makes of a missing or damaged file, which may be any exception, into InputError."""
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is no file of plain tensors, and is not opened for safety; download it again"
        ) from None
    except Exception:
        if not path.exists():
            raise InputError(f"{path} not found; see weights/README.md for where to get it") from None
        raise InputError(f"{path} cannot be read: truncated, or of another kind; download it again") from None


def load_pickle(path: Path) -> dict:
    """A ``.pt`` or ``.pth`` file, memory-mapped, tensors and plain containers alone.

    Raises InputError where it is missing, truncated, or holds anything that would run code.
    """
    with reading(path):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_safetensors(path: Path) -> StateDict:
    """A ``.safetensors`` file, memory-mapped. Raises InputError where it is missing or damaged."""
    with reading(path):
        return load_file(path)


def load_sharded_safetensors(folder: Path, stem: str) -> StateDict:
    """``stem.safetensors``, or all of ``stem-00001-of-0000N.safetensors``, in ``folder``."""
    shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors")) or [folder / f"{stem}.safetensors"]
    if len(shards) > 1 and len(shards) != (expected := int(shards[0].stem.rsplit("-", 1)[1])):
        raise InputError(f"{folder} holds {len(shards)} of {expected} shards of {stem}; download the missing ones")
    state: StateDict = {}
    for shard in shards:
        state |= load_safetensors(shard)
    return state


def read_transformer(state: StateDict) -> StateDict:
    """Transformer weights under the names this engine and diffusers use, whichever names they came under."""
    state = {key.removeprefix("model.").removeprefix("_fsdp_wrapped_module."): tensor for key, tensor in state.items()}
    if any(key.startswith("condition_embedder.") for key in state):
        return state
    return convert_wan_transformer_to_diffusers(state)


def read_distilled(path: Path, key: str) -> StateDict:
    """The transformer under ``key`` of a Self-Forcing or CausVid checkpoint file.

    Raises InputError where the file has no such key.
    """
    content = load_pickle(path)
    if key not in content:
        found = ", ".join(map(str, list(content)[:4])) or "nothing"
        hint = "try --use_ema" if "generator_ema" in content else "is it the right checkpoint?"
        raise InputError(f"{path} has no '{key}' (it holds: {found}); {hint}")
    state = content[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} does not hold named weights under '{key}'; is it the right checkpoint?")
    return read_transformer(state)


def assign(module: nn.Module, state: StateDict, source: Path) -> None:
    """Give ``module`` (which may be on the meta device) the tensors of ``state`` as they are, all of them.

    Raises InputError, and leaves ``module`` as it was, where a name or a shape differs.
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
    module.load_state_dict(state, strict=True, assign=True)
