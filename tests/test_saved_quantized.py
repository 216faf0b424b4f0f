"""Saved 8-bit checkpoints and settings from a file: the same video to the last bit, in half the memory, or a refusal."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING, load_runner, small_config
from measure_loading import empty
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dax.quant.nn import dynamic, quantized
from dax.quant.quantization import QConfig, convert, load_quantized, prepare, read_qconfig_dict, save_quantized
from dax.quant.quantization.qconfig import get_default_dynamic_int8_qconfig, get_fp8_per_channel_weight_qconfig
from inferix.cli.main import run
from quantization import quantize_transformer

FP8, INT8 = QConfig(), QConfig(torch.int8)
RUNNERS = {name: load_runner(name) for name in ("self_forcing", "causvid")}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(21, 48, bias=False), nn.GELU(), nn.Linear(48, 21))
    return nn.Sequential(nn.Linear(33, 21), ffn, nn.LayerNorm(21), nn.Linear(21, 4)).requires_grad_(False)


def quantized_model(qconfig_dict: dict, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = prepare(build().to(dtype), qconfig_dict)
    model(torch.randn(50, 33, dtype=dtype))
    return convert(model)


# --- dax


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
    "other codes' shape": (replaced("0.qweight", torch.zeros(21, 32, dtype=torch.int8)), "0.qweight is"),
    "other codes' type": (replaced("0.qweight", torch.zeros(21, 33).to(torch.float8_e4m3fn)), "0.qweight is"),
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


# --- at real geometry


def test_loading_the_1_3b_transformer_takes_little_more_memory_than_its_8_bits(tmp_path):
    """In a process of its own; the numbers are a hole in the file, which takes no disk."""
    folder = tmp_path / "saved"
    folder.mkdir()
    model = empty()
    quantize_transformer(model)
    fields = json.dumps({"blocks": FP8.to_dict()}).encode()
    (folder / "qconfig.json").write_bytes(fields)
    header, end = {"__metadata__": {"qconfig_sha256": hashlib.sha256(fields).hexdigest()}}, 0
    for name, tensor in model.state_dict().items():
        kind = "F8_E4M3" if name.endswith("qweight") else "F32" if name.endswith("weight_scale") else "BF16"
        start, end = end, end + prod(tensor.shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[kind]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)

    command = [sys.executable, ROOT / "tests/measure_loading.py", "saved fp8", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    _, size, grown, _ = map(float, result.stdout.split())
    assert size == end and 1.4e9 < size < 1.5e9  # half of bfloat16's 2.84 GB
    assert 0.9 * size < grown <= 1.2 * size  # every weight was read


# --- the runners


def flags(name: str, folder: Path, **changes: object) -> list[str]:
    """Of a short run on the golden model, in this process."""
    given = {
        "config_path": small_config(
            {"self_forcing": "self_forcing/configs/self_forcing_dmd"}.get(name, "causvid/configs/causvid"), folder
        ),
        "wan_base_model_path": BASE,
        "output_folder": folder / "output",
        **({"checkpoint_path": SELF_FORCING, "num_output_frames": 3} if name == "self_forcing" else {}),
        **({"checkpoint_folder": CAUSVID, "num_rollout": 1} if name == "causvid" else {}),
    } | changes
    return [word for flag, value in given.items() if value is not None for word in (f"--{flag}", str(value))]


def made(name: str, folder: Path, **changes: object) -> bytes:
    """The video that the runner makes."""
    assert run(RUNNERS[name].main, flags(name, folder, **changes)) == 0
    (path,) = (folder / "output").iterdir()
    content = path.read_bytes()
    path.unlink()
    return content


WITHOUT = {"self_forcing": {"checkpoint_path": None}, "causvid": {"checkpoint_folder": None}}


@pytest.mark.parametrize(("name", "quant_type"), [("self_forcing", "fp8"), ("causvid", "int8")])
def test_the_saved_checkpoint_makes_the_same_video(name, quant_type, tmp_path, capsys):
    expected = made(name, tmp_path, quant_type=quant_type, save_quantized=tmp_path / "saved")
    report = capsys.readouterr().out.splitlines()
    base = tmp_path / "base"  # without the transformer, which is not needed
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = made(name, tmp_path, load_quantized=tmp_path / "saved", wan_base_model_path=base, **WITHOUT[name])
    assert loaded == expected
    again = capsys.readouterr().out.splitlines()
    assert report[-2:] == again[-2:] and report[-2].startswith("weight memory")


def test_static_quantization_is_calibrated_and_saved(tmp_path):
    static = get_fp8_per_channel_weight_qconfig().to_dict()
    (tmp_path / "static.yaml").write_text(json.dumps({"blocks": static}))
    expected = made("self_forcing", tmp_path, qconfig=tmp_path / "static.yaml", save_quantized=tmp_path / "saved")
    assert made("self_forcing", tmp_path, load_quantized=tmp_path / "saved", checkpoint_path=None) == expected
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        scales = {name: file.get_tensor(name).item() for name in file.keys() if name.endswith("input_scale")}
    assert len(scales) == 20 and all(0 < scale < 1 for scale in scales.values())
    assert scales["blocks.0.attn1.to_q.input_scale"] == scales["blocks.0.attn1.to_v.input_scale"]  # one input


def test_settings_from_a_file(tmp_path, capsys):
    expected = made("self_forcing", tmp_path)
    same = '"": fp8\ncondition_embedder: null\nproj_out: null\n'
    (tmp_path / "same.yaml").write_text(same)
    assert made("self_forcing", tmp_path, qconfig=tmp_path / "same.yaml") == expected
    # queries, keys and values of different precision; a block and two kinds of layers as they are
    (tmp_path / "mixed.yaml").write_text(same + "attn1.to_q: null\nattn1.to_k: int8\nblocks.1: null\n")
    assert made("self_forcing", tmp_path, qconfig=tmp_path / "mixed.yaml") != expected
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "high precision     condition_embedder, blocks.0.attn1.to_q, blocks.1, proj_out"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"load_quantized": "nowhere"}, "nowhere not found"),
        ({"load_quantized": "saved", "checkpoint_path": SELF_FORCING}, "leave one out"),
        ({"load_quantized": "saved", "quant_type": "int8"}, "leave one out"),
        ({"load_quantized": "saved", "no_quantize": "1"}, "leave one out"),
        ({"load_quantized": "saved", "qconfig": "ok.yaml"}, "leave one out"),
        ({"load_quantized": "."}, "is no saved 8-bit model"),
        ({"load_quantized": "wider"}, "is of another model"),
        ({"save_quantized": "ok.yaml"}, "choose another folder"),
        ({"save_quantized": "saved", "no_quantize": "1"}, "leave one out"),
        ({"qconfig": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"qconfig": "saved"}, "saved cannot be read"),
        ({"qconfig": "no.yaml"}, "is not valid YAML"),
        ({"qconfig": "int4.yaml"}, "'int4' is not null, fp8, int8"),
        ({"qconfig": "typo.yaml"}, "no module atn1"),
        ({"qconfig": "ok.yaml", "quant_granularity": "per_tensor"}, "leave one out"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, changes, complaint):
    monkeypatch.chdir(tmp_path)
    for name, text in {"ok": '"": fp8', "no": '"": [fp8', "int4": '"": int4', "typo": '"": fp8\natn1: null'}.items():
        Path(f"{name}.yaml").write_text(text)
    wider = copy.deepcopy(empty_like_golden())
    save_quantized(wider, "saved")
    wider.blocks[1].ffn.net[2] = dynamic.Linear(256, 96, qconfig=INT8)
    save_quantized(wider, "wider")
    changes = ({"checkpoint_path": None} if "load_quantized" in changes else {}) | changes
    code = run(RUNNERS["self_forcing"].main, flags("self_forcing", tmp_path, **changes))
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ") and complaint in error
    assert not (tmp_path / "output").exists()


def empty_like_golden() -> nn.Module:
    """The golden transformer's shapes, quantized, all zeros."""
    from inferix.models.transformer import CausalWanTransformer, TransformerConfig

    model = CausalWanTransformer(TransformerConfig.from_json(BASE / "config.json")).requires_grad_(False)
    return convert(prepare(model, {"blocks": INT8}))
