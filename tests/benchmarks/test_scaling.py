"""The benchmark of how cost grows, at the demo's size, and its words."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(1, str(ROOT / "benchmarks"))
import scaling

from inferix import InputError
from inferix.cli.main import run


def test_lengths_and_ranks(tmp_path, capsys):
    flags = ["--lengths", "3", "6", "--sizes", "--batches", "1", "--ranks", "1", "2", "--num_frames=3", "--repeats=1"]
    assert run(scaling.main, [*flags, f"--output_folder={tmp_path}"]) == 0
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["length"] for row in report["length"]] == [3, 6] and [row["ranks"] for row in report["ranks"]] == [1, 2]
    assert report["length"][0] == report["ranks"][0]  # measured once
    assert all(row["seconds"] > 0 and row["gb"] > 0 for axis in ("length", "ranks") for row in report[axis])
    printed = capsys.readouterr().out
    assert "| latent frames | seconds | GB |" in printed and "seconds against length: " in printed
    assert "GB against ranks: " in printed
    for axis in ("length", "ranks"):
        assert Image.open(tmp_path / f"scaling_{axis}.png").size[0] > 500
    assert not (tmp_path / "scaling_batch.png").exists()  # of a single value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2.1, 4], "grow in proportion (exponent 1.00"),
        ([1, 1.5, 2], "grow, less than in proportion"),
        ([1, 3, 9], "grow more than in proportion"),
        ([1, 1.01, 1], "stay as they are"),
        ([4, 2, 1], "fall in inverse proportion"),
        ([4, 3, 2], "fall, less than in inverse proportion"),
    ],
)
def test_slopes_in_words(values, words):
    assert f"seconds against ranks: {words}" in scaling.in_words("ranks", "seconds", [1, 2, 4], values)


def test_what_cannot_be_measured():
    with pytest.raises(InputError, match="multiples of 16, such as 480x832, not 480x830"):
        scaling.main(["--sizes", "480x830", "480x832"])
