"""A checkpoint that cannot be read is refused with one line that says what is wrong; nothing else is taken for bad input."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, GOLDEN, SELF_FORCING
from safetensors.torch import load_file, save_file

from inferix import InputError
from inferix.checkpoints import files
from inferix.checkpoints.containers import load_checkpoint
from inferix.checkpoints.files import load_strict
from inferix.errors import input_errors
from inferix.models.base_model import WanCheckpoint

FP8 = GOLDEN / "containers/lightx2v_fp8.safetensors"
FLAT = GOLDEN / "containers/flat_model_prefix.safetensors"


def refusal(path: Path) -> str:
    """The line that the checkpoint at ``path`` is refused with."""
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(path: Path, folder: Path, removed: str = "", **added: torch.Tensor) -> Path:
    """A copy of a safetensors file without the tensor ``removed`` and with those ``added`` (a dot is written __)."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != removed}
    tensors |= {name.replace("__", "."): tensor for name, tensor in added.items()}
    save_file(tensors, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.parametrize("source", [SELF_FORCING, FLAT, CAUSVID / "model.pt"], ids=lambda path: path.name)
@pytest.mark.parametrize("share", [0, 0.00001, 0.001, 0.5, 0.99])
def test_half_a_download(tmp_path, source, share):
    content = source.read_bytes()
    (tmp_path / "half").write_bytes(content[: int(share * len(content))])
    message = refusal(tmp_path / "half")
    assert "download it again" in message
    assert "truncated" in message or "neither a PyTorch nor a safetensors file" in message


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_half_a_download_of_an_old_pickle(tmp_path, share):
    torch.save({"a": torch.ones(30), "b": [1, 2]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(content[: int(share * len(content))])
    assert "download it again" in refusal(tmp_path / "old.pt")


class Code:
    def __reduce__(self):
        return os.system, ("touch trace",)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_pickle_with_code_in_it(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    if form == "pickle":
        Path(name).write_bytes(pickle.dumps({"generator": Code()}))
    else:
        torch.save({"generator": Code()}, name, _use_new_zipfile_serialization=form == "zip")
    assert "not opened for safety" in refusal(Path(name))
    assert not Path("trace").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"GGUF\x03\x00\x00\x00\x00", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "neither a PyTorch nor a safetensors file"),
        (b'{"weight_map": {}}', "neither a PyTorch nor a safetensors file"),
        (b"PK\x03\x04 and no more", "truncated"),
        ((20).to_bytes(8, "little") + b"{ and so on, no JSON", "truncated"),
    ],
)
def test_a_file_of_another_kind(tmp_path, content, complaint):
    (tmp_path / "model.pt").write_bytes(content)
    assert complaint in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("Wan2.1-T2V-tiny/Wan2.1_VAE.pth", "is a VAE, not a transformer"),
        ("Wan2.1-T2V-tiny/models_t5_umt5-xxl-enc-bf16.pth", "is a text encoder, not a transformer"),
        ("LongLive/models/lora.pt", "LORA_PATH="),
        ("LoRA/peft.safetensors", "LORA_PATH="),
        ("LoRA/kohya.safetensors", "LORA_PATH="),
        ("LoRA/lightx2v.safetensors", "LORA_PATH="),
        ("expected/text.safetensors", "holds no Wan transformer"),
        ("nowhere.pt", "not found"),
        ("LongLive/models", "holds 2 checkpoints (longlive_base.pt, lora.pt)"),
        ("configs", "holds no checkpoint"),
    ],
)
def test_another_part_of_a_model(path, complaint):
    assert complaint in refusal(GOLDEN / path)


def test_a_bare_lora_of_longlive(tmp_path):
    torch.save(torch.load(GOLDEN / "LongLive/models/lora.pt")["generator_lora"], tmp_path / "lora.pt")
    assert "LORA_PATH=" in refusal(tmp_path / "lora.pt")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"generator": {}}, "does not hold named weights under 'generator'"),
        ({"generator": {"model.x": 3}}, "does not hold named weights"),
        ({"critic": {}, "step": 3}, "it holds: critic, step"),
        ({}, "it holds: nothing"),
        (torch.zeros(2), "holds a Tensor"),
    ],
)
def test_dictionaries_of_something_else(tmp_path, content, complaint):
    torch.save(content, tmp_path / "x.pt")
    assert complaint in refusal(tmp_path / "x.pt")


def test_weights_that_occur_twice(tmp_path):
    path = changed(FLAT, tmp_path, patch_embedding__bias=torch.zeros(96))
    assert "patch_embedding.bias twice" in refusal(path)


@pytest.mark.parametrize(
    ("removed", "added", "complaint"),
    [
        ("", {"model__blocks__9__ffn__0__weight_scale": torch.ones(4, 1)}, "blocks.9.ffn.net.0.proj.weight_scale without"),
        ("", {"model__blocks__0__norm3__weight_scale": torch.ones(96, 1)}, "norm2.weight_scale without"),
        ("", {"model__blocks__0__ffn__0__weight_scale": torch.ones(192, 6)}, "[192, 6] of torch.float32"),
        ("", {"model__blocks__0__ffn__0__weight_scale": torch.ones(96, 1)}, "[96, 1] of torch.float32"),
        ("", {"model__blocks__0__ffn__0__weight_scale": torch.ones(192, 1).to(torch.uint8)}, "of torch.uint8"),
        ("", {"model__blocks__0__ffn__0__comfy_quant": torch.ones(3)}, "ComfyUI's mixed-precision format"),
        ("", {"model__head__head__weight": torch.ones(64, 96, dtype=torch.int8)}, "proj_out.weight as int8"),
        ("", {"model__blocks__0__ffn__0__weight": torch.ones(192, 96, dtype=torch.uint8)}, "weight as uint8"),
    ],
)  # fmt: skip
def test_8_bit_formats_that_are_not_supported(tmp_path, removed, added, complaint):
    assert complaint in refusal(changed(FP8, tmp_path, removed, **added))


def shard(folder: Path, numbers: list[int], index: dict | str | None = None) -> Path:
    items = list(load_file(FLAT).items())
    for number in numbers:
        save_file(dict(items[number::3]), folder / f"model-{number + 1:05}-of-00003.safetensors")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def test_a_shard_that_is_missing(tmp_path):
    shard(tmp_path, [0, 2])
    for path in (tmp_path, tmp_path / "model-00001-of-00003.safetensors"):
        assert "holds 2 of 3 shards of model; download the missing ones" in refusal(path)


def test_a_listed_shard_that_is_missing(tmp_path):
    weight_map = {name: f"model-{number + 1:05}-of-00003.safetensors" for number, name in enumerate("abc")}
    shard(tmp_path, [0, 2], {"weight_map": weight_map})
    assert "lacks 1 of 3 shards of a checkpoint, such as model-00002-of-00003.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}]
)
def test_an_index_that_lists_nothing(tmp_path, index):
    assert "index.json" in refusal(shard(tmp_path, [0, 1, 2], index))


@pytest.mark.parametrize("names", [["a.pt", "b.safetensors"], ["one/a.pt", "two/a.pt"]])
def test_a_folder_with_two_checkpoints(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(FLAT)
    assert f"holds 2 checkpoints ({', '.join(names)}); give the path of one of them" in refusal(tmp_path)


def test_an_empty_folder(tmp_path):
    (tmp_path / "transformer").mkdir()
    assert "transformer holds no checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("removed", "added", "complaint"),
    [
        ("model.head.head.bias", {}, "lacks 1 tensors and has 0 unknown ones, such as proj_out.bias"),
        ("", {"model__img_emb__proj__0__weight": torch.ones(4)}, "unknown ones, such as img_emb.proj.0.weight"),
        ("", {"model__blocks__1__ffn__2__weight": torch.ones(96, 256)}, "is [96, 256], not [96, 192]"),
    ],
)
def test_a_transformer_that_does_not_fit(tmp_path, removed, added, complaint):
    path = changed(FLAT, tmp_path, removed, **added)
    model = WanCheckpoint(BASE).transformer()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_strict(model, load_checkpoint(path).state, path)
    assert complaint in str(error.value) and str(path) in str(error.value)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), ImportError("no such package")])
@pytest.mark.parametrize("path", [SELF_FORCING, FLAT], ids=lambda path: path.name)
def test_what_is_no_fault_of_the_file_passes_through(monkeypatch, path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(files, "safe_open", fail)
    with pytest.raises(type(error)):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("PytorchStreamReader failed"), False),
        (ValueError("not\na number"), False),
        (KeyError("x"), True),
    ],
)
def test_input_errors_names_the_source_of_bad_input_alone(error, passes):
    with pytest.raises(type(error) if passes else InputError) as raised, input_errors("a.pt", RuntimeError, ValueError):
        raise error
    assert passes or str(raised.value) == f"a.pt: {' '.join(str(error).split())}"


def test_a_file_that_may_not_be_read(tmp_path):
    with pytest.raises(InputError, match="x.pt cannot be read: Permission denied"), input_errors("x.pt", OSError):
        raise PermissionError(13, "Permission denied")
