"""Compiled functions in files. What is compiled here are matrix products, for which Inductor needs no C++ compiler."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._dynamo.utils import counters

from dax.quant.quantization.qconfig import QConfig
from inferix.runtime import compile_cache
from inferix.runtime.compile_cache import CompiledFunction, compile_methods

PROGRAM = """
import sys
import torch
from torch._dynamo.utils import counters
from test_compile_cache import compiled_layer, x
with torch.no_grad():
    print(compiled_layer().project(x(3)).sum().item(), counters["stats"]["unique_graphs"])
"""


class Layer(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(8, 8).requires_grad_(False)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def compiled_layer(seed: int = 0) -> Layer:
    layer = Layer(seed)
    compile_methods([layer], "project")
    return layer


def x(rows: int) -> torch.Tensor:
    return torch.arange(8.0 * rows).view(rows, 8) / 8


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "cache_folder", lambda: tmp_path / "inferix")
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield tmp_path / "inferix"
    torch.compiler.reset()


def traced() -> int:
    return counters["stats"]["unique_graphs"]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def check(layer: Layer, rows: int = 3) -> None:
    torch.testing.assert_close(layer.project(x(rows)), Layer.project(layer, x(rows)))


def test_the_next_process_traces_nothing(tmp_path):
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests"), *sys.path]),
    }
    outputs = [
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    (first, graphs), (second, none) = (output.stdout.split() for output in outputs)
    assert first == second and (graphs, none) == ("1", "0")
    assert len(files(tmp_path / "inferix")) == 1


def test_one_code_serves_all_layers(folder):
    layers = [Layer(seed) for seed in range(3)]
    compile_methods(layers, "project")
    for layer in layers:
        check(layer)
    assert traced() == 1 and len(files(folder)) == 1
    check(compiled_layer(5))
    assert traced() == 1  # another model found the file


def test_other_sizes_are_compiled_once_for_all_of_them(folder):
    layer = compiled_layer()
    for rows in (3, 7, 5, 9, 3):
        check(layer, rows)
    assert traced() == 2 and len(files(folder)) == 1


def change_nothing(layer: Layer) -> None:
    """Nor does a step of training, or another value, change what is compiled."""
    layer.linear.weight.mul_(2)


def change_qconfig(layer: Layer) -> None:
    layer.linear.qconfig = QConfig(torch.int8)


def change_bias(layer: Layer) -> None:
    layer.linear.bias = None


def change_dtype(layer: Layer) -> None:
    layer.bfloat16()


def change_width(layer: Layer) -> None:
    layer.linear = nn.Linear(8, 4).requires_grad_(False)


def change_type(layer: Layer) -> None:
    layer.linear = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8).requires_grad_(False)


@pytest.mark.parametrize(
    "change, more", [(change_nothing, 0), (change_qconfig, 1), (change_bias, 1), (change_width, 1), (change_type, 1)]
)
@pytest.mark.parametrize("when", ["in another process", "in this process"])
def test_what_the_code_depends_on(folder, change, more, when):
    """A file of its own for each, or no file: never another's result."""
    layer = compiled_layer()
    check(layer)
    if when == "in another process":
        layer = compiled_layer()
    change(layer)
    check(layer)
    assert len(files(folder)) == 1 + more or when == "in this process"
    assert traced() == 1 + more


def test_dtypes(folder):
    check(compiled_layer())
    layer = compiled_layer()
    change_dtype(layer)
    wide = x(3).bfloat16()
    assert layer.project(wide).dtype == torch.bfloat16 and torch.equal(layer.project(wide), layer.linear(wide))
    assert len(files(folder)) == 2


def test_sources(folder, monkeypatch):
    check(compiled_layer())
    monkeypatch.setattr(compile_cache, "source_hash", lambda package: "changed")
    check(compiled_layer())
    assert len(files(folder)) == 2 and traced() == 2


def add_hook(layer: Layer) -> None:
    layer.linear.register_forward_hook(lambda module, args, output: output + 1)


def add_group(layer: Layer) -> None:
    layer.linear.process_group = object()


def replace_forward(layer: Layer) -> None:
    layer.linear.forward = lambda x: x * 3


class Tagged(torch.Tensor):
    pass


def replace_weight(layer: Layer) -> None:
    layer.linear.weight = nn.Parameter(layer.linear.weight.as_subclass(Tagged), requires_grad=False)


@pytest.mark.parametrize("change", [add_hook, add_group, replace_forward, replace_weight])
def test_what_no_file_can_hold_is_compiled_in_every_process(folder, change):
    check(compiled_layer())
    for _ in range(2):
        layer = compiled_layer()
        change(layer)
        check(layer)
    assert len(files(folder)) == 1


def test_gradients(folder):
    layer = compiled_layer()
    layer.requires_grad_(True)
    with torch.enable_grad():
        layer.project(x(3)).sum().backward()
    assert torch.equal(layer.linear.weight.grad, x(3).sum(0).expand(8, 8)) and not files(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_a_damaged_file_is_replaced(folder, content):
    check(compiled_layer())
    (path,) = files(folder)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] if content is None else content)
    check(compiled_layer())
    assert traced() == 2 and files(folder) == [path] and len(path.read_bytes()) > len(good) / 2
    check(compiled_layer())
    assert traced() == 2


def test_where_nothing_can_be_written(folder):
    folder.write_text("a file where the folder should be")
    for _ in range(2):
        check(compiled_layer())
    assert traced() == 2 and folder.is_file()


def test_what_cannot_be_compiled_ahead_is_still_computed(folder):
    def breaks(x):
        torch._dynamo.graph_break()
        return x @ x.T

    function = CompiledFunction(breaks)
    with pytest.warns(UserWarning, match="breaks is compiled by every process anew"):
        torch.testing.assert_close(function(x(3)), x(3) @ x(3).T)
    torch.testing.assert_close(function(x(4)), x(4) @ x(4).T)
    assert not files(folder)


@contextmanager
def eager() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@contextmanager
def variable() -> Iterator[None]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    yield
    del os.environ["TORCHDYNAMO_DISABLE"]


@pytest.mark.parametrize(
    ("off", "graphs"),
    [
        (eager, 0),
        (variable, 0),
        (lambda: torch._dynamo.config.patch(disable=True), 0),
        (lambda: torch._inductor.config.patch(force_disable_caches=True), 1),
    ],
)
def test_the_compiler_and_its_caches_can_be_turned_off(folder, monkeypatch, off, graphs):
    """Then neither code that is loaded nor a file is used."""
    layer = compiled_layer()
    check(layer)
    codes, before = layer.project.func.codes, traced()
    codes.update({kind: code._replace(function="not to be used") for kind, code in codes.items()})
    monkeypatch.setattr(compile_cache, "load", lambda path: pytest.fail("a file is read"))
    with off():
        check(layer)
        check(compiled_layer())
    assert traced() == before + graphs and len(files(folder)) == 1


def test_a_copy_computes_with_its_own_weights():
    layer = compiled_layer()
    check(layer)
    twin = copy.deepcopy(layer)
    twin.linear.weight.zero_()
    check(twin)
    check(layer)
    assert not torch.equal(twin.project(x(3)), layer.project(x(3)))
