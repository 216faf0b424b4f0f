"""The benchmark of several GPUs, with processes that talk through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from processes import Process

sys.path.insert(1, str(ROOT / "benchmarks"))
import several_gpus
from user import COLUMNS

from inferix import InputError


def torchrun(num_ranks: int, folder: Path, *flags: str, seconds: float = 110) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += [ROOT / "benchmarks/several_gpus.py", "--num_frames=6", "--repeats=1", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OUTPUT_FOLDER": str(folder)}
    with Process(command, env) as process:
        return process.wait(seconds)


def test_four_ranks_compute_what_one_does(tmp_path):
    result = torchrun(4, tmp_path, "--engine_only", "--splits", "4x1", "2x2")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "several_gpus.json").read_text())
    rows = {(row["setting"], row["split"]): row for row in report["rows"]}
    assert report["gpus"] == 4
    assert list(rows) == [(setting, split) for split in ("1x1", "4x1", "2x2") for setting in ("bf16", "fp8+fp8kv")]
    for (setting, split), row in rows.items():
        assert row["speedup"] == rows[setting, "1x1"]["clip_s"] / row["clip_s"]
        if setting == "bf16":  # float32 on the CPU
            assert len(row["error"]) == 2 and max(row["error"]) < 1e-4
        for error, alone in zip(row["error_to_bf16"], rows[setting, "1x1"]["error_to_bf16"]):
            assert error == pytest.approx(alone, rel=0.1, abs=1e-4)
        assert f"| demo | {setting} | {split} | {row['clip_s']:.3f} |" in result.stdout


@pytest.mark.timeout(200)
def test_what_a_user_sees(tmp_path):
    result = torchrun(2, tmp_path, "--num_frames=3", "--splits", "2x1", "--settings", "bf16", seconds=190)
    assert result.returncode == 0, result.stderr
    for row in json.loads((tmp_path / "several_gpus.json").read_text())["rows"]:
        assert all(row[key] > 0 for key in COLUMNS)
        assert f"| demo | bf16 | {row['split']} | {row['script_clip_s']:.4g} |" in result.stdout


def test_time_limit(tmp_path):
    result = torchrun(2, tmp_path, "--time_limit", "0.1")
    assert result.returncode == 0 and "stopped after" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("num_ranks", "split", "complaint"),
    [
        (2, "4x1", "ulysses_size 4 x ring_size 1 is not the number of processes"),
        (2, "2", "--splits takes Ulysses x ring"),
        (1, "1x1", "start it with torchrun"),
    ],
)
def test_what_cannot_be_measured(monkeypatch, num_ranks, split, complaint):
    monkeypatch.setattr(several_gpus, "WORLD_SIZE", num_ranks)
    with pytest.raises(InputError, match=complaint):
        several_gpus.main(["--splits", split])


def test_kernels_of_a_trace():
    events = [
        {"cat": "kernel", "name": "ncclDevKernel_SendRecv", "dur": 1000.0},
        {"cat": "kernel", "name": "gemm", "dur": 2500.0},
        {"cat": "kernel", "name": "gemm", "dur": 500.0},
        {"cat": "gpu_user_annotation", "name": "nccl:all_to_all", "dur": 1000.0},
        {"ph": "M", "name": "process_name"},
    ]
    summary = several_gpus.summarize_kernels(events)
    assert summary["gpu_ms"] == 4.0 and summary["nccl_share"] == 0.25
    assert list(summary["kernels_ms"].items()) == [("gemm", 3.0), ("ncclDevKernel_SendRecv", 1.0)]
    assert several_gpus.summarize_kernels(events[-1:]) == {}
