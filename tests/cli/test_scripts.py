"""The scripts as a person starts them: real processes, from another folder, on the golden models."""

import os
import signal

import imageio.v3 as iio
import numpy as np
import psutil
import pytest
import torch
from forks import ForkedScript
from PIL import Image
from scripts import (
    CAUSVID_SUFFIX,
    SCRIPTS,
    SELF_FORCING_SUFFIX,
    assert_plays_in_a_browser,
    causvid_env,  # noqa: F401
    run_here,
    self_forcing_env,  # noqa: F401
    written,
)

# ruff: noqa: F811


def test_self_forcing_script(self_forcing_env, tmp_path):
    env = self_forcing_env | {"PROMPT": "A cat; A cat! ;a/../dog", "NUM_SAMPLES": "2", "ENABLE_PROFILING": "1"}
    with ForkedScript([SCRIPTS / "self_forcing_quantized.sh"], env, cwd=tmp_path) as process:
        result = process.wait(100)
    files = written(result, tmp_path)
    names = ["A-cat-0-0-0", "A-cat-0-0-1", "A-cat-1-0-0", "A-cat-1-0-1", "a-dog-0-0", "a-dog-0-1"]
    assert [path.stem for path in files] == [f"{name}{SELF_FORCING_SUFFIX}" for name in names]
    for path in files:
        assert_plays_in_a_browser(path, 9)
    assert len({path.read_bytes() for path in files}) == 6  # samples and prompts differ
    lines = result.stdout.splitlines()
    assert any(line.startswith("seconds ") and line.endswith("for 54 frames") for line in lines)
    assert any(line.startswith("frames per second ") for line in lines)
    assert "quantization       fp8, per token" in lines and "key-value cache    float32" in lines
    assert "high precision     condition_embedder, proj_out" in lines
    before, after = (float(word) for word in next(line for line in lines if "memory" in line).split() if "." in word)
    assert after < 0.55 * before  # float32 here; the condition embedder stays
    for stage in ("encode prompt", "denoise", "decode"):
        assert any(line.startswith(stage) and "in 3: " in line for line in lines)
    total, stages = next(line for line in lines if line.startswith("start-up ")).split(" s to the first frames: ")
    seconds = {stage.rpartition(" ")[0]: float(stage.rpartition(" ")[2]) for stage in stages.split(", ")}
    assert list(seconds) == [
        *("Python and imports", "base model", "checkpoint", "to the device", "quantization"),
        *("encode prompt", "denoise", "decode"),
    ]
    assert sum(seconds.values()) == pytest.approx(float(total.split()[1]), abs=0.05)


def test_int8_image_to_video(self_forcing_env, tmp_path):
    rows = np.linspace(40, 200, 64)[:, None, None].repeat(96, 1).repeat(3, 2).astype(np.uint8)
    Image.fromarray(rows).save(tmp_path / "image.jpg")
    env = self_forcing_env | {
        "I2V": "1",
        "IMAGE_PATH": "image.jpg",
        "NUM_OUTPUT_FRAMES": "4",
        "SAVE_WITH_INDEX": "true",
        "KV_CACHE_DTYPE": "fp8",
    }
    env |= {"QUANT_TYPE": "int8", "QUANT_GRANULARITY": "per_tensor", "SEED": "7"}
    result = run_here("self_forcing_quantized.sh", env, tmp_path)
    (path,) = written(result, tmp_path)
    assert path.name == "0-7-0-self_forcing_dmd-checkpoint-int8-per-tensor-fp8-cache-latents-4-from-image.mp4"
    assert "quantization       int8, per tensor\nkey-value cache    float8_e4m3fn\n" in result.stdout
    assert_plays_in_a_browser(path, 13)


def test_the_file_shows_what_the_model_made(self_forcing_env, self_forcing, tmp_path):
    env = self_forcing_env | {"NO_QUANTIZE": "1", "PROMPT": "A red cat walks on the moon"}
    result = run_here("self_forcing_quantized.sh", env, tmp_path)
    (path,) = written(result, tmp_path)
    assert "high precision     everything" in result.stdout.splitlines()
    video = self_forcing.generate(["A red cat walks on the moon"], 3, torch.Generator().manual_seed(0))
    saved = torch.from_numpy(np.stack(list(iio.imiter(path, plugin="FFMPEG")))).permute(0, 3, 1, 2) / 255
    difference = torch.nn.functional.avg_pool2d(saved - video[0], 8)  # compression blurs the fine noise that it makes
    assert difference.square().mean().sqrt() < 0.02
    assert torch.nn.functional.avg_pool2d(video[0], 8).std() > 0.05  # so that there was something to be right about


def test_causvid_with_a_prompt_for_each_rollout(causvid_env, tmp_path):
    env = causvid_env | {"PROMPT": "A cat; A dog", "DIFF_PROMPT": "1", "QUANT_TYPE": "int8", "ENABLE_KV_OFFLOAD": "0"}
    (path,) = written(run_here("causvid_quantized.sh", env, tmp_path), tmp_path)
    assert path.name == f"A-cat-A-dog-0{CAUSVID_SUFFIX}-int8.mp4"
    assert_plays_in_a_browser(path, 2 * 24)


def test_causvid_makes_a_video_of_every_prompt(causvid_env, tmp_path):
    env = causvid_env | {"PROMPT": "A cat; A dog", "NUM_ROLLOUT": "1", "NUM_OVERLAP_FRAMES": "6"}
    files = written(run_here("causvid_quantized.sh", env, tmp_path), tmp_path)
    suffix = f"{CAUSVID_SUFFIX}-rollouts-1-overlap-6"
    assert [path.name for path in files] == [f"A-cat-0{suffix}.mp4", f"A-dog-0{suffix}.mp4"]
    for path in files:
        assert_plays_in_a_browser(path, 33 - 21)


def test_causvid_prompt_file(causvid_env, tmp_path):
    (tmp_path / "prompts.txt").write_text("A cat\n\n A dog; asleep \n")
    (path,) = written(
        run_here("causvid_quantized.sh", causvid_env | {"DIFF_PROMPT_FILE": "prompts.txt"}, tmp_path), tmp_path
    )
    assert path.name == f"A-cat-A-dog-asleep-0{CAUSVID_SUFFIX}.mp4"
    assert_plays_in_a_browser(path, 2 * 24)


def test_causvid_asks_for_a_prompt_when_its_rollout_begins(causvid_env, tmp_path):
    name = f"my videos/A-cat-interactive-0{CAUSVID_SUFFIX}.mp4"
    with ForkedScript(
        [SCRIPTS / "causvid_quantized.sh"], causvid_env | {"IS_INTERACTIVE": "1"}, cwd=tmp_path
    ) as process:
        process.type(b"A cat\n")
        process.wait_until(lambda: process.stderr.count("next prompt") == 2)
        assert not (tmp_path / name).exists()
        process.type(b"\n\xff A dog \n")  # the same again, then another
        result = process.wait()
    assert result.returncode == 0
    assert result.stdout.startswith(f"file written       {name}\n")
    assert_plays_in_a_browser(tmp_path / name, 3 * 24)


@pytest.mark.parametrize("path", [os.devnull, None], ids=["at its end", "closed"])
def test_interactive_without_a_prompt(causvid_env, tmp_path, monkeypatch, path):
    stdin = open(path) if path else None  # what Python makes of a closed descriptor
    monkeypatch.setattr("sys.stdin", stdin)
    result = run_here("causvid_quantized.sh", causvid_env | {"IS_INTERACTIVE": "1"}, tmp_path)
    assert result.returncode == 2 and "no prompt was typed" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_stopping_leaves_no_half_written_file(self_forcing_env, tmp_path, sent, code):
    env = self_forcing_env | {"NUM_OUTPUT_FRAMES": "30000", "NUM_SAMPLES": "2"}
    folder = tmp_path / "my videos"
    with ForkedScript([SCRIPTS / "self_forcing_quantized.sh"], env, cwd=tmp_path) as process:
        process.wait_until(lambda: folder.is_dir() and len(list(folder.iterdir())) == 2)
        process.popen.send_signal(sent)
        result = process.wait()
    assert result.returncode == code and "Traceback" not in result.stderr
    assert not list(folder.iterdir())


def test_full_disk(self_forcing_env, tmp_path):
    with ForkedScript([SCRIPTS / "self_forcing_quantized.sh"], self_forcing_env, cwd=tmp_path) as process:
        psutil.Process(process.popen.pid).rlimit(psutil.RLIMIT_FSIZE, (8192, 8192))  # long before it writes
        result = process.wait(100)
    assert result.returncode == 2, result.stderr
    assert "limit on file sizes" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not list((tmp_path / "my videos").iterdir())
