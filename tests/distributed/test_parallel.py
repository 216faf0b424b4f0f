"""Several processes share a video: real ones, started by torchrun and talking through gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file
from scripts import SCRIPTS, assert_plays_in_a_browser, run, self_forcing_env, written  # noqa: F401

from inferix import InputError, ParallelConfig
from inferix.cli.devices import parallel_config
from inferix.parallel import check_sizes


def launched(nproc: int, *command: str, **options) -> subprocess.Popen:
    env = os.environ | {"NPROC": str(nproc), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen([sys.executable, str(SCRIPTS / "launch.py"), *command], env=env, **options)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Golden clips made by one process (1x1) and by two and four, each named by its sizes, Ulysses x ring."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.main(folder, "1x1")
    torch.set_grad_enabled(True)
    for nproc, ways in ((2, ("2x1", "1x2")), (4, ("2x2",))):
        with launched(nproc, str(ROOT / "tests/ranks.py"), str(folder), *ways) as process:
            assert process.wait(timeout=120) == 0
    return {name: tensor for n in (1, 2, 4) for name, tensor in load_file(folder / f"{n}.safetensors").items()}


WAYS = ["2x1", "1x2", "2x2"]


@pytest.mark.parametrize("way", WAYS)
def test_full_precision_is_the_golden_data(clips, way):
    golden = load_file(GOLDEN / "expected/self_forcing.safetensors")
    torch.testing.assert_close(clips[f"{way}.self_forcing.latents"], golden["latents"], rtol=0, atol=1e-3)
    torch.testing.assert_close(clips[f"{way}.self_forcing.video"], golden["video"].float(), rtol=0, atol=5e-3)
    golden = load_file(GOLDEN / "expected/causvid.safetensors")
    for rollout in ("latents_0", "latents_1"):
        torch.testing.assert_close(clips[f"{way}.causvid.{rollout}"], golden[rollout], rtol=0, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_full_precision_is_what_one_process_computes(clips, way):
    for name in ("self_forcing.latents", "self_forcing.video", "causvid.latents_0", "causvid.latents_1"):
        torch.testing.assert_close(clips[f"{way}.{name}"], clips[f"1x1.{name}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quantized", ["fp8", "int8"])
def test_quantized(clips, way, quantized):
    """The cache offloaded besides; fp8 with a scale for each tensor, of which every rank has a part."""
    ours, alone = (clips[f"{w}.{quantized}.latents"].flatten() for w in (way, "1x1"))
    assert torch.nn.functional.cosine_similarity(ours, alone, dim=0) >= 0.999
    if quantized == "fp8":
        torch.testing.assert_close(clips[f"{way}.fp8.scales"], clips["1x1.fp8.scales"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("sizes", "tokens", "complaint"),
    [
        ((8, 1), 1560, "does not divide the 12 attention heads; .*: 1 x 8, 2 x 4, 4 x 2$"),
        ((1, 7), 1560, "cannot be split over 7 processes; .*: 1, 2, 3, 4, 5, 6, 8, 10, 12, 13$"),
        ((4, 4), 1560, "cannot be split over 16 processes; .* 12, 13, 15, 20, 24, 26, 30$"),
    ],
)
def test_sizes_that_do_not_divide(sizes, tokens, complaint):
    config = ParallelConfig(*sizes, world_size=sizes[0] * sizes[1])
    with pytest.raises(InputError, match=complaint):
        check_sizes(config, num_heads=12, tokens_per_frame=tokens)


@pytest.mark.parametrize(
    ("given", "world", "sizes"),
    [((None, None), 4, (2, 2)), ((None, 4), 4, (1, 4)), ((1, None), 4, (1, 4)), ((None, None), 1, (1, 1))],
)
def test_sizes_not_given(given, world, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    config = parallel_config(*given, num_heads=2)
    assert (config.ulysses_size, config.ring_size) == sizes


def test_script(self_forcing_env, tmp_path):  # noqa: F811
    env = self_forcing_env | {"NPROC": "2", "PROMPT": "A cat; A dog", "ENABLE_KV_OFFLOAD": "1"}
    result = run("self_forcing_quantized.sh", env, tmp_path)
    for path in written(result, tmp_path):
        assert_plays_in_a_browser(path, 9)
    assert result.stdout.count("seconds ") == 1 and result.stderr.count("| 0/1") == 2  # one process speaks
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"NPROC": "2", "ULYSSES_SIZE": "4"}, "ulysses_size 4 x ring_size 1 is not the number of processes (2)"),
        ({"NPROC": "2", "OUTPUT_FOLDER": "/proc/nowhere"}, "choose another folder"),  # which the first process finds
        ({"NPROC": "two"}, "NPROC must be a number"),
    ],
)
def test_refusal(self_forcing_env, tmp_path, changes, complaint):  # noqa: F811
    result = run("self_forcing_quantized.sh", self_forcing_env | changes, tmp_path)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, ""), result.stderr
    assert result.stderr.startswith("error: ") and complaint in result.stderr
    assert not (tmp_path / "my videos").exists()


def test_a_rank_that_dies_ends_the_job(self_forcing_env, tmp_path):  # noqa: F811
    env = self_forcing_env | {"NPROC": "2", "NUM_OUTPUT_FRAMES": "3000"}
    command = [SCRIPTS / "self_forcing_quantized.sh"]
    with subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        shown = b""
        while b"2/1000" not in shown:
            chunk = process.stderr.read1()
            assert chunk, shown
            shown += chunk
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (victim,) = [pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
        os.kill(int(victim), signal.SIGKILL)
        began = time.monotonic()
        _, rest = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was ended by SIGKILL" in rest.decode()
    # Who writes had time to clear up.
    assert not list((tmp_path / "my videos").iterdir())
