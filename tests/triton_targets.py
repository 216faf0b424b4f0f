"""Compile Triton kernels for GPUs that need not be there, or interpret them."""

import importlib.util
from types import ModuleType

import pytest

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""What a thread block may have, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""


def compile_for(capability, kernel, signature, constants, config):
    """Compile for a GPU that need not be there, down to its machine code; return the bytes of shared memory it takes."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    # what the launcher finds out about pointers and sizes at run time
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if not name.endswith("_desc")}
    signature = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, constexprs=constants | config.kwargs, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


def interpreted_module(name: str, monkeypatch) -> ModuleType:
    """Return the module ``name`` once more, its kernels for Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
