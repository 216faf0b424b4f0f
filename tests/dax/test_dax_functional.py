"""The functions that layers are made of: padding, products, rotation."""

import pytest
import torch
from dax_layers import (  # noqa: F401
    E4M3,
    E5M2,
    FP8_TOKEN,
    INT8,
    INT8_TOKEN,
    every_device,
    layer,
    no_grad,
    product64,
    quantize,
    seed,
)
from torch import nn

import dax.quant.functional as QF
from dax.quant.quantization.qconfig import QConfig


@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2], ids=str)
def test_pad_to(dtype):
    q = torch.arange(1, 16).view(3, 5).to(dtype)
    padded = QF.pad_to(q, 17, 16)
    assert padded.dtype == dtype and padded.shape == (17, 16) and padded.is_contiguous()
    assert padded[:3, :5].float().equal(q.float()) and padded.float().sum() == q.float().sum()
    assert QF.pad_to(q, 3, 5) is q
    for shape, expected in {(1, 1): (16, 16), (16, 17): (16, 32), (33, 48): (48, 48)}.items():
        assert QF.pad_weight(torch.ones(shape).to(dtype)).shape == expected


@pytest.mark.parametrize("int8_dot", [True, False])
@pytest.mark.parametrize("m, k, n", [(1, 16, 16), (16, 1040, 16), (17, 1041, 32), (3, 4096, 16)])
def test_int8_sums_are_exact_as_far_as_float32_holds_them(monkeypatch, int8_dot, m, k, n):
    if not int8_dot or QF.CPU_HAS_INT8_DOT:  # forcing the int8 instructions on a CPU without them gives wrong sums
        monkeypatch.setattr(QF, "CPU_HAS_INT8_DOT", int8_dot)
    x, w = (torch.randint(-127, 128, (rows, k)).to(INT8) for rows in (m, n))
    x[0], w[0], w[1] = 127, 127, -127  # the largest sums of either sign
    one = torch.ones(1, 1)
    y, expected = QF.linear(x, one, w, one).long(), x.long() @ w.long().t()
    if k <= 1040:  # 127² · 1040 < 2²⁴
        assert y.equal(expected)
    assert ((y - expected).abs() <= 2**-22 * 127**2 * k).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_rounding_in_float32_is_the_cast(dtype):
    largest, smallest = QF.QMAX[dtype], torch.finfo(dtype).smallest_normal
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    halfway = (values[1:] + values[:-1]) / 2  # ties, the denormals' too
    around = torch.cat([halfway * (1 + step) for step in (-(2**-23), 0, 2**-23)])
    spread = torch.randn(20000) * torch.logspace(-3, 2, 20000) * smallest * 10
    q = torch.cat([values, around, spread, spread * largest, torch.tensor([0.0, -0.0, 1e-42])]).clamp(-largest, largest)
    assert QF.round_to_fp8(q.clone(), dtype).equal(q.to(dtype).float())
    assert QF.round_to_fp8(torch.tensor([torch.nan]), dtype).isnan().all()


def test_without_torchs_private_products_float32_computes_the_same(monkeypatch):
    for name in ("HAS_INT_MM", "HAS_SCALED_MM", "CPU_HAS_INT8_DOT"):
        monkeypatch.setattr(QF, name, False)
    for dtype in (INT8, E4M3):
        for device in ("cpu", "cuda"):
            assert QF.float_product(dtype, torch.device(device))
    for qconfig in (FP8_TOKEN, INT8_TOKEN):
        linear, x = layer(100, 70, qconfig), torch.randn(5, 100)
        expected, _ = product64(linear, x)
        torch.testing.assert_close(linear(x), expected.float())


def test_the_gpu_product_gets_the_shapes_that_it_takes(monkeypatch):
    """CUDA's `_int_mm` refuses what the CPU's takes: this asks for CUDA's rules on the CPU."""
    seen = []

    def strict(x, w):
        seen.append(x.shape)
        assert x.shape[0] > 16 and x.shape[1] % 16 == 0 and w.shape[1] % 16 == 0
        assert x.is_contiguous() and w.t().is_contiguous()
        return (x.long() @ w.long()).int()

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr(QF, "float_product", lambda dtype, device: False)
    monkeypatch.setattr(QF, "int8_mm", QF.cuda_int8_mm)
    for m, k, n in [(1, 32, 32), (16, 33, 5), (17, 100, 70), (192, 64, 130)]:
        linear = layer(k, n, INT8_TOKEN)
        for x in (torch.randn(m, k), torch.randn(k, m).t()):
            expected, _ = product64(linear, x)
            torch.testing.assert_close(linear(x).double(), expected)
    assert len(seen) == 8


def scaled_mm_by_cuda_rules(x, w, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
    """What CUDA's `_scaled_mm` takes, and gives. (The CPU's knows no row-wise scales in torch 2.11.)"""
    (m, k), n = x.shape, w.shape[1]
    assert x.is_contiguous() and w.t().is_contiguous() and k % 16 == 0 and n % 16 == 0
    per_tensor = scale_a.numel() == scale_b.numel() == 1
    assert per_tensor or (scale_a.shape == (m, 1) and scale_b.shape == (1, n))
    assert scale_a.is_contiguous() and scale_b.is_contiguous() and scale_a.dtype == scale_b.dtype == torch.float32
    assert out_dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
    return ((x.double() * scale_a) @ (w.double() * scale_b) + (0 if bias is None else bias)).to(out_dtype)


@every_device
@pytest.mark.parametrize("activation", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("x_scheme", [QF.quantize_per_token, QF.quantize_per_tensor])
@pytest.mark.parametrize("w_scheme", [QF.quantize_per_token, QF.quantize_per_tensor])
@pytest.mark.parametrize("m, biased", [(1, True), (17, True), (17, False)])
def test_product_with_scales_in_its_epilogue(m, biased, w_scheme, x_scheme, activation, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm_by_cuda_rules)
    x, w = torch.randn(m, 64, device=device), torch.randn(48, 64, device=device)
    bias = torch.randn(48, device=device) if biased else None
    (xq, x_scale), (wq, w_scale) = x_scheme(x, activation), w_scheme(w, E4M3)
    y = QF.scaled_fp8_mm(xq, x_scale.reshape(-1, 1), wq, w_scale.reshape(-1, 1), bias)
    expected = (xq.double() * x_scale) @ (wq.double() * w_scale).t() + (bias if biased else 0)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=2**-7)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_every_finite_fp8_value_is_read_exactly(dtype):
    q = torch.arange(256, dtype=torch.uint8).view(dtype)
    q = q[q.float().isfinite()]
    values, unit = QF.to_float32(q)
    assert values.dtype == torch.float32 and (values * unit).equal(q.float())


@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2], ids=str)
def test_values_beyond_the_scale_saturate(dtype):
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, 1.001, -1.001, 0.0])
    q = QF.quantize(x, torch.tensor(1 / QF.QMAX[dtype]), dtype).float()
    assert (q / QF.QMAX[dtype]).tolist() == [1, -1, 1, -1, 1, -1, 0]


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k, block", [(192, 64), (48, 16), (20, 4), (33, 1)])
def test_rotation_is_orthonormal_and_its_own_inverse(k, block, dtype, device):
    identity = torch.eye(k, device=device, dtype=dtype)
    h = QF.rotate(identity)
    assert h.dtype == dtype and h.equal(h.t()) and (h @ h).equal(identity)
    assert ((h != 0).sum(1) == block).all()
    x = torch.randn(5, k, device=device)
    torch.testing.assert_close(QF.rotate(QF.rotate(x)), x)


@every_device
@pytest.mark.parametrize("dtype, gain", [(INT8, 8.0), (E4M3, -2.0)], ids=str)
def test_rotation_spreads_outliers(dtype, gain, device):
    """A few channels thirty times as large cost int8 its precision; e4m3, whose step follows the value, little."""
    linear = nn.Linear(512, 256, bias=False, device=device)
    x = torch.randn(256, 512, device=device)
    x[:, ::100] *= 30
    expected = x.double() @ linear.weight.double().t()
    noise = [(quantize(linear, QConfig(dtype, rotation=on))(x) - expected).square().sum() for on in (False, True)]
    assert 10 * torch.log10(noise[0] / noise[1]) >= gain
