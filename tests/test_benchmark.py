"""The speed benchmark, as it runs without a GPU: what it prints, and the files it writes."""

import json
import re
import subprocess

from conftest import ROOT
from PIL import Image


def test_it_measures_prints_and_draws(tmp_path):
    command = [ROOT / "example/quantization/benchmark.sh", "--settings", "fp8", "--repeats=1", "--output_folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "benchmark.json").read_text())
    fp8 = report["settings"]["fp8"]
    assert report["geometry"] == "demo" and report["vae"]["vae_decode_s"] > 0
    assert 0.995 <= fp8["cosine"] <= 1 and 0.002 < fp8["weights_gb"] < 0.003  # of 0.007 in full precision
    assert len(fp8["block_ms"]) == 7 and sum(fp8["block_ms"]) / 1000 == fp8["seven_blocks_s"]
    assert fp8["full_window_block_ms"] == fp8["block_ms"][-1]
    assert round(81 / fp8["end_to_end_s"], 6) == round(fp8["fps"], 6)
    assert re.search(rf"\| fp8 \| .* \| {fp8['cosine']:.4f} \|", done.stdout)
    assert re.search(rf"\| fp8 \| {fp8['block_ms'][0]:.1f} \(", done.stdout)
    assert Image.open(tmp_path / "benchmark.png").size[0] > 500
