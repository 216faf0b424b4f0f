"""Saved 8-bit checkpoints and settings from a file: the same video to the last bit, in half the memory, or a refusal."""

import copy
import hashlib
import json
import shutil
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, GOLDEN, ROOT, SELF_FORCING, load_runner, small_config
from forks import run_ranks
from safetensors import safe_open
from torch import nn

sys.path.insert(1, str(ROOT / "benchmarks"))
import loading

from dax.quant.nn import dynamic
from dax.quant.quantization import QConfig, convert, prepare, read_metadata, save_quantized
from dax.quant.quantization.qconfig import get_fp8_per_channel_weight_qconfig
from inferix.cli.main import run
from inferix.models.transformer import CausalWanTransformer, TransformerConfig
from quantization import quantize_transformer

FP8, INT8 = QConfig(), QConfig(torch.int8)
RUNNERS = {name: load_runner(name) for name in ("self_forcing", "causvid")}


# --- at real geometry


def test_loading_the_1_3b_transformer_takes_little_more_memory_than_its_8_bits(tmp_path):
    """In a process of its own; the numbers are a hole in the file, which takes no disk."""
    folder = tmp_path / "saved"
    folder.mkdir()
    with torch.device("meta"):
        model = CausalWanTransformer(TransformerConfig()).requires_grad_(False)
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

    (process,) = run_ranks(1, loading.main, ["--geometry=1.3b", "--way=saved fp8", f"--weights_folder={tmp_path}"])
    measured = json.loads(process.output)
    assert measured["weights"] == end and 1.4e9 < end < 1.5e9  # half of bfloat16's 2.84 GB
    assert 0.9 * end < measured["peak"] <= 1.2 * end  # every weight was read


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
    (path,) = (folder / "output").glob("*.mp4")
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
        ({"qconfig": "nowhere.yaml"}, "nowhere.yaml not found"),
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


def test_a_folder_keeps_what_it_holds(tmp_path, capsys):
    saved = tmp_path / "saved"
    made("self_forcing", tmp_path, save_quantized=saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    made("self_forcing", tmp_path, save_quantized=saved)  # the same again
    assert (
        run(RUNNERS["self_forcing"].main, flags("self_forcing", tmp_path, save_quantized=saved, quant_type="int8")) == 2
    )
    assert "holds another quantized model: choose another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_knows_its_model(tmp_path, capsys):
    made("self_forcing", tmp_path, save_quantized=tmp_path / "saved")
    metadata = read_metadata(tmp_path / "saved")
    assert (metadata["model"], metadata["quantization"]) == ("self_forcing", "fp8, per token")
    assert metadata["checkpoint_sha256"] == hashlib.sha256(SELF_FORCING.read_bytes()).hexdigest()
    argv = flags("causvid", tmp_path, load_quantized=tmp_path / "saved", checkpoint_folder=None)
    assert run(RUNNERS["causvid"].main, argv) == 2
    assert "saved: it was made of self_forcing, not of causvid" in capsys.readouterr().err


def test_a_folder_knows_its_loras(tmp_path, capsys):
    saved, lora = tmp_path / "saved", f"{GOLDEN}/LoRA/peft.safetensors:0.5"
    expected = made("self_forcing", tmp_path, lora_path=lora, save_quantized=saved)
    assert read_metadata(saved)["loras"] == "peft.safetensors:0.5"
    capsys.readouterr()
    argv = flags("self_forcing", tmp_path, load_quantized=saved, checkpoint_path=None)
    assert run(RUNNERS["self_forcing"].main, [*argv, "--lora_path", lora]) == 2
    assert "leave one out; a LoRA is merged before --save_quantized saves" in capsys.readouterr().err
    assert made("self_forcing", tmp_path, load_quantized=saved, checkpoint_path=None) == expected
    line = f"saved weights      {SELF_FORCING.name}, peft.safetensors:0.5, fp8, per token"
    assert line in capsys.readouterr().out.splitlines()


def empty_like_golden() -> nn.Module:
    """The golden transformer's shapes, quantized, all zeros."""
    model = CausalWanTransformer(TransformerConfig.from_json(BASE / "config.json")).requires_grad_(False)
    return convert(prepare(model, {"blocks": INT8}))
