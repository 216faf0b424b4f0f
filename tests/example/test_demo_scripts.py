"""The README's two commands, no variable set: a video in which one sees what the prompt says, made by the demo model."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import run_here

sys.path.insert(0, str(ROOT / "example/demo_model"))
from inferix.cli import model_paths
from score import score
from world import Scene

DEFAULT = Scene("red", "circle", "from left to right", "black")


@pytest.fixture
def project(tmp_path) -> Path:
    """A checkout in which nothing has been downloaded, whatever the real one holds."""
    project = tmp_path / "project"
    for folder in ("example", "inferix"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "weights").mkdir()
    (project / "weights/demo").symlink_to(ROOT / "weights/demo")
    return project


def run(project: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Start the script from another folder, with no variable set but these."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix} | variables
    command = [project / f"example/quantization/{name}_quantized.sh", *arguments]
    return subprocess.run(command, cwd=project.parent, env=env, capture_output=True, text=True, timeout=180)


def written(result: subprocess.CompletedProcess, folder: Path) -> torch.Tensor:
    """Return the one video that a run has made, [T, 3, H, W] in [0, 1]."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("file written") == 1
    (path,) = (folder / "outputs").glob("*.mp4")
    return torch.from_numpy(np.stack(list(iio.imiter(path, plugin="FFMPEG")))).permute(0, 3, 1, 2) / 255


def test_self_forcing(project):
    """In an interpreter of its own, which imports what the checkout holds."""
    result = run(project, "self_forcing")
    video = written(result, project)
    assert video.shape == (81, 3, 128, 128)
    assert all(score(video, DEFAULT).values())
    first, *_, last = result.stdout.splitlines()
    assert "using the small demo model" in first and last == "high precision     condition_embedder, proj_out"
    assert "note:" not in result.stdout


def shorten_rollouts(config: Path, num_frames: int) -> Path:
    """Write ``config`` with rollouts of so many latent frames in the place of 21, and return it."""
    text = config.read_text()
    assert "[1, 21, 16, 16, 16]" in text
    config.write_text(text.replace("[1, 21, 16, 16, 16]", f"[1, {num_frames}, 16, 16, 16]"))
    return config


SCENE = Scene("green", "triangle", "from bottom to top", "white")


def test_causvid(tmp_path, monkeypatch):
    """Short rollouts, in this process; with the tiny VAE, since the full one decodes in the other tests."""
    paths = model_paths.DEMO["causvid"]
    config = shorten_rollouts(Path(shutil.copy(paths.config, tmp_path)), 12)
    monkeypatch.setitem(model_paths.DEMO, "causvid", replace(paths, config=config))
    missing = model_paths.ModelPaths(*[tmp_path / "not downloaded"] * 3)
    monkeypatch.setitem(model_paths.REAL, "causvid", missing)
    env = {"PROMPT": SCENE.prompt, "NUM_ROLLOUT": "2", "VAE": "tiny", "OUTPUT_FOLDER": "outputs"}
    result = run_here("causvid_quantized.sh", env, tmp_path)
    video = written(result, tmp_path)
    assert "using the small demo model" in result.stdout
    assert video.shape == (2 * (45 - 9), 3, 128, 128)
    assert all(score(video, SCENE).values())


@pytest.mark.parametrize("name", ["self_forcing", "causvid"])
def test_int8(tmp_path, name):
    base = ROOT / "weights/demo/Wan2.1-T2V-demo"
    env = {"QUANT_TYPE": "int8", "PROMPT": SCENE.prompt, "WAN_BASE_MODEL_PATH": str(base), "NUM_OUTPUT_FRAMES": "9"}
    if name == "causvid":
        config = shutil.copy(ROOT / "example/causvid/configs/causvid_demo.yaml", tmp_path)
        env = env | {"CHECKPOINT_FOLDER": str(base.parent / "CausVid/autoregressive_checkpoint"), "NUM_ROLLOUT": "1"}
        env = env | {"CONFIG_PATH": str(shorten_rollouts(Path(config), 9))}
    result = run_here(f"{name}_quantized.sh", env | {"OUTPUT_FOLDER": "outputs"}, tmp_path)
    assert all(score(written(result, tmp_path), SCENE).values()) and "note:" not in result.stdout


def test_a_prompt_that_the_demo_model_cannot_know_runs_and_is_said_to_be_one(tmp_path):
    base = str(ROOT / "weights/demo/Wan2.1-T2V-demo")
    env = {"WAN_BASE_MODEL_PATH": base, "PROMPT": "A cat dancing on the moon", "NUM_OUTPUT_FRAMES": "3"}
    result = run_here("self_forcing_quantized.sh", env | {"OUTPUT_FOLDER": "outputs"}, tmp_path)
    assert len(written(result, tmp_path)) == 9
    (note,) = (line for line in result.stdout.splitlines() if line.startswith("note: "))
    assert "knows only prompts of the form" in note and "A cat dancing on the moon" in note


def test_a_path_that_the_user_sets_is_never_replaced(project):
    """All or nothing: the demo model's base with a public checkpoint that is not there."""
    result = run(project, "self_forcing", WAN_BASE_MODEL_PATH=str(project / "weights/demo/Wan2.1-T2V-demo"))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "self_forcing_dmd.pt not found" in result.stderr and "download.sh" in result.stderr
    result = run(project, "causvid", CHECKPOINT_FOLDER="./weights/causvid", PROMPT="A beautiful sunset over the ocean")
    assert (result.returncode, result.stdout) == (2, "") and "weights/causvid not found" in result.stderr


def test_without_the_demo_model_either(project):
    (project / "weights/demo").unlink()
    result = run(project, "causvid")
    assert (result.returncode, result.stdout) == (2, "") and "download.sh" in result.stderr
