"""What happens to a model around the layers that are replaced: hooks, fast paths, subclasses, errors half-way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dax_layers import FP8_TOKEN, INT8_TOKEN, both_types, kinds, model, no_grad, seed  # noqa: F401
from torch import nn

from dax.quant.nn import dynamic, quantized
from dax.quant.nn.linear import check_device
from dax.quant.quantization import convert, prepare, quantize_dynamic
from dax.quant.quantization.qconfig import get_default_fp8_qconfig

# --- errors half-way


def assert_untouched(broken, before, float_model):
    assert [(name, id(module)) for name, module in broken.named_modules()] == before
    assert not any(isinstance(module, dynamic.Linear | quantized.Linear) for module in broken.modules())
    for name, tensor in float_model.state_dict().items():
        torch.testing.assert_close(broken.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("damage", ["nan", "empty", "forward", "state hook"])
def test_an_error_leaves_the_model_as_it_was(damage):
    broken = model()
    last = broken["proj_out"]
    if damage == "nan":
        last.weight[1, 2] = torch.nan
    elif damage == "empty":
        last.weight = nn.Parameter(torch.empty(0, 8))
    elif damage == "forward":
        last.forward = lambda x: F.linear(x, last.weight) * 2
    else:
        last._register_load_state_dict_pre_hook(lambda *args: None)
    before, float_model = [(name, id(module)) for name, module in broken.named_modules()], copy.deepcopy(broken)
    with pytest.raises(ValueError, match="^proj_out: "):
        quantize_dynamic(broken, {"": INT8_TOKEN})
    assert_untouched(broken, before, float_model)


def test_a_device_that_cannot_multiply_leaves_the_model_as_it_was(monkeypatch):
    """The last layer alone is said to be on such a GPU."""
    whole = model()

    def check(dtype, device):
        seen.append(dtype)
        check_device(dtype, torch.device("cuda") if len(seen) == len(kinds(whole)) else device)

    seen: list[torch.dtype] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr("dax.quant.nn.linear.check_device", check)
    before, float_model = [(name, id(module)) for name, module in whole.named_modules()], copy.deepcopy(whole)
    with pytest.raises(RuntimeError, match="use int8"):
        quantize_dynamic(whole, {"": FP8_TOKEN})
    assert_untouched(whole, before, float_model)


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was(recwarn):
    import warnings

    whole = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            quantize_dynamic(whole, {"": INT8_TOKEN, "nowhere": None})
    assert not any(kinds(whole).values())


def test_a_type_of_the_callers_that_fails_leaves_the_model_as_it_was():
    class Fragile(dynamic.Linear):
        @classmethod
        def from_float(cls, linear, qconfig):
            if linear.out_features == 4:
                raise ValueError("too narrow")
            return super().from_float(linear, qconfig)

    whole = model()
    before, float_model = [(name, id(module)) for name, module in whole.named_modules()], copy.deepcopy(whole)
    with pytest.raises(ValueError, match="proj_out: too narrow"):
        quantize_dynamic(whole, {"": INT8_TOKEN}, mapping={nn.Linear: Fragile})
    assert_untouched(whole, before, float_model)


def test_a_layer_that_calibration_missed_leaves_the_model_prepared():
    prepared = prepare(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), {"": get_default_fp8_qconfig()})
    prepared["a"](torch.randn(4, 8))
    with pytest.raises(ValueError, match="^b: calibration never reached"):
        convert(prepared)
    assert type(prepared["a"]) is nn.Linear
    prepared["b"](torch.randn(4, 8))
    assert type(convert(prepared)["a"]) is quantized.Linear


# --- hooks


@both_types
def test_hooks_are_carried_over_and_their_handles_remove_them(qconfig):
    linear = nn.Linear(16, 8)
    calls = []

    def hook(name):
        return lambda *args, **kwargs: calls.append(name)

    handles = [
        linear.register_forward_pre_hook(hook("pre")),
        linear.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True),
        linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        linear.register_forward_hook(hook("post"), always_call=True),
        linear.register_forward_hook(lambda module, args, kwargs, y: y + 1, with_kwargs=True),
        linear.register_full_backward_pre_hook(hook("backward pre")),
        linear.register_full_backward_hook(hook("backward")),
    ]
    plain = quantize_dynamic(nn.Sequential(copy.deepcopy(linear)), {"": qconfig})[0]
    for hooks in (plain._forward_pre_hooks, plain._forward_hooks, plain._backward_hooks, plain._backward_pre_hooks):
        hooks.clear()
    hooked = quantize_dynamic(nn.Sequential(linear), {"": qconfig})
    x = torch.randn(3, 16)
    assert hooked(x).equal(plain(x * 2) + 1)
    assert calls == ["pre", "post"]
    with torch.enable_grad():
        hooked(x.requires_grad_()).sum().backward()
    assert calls[2:] == ["pre", "post", "backward pre", "backward"]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        hooked(torch.randn(3, 15))
    assert calls[-1] == "post"  # it is to be called always
    calls.clear()
    for handle in handles:
        handle.remove()
    assert hooked(x.detach()).equal(plain(x.detach())) and not calls


def test_calibration_keeps_the_hooks_and_takes_its_own_away():
    linear, calls = nn.Linear(8, 8), []
    linear.register_forward_pre_hook(lambda *args: calls.append(1))
    prepared = prepare(nn.Sequential(linear), {"": get_default_fp8_qconfig()})
    prepared(torch.randn(3, 8))
    converted = convert(prepared)
    converted(torch.randn(3, 8))
    assert len(calls) == 2 and len(converted[0]._forward_pre_hooks) == 1


# --- Linears that are something else


@both_types
def test_subclasses_and_computed_weights_stay_in_float_and_are_named_once(qconfig):
    class Special(nn.Linear):
        pass

    whole = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("plain", "parametrized", "hooked", "kept")})
    whole["special"] = Special(8, 8)
    whole["special_kept"] = Special(8, 8)
    nn.utils.parametrizations.weight_norm(whole["parametrized"])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(whole["hooked"])
    x = torch.randn(3, 8)
    expected = {name: module(x) for name, module in whole.items()}
    with pytest.warns(UserWarning) as warned:
        quantize_dynamic(whole, {"": qconfig, "kept": None, "special_kept": None})
    (message,) = [str(warning.message) for warning in warned]
    for name in ("parametrized (ParametrizedLinear)", "hooked (Linear)", "special (Special)"):
        assert name in message
    assert "kept (" not in message
    assert [name for name, module in whole.items() if type(module) is dynamic.Linear] == ["plain"]
    assert all(whole[name](x).equal(y) for name, y in expected.items() if name != "plain")


# --- nn.TransformerEncoder


@both_types
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.filterwarnings("ignore:only plain Linear")  # out_proj of MultiheadAttention
def test_a_transformer_encoder_calls_its_quantized_layers(qconfig, masked):
    encoder_layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(encoder_layer, 2).eval().requires_grad_(False)
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    expected = encoder(x, src_key_padding_mask=mask if masked else None)
    quantize_dynamic(encoder, {"": qconfig})
    layers = [module for module in encoder.modules() if isinstance(module, dynamic.Linear)]
    assert len(layers) == 4
    called = []
    quantize_input = dynamic.Linear._quantize_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic.Linear, "_quantize_input", lambda s, *a: called.append(s) or quantize_input(s, *a))
        y = encoder(x, src_key_padding_mask=mask if masked else None)
    assert {*called} == {*layers}
    keep = ~mask
    torch.testing.assert_close(y[keep], expected[keep], rtol=0.1, atol=0.1)


# --- shared layers and weights


@both_types
def test_linears_that_share_a_weight_share_the_quantized_one(qconfig):
    whole = nn.ModuleDict({name: nn.Linear(33, 8) for name in ("a", "b", "c")})
    whole["b"].weight = whole["a"].weight
    whole["again"] = whole["a"]
    quantize_dynamic(whole, {"": qconfig})
    assert whole["again"] is whole["a"] is not whole["b"]
    assert whole["b"].qweight is whole["a"].qweight and whole["b"].weight_scale is whole["a"].weight_scale
    assert whole["c"].qweight is not whole["a"].qweight
    assert whole["a"].bias is not whole["b"].bias


def test_below_a_replaced_module_nothing_is_replaced():
    class Pair(nn.Sequential):
        pass

    class QuantizedPair(nn.Module):
        @classmethod
        def from_float(cls, module, qconfig):
            new = cls()
            new.only = dynamic.Linear.from_float(module[0], qconfig)
            return new

    whole = nn.ModuleDict({"pair": Pair(nn.Linear(8, 8), nn.Linear(8, 8)), "pair_out": nn.Linear(8, 8)})
    quantize_dynamic(whole, {"": INT8_TOKEN}, mapping={Pair: QuantizedPair, nn.Linear: dynamic.Linear})
    assert type(whole["pair"]) is QuantizedPair and type(whole["pair_out"]) is dynamic.Linear
