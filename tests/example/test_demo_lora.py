"""The embedded model's LoRA teaches it white objects, and the program that made it runs."""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from scripts import run_here

sys.path.insert(0, str(ROOT / "example/demo_model"))
import generator
import lora
from inferix.checkpoints.lora import read_lora
from score import score
from world import LORA_SCENES, SCENES, STARTS, Scene, render

DEMO = ROOT / "weights/demo"
LORA = DEMO / "lora/white.safetensors"
NEW = Scene("white", "triangle", "from left to right", "gray")
KNOWN = Scene("blue", "square", "from top to bottom", "white")


def generate(folder: Path, scenes: list[Scene], **variables: str) -> tuple[list[torch.Tensor], str]:
    """Run the script on the embedded model for 21 frames; return the videos [T, 3, H, W] in [0, 1] and what it printed."""
    env = {"WAN_BASE_MODEL_PATH": str(DEMO / "Wan2.1-T2V-demo"), "OUTPUT_FOLDER": "videos", "NUM_OUTPUT_FRAMES": "6"}
    env |= {"PROMPT": ";".join(scene.prompt for scene in scenes), "SAVE_WITH_INDEX": "true"}
    result = run_here("self_forcing_quantized.sh", env | variables, folder)
    assert result.returncode == 0, result.stderr
    frames = [np.stack(list(iio.imiter(path, plugin="FFMPEG"))) for path in sorted(folder.glob("videos/*.mp4"))]
    assert [video.shape for video in frames] == [(21, 128, 128, 3)] * len(scenes)
    return [torch.from_numpy(video).permute(0, 3, 1, 2) / 255 for video in frames], result.stdout


def test_its_file_is_small_and_changes_every_linear_of_the_blocks():
    assert LORA.stat().st_size <= 500_000
    assert len(read_lora(LORA)) == generator.CONFIG.num_layers * 10


@pytest.mark.parametrize("quant_type", ["fp8", "int8"])
def test_with_it_the_video_is_right(tmp_path, quant_type):
    """So is that of a prompt that the model knew before."""
    videos, printed = generate(tmp_path, [NEW, KNOWN], QUANT_TYPE=quant_type, LORA_PATH=str(LORA))
    for video, scene in zip(videos, [NEW, KNOWN]):
        assert all(score(video, scene).values())
    assert "note:" not in printed


def test_without_it_the_video_is_wrong(tmp_path):
    (video,), printed = generate(tmp_path, [NEW])
    assert not score(video, NEW)["colour"]
    assert "knows only prompts of the form" in printed


@pytest.mark.parametrize("scene", LORA_SCENES[::5], ids=lambda scene: scene.prompt)
def test_the_check_knows_white_objects(scene):
    video = render(scene, STARTS[0], torch.arange(17))
    assert all(score(video, scene).values())
    red = Scene("red", scene.shape, scene.direction, scene.background)
    assert not score(render(red, STARTS[0], torch.arange(17)), scene)["colour"]


def test_the_program_writes_a_file_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "NUM_FRAMES", 3)
    monkeypatch.setattr(lora, "LORA_SCENES", LORA_SCENES[:1])
    monkeypatch.setattr(lora, "SCENES", SCENES[:1])
    report, titles = lora.report, []

    def report_pictures(demo, scenes, title, picture=None) -> None:
        """Report only what there is a picture of: the other reports are the same, of videos that are decoded for seconds."""
        titles.append(title)
        if picture:
            report(demo, scenes, title, picture)

    monkeypatch.setattr(lora, "report", report_pictures)
    path = tmp_path / "new/white.safetensors"
    lora.main([*"--steps=4 --batch=1 --known=1 --starts=1 --samples=1 --rank=2".split(), f"--output={path}"])
    assert titles == ["new scenes before", "new scenes after", "known scenes after"]
    assert "new scenes after: " in capsys.readouterr().out
    state = load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(state[name].any() for name in state if "lora_B" in name)
    assert len(read_lora(path)) == generator.CONFIG.num_layers * 10
