"""Quantized products against float64, for every kind of input."""

import pytest
import torch
from dax_layers import (  # noqa: F401
    DYNAMIC,
    E4M3,
    E5M2,
    FP8_TOKEN,
    INT8,
    INT8_TOKEN,
    every_device,
    every_qconfig,
    layer,
    no_grad,
    product64,
    quantize,
    seed,
)
from hypothesis import given, settings, strategies
from torch import nn

import dax.quant.functional as QF
from dax.quant import per_tensor_symmetric, per_token_symmetric


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 32, 32), (1, 33, 5), (17, 100, 70), (40, 1100, 48), (192, 64, 130)])
@every_qconfig
def test_product_is_the_definition(qconfig, m, k, n, dtype, device):
    linear = layer(k, n, qconfig, device, dtype, bias=n != 70)
    x = torch.randn(m, k, device=device, dtype=dtype)
    y = linear(x)
    expected, magnitude = product64(linear, x)
    assert y.dtype == dtype and y.shape == (m, n)
    # fp8 tensor cores add in fewer than float32's bits
    summation = 1e-3 if device == "cuda" and qconfig.dtype == E4M3 else 1e-6
    assert ((y - expected).abs() <= summation * magnitude + torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("qdtype, step, fine", [(INT8, 0, 0.5), (E4M3, 2**-4, 2**-10), (E5M2, 2**-3, 2**-17)], ids=str)
def test_quantized_values_are_the_nearest(qdtype, step, fine, dtype):
    # Half a step at most: of a constant size for int8, relative to the value for fp8 down to its denormals.
    x = (torch.randn(50, 300) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    for quantize_x in (QF.quantize_per_token, QF.quantize_per_tensor):
        q, scale = quantize_x(x, qdtype)
        assert q.dtype == qdtype and scale.dtype == torch.float32
        error = (q.double() * scale.double() - x.double()).abs()
        assert (error <= (step * x.double().abs()).maximum(fine * scale.double()) * (1 + 1e-4)).all()
        assert q.float().abs().max() == QF.QMAX[qdtype]
    assert QF.quantize_per_token(x, qdtype)[1].shape == (50, 1) and scale.shape == ()


@every_device
@pytest.mark.parametrize(
    "qconfig, k, decibel",
    [(INT8_TOKEN, 1536, 38.5), (INT8_TOKEN, 8960, 37.5), (FP8_TOKEN, 1536, 27.5), (FP8_TOKEN, 8960, 27.5)],
    ids=["int8-1536", "int8-8960", "fp8-1536", "fp8-8960"],
)
def test_signal_to_noise_on_gaussian_data(qconfig, k, decibel, device):
    linear = nn.Linear(k, 256, bias=False, device=device)
    nn.init.normal_(linear.weight)
    x = torch.randn(256, k, device=device)
    expected = x.double() @ linear.weight.double().t()
    noise = quantize(linear, qconfig)(x) - expected
    assert 10 * torch.log10(expected.square().sum() / noise.square().sum()) >= decibel


FLOATS = {torch.float32: 32, torch.bfloat16: 32, torch.float16: 16}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_finite_or_infinite_values(dtype, data):
    """What holds for every input: values within half a step, no NaN, and the product as float64 has it."""
    m, k = data.draw(strategies.integers(1, 18)), data.draw(strategies.integers(1, 40))
    numbers = strategies.floats(width=FLOATS[dtype], allow_nan=False)
    values = data.draw(strategies.lists(numbers, min_size=1, max_size=m * k))
    x = torch.tensor(values).repeat(-(-m * k // len(values)))[: m * k].view(m, k).to(dtype)
    largest = torch.finfo(dtype).max
    clipped = x.double().clamp(-largest, largest)
    for qdtype, step, fine in ((INT8, 0, 0.5), (E4M3, 2**-4, 2**-10), (E5M2, 2**-3, 2**-17)):
        for quantize_x in (QF.quantize_per_token, QF.quantize_per_tensor):
            q, scale = quantize_x(x, qdtype)
            error = (q.double() * scale.double() - clipped).abs()
            assert (error <= (step * clipped.abs()).maximum(fine * scale.double()) * (1 + 1e-4)).all()
    for qconfig in (FP8_TOKEN, INT8_TOKEN, DYNAMIC["int8-rotation"]):
        linear = layer(k, 3, qconfig)
        xq, x_scale = linear.quantize_input(x)
        y = linear.forward_quantized(xq, x_scale, torch.float32)
        expected, magnitude = product64(linear, x)
        fits = magnitude < 1e30  # beyond, a sum of products times one scale may be more than float32 holds
        assert not y.isnan().any() and not linear(x).isnan().any()
        assert ((y - expected).abs() <= 1e-6 * magnitude + 1e-37)[fits].all()


@every_device
@every_qconfig
def test_zeros_and_denormals(qconfig, device):
    linear = nn.Linear(48, 20, device=device)
    linear.weight[3] = 0
    linear.weight[4] = 1e-42
    linear = quantize(linear, qconfig)
    x = torch.randn(6, 48, device=device)
    x[0], x[1] = 0, 1e-42
    y = linear(x)
    assert y.isfinite().all()
    assert y[:2].equal(linear.bias.expand(2, 20))
    torch.testing.assert_close(y[:, 3:5], linear.bias[3:5].expand(6, 2), rtol=1e-6, atol=1e-37)
    assert linear(torch.zeros_like(x)).equal(linear.bias.expand(6, 20))


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_qconfig
def test_infinity_saturates_and_never_makes_a_nan(qconfig, dtype, device):
    linear = layer(48, 20, qconfig, device, dtype)
    x = torch.randn(6, 48, device=device, dtype=dtype)
    finite = linear(x)
    x[1, 5], x[2, 6], x[2, 7] = -torch.inf, torch.inf, -torch.inf
    xq, x_scale = linear.quantize_input(x)
    assert (xq.float() * x_scale).isfinite().all()
    assert qconfig.rotation or xq[1, 5].float() == -QF.QMAX[qconfig.activation_dtype]
    largest = linear.quantize_input(x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max))
    assert xq.float().equal(largest[0].float()) and x_scale.equal(largest[1])
    y = linear(x)
    assert not y.isnan().any()
    if qconfig.activation_scheme is per_token_symmetric:
        assert y[[0, 3, 4, 5]].equal(finite[[0, 3, 4, 5]])


@every_device
@every_qconfig
def test_nan_shows_in_its_row(qconfig, device):
    linear = layer(48, 20, qconfig, device)
    x = torch.randn(6, 48, device=device)
    x[1, 5] = torch.nan
    bad = linear(x).isnan()
    assert bad[1].all()
    assert bad.all() if qconfig.activation_scheme is per_tensor_symmetric else not bad[[0, 2, 3, 4, 5]].any()


@every_device
@every_qconfig
def test_any_layout_and_any_leading_dimensions(qconfig, device):
    linear = layer(48, 20, qconfig, device)
    x = torch.randn(2, 3, 96, device=device)
    expected = linear(x[..., ::2].contiguous())
    assert expected.shape == (2, 3, 20)
    assert linear(x[..., ::2]).equal(expected)
    assert linear(x[..., ::2].contiguous().permute(2, 0, 1).contiguous().permute(1, 2, 0)).equal(expected)
    assert linear(x[0, 0, ::2]).shape == (20,)
    columns = torch.randn(48, 7, device=device)
    assert linear(columns.t()).equal(linear(columns.t().contiguous()))
