"""What is answered before PyTorch is imported, however a program is started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING
from processes import Process
from scripts import SCRIPTS, run, self_forcing_env  # noqa: F401

# ruff: noqa: F811

RUNNERS = ("self_forcing", "causvid")


@pytest.fixture
def no_torch(tmp_path) -> dict[str, str]:
    """Variables with which PyTorch is found and can not be imported."""
    (tmp_path / "broken/torch").mkdir(parents=True)
    (tmp_path / "broken/torch/__init__.py").write_text("raise SystemExit('PyTorch was imported')")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(tmp_path / "broken")}


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """An interpreter that has no packages, called python3."""
    path = tmp_path / "bin/python3"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -E -s -S "$@"\n')
    path.chmod(0o755)
    return path


def start(command: list, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    with Process(command, env, cwd=folder) as process:
        return process.wait()


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--quant_type", "int4"], "--quant_type: invalid choice"),
        (["--frames", "21"], "unrecognized arguments: --frames 21"),
        (["--config_path", "nowhere.yaml"], "--config_path: nowhere.yaml not found"),
        (["--load_quantized", "nowhere"], "--load_quantized: nowhere not found"),
        (["--prompt", ";"], "the prompt is empty"),
        (["--no_quantize", "--save_quantized", "there"], "leave one out"),
    ],
)
def test_wrong_flags(no_torch, tmp_path, name, flags, complaint):
    for command in ([sys.executable, SCRIPTS / f"run_{name}_quantized.py"], [SCRIPTS / f"{name}_quantized.sh"]):
        result = start([*command, *flags], no_torch, tmp_path)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert result.stderr.startswith("error: ") and complaint in result.stderr


@pytest.mark.parametrize(
    ("name", "variables", "complaint"),
    [
        ("self_forcing", {"CHECKPOINT_PATH": "nowhere.pt", "ENABLE_WEBRTC": "1"}, "nowhere.pt not found"),
        ("self_forcing", {"NUM_OUTPUT_FRAMES": "20"}, "num_output_frames must be positive and a multiple of 3, not 20"),
        ("self_forcing", {"QCONFIG": "none.yaml"}, "none.yaml not found"),
        ("causvid", {"NUM_OVERLAP_FRAMES": "0"}, "a multiple of 3, from 3 to below the rollout's 21, not 0"),
        ("causvid", {"PROMPT": "a; b", "DIFF_PROMPT": "1", "NUM_ROLLOUT": "1"}, "2 prompts for 1 rollout:"),
        ("causvid", {"PROMPT": "a", "DIFF_PROMPT_FILE": "here.txt"}, "DIFF_PROMPT_FILE and PROMPT): leave one out"),
        ("causvid", {"DIFF_PROMPT_FILE": "empty.txt"}, "empty.txt holds no prompt"),
        ("causvid", {"CHECKPOINT_FOLDER": str(CAUSVID)}, "CHECKPOINT_FOLDER you set; set WAN_BASE_MODEL_PATH"),
    ],
)
def test_wrong_variables(no_torch, tmp_path, name, variables, complaint):
    (tmp_path / "here.txt").write_text("A cat")
    (tmp_path / "empty.txt").write_text("\n")
    if "CHECKPOINT_FOLDER" in variables and (ROOT / "weights/Wan2.1-T2V-1.3B").exists():
        pytest.skip("the public weights are there")
    result = run(f"{name}_quantized.sh", no_torch | variables, tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.startswith("error: ") and complaint in result.stderr


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "the port is taken"), ("192.0.2.1", "no such address")])
def test_the_page_cannot_be_served(no_torch, tmp_path, host, reason):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        env = no_torch | {"ENABLE_WEBRTC": "1", "WEBRTC_HOST": host, "WEBRTC_PORT": str(port)}
        result = run("self_forcing_quantized.sh", env, tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert f"{host}:{port}, {reason}" in result.stderr and "--webrtc_port" in result.stderr


def test_a_node_lacks_the_address_of_another(no_torch, tmp_path):
    variables = {"ENABLE_WEBRTC": "1", "WEBRTC_HOST": "192.0.2.1", "NNODES": "2", "NODE_RANK": "1", "NPROC": "1"}
    result = run("self_forcing_quantized.sh", no_torch | variables, tmp_path)
    assert "PyTorch was imported" in result.stderr and "cannot serve" not in result.stderr


@pytest.mark.parametrize("name", RUNNERS)
def test_every_flag_has_a_variable(no_torch, tmp_path, name):
    result = run(f"{name}_quantized.sh", no_torch, tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    flags = {word.strip("[],") for word in result.stdout.split() if word.startswith(("--", "[--"))} - {"--help"}
    script, docs = (SCRIPTS / f"{name}_quantized.sh").read_text(), "".join(documentation())
    assert len(flags) > 20
    for flag in flags:
        variable = flag[2:].upper()
        assert f'{flag} "${variable}"}}' in script or f'{flag} "${{{variable}:-' in script, flag
        assert f"`{variable}`" in docs


def documentation():
    return (path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))


HASHING = """
import launch
from inferix.checkpoints import hashes
for versions in hashes._hashes:
    print(*(path for path, _ in versions))
"""


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),  # follows the other one
        ({"RANK": "1", "WORLD_SIZE": "2", "DATA_PARALLEL": "2"}, True),
        ({"RANK": "2", "WORLD_SIZE": "4", "DATA_PARALLEL": "2"}, True),
        ({"RANK": "3", "WORLD_SIZE": "4", "DATA_PARALLEL": "2"}, False),
    ],
)
def test_the_checkpoint_is_hashed_from_the_start(no_torch, tmp_path, variables, begins):
    flags = ["--data_parallel", variables["DATA_PARALLEL"]] if "DATA_PARALLEL" in variables else []
    (tmp_path / "run_self_forcing_quantized.py").write_text(HASHING)
    env = no_torch | variables | {"PYTHONPATH": f"{no_torch['PYTHONPATH']}:{SCRIPTS}"}
    flags += ["--checkpoint_path", SELF_FORCING, "--wan_base_model_path", BASE]
    result = start([sys.executable, "run_self_forcing_quantized.py", *flags], env, tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{SELF_FORCING}\n" if begins else ""), result.stderr


def test_python_without_the_packages(bare_python, tmp_path):
    env = {"PATH": f"{bare_python.parent}:/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}
    for name in RUNNERS:
        for command in ([SCRIPTS / f"{name}_quantized.sh"], [bare_python, SCRIPTS / f"run_{name}_quantized.py"]):
            result = start(command, env, tmp_path)
            assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
            assert "lacks what generation needs" in result.stderr
            assert "setup.sh" in result.stderr or ".venv/bin/python" in result.stderr


def test_another_package_called_dax(self_forcing_env, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/dax.py").touch()
    result = run("self_forcing_quantized.sh", self_forcing_env | {"PYTHONPATH": "elsewhere"}, tmp_path)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, ""), result.stderr
    assert "pip install -e 3rd_party/DAX" in result.stderr


def test_script_through_a_symlink(no_torch, tmp_path):
    (tmp_path / "link.sh").symlink_to(SCRIPTS / "self_forcing_quantized.sh")
    result = start([tmp_path / "link.sh", "--help"], no_torch, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"NPROC": "2", "ULYSSES_SIZE": "4"}, "ulysses_size 4 x ring_size 1 is not the number of processes (2)"),
        ({"NPROC": "3", "RING_SIZE": "2"}, "ulysses_size 1 x ring_size 2 is not the number of processes (3)"),
        ({"NNODES": "2", "NPROC": "1", "RING_SIZE": "1", "ULYSSES_SIZE": "1"}, "is not the number of processes (2)"),
    ],
)
def test_sizes_that_are_not_the_number_of_processes(no_torch, tmp_path, variables, complaint):
    result = run("self_forcing_quantized.sh", no_torch | variables, tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert complaint in result.stderr


@pytest.mark.parametrize("nproc", ["two", "0", "-1"])
def test_number_of_processes(no_torch, tmp_path, nproc):
    result = run("self_forcing_quantized.sh", no_torch | {"NPROC": nproc}, tmp_path)
    assert (result.returncode, result.stderr) == (2, f"error: NPROC must be a number from 1, not '{nproc}'\n")


def download(folder: Path, python: Path, *words: str) -> subprocess.CompletedProcess:
    """Run download.sh, in a checkout without weights, for the files it would fetch: no network is asked."""
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights/download.sh").write_text((ROOT / "weights/download.sh").read_text())
    if not (folder / "inferix").exists():
        (folder / "inferix").symlink_to(ROOT / "inferix")
    env = {"PATH": f"{python.parent}:/usr/bin:/bin"}
    return start(["bash", "weights/download.sh", "--dry-run", *words], env, folder)


@pytest.mark.parametrize("spelling", ["causvid", "CausVid"])
def test_download_says_what_it_would_fetch(bare_python, tmp_path, spelling):
    (tmp_path / "weights" / spelling / "autoregressive_checkpoint").mkdir(parents=True)
    (tmp_path / "weights" / spelling / "autoregressive_checkpoint/model.pt").touch()
    result = download(tmp_path, bare_python)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert any("  5.7 GB  gdhe17/Self-Forcing  checkpoints/self_forcing_dmd.pt" in line for line in lines)
    assert any(line.startswith("   there  tianweiy/CausVid") for line in lines)
    assert lines[-1].startswith("to fetch: 17.6 GB")  # the base model without its transformer, and Self-Forcing
    assert [path.name for path in sorted((tmp_path / "weights").iterdir())] == sorted([spelling, "download.sh"])


def test_download_writes_where_the_guide_looks(bare_python, tmp_path):
    assert "-> weights/causvid/autoregressive_checkpoint/model.pt" in download(tmp_path, bare_python, "causvid").stdout


def test_download_of_something_else(bare_python, tmp_path):
    result = download(tmp_path, bare_python, "more")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
