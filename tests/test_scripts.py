"""The scripts and runners as a person starts them: real processes, from another folder, on the golden models."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING, load_runner, small_config
from PIL import Image

from inferix.cli import read_prompts
from inferix.video import count_frames

SCRIPTS = ROOT / "example/quantization"


@pytest.fixture
def self_forcing_env(tmp_path) -> dict[str, str]:
    """Variables of self_forcing_quantized.sh for the golden model, relative to the test's own folder, and no others."""
    small_config("self_forcing/configs/self_forcing_dmd", tmp_path)
    (tmp_path / "base").symlink_to(BASE)
    (tmp_path / "checkpoint.pt").symlink_to(SELF_FORCING)
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "CONFIG_PATH": "self_forcing_dmd.yaml",
        "WAN_BASE_MODEL_PATH": "base",
        "CHECKPOINT_PATH": "./checkpoint.pt",
        "OUTPUT_FOLDER": "my videos",
        "NUM_OUTPUT_FRAMES": "3",
    }


@pytest.fixture
def causvid_env(self_forcing_env, tmp_path) -> dict[str, str]:
    """The same for causvid_quantized.sh."""
    small_config("causvid/configs/causvid", tmp_path)
    (tmp_path / "checkpoint").symlink_to(CAUSVID)
    return self_forcing_env | {"CONFIG_PATH": "causvid.yaml", "CHECKPOINT_FOLDER": "checkpoint"}


def run(script: str, env: dict[str, str], folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run ``script`` in ``folder`` to its end."""
    command = [str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120, **options)


def written(result: subprocess.CompletedProcess, folder: Path) -> list[Path]:
    """The files that a successful run says it has written, which are all there are."""
    assert result.returncode == 0, result.stderr
    files = [
        folder / line.removeprefix("file written").strip() for line in result.stdout.splitlines() if "file wr" in line
    ]
    assert sorted(files) == sorted((folder / "my videos").iterdir())
    return files


def assert_plays_in_a_browser(path: Path, num_frames: int) -> None:
    """H.264, 4:2:0, 16 frames a second, the index in front of the pictures."""
    meta = iio.immeta(path, plugin="FFMPEG")
    assert (meta["codec"], meta["pix_fmt"][:7], meta["fps"], meta["size"]) == ("h264", "yuv420p", 16, (96, 64))
    assert count_frames(path) == num_frames == len(list(iio.imiter(path, plugin="FFMPEG")))
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_self_forcing_script(self_forcing_env, tmp_path):
    env = self_forcing_env | {"PROMPT": "A cat; A cat! ;a/../dog", "NUM_SAMPLES": "2", "ENABLE_PROFILING": "1"}
    result = run("self_forcing_quantized.sh", env, tmp_path)
    files = written(result, tmp_path)
    assert [path.name for path in files] == [
        "A-cat-0-0-0.mp4",
        "A-cat-0-0-1.mp4",
        "A-cat-1-0-0.mp4",
        "A-cat-1-0-1.mp4",
        "a-dog-0-0.mp4",
        "a-dog-0-1.mp4",
    ]
    for path in files:
        assert_plays_in_a_browser(path, 9)
    assert len({path.read_bytes() for path in files}) == 6  # samples and prompts differ
    lines = result.stdout.splitlines()
    assert any(line.startswith("seconds ") and line.endswith("for 54 frames") for line in lines)
    assert any(line.startswith("frames per second ") for line in lines)
    assert "high precision     condition_embedder, proj_out" in lines
    before, after = (float(word) for word in next(line for line in lines if "memory" in line).split() if "." in word)
    assert after < before / 2  # float32 here; the condition embedder stays
    for stage in ("encode prompt", "denoise", "decode"):
        assert any(line.startswith(stage) and "in 3: " in line for line in lines)
    assert "100%" in result.stderr  # the bar over the blocks


def test_int8_image_to_video(self_forcing_env, tmp_path):
    rows = np.linspace(40, 200, 64)[:, None, None].repeat(96, 1).repeat(3, 2).astype(np.uint8)
    Image.fromarray(rows).save(tmp_path / "image.jpg")
    env = self_forcing_env | {
        "I2V": "1",
        "IMAGE_PATH": "image.jpg",
        "NUM_OUTPUT_FRAMES": "4",
        "SAVE_WITH_INDEX": "true",
    }
    env |= {"QUANT_TYPE": "int8", "QUANT_GRANULARITY": "per_tensor", "SEED": "7"}
    (path,) = written(run("self_forcing_quantized.sh", env, tmp_path), tmp_path)
    assert path.name == "0-7-0.mp4"
    assert_plays_in_a_browser(path, 13)


def test_the_file_shows_what_the_model_made(self_forcing_env, self_forcing, tmp_path):
    env = self_forcing_env | {"NO_QUANTIZE": "1", "PROMPT": "A red cat walks on the moon"}
    result = run("self_forcing_quantized.sh", env, tmp_path)
    (path,) = written(result, tmp_path)
    assert "high precision     everything" in result.stdout.splitlines()
    video = self_forcing.generate(["A red cat walks on the moon"], 3, torch.Generator().manual_seed(0))
    shown = torch.from_numpy(np.stack(list(iio.imiter(path, plugin="FFMPEG")))).permute(0, 3, 1, 2) / 255
    difference = torch.nn.functional.avg_pool2d(shown - video[0], 8)  # compression blurs the fine noise that it makes
    assert difference.square().mean().sqrt() < 0.02
    assert torch.nn.functional.avg_pool2d(video[0], 8).std() > 0.05  # so that there was something to be right about


def test_causvid_script_runs_in_a_prompt_for_each_rollout(causvid_env, tmp_path):
    env = causvid_env | {"PROMPT": "A cat; A dog", "DIFF_PROMPT": "1", "QUANT_TYPE": "int8", "ENABLE_KV_OFFLOAD": "0"}
    (path,) = written(run("causvid_quantized.sh", env, tmp_path), tmp_path)
    assert path.name == "A-cat-0.mp4"
    assert_plays_in_a_browser(path, 2 * 24)


def test_causvid_makes_a_video_of_every_prompt(causvid_env, tmp_path):
    env = causvid_env | {"PROMPT": "A cat; A dog", "NUM_ROLLOUT": "1", "NUM_OVERLAP_FRAMES": "6"}
    files = written(run("causvid_quantized.sh", env, tmp_path), tmp_path)
    assert [path.name for path in files] == ["A-cat-0.mp4", "A-dog-0.mp4"]
    for path in files:
        assert_plays_in_a_browser(path, 33 - 21)


def test_causvid_prompt_file(causvid_env, tmp_path):
    (tmp_path / "prompts.txt").write_text("A cat\n\n A dog; asleep \n")
    (tmp_path / "prompts.yaml").write_text("prompts: [A cat, A dog; asleep]")
    assert (
        read_prompts(tmp_path / "prompts.txt") == read_prompts(tmp_path / "prompts.yaml") == ["A cat", "A dog; asleep"]
    )
    env = causvid_env | {"DIFF_PROMPT_FILE": "prompts.txt"}
    (path,) = written(run("causvid_quantized.sh", env, tmp_path), tmp_path)
    assert_plays_in_a_browser(path, 2 * 24)


def test_causvid_asks_for_a_prompt_when_its_rollout_begins(causvid_env, tmp_path):
    env = causvid_env | {"IS_INTERACTIVE": "1", "PYTHONUNBUFFERED": "1"}
    command = [str(SCRIPTS / "causvid_quantized.sh")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, cwd=tmp_path, **pipes) as process:
        process.stdin.write(b"A cat\n")
        process.stdin.flush()
        shown = b""
        while b"2block" not in shown:  # both blocks of the first rollout that the second does not make again
            shown += process.stderr.read1()
        assert process.poll() is None and not (tmp_path / "my videos/video-0.mp4").exists()
        output, _ = process.communicate(b"\n\xff A dog \n", timeout=60)  # the same again, then another
    assert process.returncode == 0
    path = tmp_path / "my videos/video-0.mp4"
    assert output.startswith(b"file written       my videos/video-0.mp4\n")
    assert_plays_in_a_browser(path, 3 * 24)


def test_interactive_without_a_prompt(causvid_env, tmp_path):
    result = run("causvid_quantized.sh", causvid_env | {"IS_INTERACTIVE": "1"}, tmp_path, stdin=subprocess.DEVNULL)
    assert result.returncode == 2 and "no prompt was typed" in result.stderr and not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_no_half_written_file(self_forcing_env, tmp_path, sent, code):
    env = self_forcing_env | {"NUM_OUTPUT_FRAMES": "300", "NUM_SAMPLES": "2"}
    with subprocess.Popen(
        [SCRIPTS / "self_forcing_quantized.sh"], env=env, cwd=tmp_path, stderr=subprocess.PIPE
    ) as process:
        shown = b""
        while b"1/100" not in shown:
            shown += process.stderr.read1()
        assert len(list((tmp_path / "my videos").iterdir())) == 2
        process.send_signal(sent)
        _, rest = process.communicate(timeout=30)
    assert process.returncode == code and b"Traceback" not in rest
    assert not list((tmp_path / "my videos").iterdir())


def test_a_file_that_cannot_grow(self_forcing_env, tmp_path):
    command = f'ulimit -f 8; exec "{SCRIPTS}/self_forcing_quantized.sh"'
    env = self_forcing_env | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(["bash", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "raise it with ulimit -f" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not list((tmp_path / "my videos").iterdir())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"CHECKPOINT_PATH": "nowhere.pt"}, "nowhere.pt not found"),
        ({"PROMPT": ""}, "the prompt is empty"),
        ({"QUANT_TYPE": "int4"}, "--quant_type: invalid choice"),
        ({"PYTHONPATH": "elsewhere"}, "pip install -e 3rd_party/DAX"),  # another package called dax
    ],
)
def test_refusal(self_forcing_env, tmp_path, changes, complaint):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/dax.py").touch()
    result = run("self_forcing_quantized.sh", self_forcing_env | changes, tmp_path)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, ""), result.stderr
    assert result.stderr.startswith("error: ") and complaint in result.stderr
    assert not (tmp_path / "my videos").exists()


def test_python_without_the_requirements(tmp_path):
    bare = tmp_path / "bin/python3"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    env = {"PATH": f"{bare.parent}:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}
    for script in ("self_forcing_quantized.sh", "causvid_quantized.sh"):
        result = run(script, env, tmp_path)
        assert result.returncode == 2 and "setup.sh first" in result.stderr and result.stderr.count("\n") == 1


def test_download_says_what_it_would_fetch(tmp_path):
    """--dry-run, with a Python that has nothing installed, and no network asked."""
    (tmp_path / "download.sh").write_text((ROOT / "weights/download.sh").read_text())
    (tmp_path / "CausVid/autoregressive_checkpoint").mkdir(parents=True)
    (tmp_path / "CausVid/autoregressive_checkpoint/model.pt").touch()
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", "download.sh", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert "  5.7 GB  gdhe17/Self-Forcing  checkpoints/self_forcing_dmd.pt" in lines[8]
    assert lines[9].startswith("   there  tianweiy/CausVid")
    assert lines[10].startswith("to fetch: 23.3 GB")
    assert not (tmp_path / "Wan2.1-T2V-1.3B").exists()
    result = subprocess.run([*command, "more"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_help_without_dax(tmp_path):
    (tmp_path / "dax.py").touch()
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, SCRIPTS / "run_causvid_quantized.py", "--help"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--diff_prompt_file" in result.stdout


@pytest.mark.parametrize("name", ["self_forcing", "causvid"])
def test_every_flag_has_a_variable(name, capsys):
    with pytest.raises(SystemExit):
        load_runner(name).main(["--help"])
    words = capsys.readouterr().out.split()
    flags = {word.strip("[],") for word in words if word.startswith(("--", "[--"))} - {"--help"}
    script, readme = (SCRIPTS / f"{name}_quantized.sh").read_text(), (ROOT / "README.md").read_text()
    assert len(flags) > 20
    for flag in flags:
        variable = flag[2:].upper()
        assert f'{flag} "${variable}"}}' in script or f'{flag} "${{{variable}:-' in script, flag
        assert f"`{variable}`" in readme
