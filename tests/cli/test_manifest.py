"""The manifest: many processes at once, crashes, and what counts as complete."""

import json
import sys

import pytest
from conftest import ROOT
from processes import Process

from inferix import InputError
from inferix.cli.manifest import Manifest, video_key

WRITER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from inferix.cli.manifest import Manifest
manifest = Manifest(Path("manifest.jsonl"))
for number in range(100):
    manifest.append({{"id": sys.argv[1], "sample": number, "text": "x" * 3000}})
"""


def record(name: str, **changes) -> dict:
    return {
        "file": f"{name}.mp4",
        "id": name,
        "prompt": name,
        "seed": 0,
        "settings": {"steps": [1, 2]},
        "bytes": 3,
    } | changes


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    manifest = Manifest(tmp_path / "videos/manifest.jsonl")
    for name in ("a", "b"):
        manifest.append(record(name))
        (manifest.path.parent / f"{name}.mp4").write_bytes(b"123")
    manifest.refresh()
    return manifest


def test_complete_is_a_file_and_its_line(manifest):
    assert manifest.is_complete(video_key(record("a"))) and not manifest.is_complete(video_key(record("c")))
    for changes in ({"seed": 1}, {"settings": {"steps": [1]}}, {"sample": 1}, {"prompt": "b"}):
        assert not manifest.is_complete(video_key(record("a", **changes)))
    (manifest.path.parent / "b.mp4").write_bytes(b"12")
    assert not manifest.is_complete(video_key(record("b")))
    (manifest.path.parent / "a.mp4").unlink()
    assert not manifest.is_complete(video_key(record("a")))


def test_the_last_line_counts(manifest):
    manifest.append(record("a", file=None, error="out of memory"))
    manifest.append(record("b", seed=1))  # the same file, made again with another seed
    assert [line["id"] for line in manifest.refresh()] == ["a", "b"] and manifest.refresh() == []
    assert not manifest.is_complete(video_key(record("a"))) and not manifest.is_complete(video_key(record("b")))
    assert manifest.is_complete(video_key(record("b", seed=1)))


def test_half_a_line_is_removed_and_said(manifest, capsys):
    with manifest.path.open("ab") as file:
        file.write(b'{"file": "c.mp4", "pro')
    assert manifest.refresh() == []
    manifest.append(record("d"))
    assert "ended in half a line" in capsys.readouterr().err
    assert [line["id"] for line in manifest.refresh()] == ["d"]
    assert [json.loads(line)["id"] for line in manifest.path.read_text().splitlines()] == ["a", "b", "d"]


def test_a_line_that_lacks_only_its_end_stays(manifest, capsys):
    manifest.path.write_bytes(manifest.path.read_bytes()[:-1])
    manifest.append(record("c"))
    assert [json.loads(line)["id"] for line in manifest.path.read_text().splitlines()] == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_damaged_line_is_ignored_and_said(manifest, capsys):
    lines = manifest.path.read_text().splitlines(keepends=True)
    manifest.path.write_text(lines[0] + "\0\0\0\n" + lines[1])
    again = Manifest(manifest.path)
    assert [line["id"] for line in again.refresh()] == ["a", "b"]
    assert "line 2, is damaged" in capsys.readouterr().err


def test_many_processes_at_once(tmp_path):
    names = [str(number) for number in range(4)]
    processes = [Process([sys.executable, "-c", WRITER, name], cwd=tmp_path).__enter__() for name in names]
    for process in processes:
        result = process.wait()
        process.__exit__()
        assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 400
    for name in names:
        assert [line["sample"] for line in lines if line["id"] == name] == list(range(100))


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    command = ["bash", "-c", f"ulimit -f 100; trap '' XFSZ; exec {sys.executable} -c \"$0\" a", WRITER]
    with Process(command, cwd=tmp_path) as process:
        result = process.wait()
    assert result.returncode != 0 and "cannot write to manifest.jsonl" in result.stderr
    assert (tmp_path / "manifest.jsonl").read_bytes().endswith(b'"}\n')


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        Manifest(tmp_path / "file/manifest.jsonl").append(record("a"))
