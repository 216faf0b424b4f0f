"""The benchmark of several GPUs, with processes that talk through gloo."""

import json
import sys

import pytest
from conftest import ROOT
from forks import run_ranks

sys.path.insert(1, str(ROOT / "benchmarks"))
import several_gpus
from common import GEOMETRIES
from small_demo import small_demo
from user import COLUMNS

from inferix import InputError
from inferix.distributed.context_parallel import shutdown


def measure_small(*flags: str) -> None:
    """Be a rank of the benchmark, with a demo model of two layers and smaller frames."""
    GEOMETRIES["demo"] = small_demo(GEOMETRIES["demo"])
    several_gpus.main(["--num_frames=6", "--repeats=1", *flags])
    shutdown()


def test_four_ranks_compute_what_one_does(tmp_path):
    flags = ["--engine_only", "--splits", "4x1", "2x2", "--output_folder", str(tmp_path)]
    printed = run_ranks(4, measure_small, *flags)[0].output
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
        assert f"| demo | {setting} | {split} | {row['clip_s']:.3f} |" in printed


def test_what_a_user_sees(tmp_path):
    flags = ["--num_frames=3", "--splits", "2x1", "--settings", "bf16", "--output_folder", str(tmp_path)]
    printed = run_ranks(2, measure_small, *flags)[0].output
    for row in json.loads((tmp_path / "several_gpus.json").read_text())["rows"]:
        assert all(row[key] > 0 for key in COLUMNS)
        assert f"| demo | bf16 | {row['split']} | {row['script_clip_s']:.4g} |" in printed


def test_time_limit(tmp_path):
    """It is over before the first row."""
    ranks = run_ranks(2, measure_small, "--time_limit", "0.01", "--output_folder", str(tmp_path))
    assert "stopped after" in ranks[0].output
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
