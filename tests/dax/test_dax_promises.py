"""What `nn.Linear` promises and a quantized layer keeps: which inputs it takes, and the type of its output."""

import pytest
import torch
from dax_layers import DYNAMIC, INT8_TOKEN, STATIC, both_types, every_device, layer, seed  # noqa: F401
from torch import nn

from dax.quant.quantization import convert, prepare

every_layer = pytest.mark.parametrize("qconfig", [*DYNAMIC.values(), *STATIC.values()], ids=[*DYNAMIC, *STATIC])


def pair(k, n, qconfig, device="cpu", dtype=torch.float32):
    """Return a float Linear and the quantized one made from it."""
    linear = nn.Linear(k, n, device=device, dtype=dtype)
    model = prepare(nn.Sequential(linear), {"": qconfig}, inplace=False)
    with torch.no_grad():
        model(torch.randn(40, k, device=device, dtype=dtype))
    return linear, convert(model)[0]


@every_layer
@pytest.mark.parametrize("shape", [(2, 128), (128,), (3, 2, 63), (5, 1), (2, 0), (0, 63), ()], ids=str)
def test_a_wrong_width_raises_what_linear_raises(qconfig, shape):
    linear, quantized = pair(64, 4, qconfig)
    x = torch.randn(shape)
    with pytest.raises(RuntimeError) as expected:
        linear(x)
    for call in (quantized, getattr(quantized, "forward_gelu", quantized)):
        with pytest.raises(RuntimeError) as raised:
            call(x)
        assert str(raised.value) == str(expected.value)


@both_types
@pytest.mark.parametrize("width", [16, 32, 48, 64])
def test_the_functional_product_refuses_another_width_too(qconfig, width):
    quantized = layer(33, 4, qconfig)  # stored 48 wide
    xq, x_scale = layer(width, 4, qconfig).quantize_input(torch.randn(2, width))
    with pytest.raises(RuntimeError, match=f"2x{width} and 33x4"):
        quantized.forward_quantized(xq, x_scale, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_inputs_that_are_no_floats_are_refused(dtype):
    with pytest.raises(RuntimeError, match="float type"):
        layer(8, 4, INT8_TOKEN)(torch.ones(2, 8).to(dtype))


@every_device
@every_layer
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_no_rows_give_no_rows(qconfig, shape, device):
    linear, quantized = pair(8, 4, qconfig, device)
    x = torch.randn(shape, device=device, requires_grad=True)
    for y in (quantized(x), getattr(quantized, "forward_gelu", quantized)(x)):
        assert y.shape == linear(x).shape and y.dtype == x.dtype
    quantized(x).sum().backward()
    assert x.grad.shape == shape and quantized.bias.grad.equal(torch.zeros(4, device=device))


@every_layer
def test_the_input_may_be_named_and_calibration_sees_it(qconfig):
    linear = nn.Linear(8, 4)
    model = prepare(nn.ModuleDict({"layer": linear}), {"": qconfig}, inplace=False)
    x = torch.randn(5, 8)
    model["layer"](input=x)
    quantized = convert(model)["layer"]
    assert quantized(input=x).equal(quantized(x))


@every_device
@every_layer
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_type_that_linear_gives_and_changes_nothing_else(qconfig, dtype, amp, device):
    linear, quantized = pair(64, 16, qconfig, device, dtype)
    x = torch.randn(5, 64, device=device, dtype=dtype)
    expected = quantized(x.to(amp))
    with torch.autocast(device, amp):
        y = quantized(x)
        assert y.dtype == linear(x).dtype == amp
        assert y.equal(expected)  # the sums are not in 16 bits
        assert quantized.weight.dtype == dtype
        if hasattr(quantized, "forward_gelu"):
            assert quantized.forward_gelu(x).dtype == amp
    assert quantized(x).dtype == dtype


@both_types
def test_quantizing_under_autocast_gives_the_same_layer(qconfig):
    linear = nn.Linear(64, 16)
    expected = layer(64, 16, DYNAMIC["fp8-rotation"])
    for config in (qconfig, DYNAMIC["int8-rotation"]):
        expected = convert(prepare(nn.Sequential(linear), {"": config}, inplace=False))[0]
        with torch.autocast("cpu", torch.bfloat16):
            quantized = convert(prepare(nn.Sequential(linear), {"": config}, inplace=False))[0]
        assert quantized.qweight.view(torch.int8).equal(expected.qweight.view(torch.int8))
        assert quantized.weight_scale.equal(expected.weight_scale)


def test_autocast_leaves_float64_alone():
    quantized = layer(8, 4, INT8_TOKEN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64
