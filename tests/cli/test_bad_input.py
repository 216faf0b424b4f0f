"""What the user can put right ends with exit code 2 and one line on stderr, and leaves nothing behind.

The runners are called in this process, which spares every case the start of a new one; test_start.py starts real ones.
"""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, SELF_FORCING, load_runner, small_config
from PIL import Image

from inferix.cli.arguments import parse_causvid
from inferix.cli.main import run

SELF_FORCING_RUNNER = load_runner("self_forcing")
CAUSVID_RUNNER = load_runner("causvid")


class Refusal:
    """Runs a runner on the golden model with some flags changed, and gives the line that it refuses them with."""

    def __init__(self, runner, folder: Path, flags: dict[str, object], capsys):
        self.runner, self.folder, self.flags, self.capsys = runner, folder, flags, capsys
        self.output = folder / "output"

    def __call__(self, *switches: str, **changes: object) -> str:
        flags = {"output_folder": self.output} | self.flags | changes
        argv = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        code = run(self.runner.main, [*argv, *switches])
        error = self.capsys.readouterr().err
        assert (code, error.count("\n")) == (2, 1), error
        assert error.startswith("error: ")
        assert not list(self.output.rglob("*")) and not list(self.folder.rglob("*.mp4"))
        return error


@pytest.fixture
def refused(tmp_path, capsys) -> Refusal:
    """Of the Self-Forcing runner."""
    config = small_config("self_forcing/configs/self_forcing_dmd", tmp_path)
    flags = {"config_path": config, "wan_base_model_path": BASE, "checkpoint_path": SELF_FORCING}
    return Refusal(SELF_FORCING_RUNNER, tmp_path, flags, capsys)


@pytest.fixture
def causvid_refused(tmp_path, capsys) -> Refusal:
    config = small_config("causvid/configs/causvid", tmp_path)
    flags = {"config_path": config, "wan_base_model_path": BASE, "checkpoint_folder": CAUSVID}
    return Refusal(CAUSVID_RUNNER, tmp_path, flags, capsys)


def test_the_flags_that_are_changed_below_are_right_as_they_are(refused, capsys):
    flags = [word for name, value in refused.flags.items() for word in (f"--{name}", str(value))]
    flags += ["--output_folder", str(refused.output), "--num_output_frames", "3"]
    assert run(SELF_FORCING_RUNNER.main, flags) == 0
    assert len(list(refused.output.glob("*.mp4"))) == 1


@pytest.mark.parametrize("flag", ["config_path", "default_config_path", "wan_base_model_path", "checkpoint_path"])
def test_path_that_does_not_exist(refused, flag):
    assert "nowhere/at.all not found" in refused(**{flag: "nowhere/at.all"})


def test_checkpoint_folder_without_a_checkpoint(causvid_refused, tmp_path):
    assert "holds no checkpoint" in causvid_refused(checkpoint_folder=tmp_path)


class Code:
    """Unpickles by running a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_checkpoint_with_code_in_it(refused, tmp_path, save):
    path, trace = tmp_path / "evil.pt", tmp_path / "was here"
    save({"generator": Code(f"touch '{trace}'")}, path)
    assert "download it again" in refused(checkpoint_path=path)
    assert not trace.exists()


@pytest.mark.parametrize("size", [0, 1000, 2_000_000])
def test_truncated_checkpoint(refused, tmp_path, size):
    path = tmp_path / "short.pt"
    path.write_bytes(SELF_FORCING.read_bytes()[:size])
    assert "truncated" in refused(checkpoint_path=path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"generator_ema": {}}, "does not hold named weights"),
        ({"critic": {}}, "holds no Wan transformer (it holds: critic)"),
        ({"generator": torch.zeros(2)}, "does not hold named weights"),
        ({"generator": {1: torch.zeros(2)}}, "does not hold named weights"),
        ({"generator": {"model.head.weight": torch.zeros(2)}}, "not the kind of model"),
        ([torch.zeros(2)], "holds a list"),
    ],
)
def test_checkpoint_of_something_else(refused, tmp_path, content, complaint):
    torch.save(content, tmp_path / "other.pt")
    assert complaint in refused(checkpoint_path=tmp_path / "other.pt")


def test_checkpoint_of_another_size_than_the_base(refused, tmp_path):
    content = torch.load(SELF_FORCING, weights_only=True)
    content["generator"]["model.blocks.1.ffn.0.weight"] = torch.zeros(256, 96)
    torch.save(content, tmp_path / "wider.pt")
    assert "does not fit the base model" in refused(checkpoint_path=tmp_path / "wider.pt")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", b"{", "not a valid JSON object"),
        ("config.json", b"[1]", "not a valid JSON object"),
        ("config.json", b'{"dim": "wide", "ffn_dim": 1, "num_heads": 1, "num_layers": 1}', "no positive number"),
        ("config.json", b'{"dim": 96}', "has no ffn_dim"),
        ("config.json", None, "the base folder needs its config.json"),  # the golden model's heads are not 128 wide
        ("Wan2.1_VAE.pth", b"PK", "truncated"),
        ("Wan2.1_VAE.pth", None, "not found"),
        ("models_t5_umt5-xxl-enc-bf16.pth", b"", "truncated"),
        ("google/umt5-xxl/tokenizer.json", b"{}", "truncated, or of another kind"),
        ("google/umt5-xxl/tokenizer.json", b"{}" + b" " * 2**20, "truncated, or of another kind"),  # read by a process
        ("google/umt5-xxl/tokenizer.json", None, "no tokenizer.json"),
    ],
)
def test_damaged_base_model(refused, tmp_path, name, content, complaint):
    base = tmp_path / "base"
    shutil.copytree(BASE, base, copy_function=os.symlink)
    (base / name).unlink()
    if content is not None:
        (base / name).write_bytes(content)
    assert complaint in refused(wan_base_model_path=base)


def test_base_model_files_that_hold_each_others_content(refused, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base, copy_function=os.symlink)
    (base / "Wan2.1_VAE.pth").unlink()
    (base / "Wan2.1_VAE.pth").symlink_to(BASE / "models_t5_umt5-xxl-enc-bf16.pth")
    assert "not hold a Wan 2.1 VAE" in refused(wan_base_model_path=base)


@pytest.mark.parametrize("text", ["steps: [1, 2", "- a\n- b", "\tx: 1", "just words", b"\xff\xfe\x00"])
def test_config_that_is_no_yaml_mapping(refused, tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "odd.yaml" in refused(config_path=path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("denoising_step_list", "[]"),
        ("denoising_step_list", "[250, 500]"),
        ("denoising_step_list", "[1500, 500]"),
        ("denoising_step_list", "[first, second]"),
        ("denoising_step_list", "null"),
        ("num_frame_per_block", "0"),
        ("num_frame_per_block", "three"),
        ("context_noise", "-1"),
        ("model_kwargs", "none"),
        ("timestep_shift", "0"),
        ("image_or_video_shape", "[21, 16, 60, 104]"),
        ("image_or_video_shape", "[1, 21, 16, 61, 104]"),
        ("image_or_video_shape", "128"),
    ],
)
def test_config_with_a_wrong_value(refused, tmp_path, key, value):
    changes = {"timestep_shift": "5.0", "model_kwargs": "{}"} | {key: value}
    (tmp_path / "odd").mkdir()
    path = small_config("self_forcing/configs/self_forcing_dmd", tmp_path / "odd", **changes)
    assert str(path) in refused(config_path=path)


@pytest.mark.parametrize("number", ["0", "-3", "20", "three", "21.0", ""])
def test_number_of_frames(refused, number):
    assert "num_output_frames" in refused(num_output_frames=number)


@pytest.mark.parametrize("number", ["0", "1", "21"])
def test_number_of_frames_from_an_image(refused, tmp_path, number):
    Image.new("RGB", (96, 64)).save(tmp_path / "image.png")
    assert "plus 1 for the image" in refused("--i2v", image_path=tmp_path / "image.png", num_output_frames=number)


@pytest.mark.parametrize("prompt", ["", "  ", ";", " ; ; "])
def test_empty_prompt(refused, prompt):
    assert "prompt is empty" in refused(prompt=prompt)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("quant_type", "int4"),
        ("quant_type", ""),
        ("quant_granularity", "per_block"),
        ("num_samples", "0"),
        ("num_samples", "many"),
        ("seed", "-1"),
        ("seed", str(2**64)),
        ("ulysses_size", "2"),
        ("ring_size", "0"),
        ("no_quantize", "perhaps"),
        ("webrtc_port", "http"),
        ("frames", "21"),
    ],
)
def test_flag_with_a_wrong_value(refused, flag, value):
    assert flag in refused(**{flag: value})


def test_image_to_video_needs_both_flags(refused, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "image.png")
    assert "go together" in refused("--i2v")
    assert "go together" in refused(image_path=tmp_path / "image.png")


def test_image_that_cannot_be_read(refused, tmp_path):
    assert "not found" in refused("--i2v", image_path=tmp_path / "nowhere.png")
    Image.effect_noise((96, 64), 50).save(tmp_path / "whole.png")
    contents = {"text.png": b"not an image", "empty.png": b"", "cut.png": (tmp_path / "whole.png").read_bytes()[:2000]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in refused("--i2v", image_path=tmp_path / name)
    assert "cannot be read" in refused("--i2v", image_path=tmp_path)


def test_output_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another folder" in refused(output_folder=tmp_path / "file")
    assert "choose another folder" in refused(output_folder=tmp_path / "file/below")
    assert "choose another folder" in refused(output_folder="/proc/nowhere")


def test_fp8_on_a_gpu_without_it(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    assert "use QUANT_TYPE=int8" in refused()


@pytest.mark.parametrize("overlap", ["0", "-3", "2", "9", "12", "some"])
def test_overlap(causvid_refused, overlap):
    assert "num_overlap_frames" in causvid_refused(num_overlap_frames=overlap)


def test_number_of_rollouts(causvid_refused):
    assert "num_rollout" in causvid_refused(num_rollout=0)
    assert "2 prompts for 3 rollouts" in causvid_refused("--diff_prompt", prompt="a; b", num_rollout=3)


def test_clip_that_is_no_whole_number_of_blocks(causvid_refused, tmp_path):
    config = small_config("causvid/configs/causvid", tmp_path, image_or_video_shape="[1, 10, 16, 8, 12]")
    assert "no multiple of the block" in causvid_refused(config_path=config)


def test_kv_offload_takes_words_for_yes_and_no_alone(causvid_refused):
    parse = parse_causvid
    words = {"true": True, "1": True, "False": False, "0": False, "no": False}
    assert {word: parse(["--enable_kv_offload", word]).enable_kv_offload for word in words} == words
    assert parse(["--enable_kv_offload"]).enable_kv_offload and parse([]).enable_kv_offload
    assert "neither true nor false" in causvid_refused(enable_kv_offload="maybe")


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.txt", b"\n \n"), ("binary.txt", b"\xff\xfe"), ("odd.yaml", b"- a"), ("odd.yaml", b"prompts: [")],
)
def test_prompt_file(causvid_refused, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in causvid_refused(diff_prompt_file=tmp_path / name)
    assert "nowhere.txt" in causvid_refused(diff_prompt_file=tmp_path / "nowhere.txt")
