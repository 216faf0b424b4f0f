"""Batches: prompt files that resume, errors of single prompts, samples in parts, in this process on the golden model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, SELF_FORCING, load_runner, small_config
from PIL import Image

from inferix import SelfForcingPipeline
from inferix.cli.main import run
from inferix.video import VideoWriter, count_frames, wait_for_writers
from inferix.video_files import remove_stale_partials


class Runner:
    """Runs the Self-Forcing runner on prompt files in ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.videos = folder, folder / "videos"
        self.main = load_runner("self_forcing").main
        flags = {"config_path": small_config("self_forcing/configs/self_forcing_dmd", folder)}
        flags |= {"wan_base_model_path": BASE, "checkpoint_path": SELF_FORCING, "output_folder": self.videos}
        self.flags = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        self.flags += ["--num_output_frames", "3", "--use_ema"]

    def run(self, entries: list[dict], *flags: str) -> int:
        path = self.folder / "list.jsonl"
        path.write_text("\n".join(map(json.dumps, entries)))
        return run(self.main, [*self.flags, "--prompt_file", str(path), *flags])

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.videos / "manifest.jsonl").read_text().splitlines()]

    def files(self) -> dict[str, tuple[int, bytes]]:
        """Return inode and content of every video, incomplete ones too."""
        return {path.name: (path.stat().st_ino, path.read_bytes()) for path in self.videos.glob("*.mp4")}


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


CAT, DOG = {"prompt": "A cat", "id": "cat"}, {"prompt": "A dog", "id": "dog", "seed": 4, "num_output_frames": 6}


def test_what_is_complete_is_not_made_again(runner, capsys):
    assert runner.run([CAT, DOG]) == 0
    first = runner.files()
    assert first.keys() == {"cat.mp4", "dog.mp4"} and count_frames(runner.videos / "dog.mp4") == 21
    cat, dog = sorted(runner.lines(), key=lambda line: line["id"])
    assert (cat["file"], cat["seed"], cat["frames"], cat["width"], cat["height"]) == ("cat.mp4", 0, 9, 96, 64)
    assert dog["settings"] == cat["settings"] | {"num_output_frames": 6} and dog["seed"] == 4
    assert len(cat["settings"]["checkpoint_sha256"]) == 64 and cat["settings"]["quantization"] == "fp8, per token"

    assert runner.run([CAT, DOG]) == 0
    assert runner.files() == first and len(runner.lines()) == 2
    assert "videos             0 made, 2 complete before: " in capsys.readouterr().out

    (runner.videos / "dog.mp4").write_bytes(b"broken")
    assert runner.run([CAT, DOG]) == 0
    again = runner.files()
    assert again["cat.mp4"] == first["cat.mp4"] and again["dog.mp4"][1] == first["dog.mp4"][1] and len(again) == 2

    assert runner.run([CAT, DOG], "--overwrite") == 0
    again = runner.files()
    assert {name: content for name, (_, content) in again.items()} == {name: c for name, (_, c) in first.items()}
    assert again["cat.mp4"][0] != first["cat.mp4"][0]


def test_changed_settings_make_a_video_of_their_own(runner):
    assert runner.run([CAT]) == 0
    assert runner.run([CAT], "--quant_type", "int8") == 0
    assert runner.run([CAT | {"extended_prompt": "A cat, in detail"}]) == 0
    assert runner.files().keys() == {"cat.mp4", "cat-2.mp4", "cat-3.mp4"}
    assert [line["extended_prompt"] for line in runner.lines()] == [None, None, "A cat, in detail"]
    assert runner.run([CAT], "--quant_type", "int8") == 0
    assert len(runner.lines()) == 3


def test_a_prompt_that_fails_does_not_stop_the_others(runner, capsys):
    (runner.folder / "image.png").write_bytes(b"no image")
    bad = {"prompt": "A bird", "id": "bird", "image": "image.png", "num_output_frames": 4}
    assert runner.run([bad, CAT]) == 1
    output = capsys.readouterr()
    assert "videos             1 made, 1 failed: " in output.out
    assert "error: 1 of 2 videos failed, the last one for: image " in output.err and "Traceback" not in output.err
    failed, made = runner.lines()
    assert failed["file"] is None and "cannot be read" in failed["error"] and made["file"] == "cat.mp4"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(runner.folder / "image.png")
    assert runner.run([bad, CAT]) == 0
    assert [line["file"] for line in runner.lines()] == [None, "cat.mp4", "bird.mp4"]


def test_samples_in_parts_are_those_of_the_whole_batch(self_forcing):
    whole = self_forcing.generate(["A cat"] * 3, 6, self_forcing.seeded(7))
    for samples in ([0], [1, 2]):
        generator = self_forcing.seeded(7, samples, 3)
        part = self_forcing.generate(["A cat"] * len(samples), 6, generator)
        torch.testing.assert_close(part, whole[samples], rtol=0, atol=1e-4)


def test_too_little_memory_for_all_samples(runner, monkeypatch):
    stream, batches = SelfForcingPipeline.stream, []

    def limited(self, prompts, *arguments):
        batches.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from stream(self, prompts, *arguments)

    monkeypatch.setattr(SelfForcingPipeline, "stream", limited)
    assert runner.run([CAT], "--num_samples", "3") == 0
    assert batches == [3, 1, 2, 1, 1] and runner.files().keys() == {"cat-0.mp4", "cat-1.mp4", "cat-2.mp4"}
    lines = sorted(runner.lines(), key=lambda line: line["sample"])  # recorded as their encoders ended
    assert [(line["sample"], line.get("error")) for line in lines] == [(0, None), (1, None), (2, None)]


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    """An incomplete file; a complete one whose record was not written; nothing that a living writer holds."""
    (tmp_path / ".a.1-0.partial.mp4").write_bytes(b"half")
    (tmp_path / ".b.1-1.partial.mp4").write_bytes(b"whole")
    (tmp_path / "b.mp4").hardlink_to(tmp_path / ".b.1-1.partial.mp4")
    (tmp_path / ".c.1-2.partial.mp4").write_bytes(b"recorded")
    (tmp_path / "c.mp4").hardlink_to(tmp_path / ".c.1-2.partial.mp4")
    with VideoWriter(tmp_path / "d.mp4") as writer:
        remove_stale_partials(tmp_path, {"c.mp4"}, min_age=-1)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names[1:] == ["c.mp4"] and names[0].startswith(".d.")
        writer.write(torch.zeros(2, 3, 16, 16))
    wait_for_writers()


def test_a_file_whose_record_cannot_be_written_is_not_left(tmp_path):
    def fail(writer: VideoWriter) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left"):
        with VideoWriter(tmp_path / "a.mp4", on_complete=fail) as writer:
            writer.write(torch.zeros(2, 3, 16, 16))
        wait_for_writers()
    assert not list(tmp_path.iterdir())
