"""The benchmarks of speed and memory as they run without a GPU: what they print, and the files they write."""

import json
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from forks import python_command
from PIL import Image

sys.path.insert(1, str(ROOT / "benchmarks"))
import loading
import long_video
import memory
import speed
import user
import webrtc_soak  # noqa: F401  it can be imported
from common import GEOMETRIES
from settings import SETTINGS, missing
from small_demo import small_demo

from inferix import InputError
from inferix.cli.figures import MAX_ERROR
from inferix.cli.main import run


def read_json(path) -> dict:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # strict: no NaN


def test_script_passes_flags_on(tmp_path):
    command = [ROOT / "benchmarks/benchmark.sh", "--settings", "bf16", "two words"]
    assert python_command(command, {}, tmp_path) == [str(ROOT / "benchmarks/speed.py"), *command[1:]]


def test_speed(tmp_path, capsys, monkeypatch):
    geometry = small_demo(GEOMETRIES["demo"])
    config = replace(geometry.config, image_or_video_shape=(1, 21, 16, 4, 4))
    monkeypatch.setitem(GEOMETRIES, "demo", replace(geometry, config=config))
    flags = ["--settings", "bf16", "fp8+fp8kv", "--repeats=1", "--num_frames=6", f"--output_folder={tmp_path}"]
    assert run(speed.main, flags) == 0
    printed = capsys.readouterr().out
    report = read_json(tmp_path / "benchmark.json")
    full, eight_bit = report["settings"].values()
    assert report["geometry"] == "demo" and report["vae_decode_s"] > 0
    assert 0.0012 < eight_bit["weights_gb"] < 0.0013 < 0.0028 < full["weights_gb"] < 0.0029
    assert max(full["error"]) < 1e-4 and max(abs(1 - gain) for gain in full["gain"]) < 1e-4  # float32 on the CPU
    assert all(0.005 < error < MAX_ERROR["fp8+fp8kv"] for error in eight_bit["error"])
    for result in (full, eight_bit):
        assert len(result["error"]) == len(result["gain"]) == len(result["block_ms"]) == 2
        assert sum(result["block_ms"]) / 1000 == result["seven_blocks_s"]
        assert result["full_window_block_ms"] == result["block_ms"][-1]
        assert 21 / result["end_to_end_s"] == pytest.approx(result["fps"])
        assert all(result[key] > 0 for key in user.COLUMNS)
    assert f"| fp8+fp8kv | {eight_bit['weights_gb'] * 1e3:.2f} MB |" in printed
    assert f"| fp8+fp8kv | {eight_bit['script_clip_s']:.4g} |" in printed
    assert f"| fp8+fp8kv | {eight_bit['error'][0]:.4f} |" in printed and "{" not in printed
    for name in ("benchmark.png", "benchmark_error.png"):
        assert Image.open(tmp_path / name).size[0] > 500


def test_memory(tmp_path, capsys, monkeypatch):
    demo = GEOMETRIES["demo"]
    monkeypatch.setitem(GEOMETRIES, "demo", replace(small_demo(demo), transformer=demo.transformer))
    flags = ["--settings", "bf16", "bf16+offload", "low", "--repeats=1", "--num_frames=6"]
    assert run(memory.main, [*flags, f"--output_folder={tmp_path}"]) == 0
    results = read_json(tmp_path / "memory.json")["settings"]
    whole, offloaded, low = (results[name]["bytes"] for name in ("bf16", "bf16+offload", "low"))
    assert whole["cache"] == 2 * 6 * 6 * 16 * 128 * 4  # keys and values, layers, frames, tokens, dim, float32
    assert low["cache"] < offloaded["cache"] == whole["cache"] // 2  # a layer that stays, two in transit
    assert low["transformer"] < whole["transformer"] / 2 and low["text encoder"] < whole["text encoder"]
    printed = capsys.readouterr().out
    assert "bf16+offload: latents the same to the bit" in printed and "| low | 2." in printed


def test_loading(tmp_path):
    geometry = GEOMETRIES["demo"]
    loading.write(geometry, tmp_path)
    ways = {way: loading.measure(geometry, way, tmp_path) for way in loading.WAYS}
    assert ways["saved fp8"]["weights"] == ways["bfloat16, then fp8"]["weights"] < 0.6 * ways["bfloat16"]["weights"]
    assert loading.table(ways).count(" MB |") == 6


def test_long_video(tmp_path, capsys):
    flags = ["--num_blocks=6", "--num_frames=6", "--settings", "bf16", f"--output_folder={tmp_path}"]
    assert run(long_video.main, flags) == 0
    assert len(read_json(tmp_path / "long_video.json")["seconds"]["bf16"]) == 6
    assert "| bf16 | " in capsys.readouterr().out
    with pytest.raises(InputError, match="at least 6"):
        long_video.main(["--num_blocks=5"])


def test_what_cannot_be_run_here(capsys):
    name = next(name for name in SETTINGS if missing(name))
    assert run(speed.main, ["--settings", name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {missing(name)}")
