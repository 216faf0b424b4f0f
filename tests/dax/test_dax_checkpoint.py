"""Saved 8-bit models: what is loaded computes the same to the last bit, or the folder is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dax.quant.nn import dynamic, quantized
from dax.quant.quantization import QConfig, convert, load_quantized, prepare, read_qconfig_dict, save_quantized
from dax.quant.quantization.qconfig import get_default_dynamic_int8_qconfig, get_fp8_per_channel_weight_qconfig

FP8, INT8 = QConfig(), QConfig(torch.int8)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(21, 48, bias=False), nn.GELU(), nn.Linear(48, 21))
    return nn.Sequential(nn.Linear(33, 21), ffn, nn.LayerNorm(21), nn.Linear(21, 4)).requires_grad_(False)


def quantized_model(qconfig_dict: dict, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = prepare(build().to(dtype), qconfig_dict)
    model(torch.randn(50, 33, dtype=dtype))
    return convert(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("qconfig_dict", "saved"),
    [
        ({"": FP8}, {"": "fp8"}),
        ({"": INT8, "3": None}, {"0": "int8", "1": "int8", "3": None}),
        ({"1": get_default_dynamic_int8_qconfig()}, {"0": None, "1": "tensor", "3": None}),
        ({"": get_fp8_per_channel_weight_qconfig(), "1.0": INT8}, {"0": "s", "1.0": "int8", "1.2": "s", "3": "s"}),
    ],
    ids=["fp8", "kept", "default float", "static and dynamic"],
)
def test_what_is_loaded_computes_the_same_to_the_last_bit(tmp_path, qconfig_dict, saved, dtype):
    model = quantized_model(qconfig_dict, dtype)
    save_quantized(model, tmp_path / "new/folder")
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {"model.safetensors", "qconfig.json"}
    short = {"fp8": FP8, "int8": INT8, "tensor": get_default_dynamic_int8_qconfig()}
    short |= {"s": get_fp8_per_channel_weight_qconfig(), None: None}
    content = json.loads((tmp_path / "new/folder/qconfig.json").read_text())
    assert read_qconfig_dict(content) == {name: short[kind] for name, kind in saved.items()}

    loaded = load_quantized(build().to("meta"), tmp_path / "new/folder")
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and state[name].float().equal(tensor.float())
    x = torch.randn(7, 33, dtype=dtype)
    assert loaded(x).equal(model(x))
    assert not any(tensor.requires_grad for tensor in loaded.parameters())
    for new, old in zip(loaded.modules(), model.modules()):
        assert type(new) is type(old)
        if isinstance(old, dynamic.Linear | quantized.Linear):
            assert new.dtype == old.dtype == dtype


def test_saving_again_over_what_is_loaded(tmp_path):
    """The file that a loaded model is mapped from is replaced, not written into."""
    save_quantized(quantized_model({"": FP8}), tmp_path)
    loaded = load_quantized(build().to("meta"), tmp_path)
    x = torch.randn(7, 33)
    expected = loaded(x)
    save_quantized(loaded, tmp_path)
    assert loaded(x).equal(expected) and load_quantized(build(), tmp_path)(x).equal(expected)


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a saved model and leave the header's hash as it is."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    change(state)
    save_file(state, path, metadata)


def replaced(name: str, tensor: torch.Tensor):
    return lambda folder: rewrite(folder, lambda state: state.update({name: tensor}))


DAMAGES = {
    "another qconfig": (lambda d: (d / "qconfig.json").write_text('{"": "fp8"}'), "SHA-256 differs"),
    "one space more": (lambda d: (d / "qconfig.json").write_text((d / "qconfig.json").read_text() + " "), "SHA-256"),
    "no qconfig": (lambda d: (d / "qconfig.json").unlink(), "it needs qconfig.json and model.safetensors"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "it needs qconfig.json and model.safetensors"),
    "no folder": (shutil.rmtree, "it needs qconfig.json and model.safetensors"),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "damag",
    ),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\x80\x04abcdefgh"), "damaged"),
    "missing scale": (lambda d: rewrite(d, lambda s: s.pop("1.0.weight_scale")), "lacks 1.0.weight_scale"),
    "missing bias": (lambda d: rewrite(d, lambda s: s.pop("0.bias")), "lacks 0.bias"),
    "unknown tensor": (replaced("4.weight", torch.zeros(2)), "has 4.weight"),
    "other qdata's shape": (replaced("0.qweight", torch.zeros(21, 32, dtype=torch.int8)), "0.qweight is"),
    "other qdata's type": (replaced("0.qweight", torch.zeros(21, 33).to(torch.float8_e4m3fn)), "0.qweight is"),
    "other scales' type": (replaced("0.weight_scale", torch.ones(21, 1).half()), "0.weight_scale is"),
    "other norm": (replaced("2.weight", torch.zeros(22)), "2.weight is"),
    "integers for floats": (replaced("2.weight", torch.zeros(21, dtype=torch.int32)), "2.weight is"),
}


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_and_the_model_stays_as_it_was(tmp_path, damage, complaint):
    save_quantized(quantized_model({"": INT8, "3": None}), tmp_path / "saved")
    damage(tmp_path / "saved")
    model = build()
    x = torch.randn(7, 33)
    expected = model(x)
    with pytest.raises(ValueError, match=complaint):
        load_quantized(model, tmp_path / "saved")
    assert model(x).equal(expected)


def test_another_models_layers_are_refused(tmp_path):
    save_quantized(quantized_model({"": INT8, "3": None}), tmp_path)
    with pytest.raises(ValueError, match="no module 3"):
        load_quantized(build()[:2], tmp_path)


def test_a_model_that_is_not_quantized_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no quantized layer"):
        save_quantized(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_qconfig_as_text():
    every = [FP8, INT8, get_fp8_per_channel_weight_qconfig(), QConfig(activation_dtype=torch.float8_e5m2)]
    for qconfig in every:
        assert QConfig.from_dict(json.loads(json.dumps(qconfig.to_dict()))) == qconfig
    assert read_qconfig_dict({"": "fp8", "a": None, "b": {"dtype": "int8"}}) == {"": FP8, "a": None, "b": INT8}
    for content in (None, [], {}, "fp8", {"a": "int4"}, {"a": 8}, {"a": ["fp8"]}, {1: "fp8"}, {"a": {"type": "int8"}}):
        with pytest.raises(ValueError):
            read_qconfig_dict(content)
    for fields in ({"dtype": "int4"}, {"dtype": "float8_e5m2"}, {"static": 1}, {"static": True}, {"dtype": {}}):
        with pytest.raises(ValueError, match="'a'"):
            read_qconfig_dict({"a": fields})
