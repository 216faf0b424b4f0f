"""Compiled functions whose code is kept in files, so that the next process neither traces nor compiles.

Inductor keeps what it makes of a graph; that graph is traced anew in every process, for two seconds. Here the whole function
is kept, by PyTorch's ahead-of-time compilation. The files lie in Inductor's cache folder and are loaded as Inductor loads its
own: like those, they are code, and the folder has to be the user's.
"""

import hashlib
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inferix.checkpoints.hashes import file_hash
from inferix.runtime import inductor

CONSTANTS = (type(None), bool, int, float, str, torch.dtype)


class Code(NamedTuple):
    """A function compiled for inputs of certain sizes."""

    function: Any
    """None where it could not be compiled ahead of its first call."""
    sizes: list[tuple]


class CompiledFunction:
    """``function`` without gradients, compiled at the first call, or loaded where an earlier process has compiled it.

    For each kind of arguments (dtypes, devices, layers) the sizes of the first call get code of their own, which is kept.
    Arguments of other sizes, and what cannot be kept, go through ``torch.compile``, where the sizes that changed are dynamic.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.codes: dict[Hashable, Code] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: the code of one process is none of another's."""
        return {"function": self.function, "codes": {}}

    @cached_property
    def traced(self) -> Callable:
        """The function as ``torch.compile`` returns it."""
        return torch.compile(self.function, backend=inductor.backend())

    def __call__(self, *args: Any) -> Any:
        inputs = list(leaves(args))
        kind = tuple(map(kind_of, inputs))
        if None in kind or torch.is_grad_enabled() or inductor.is_disabled():
            return self.traced(*args)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        sizes = [size_of(tensor) for tensor in tensors]
        if kind not in self.codes:
            self.codes[kind] = Code(self.load_or_compile(args, (kind, sizes)), sizes)
        code = self.codes[kind]
        if code.function is not None and sizes == code.sizes and code.function.guard_check(*args):
            return code.function(*args)
        for tensor, size, known in zip(tensors, sizes, code.sizes):
            mark_dynamic(tensor, size, known)
        return self.traced(*args)

    def load_or_compile(self, args: tuple, signature: tuple) -> Any:
        """Return the code for ``args``, which is kept in a file from then on; None where PyTorch cannot do that."""
        modules = [module for x in leaves(args) if isinstance(x, nn.Module) for module in x.modules()]
        weights = [(name, kind_of(x), size_of(x)) for module in modules for name, x in own_tensors(module)]
        if any(kind is None for _, kind, _ in weights):
            return None
        try:
            path = self.path(modules, (signature, weights))
            code = load(path)
            if code is None or not code.guard_check(*args):
                code = inductor.aot_compile(self.function, args)
                save(code, path)
            code.disable_guard_check()  # ``__call__`` has checked them
            return code
        except Exception as error:  # of any class; what is wrong with the function, ``torch.compile`` says next
            warnings.warn(f"{self.function.__name__} is compiled by every process anew: {error}", stacklevel=2)
            return None

    def path(self, modules: list[nn.Module], signature: tuple) -> Path:
        """Return the file for arguments of ``signature``: its name stands for all that the code depends on."""
        packages = {each.__module__.partition(".")[0] for each in (self.function, *map(type, modules))}
        known = (
            (platform.python_version(), torch.__version__),
            torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            sorted(torch._inductor.config.save_config_portable().items()),
            sorted((package, source_hash(package)) for package in packages - {"torch"}),
            (self.function.__module__, self.function.__qualname__, signature),
        )
        return cache_folder() / f"{hashlib.sha256(repr(known).encode()).hexdigest()}.bin"


def compile_methods(modules: Iterable[nn.Module], *names: str) -> None:
    """Compile methods of modules of one class, one code for all of them. Idempotent."""
    functions: dict[tuple[type, str], CompiledFunction] = {}
    for module in modules:
        for name in names:
            if name not in vars(module):
                kind = type(module)
                function = functions.setdefault((kind, name), CompiledFunction(getattr(kind, name)))
                setattr(module, name, partial(function, module))


@cache
def compiled(function: Callable) -> CompiledFunction:
    """Return ``function`` compiled, the same object for every caller."""
    return CompiledFunction(function)


def leaves(args: Iterable) -> Iterator[Any]:
    """Yield the elements of nested tuples and lists in order."""
    for arg in args:
        if isinstance(arg, tuple | list):
            yield from leaves(arg)
        else:
            yield arg


def kind_of(x: Any) -> Hashable:
    """Return what code depends on besides sizes, with a ``repr`` that says all of it; None where it cannot be kept."""
    if isinstance(x, Tensor):
        return (x.dtype, x.device, x.ndim, x.requires_grad) if type(x) in (Tensor, nn.Parameter) else None
    if isinstance(x, nn.Module):
        layers = tuple(map(layer_kind, x.modules()))
        return None if None in layers else layers
    return (type(x), x) if isinstance(x, CONSTANTS) else None


def layer_kind(module: nn.Module) -> Hashable:
    """Return the type of a layer and its settings; None where it calls what no file can hold: hooks, other processes."""
    attributes = vars(module)
    hooks = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
    if hooks or "forward" in attributes or attributes.get("process_group") is not None:
        return None
    return type(module), attributes.get("qconfig")


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of the module alone."""
    return [(name, x) for name, x in (*module._parameters.items(), *module._buffers.items()) if x is not None]


def size_of(tensor: Tensor) -> tuple:
    """Return the sizes, and the strides where they matter."""
    return tensor.shape, tuple(stride for size, stride in zip(tensor.shape, tensor.stride()) if size != 1)


def mark_dynamic(tensor: Tensor, size: tuple, known: tuple) -> None:
    """Tell ``torch.compile`` which sizes of ``tensor`` differ from those that code is there for."""
    for dim, (new, old) in enumerate(zip(size[0], known[0])):
        if new != old:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def cache_folder() -> Path:
    """Return where the files are."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir(), "inferix")


@cache
def source_hash(package: str) -> str:
    """Return a hash of the Python files of a package."""
    path = getattr(sys.modules[package], "__file__", None)
    return file_hash(*sorted(Path(path).parent.rglob("*.py"))) if path else ""


def load(path: Path) -> Any:
    """Return the code in a file; None where there is none that can be used: it will be replaced."""
    try:
        # one thread: else a pool of processes is started, for which there is nothing to compile
        with path.open("rb") as file, torch._inductor.config.patch(compile_threads=1):
            return torch.compiler.load_compiled_function(file)
    except Exception:  # missing, cut off, or of another version; unpickling raises anything
        return None


def save(compiled: Any, path: Path) -> None:
    """Write code to a file, which appears when it is complete; nothing is written where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled.save_compiled_function(f"{folder}/code")
            os.replace(f"{folder}/code", path)
    except OSError:  # a full disk: the next process compiles again
        return
