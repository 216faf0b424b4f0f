"""The scripts under example/quantization as the tests start them: real processes, on the golden models."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING, load_runner, small_config
from forks import python_command
from processes import Process

from inferix.cli import main
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


SELF_FORCING_SUFFIX = "-self_forcing_dmd-checkpoint-latents-3"
"""What a file name says of these variables, none of which is the default."""


@pytest.fixture
def causvid_env(self_forcing_env, tmp_path) -> dict[str, str]:
    """The same for causvid_quantized.sh."""
    small_config("causvid/configs/causvid", tmp_path)
    (tmp_path / "checkpoint").symlink_to(CAUSVID)
    return self_forcing_env | {"CONFIG_PATH": "causvid.yaml", "CHECKPOINT_FOLDER": "checkpoint"}


CAUSVID_SUFFIX = "-causvid-checkpoint"


def run(script: str, env: dict[str, str], folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run ``script`` in ``folder`` to its end."""
    with Process([SCRIPTS / script, *arguments], env, cwd=folder, **options) as process:
        return process.wait(100)


def run_here(script: str, env: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Do what ``run`` does in this process, which has imported already what a new one imports for seconds.

    For tests of what a run makes. What it is as a process, its signals, descriptors and variables that are no flags, is
    tested with ``run``.
    """
    runner = load_runner(script.removesuffix("_quantized.sh"))
    _launch, _runner, *flags = python_command([SCRIPTS / script, *arguments], env, folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run(runner.main, flags)
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def run_runner(folder: Path, flags: list[str]) -> int:
    """Be one of the processes that self_forcing_quantized.sh starts; return its exit code."""
    os.chdir(folder)
    return main.run(load_runner("self_forcing").main, flags)


def written(result: subprocess.CompletedProcess, folder: Path) -> list[Path]:
    """Return the files that a successful run says it has written, which are all there are and have a record each."""
    assert result.returncode == 0, result.stderr
    files = [
        folder / line.removeprefix("file written").strip() for line in result.stdout.splitlines() if "file wr" in line
    ]
    lines = (folder / "my videos/manifest.jsonl").read_text().splitlines()
    videos = [path for path in (folder / "my videos").iterdir() if path.name != "manifest.jsonl"]
    assert sorted(files) == sorted(videos) == sorted(folder / "my videos" / json.loads(line)["file"] for line in lines)
    return files


def assert_plays_in_a_browser(path: Path, num_frames: int) -> None:
    """H.264, 4:2:0, 16 frames a second, the index in front of the pictures."""
    meta = iio.immeta(path, plugin="FFMPEG")
    assert (meta["codec"], meta["pix_fmt"][:7], meta["fps"], meta["size"]) == ("h264", "yuv420p", 16, (96, 64))
    assert count_frames(path) == num_frames == len(list(iio.imiter(path, plugin="FFMPEG")))
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
