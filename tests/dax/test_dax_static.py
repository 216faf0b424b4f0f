"""Static quantization: prepare, calibrate, convert."""

import pytest
import torch
from dax_layers import INT8_TOKEN, both_static, every_device, mlp, no_grad, product64, seed  # noqa: F401
from torch import nn

from dax.quant.nn import dynamic, quantized
from dax.quant.quantization import convert, prepare
from dax.quant.quantization.qconfig import get_default_fp8_qconfig


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
