"""How a quantized layer stores, moves, loads and fuses."""

import copy
import io

import pytest
import torch
from dax_layers import FP8_TOKEN, INT8_TOKEN, every_device, every_qconfig, layer, mlp, no_grad, quantize, seed  # noqa: F401
from torch import nn

from dax.quant import per_channel_symmetric
from dax.quant.nn import dynamic
from dax.quant.quantization import quantize_dynamic
from dax.quant.quantization.qconfig import get_default_dynamic_int8_qconfig


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
def test_casting_the_model_leaves_the_quantized_values(qconfig, cast, device):
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
