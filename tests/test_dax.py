"""The arithmetic of `dax` against float64, and the contract of the layers and of `quantize_dynamic` around it.

Everything runs on the CPU, and again on a GPU where there is one.
"""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn

import dax.quant.functional as QF
from dax.quant import per_channel_symmetric, per_tensor_symmetric, per_token_symmetric
from dax.quant.nn import dynamic, quantized
from dax.quant.nn.linear import check_device
from dax.quant.quantization import convert, prepare, quantize_dynamic
from dax.quant.quantization.qconfig import (
    QConfig,
    get_default_dynamic_fp8_qconfig,
    get_default_dynamic_int8_qconfig,
    get_default_fp8_qconfig,
    get_dynamic_fp8_per_token_act_per_channel_weight_qconfig,
    get_dynamic_int8_per_channel_weight_qconfig,
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig,
    get_fp8_per_channel_weight_qconfig,
)

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
FP8_TOKEN = get_dynamic_fp8_per_token_act_per_channel_weight_qconfig()
INT8_TOKEN = get_dynamic_int8_per_token_act_per_channel_weight_qconfig()
DYNAMIC = {
    "fp8": FP8_TOKEN,
    "fp8-tensor": get_default_dynamic_fp8_qconfig(),
    "fp8-e5m2": get_dynamic_fp8_per_token_act_per_channel_weight_qconfig(activation_dtype=E5M2),
    "fp8-mixed": QConfig(E4M3, weight_scheme=per_tensor_symmetric, activation_scheme=per_token_symmetric),
    "int8": INT8_TOKEN,
    "int8-tensor": get_default_dynamic_int8_qconfig(),
    "int8-channel": get_dynamic_int8_per_channel_weight_qconfig(),
    "fp8-rotation": QConfig(E4M3, rotation=True),
    "int8-rotation": QConfig(INT8, rotation=True),
}
STATIC = {"static": get_default_fp8_qconfig(), "static-channel": get_fp8_per_channel_weight_qconfig()}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

every_qconfig = pytest.mark.parametrize("qconfig", DYNAMIC.values(), ids=DYNAMIC)
both_types = pytest.mark.parametrize("qconfig", [FP8_TOKEN, INT8_TOKEN], ids=["fp8", "int8"])
both_static = pytest.mark.parametrize("qconfig", STATIC.values(), ids=STATIC)
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small for two
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def quantize(linear: nn.Linear, qconfig: QConfig) -> dynamic.Linear:
    return quantize_dynamic(copy.deepcopy(linear), {"": qconfig})


def layer(k, n, qconfig, device="cpu", dtype=torch.float32, bias=True) -> dynamic.Linear:
    return quantize(nn.Linear(k, n, bias, device=device, dtype=dtype), qconfig)


def product64(layer, x):
    """What `layer(x)` is by definition, in float64, and the sum of the magnitudes that went into it."""
    xq, x_scale = layer.quantize_input(x)
    x, w = xq.double() * x_scale.double(), layer.qweight.double() * layer.weight_scale.double()
    bias = torch.zeros(1).double() if layer.bias is None else layer.bias.double()
    return x @ w.t() + bias.to(x), x.abs() @ w.abs().t() + bias.abs().to(x)


def model():
    """Names like the real model's: a conditioner, blocks that repeat, an output projection."""

    def block():
        attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})
        return nn.ModuleDict({"attn1": attention, "ffn": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))})

    return nn.ModuleDict(
        {
            "condition_embedder": nn.ModuleDict({"time_embedder": nn.Linear(8, 8)}),
            "blocks": nn.ModuleList([block(), block()]),
            "proj_out": nn.Linear(8, 4),
        }
    )


def mlp(k=40, hidden=72, n=24):
    return nn.Sequential(nn.LayerNorm(k), nn.Linear(k, hidden), nn.GELU(), nn.Linear(hidden, n, bias=False))


# --- the arithmetic


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
@pytest.mark.parametrize("code, step, fine", [(INT8, 0, 0.5), (E4M3, 2**-4, 2**-10), (E5M2, 2**-3, 2**-17)], ids=str)
def test_codes_are_the_nearest(code, step, fine, dtype):
    # Half a step at most: of a constant size for int8, relative to the value for fp8 down to its denormals.
    x = (torch.randn(50, 300) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    for quantize in (QF.quantize_per_token, QF.quantize_per_tensor):
        q, scale = quantize(x, code)
        assert q.dtype == code and scale.dtype == torch.float32
        error = (q.double() * scale.double() - x.double()).abs()
        assert (error <= (step * x.double().abs()).maximum(fine * scale.double()) * (1 + 1e-4)).all()
        assert q.float().abs().max() == QF.QMAX[code]
    assert QF.quantize_per_token(x, code)[1].shape == (50, 1) and scale.shape == ()


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
    """What holds for every input: codes within half a step, no NaN, and the product as float64 has it."""
    m, k = data.draw(strategies.integers(1, 18)), data.draw(strategies.integers(1, 40))
    numbers = strategies.floats(width=FLOATS[dtype], allow_nan=False)
    values = data.draw(strategies.lists(numbers, min_size=1, max_size=m * k))
    x = torch.tensor(values).repeat(-(-m * k // len(values)))[: m * k].view(m, k).to(dtype)
    largest = torch.finfo(dtype).max
    clipped = x.double().clamp(-largest, largest)
    for code, step, fine in ((INT8, 0, 0.5), (E4M3, 2**-4, 2**-10), (E5M2, 2**-3, 2**-17)):
        for quantize_x in (QF.quantize_per_token, QF.quantize_per_tensor):
            q, scale = quantize_x(x, code)
            error = (q.double() * scale.double() - clipped).abs()
            assert (error <= (step * clipped.abs()).maximum(fine * scale.double()) * (1 + 1e-4)).all()
    for qconfig in (FP8_TOKEN, INT8_TOKEN, DYNAMIC["int8-rotation"]):
        linear = layer(k, 3, qconfig)
        xq, x_scale = linear.quantize_input(x)
        y = linear.forward_quantized(xq, x_scale, torch.float32)
        expected, magnitude = product64(linear, x)
        fits = magnitude < 1e30  # beyond, a sum of codes times one scale may be more than float32 holds
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
def test_int8_product_is_exact(monkeypatch, int8_dot, m, k, n):
    if not int8_dot or QF.CPU_HAS_INT8_DOT:  # forcing the int8 instructions on a CPU without them gives wrong sums
        monkeypatch.setattr(QF, "CPU_HAS_INT8_DOT", int8_dot)
    x, w = (torch.randint(-127, 128, (rows, k)).to(INT8) for rows in (m, n))
    x[0], w[0], w[1] = 127, 127, -127  # the largest sums of either sign
    y = QF.int8_mm(x, w)
    assert y.dtype == torch.int32 and y.equal((x.long() @ w.long().t()).int())


def test_the_gpu_product_gets_the_shapes_that_it_takes(monkeypatch):
    """CUDA's `_int_mm` refuses what the CPU's takes: this asks for CUDA's rules on the CPU."""
    multiply, seen = torch._int_mm, []

    def strict(x, w):
        seen.append(x.shape)
        assert x.shape[0] > 16 and x.shape[1] % 16 == 0 and w.shape[1] % 16 == 0
        assert x.is_contiguous() and w.t().is_contiguous()
        return multiply(x, w)

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr(QF, "CPU_HAS_INT8_DOT", True)
    for m, k, n in [(1, 32, 32), (16, 33, 5), (17, 100, 70), (192, 64, 130)]:
        linear = layer(k, n, INT8_TOKEN)
        for x in (torch.randn(m, k), torch.randn(k, m).t()):
            linear(x)
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
def test_every_finite_fp8_code_is_read_exactly(dtype):
    q = torch.arange(256, dtype=torch.uint8).view(dtype)
    q = q[q.float().isfinite()]
    values, unit = QF.fp8_to_float32(q)
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
@pytest.mark.parametrize("code, gain", [(INT8, 8.0), (E4M3, -2.0)], ids=str)
def test_rotation_spreads_outliers(code, gain, device):
    """A few channels thirty times as large cost int8 its precision; e4m3, whose step follows the value, little."""
    linear = nn.Linear(512, 256, bias=False, device=device)
    x = torch.randn(256, 512, device=device)
    x[:, ::100] *= 30
    expected = x.double() @ linear.weight.double().t()
    noise = [(quantize(linear, QConfig(code, rotation=on))(x) - expected).square().sum() for on in (False, True)]
    assert 10 * torch.log10(noise[0] / noise[1]) >= gain


# --- the layer


@every_device
@every_qconfig
def test_storage_is_8_bit(qconfig, device):
    linear = nn.Linear(48, 20, device=device, dtype=torch.bfloat16)
    new = quantize(linear, qconfig)
    assert type(new) is dynamic.Linear and new.bias is not None and new.qweight.device == linear.weight.device
    assert new.qweight.shape == (20, 48) and new.qweight.dtype == qconfig.dtype and new.qweight.element_size() == 1
    assert new.weight.dtype == torch.bfloat16 and new.weight_scale.dtype == torch.float32
    assert new.weight_scale.shape == (20 if qconfig.weight_scheme is per_channel_symmetric else 1, 1)
    assert (new.weight - linear.weight).abs().max() <= 0.07 * linear.weight.abs().max()
    assert set(new.state_dict()) == {"qweight", "weight_scale", "bias"}


@every_device
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
@every_qconfig
def test_casting_the_model_leaves_the_codes(qconfig, cast, device):
    model = quantize_dynamic(mlp().to(device), {"": qconfig})
    before = copy.deepcopy(model)
    cast(model)
    assert model[1].qweight.dtype == qconfig.dtype and model[1].qweight.float().equal(before[1].qweight.float())
    assert model[1].weight_scale.dtype == torch.float32 and model[1].weight_scale.equal(before[1].weight_scale)
    assert model[1].weight.dtype == model[1].bias.dtype == model[0].weight.dtype != torch.float32
    x = torch.randn(3, 40, device=device)
    torch.testing.assert_close(model(x.to(model[1].bias.dtype)).float(), before(x), rtol=0.1, atol=0.1)


@every_device
@pytest.mark.parametrize("k, n", [(32, 48), (33, 21)])
@every_qconfig
def test_copies_and_moves_compute_the_same(qconfig, k, n, device):
    linear = layer(k, n, qconfig)
    x = torch.randn(5, k)
    expected = linear(x)
    assert copy.deepcopy(linear)(x).equal(expected)
    torch.save(linear, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=False)(x).equal(expected)
    torch.testing.assert_close(copy.deepcopy(linear).to(device)(x.to(device)).cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("k, n", [(32, 48), (33, 21)])
@every_qconfig
def test_state_dict_round_trip(qconfig, k, n, tmp_path):
    from safetensors.torch import load_file, save_file

    linear, x = layer(k, n, qconfig), torch.randn(5, k)
    state = linear.state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values())
    save_file(state, tmp_path / "layer.safetensors")
    for saved in (state, load_file(tmp_path / "layer.safetensors")):
        fresh = dynamic.Linear(k, n, qconfig=qconfig)
        fresh.load_state_dict(saved)
        assert fresh(x).equal(linear(x))
        quantized_differently = layer(k, n, qconfig)
        quantized_differently.load_state_dict(saved)
        assert quantized_differently(x).equal(linear(x))
        never_held_a_float_weight = quantize(nn.Linear(k, n, device="meta"), qconfig)
        assert never_held_a_float_weight.qweight.is_meta
        never_held_a_float_weight.load_state_dict(saved, assign=True)
        assert never_held_a_float_weight(x).equal(linear(x))


def test_loading_another_type_or_a_float_weight_is_refused():
    target = layer(32, 48, INT8_TOKEN)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError, match="qweight is torch.float8_e4m3fn, this model's is torch.int8"):
        target.load_state_dict(layer(32, 48, FP8_TOKEN).state_dict())
    assert target.qweight.equal(before["qweight"])
    with pytest.raises(RuntimeError, match="qweight"):
        target.load_state_dict(nn.Linear(32, 48).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight_scale"):
        target.load_state_dict(layer(32, 48, get_default_dynamic_int8_qconfig()).state_dict())


@every_device
@every_qconfig
def test_quantize_the_input_once(qconfig, device):
    x = torch.randn(2, 19, 40, device=device)
    first, second = layer(40, 24, qconfig, device), layer(40, 70, qconfig, device, bias=False)
    xq, x_scale = first.quantize_input(x)
    for linear in (first, second):
        assert linear.forward_quantized(xq, x_scale, torch.float32).equal(linear(x))
        assert linear.forward_quantized(xq, x_scale, torch.bfloat16).dtype == torch.bfloat16


@every_device
@pytest.mark.parametrize("k, widths", [(48, (32, 48, 16)), (40, (21, 5, 30))], ids=["even", "odd"])
@every_qconfig
def test_fuse(qconfig, k, widths, device, tmp_path):
    from safetensors.torch import load_file, save_file

    linears = [layer(k, n, qconfig, device, bias=i != 1) for i, n in enumerate(widths)]
    x = torch.randn(19, k, device=device)
    expected = [linear(x) for linear in linears]
    states = [copy.deepcopy(linear.state_dict()) for linear in linears]
    fused = dynamic.Linear.fuse(linears)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(list(fused(x).split(widths, -1)), expected, **tolerance)
    storage = fused.qweight.untyped_storage().data_ptr()
    assert all(linear.qweight.untyped_storage().data_ptr() == storage for linear in linears)
    assert all(linear(x).equal(y) for linear, y in zip(linears, expected))

    names = nn.ModuleDict({f"to_{i}": linear for i, linear in enumerate(linears)})
    save_file(names.state_dict(), tmp_path / "fused.safetensors")
    saved = load_file(tmp_path / "fused.safetensors", device=device)
    for i, state in enumerate(states):
        for name, tensor in state.items():
            assert saved[f"to_{i}.{name}"].float().equal(tensor.float())
    if k % 16 == 0 and qconfig.weight_scheme is per_channel_symmetric:
        linears[0].load_state_dict(layer(k, widths[0], qconfig).state_dict())  # reaches the fused layer too
        torch.testing.assert_close(fused(x)[:, : widths[0]], linears[0](x), **tolerance)
        assert not torch.allclose(linears[0](x), expected[0])


def test_fuse_refuses_layers_that_differ():
    with pytest.raises(ValueError, match="agree"):
        dynamic.Linear.fuse([layer(32, 16, FP8_TOKEN), layer(32, 16, INT8_TOKEN)])
    with pytest.raises(ValueError, match="agree"):
        dynamic.Linear.fuse([layer(32, 16, FP8_TOKEN), layer(48, 16, FP8_TOKEN)])


# --- which layers, and how


def kinds(model):
    """Dotted name → what a layer became: its weight's type, or None for a float one."""
    return {
        name: module.qconfig.dtype if isinstance(module, dynamic.Linear) else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | dynamic.Linear)
    }


def test_the_guide_leaves_exactly_what_it_names():
    result = kinds(quantize_dynamic(model(), {"": FP8_TOKEN, "condition_embedder": None, "proj_out": None}))
    assert {name for name, kind in result.items() if kind is None} == {"condition_embedder.time_embedder", "proj_out"}
    assert len(result) == 10 and {*result.values()} == {None, E4M3}


@pytest.mark.parametrize(
    "rules, changed",
    [
        ({}, {"": INT8}),
        ({"blocks": FP8_TOKEN}, {"blocks": E4M3}),
        ({"blocks.1": None}, {"blocks.1": None}),
        ({"to_q": None}, {"blocks.0.attn1.to_q": None, "blocks.1.attn1.to_q": None}),
        ({"attn1.to_q": None}, {"blocks.0.attn1.to_q": None, "blocks.1.attn1.to_q": None}),
        ({"attn1": None, "to_q": FP8_TOKEN}, {"attn1.to_q": E4M3, "attn1.to_k": None}),
        ({"attn1": None, "blocks.0.attn1": FP8_TOKEN}, {"blocks.0.attn1": E4M3, "blocks.1.attn1": None}),
        ({"to_q": None, "blocks.0": FP8_TOKEN}, {"blocks.0": E4M3, "blocks.1.attn1.to_q": None}),
        ({"to_q": None, "attn1.to_q": FP8_TOKEN}, {"attn1.to_q": E4M3}),
        ({"blocks": None, "blocks.1.ffn": FP8_TOKEN}, {"blocks": None, "blocks.1.ffn": E4M3}),
        ({"blocks.1.ffn": FP8_TOKEN, "blocks": None}, {"blocks": None, "blocks.1.ffn": E4M3}),
    ],
    ids=lambda value: "+".join(value),
)
def test_qconfig_dict_rules(rules, changed):
    names = kinds(model())
    expected = {
        name: next((changed[key] for key in sorted(changed, key=len, reverse=True) if key in name), INT8)
        for name in names
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(quantize_dynamic(model(), {"": INT8_TOKEN, **rules})) == expected


def test_without_a_default_the_rest_stays_float():
    result = kinds(quantize_dynamic(model(), {"ffn": INT8_TOKEN}))
    assert {name for name, kind in result.items() if kind} == {f"blocks.{i}.ffn.{j}" for i in (0, 1) for j in (0, 2)}


def test_a_key_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match="'proj_in' matches no module"):
        quantize_dynamic(model(), {"": INT8_TOKEN, "proj_in": None})
    with pytest.warns(UserWarning, match="'locks' matches no module"):  # part of a name is not a name
        result = kinds(quantize_dynamic(model(), {"": INT8_TOKEN, "locks": None, "blocks.0.ffn": FP8_TOKEN}))
    assert None not in result.values()


def test_nothing_to_quantize_warns():
    with pytest.warns(UserWarning, match="no layer of Sequential was quantized"):
        quantize_dynamic(nn.Sequential(nn.Conv2d(1, 1, 1)), {"": INT8_TOKEN})


def test_bad_requests_are_refused():
    with pytest.raises(TypeError, match="proj_out"):
        quantize_dynamic(model(), {"": INT8_TOKEN, "proj_out": "float"})
    with pytest.raises(ValueError, match="calibration"):
        quantize_dynamic(model(), {"": get_default_fp8_qconfig()})
    for arguments in [
        {"dtype": E5M2},
        {"dtype": INT8, "activation_dtype": E4M3},
        {"weight_scheme": per_token_symmetric},
        {"activation_scheme": per_channel_symmetric},
        {"static": True},
        {"static": True, "activation_scheme": per_tensor_symmetric, "rotation": True},
    ]:
        with pytest.raises(ValueError, match="QConfig"):
            QConfig(**arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    broken = model()
    broken["blocks"][1]["attn1"]["to_k"].weight[2, 3] = value
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.to_k.*NaN or an infinity"):
        quantize_dynamic(broken, {"": FP8_TOKEN})


def test_fp8_on_a_gpu_without_it_says_int8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(RuntimeError, match="use int8"):
        check_device(E4M3, torch.device("cuda"))
    check_device(INT8, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_device(E4M3, torch.device("cuda"))


def test_inplace_root_shared_and_mapping():
    original = model()
    copied = quantize_dynamic(original, {"": INT8_TOKEN}, inplace=False)
    assert not any(kinds(original).values()) and all(kinds(copied).values())
    assert quantize_dynamic(original, {"": INT8_TOKEN}) is original
    assert type(quantize_dynamic(nn.Linear(4, 4), {"": INT8_TOKEN})) is dynamic.Linear

    tied = nn.Linear(8, 8)
    model_with_tied = quantize_dynamic(nn.ModuleDict({"a": tied, "b": tied, "c": nn.Linear(8, 8)}), {"": INT8_TOKEN})
    assert model_with_tied["a"] is model_with_tied["b"] is not model_with_tied["c"]

    class Special(nn.Linear):
        pass

    class SpecialQuantized(dynamic.Linear):
        pass

    mixed = nn.Sequential(Special(8, 8), nn.Linear(8, 8))
    quantize_dynamic(mixed, {"": INT8_TOKEN}, mapping={Special: SpecialQuantized})
    assert [type(module) for module in mixed] == [SpecialQuantized, nn.Linear]


# --- static


@every_device
@both_static
def test_static_quantization(qconfig, device):
    float_model = mlp().to(device)
    model = prepare(float_model, {"": qconfig}, inplace=False)
    data = [torch.randn(19, 40, device=device) for _ in range(3)]
    for x in data:
        assert model(x).equal(float_model(x))  # observing changes nothing
    seen = max(float_model[0](x).abs().max() for x in data)
    assert convert(model) is model

    linear = model[1]
    assert type(linear) is quantized.Linear and linear.input_scale.dtype == torch.float32
    torch.testing.assert_close(linear.input_scale, seen / 448)
    assert {name for name, _ in model.named_buffers() if "observer" in name} == set()
    x = data[0]
    assert (model(x) - float_model(x)).square().sum() <= 0.01 * float_model(x).square().sum()
    expected, magnitude = product64(linear, float_model[0](x))
    assert ((linear(float_model[0](x)) - expected).abs() <= (1e-6 if device == "cpu" else 1e-3) * magnitude).all()

    beyond = linear(torch.full((1, 40), 1e9, device=device))  # saturates at what calibration saw
    torch.testing.assert_close(beyond, linear(torch.full((1, 40), seen.item(), device=device)))
    x = torch.randn(3, 40, device=device)
    x[1, 7] = torch.nan
    assert linear(x)[1].isnan().all()

    fresh = quantized.Linear(40, 72, qconfig=qconfig, device=device)
    fresh.load_state_dict(linear.half().state_dict())
    assert fresh.input_scale.dtype == torch.float32 and fresh.input_scale == linear.input_scale
    assert fresh(data[0]).equal(linear.float()(data[0]))


@both_static
def test_static_layers_with_one_input_fuse(qconfig):
    model = prepare(nn.ModuleList([nn.Linear(40, 24), nn.Linear(40, 8)]), {"": qconfig})
    x = torch.randn(19, 40)
    model[0](x), model[1](x)
    convert(model)
    fused = quantized.Linear.fuse(list(model))
    torch.testing.assert_close(fused(x), torch.cat([linear(x) for linear in model], -1))
    model[1].input_scale.mul_(2)
    with pytest.raises(ValueError, match="agree"):
        quantized.Linear.fuse(list(model))


def test_calibration_that_missed_or_broke_is_refused():
    with pytest.raises(ValueError, match="1: calibration never reached"):
        convert(prepare(mlp(), {"": get_default_fp8_qconfig()}))
    for value in (torch.nan, torch.inf):
        model = prepare(nn.Sequential(nn.Linear(4, 4)), {"": get_default_fp8_qconfig()})
        model(torch.full((2, 4), value))
        with pytest.raises(ValueError, match="0: calibration saw a NaN or an infinity"):
            convert(model)


def test_prepare_mixes_static_and_dynamic():
    model = prepare(mlp(), {"": get_default_fp8_qconfig(), "3": INT8_TOKEN})
    model(torch.randn(5, 40))
    convert(model)
    assert [type(module) for module in model] == [nn.LayerNorm, quantized.Linear, nn.GELU, dynamic.Linear]


# --- the compiler


@every_device
@pytest.mark.parametrize("qconfig", [*DYNAMIC.values(), *STATIC.values()], ids=[*DYNAMIC, *STATIC])
def test_compiles_without_a_graph_break(qconfig, device):
    # aot_eager traces and functionalizes as every backend does, and needs no C++ compiler.
    model = prepare(mlp(k=40, hidden=70).to(device), {"": qconfig})
    x = torch.randn(2, 19, 40, device=device)
    model(x)
    convert(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x[:, :1]), model(x[:, :1]))
