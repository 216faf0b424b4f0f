"""Which layers of a model are quantized, and how."""

import warnings

import pytest
import torch
from dax_layers import E4M3, E5M2, FP8_TOKEN, INT8, INT8_TOKEN, kinds, model, no_grad, seed  # noqa: F401
from torch import nn

from dax.quant import per_channel_symmetric, per_tensor_symmetric, per_token_symmetric
from dax.quant.nn import dynamic
from dax.quant.nn.linear import check_device
from dax.quant.quantization import convert, prepare, quantize_dynamic
from dax.quant.quantization.qconfig import QConfig, get_default_fp8_qconfig


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


@pytest.mark.parametrize("through_prepare", [False, True])
def test_each_layer_is_moved_to_the_device_before_it_is_quantized(through_prepare, monkeypatch):
    """``meta`` stands for a small GPU: it never holds a second float weight."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4))
    held = []
    from_float = dynamic.Linear.from_float.__func__

    def counting(cls, linear, qconfig):
        held.append(sum(type(layer) is nn.Linear and layer.weight.is_meta for layer in model))
        return from_float(cls, linear, qconfig)

    monkeypatch.setattr(dynamic.Linear, "from_float", classmethod(counting))
    qconfigs = {"": QConfig(torch.int8), "3": None}
    if through_prepare:
        convert(prepare(model, qconfigs), device="meta")
    else:
        assert quantize_dynamic(model, qconfigs, device="meta") is model
    assert held == [1, 1]
    assert type(model[0]) is type(model[2]) is dynamic.Linear and type(model[3]) is nn.Linear
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_a_device_that_cannot_multiply_the_type_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="int8"):
        quantize_dynamic(model, {"": QConfig(torch.float8_e4m3fn)}, device="cuda")
    assert type(model[0]) is nn.Linear and model[0].weight.device.type == "cpu"
