"""Quantized models under `torch.compile`, `torch.export` and `torch.jit.trace`."""

import copy
import io
import warnings

import pytest
import torch
from dax_layers import DYNAMIC, FP8_TOKEN, INT8, INT8_TOKEN, STATIC, every_device, mlp, no_grad, seed  # noqa: F401
from torch import nn

import dax.quant.functional as QF
from dax.quant.quantization import convert, prepare, quantize_dynamic

every_layer = pytest.mark.parametrize("qconfig", [*DYNAMIC.values(), *STATIC.values()], ids=[*DYNAMIC, *STATIC])


def quantized_mlp(qconfig, device="cpu"):
    model = prepare(mlp(k=40, hidden=70).to(device), {"": qconfig})
    model(torch.randn(19, 40, device=device))
    return convert(model)


@every_device
@every_layer
def test_compiles_without_a_graph_break(qconfig, device):
    """A batch, and a few rows under autocast: static shapes, as those of any size are exported below."""
    # aot_eager traces and functionalizes as every backend does, and needs no C++ compiler.
    model = quantized_mlp(qconfig, device)
    x = torch.randn(2, 19, 40, device=device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast(device, torch.bfloat16):
        few = compiled(x[:, :1])
        assert few.dtype == torch.bfloat16
        torch.testing.assert_close(few, model(x[:, :1]), rtol=0.02, atol=0.02)


@every_device
@pytest.mark.parametrize("name", ["fp8", "int8-tensor"])
def test_compiles_for_any_size(name, device):
    model = quantized_mlp(DYNAMIC[name], device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (19, 7):
        x = torch.randn(2, rows, 40, device=device)
        torch.testing.assert_close(compiled(x), model(x))


def test_inference_is_one_graph_with_no_operation_for_gradients():
    """Without gradients, a graph does not tell whether the bias would want one."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    for qconfig in (FP8_TOKEN, INT8_TOKEN):
        for trainable in (True, False):
            model = quantized_mlp(qconfig).requires_grad_(trainable)
            torch.compiler.reset()
            torch.compile(model, fullgraph=True, backend=keep)(torch.randn(19, 40))
    assert len(graphs) == 4 and graphs[0] == graphs[1] and graphs[2] == graphs[3]
    assert not any("autograd" in str(target) for graph in graphs for target in graph)


def assert_exports(model, device="cpu", strict=False):
    rows = torch.export.Dim("rows")
    x = torch.randn(40, 40, device=device)
    exported = torch.export.export(model, (x[:20],), dynamic_shapes=({0: rows},), strict=strict).module()
    for count in (2, 5, 16, 17, 40):
        torch.testing.assert_close(exported(x[:count]), model(x[:count]))


@every_device
@every_layer
def test_exports_with_a_batch_of_any_size(qconfig, device):
    assert_exports(quantized_mlp(qconfig, device).requires_grad_(False), device)


@every_device
@pytest.mark.parametrize("name", ["fp8", "int8-tensor", "fp8-rotation", "static-channel"])
def test_exports_strictly_with_a_batch_of_any_size(name, device):
    """One layer of each way to quantize an input: as compiled, Python's bytecode is traced."""
    qconfig = {**DYNAMIC, **STATIC}[name]
    assert_exports(quantized_mlp(qconfig, device).requires_grad_(False), device, strict=True)


@pytest.mark.parametrize("product", ["cuda_int8_mm", "_int_mm"])
def test_exports_with_the_products_that_this_machine_may_lack(monkeypatch, product):
    """CUDA's int8 product and that of CPUs with VNNI, of which `torch._int_mm` is the heart."""
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: (x.float() @ w.float()).int())
    monkeypatch.setattr(QF, "float_product", lambda dtype, device: False)
    if product == "cuda_int8_mm":
        monkeypatch.setattr(QF, "int8_mm", QF.cuda_int8_mm)
    else:
        monkeypatch.setattr(QF, "CPU_HAS_INT8_DOT", True)
    assert_exports(quantized_mlp(INT8_TOKEN).requires_grad_(False))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
@every_device
@every_layer
def test_jit_trace_records_the_model(qconfig, device, grad):
    # A trace multiplies fp8 values in float32: on a GPU one next to the middle of two may then be rounded otherwise.
    same = device == "cpu" or qconfig.activation_dtype == INT8
    for model in (quantized_mlp(qconfig, device), quantized_mlp(qconfig, device).requires_grad_(False)):
        x = torch.randn(2, 20, 40, device=device)
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)  # a branch that the trace would have lost
            traced = torch.jit.trace(model, x[:, :5], check_trace=same)
        torch.jit.save(traced, file := io.BytesIO())
        file.seek(0)
        actual, wanted = torch.jit.load(file)(x), model(x)
        if same:
            tolerance = {"rtol": 1e-3, "atol": 1e-3} if device == "cuda" else {}
            torch.testing.assert_close(actual, wanted, **tolerance)
        else:
            assert (actual - wanted).norm() <= 0.03 * wanted.norm()


def test_a_copy_compiles_apart_from_the_original():
    model = quantize_dynamic(nn.Sequential(nn.Linear(40, 24)), {"": INT8_TOKEN})
    other = copy.deepcopy(model)
    x = torch.randn(3, 40)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(other(x))
