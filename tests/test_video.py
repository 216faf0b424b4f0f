"""Writing videos: what is in the files, which names they get, and what happens when something goes wrong."""

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from inferix import video
from inferix.errors import InputError
from inferix.file_name import safe_file_name
from inferix.video import SegmentedVideoWriter, VideoWriter, count_frames, wait_for_writers
from inferix.video_encoder import Encoder, encoder_command, to_pixels


def clip(num_frames: int, first: int = 0, height: int = 48, width: int = 64) -> Tensor:
    """Return frames [t, 3, H, W] of moving gradients, numbers ``first`` and up of one endless video."""
    t = torch.arange(first, first + num_frames).view(-1, 1, 1, 1) / 8
    y, x = torch.linspace(0, 2, height).view(-1, 1), torch.linspace(0, 2, width)
    return 0.5 + 0.4 * torch.sin(torch.tensor([1.0, 1.3, 0.7]).view(3, 1, 1) * (x + y) + t)


def write(path: Path, frames: Tensor) -> Path:
    """Write a file and return its final name."""
    with VideoWriter(path) as writer:
        writer.write(frames)
    return writer.result()


def decoded(path: Path) -> Tensor:
    """Return a file's frames [t, 3, H, W] in [0, 1]."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 255


def encoders(parent: int | None = None) -> list[int]:
    """Return the ids of the live child processes of ``parent`` (default: this process) but for Python's own servers."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
            state, ppid = rest.split()[:2]
        except OSError:  # it has just ended
            continue
        if int(ppid) == (parent or os.getpid()) and state != "Z" and "(python" not in name:
            children.append(int(stat.parent.name))
    return children


def wait_for_encoder() -> int:
    """Return the id of the one encoder that runs, or is about to."""
    while not (running := encoders()):
        time.sleep(0.01)
    (encoder,) = running
    return encoder


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves an encoder, a thread or an incomplete file."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("writer of"):
            thread.join(10)
            assert not thread.is_alive()
    assert not encoders() and not VideoWriter.partials
    wait_for_writers()


def test_the_file_shows_the_frames(tmp_path):
    frames = clip(20)
    with VideoWriter(tmp_path / "new/folder/-a: b.mp4", fps=8) as writer:
        for piece in frames.split([1, 0, 12, 7]):
            writer.write(piece)
        assert writer.frames == 20
    path = writer.result()
    assert path == writer.path == tmp_path / "new/folder/-a: b.mp4" and list(path.parent.iterdir()) == [path]
    assert count_frames(path) == 20
    assert (decoded(path) - frames).square().mean().sqrt() < 0.01
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.format.name, stream.average_rate) == ("h264", "yuv420p", 8)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_values_are_rounded_and_clamped_and_odd_sizes_become_even(tmp_path):
    pixels, event = to_pixels(torch.tensor([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.1]).view(1, 3, 2, 1))
    assert pixels.flatten().tolist() == [0, 0, 0, 1, 255, 255] and event is None
    half = torch.linspace(0, 1, 1024, dtype=torch.bfloat16).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert torch.equal(to_pixels(half)[0], to_pixels(half.float())[0])
    assert decoded(write(tmp_path / "a.mp4", clip(2, height=33, width=51))).shape == (2, 3, 34, 52)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_frames_from_a_gpu(tmp_path):
    frames = clip(40, height=480, width=832)
    expected = write(tmp_path / "cpu.mp4", frames)
    buffer = torch.empty(4, 3, 480, 832, device="cuda")  # overwritten at once, as a CUDA graph's output is
    with VideoWriter(tmp_path / "gpu.mp4") as writer:
        for piece in frames.split(4):
            writer.write(buffer.copy_(piece))
        buffer.zero_()
    assert writer.result().read_bytes() == expected.read_bytes()


def test_the_same_frames_give_the_same_bytes(tmp_path):
    frames = clip(30, height=240, width=416)
    path = write(tmp_path / "a.mp4", frames)
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cpus)})  # the thread and its encoder inherit it
        with VideoWriter(tmp_path / "b.mp4") as writer:
            for piece in frames.split(7):
                writer.write(piece)
        assert writer.result().read_bytes() == path.read_bytes()
    finally:
        os.sched_setaffinity(0, cpus)
    command = encoder_command(tmp_path / "c.mp4", 416, 240, 16)  # on a CPU that has none of this one's extensions
    command[1:1] = ["-cpuflags", "0"]
    command[command.index("cpu-independent=1")] += ":asm=0"
    encoder = Encoder(command)
    for frame in to_pixels(frames)[0].numpy():
        encoder.write(frame)
    encoder.finish()
    encoder.close()
    assert (tmp_path / "c.mp4").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("hard_links", [True, False])
def test_nothing_is_overwritten(tmp_path, monkeypatch, hard_links):
    if not hard_links:

        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)  # as FAT and some network file systems answer
    first = write(tmp_path / "a.mp4", clip(3))
    before = (first.read_bytes(), first.stat().st_ino)
    assert first.name == "a.mp4" and first.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))
    assert write(tmp_path / "a.mp4", clip(5)).name == "a-2.mp4"
    assert write(tmp_path / "a.mp4", clip(3)).name == "a.mp4"  # made again: stays
    assert write(tmp_path / "a.mp4", clip(5)).name == "a-2.mp4"
    (tmp_path / "a-3.mp4").mkdir()
    (tmp_path / "a-4.mp4").symlink_to("nowhere")
    assert write(tmp_path / "a.mp4", clip(7)).name == "a-5.mp4"
    assert (first.read_bytes(), first.stat().st_ino) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.mp4", "a-3.mp4", "a-4.mp4", "a-5.mp4", "a.mp4"]
    assert [count_frames(tmp_path / name) for name in ("a.mp4", "a-2.mp4", "a-5.mp4")] == [3, 5, 7]


def test_the_next_clip_does_not_wait_for_the_last_ones_encoder(tmp_path):
    with VideoWriter(tmp_path / "a.mp4") as first:
        first.write(clip(5))
        stopped = wait_for_encoder()
        os.kill(stopped, signal.SIGSTOP)
    try:
        assert write(tmp_path / "a.mp4", clip(3)).name == "a.mp4"  # complete first, so the name is free
        assert encoders() == [stopped] and len(VideoWriter.partials) == 1
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert first.result().name == "a-2.mp4" and count_frames(tmp_path / "a-2.mp4") == 5


def test_a_few_encoders_finish_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FINISHING", 1)
    with VideoWriter(tmp_path / "a.mp4") as first:
        first.write(clip(5))
        stopped = wait_for_encoder()
        os.kill(stopped, signal.SIGSTOP)
    thread = threading.Thread(target=write, args=(tmp_path / "b.mp4", clip(3)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and len(VideoWriter.partials) == 1
    os.kill(stopped, signal.SIGCONT)
    thread.join()
    assert count_frames(first.result()) == 5 and count_frames(tmp_path / "b.mp4") == 3


@pytest.mark.parametrize("dies", [False, True])
def test_the_queue_is_bounded(tmp_path, monkeypatch, dies):
    monkeypatch.setattr(video, "QUEUE_BYTES", 10 * 3 * 240 * 416)
    writer, errors = VideoWriter(tmp_path / "a.mp4"), []

    def generate():
        try:
            with writer:
                writer.write(clip(100, height=240, width=416))
        except InputError as error:
            errors.append(str(error))

    writer.write(clip(1, height=240, width=416))
    encoder = wait_for_encoder()
    os.kill(encoder, signal.SIGSTOP)
    thread = threading.Thread(target=generate)
    thread.start()
    thread.join(1)
    assert thread.is_alive() and writer.frames < 50  # it waits, and so does most of the video
    os.kill(encoder, signal.SIGKILL if dies else signal.SIGCONT)
    thread.join()
    if dies:
        assert "signal 9" in errors[0] and not list(tmp_path.iterdir())
    else:
        assert not errors and count_frames(writer.result()) == 101


def test_a_failure_in_the_background_is_reported_once(tmp_path):
    def leave_with_a_dead_encoder() -> VideoWriter:
        with VideoWriter(tmp_path / "a.mp4") as writer:
            writer.write(clip(3))
            os.kill(wait_for_encoder(), signal.SIGSTOP)
        os.kill(wait_for_encoder(), signal.SIGKILL)
        while any(path.name.startswith(".a.") for path in VideoWriter.partials.copy()):
            time.sleep(0.01)
        return writer

    failed = leave_with_a_dead_encoder()
    with pytest.raises(InputError, match="a.mp4 failed: .*signal 9"):
        wait_for_writers()
    with pytest.raises(InputError, match="a.mp4 failed"):
        failed.result()
    leave_with_a_dead_encoder()
    with pytest.raises(InputError, match="a.mp4 failed"):
        VideoWriter(tmp_path / "b.mp4")
    with pytest.raises(InputError, match="a.mp4 failed"), VideoWriter(tmp_path / "b.mp4") as writer:
        failed = leave_with_a_dead_encoder()
        writer.write(clip(3))
    assert write(tmp_path / "b.mp4", clip(3)).name == "b.mp4"
    assert list(tmp_path.iterdir()) == [tmp_path / "b.mp4"]


def fill_the_disk(folder: Path) -> None:
    with VideoWriter(folder / "a.mp4") as writer:
        for _ in range(50):
            writer.write(torch.rand(4, 3, 240, 416))
    writer.result()


def change_the_folder(folder: Path, replace: bool) -> None:
    with VideoWriter(folder / "a.mp4") as writer:
        writer.write(clip(3))
        wait_for_encoder()
        shutil.rmtree(folder)
        if replace:
            folder.touch()
        writer.write(clip(3))
    writer.result()


@pytest.mark.parametrize("replace", [False, True])
def test_the_folder_is_deleted_or_replaced(tmp_path, replace):
    folder = tmp_path / "videos"
    message = "was replaced" if replace else f"the folder {folder} was deleted"
    with pytest.raises(InputError, match=message) as caught:
        change_the_folder(folder, replace)
    assert "\n" not in str(caught.value) and "full" not in str(caught.value)
    assert list(tmp_path.iterdir()) == ([folder] if replace else [])


def test_a_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system: needs root")
    try:
        with pytest.raises(InputError, match="^writing .*a.mp4 failed: the disk is full; free some space or .*$"):
            fill_the_disk(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "encoder cannot be started .No such file"),
        ("no program", "encoder cannot be started .Exec format error"),
        ("#!/bin/sh\nexit 3", "ended with exit code 3"),
        ("#!/bin/sh\necho what is libx264 >&2\nexit 1", "what is libx264"),
        ("#!/bin/sh\ncat >/dev/null", "left frames out"),
    ],
)
def test_another_encoder(tmp_path, monkeypatch, content, message):
    executable = tmp_path / "encoder"
    if content is not None:
        executable.write_text(content)
        executable.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(executable))
    message = message.replace("encoder cannot", f"encoder {executable} cannot")
    with pytest.raises(InputError, match=f"^writing .*a.mp4 failed: [^\n]*{message}[^\n]*$"):
        write(tmp_path / "videos/a.mp4", clip(3))
    assert not list((tmp_path / "videos").iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file/a.mp4", f"{'x' * 300}.mp4"):
        with pytest.raises(InputError, match="^cannot write to .*; choose another folder"):
            VideoWriter(tmp_path / path)


def test_wrong_use(tmp_path):
    with pytest.raises(ValueError, match="expected"), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(torch.rand(2, 48, 64, 3))
    with pytest.raises(ValueError, match="48, 64"), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(2))
        writer.write(clip(2, height=96))
    with pytest.raises(RuntimeError, match="context"), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.result()
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(0))
    with pytest.raises(ValueError, match="open"):
        writer.write(clip(2))
    with pytest.raises(InputError, match="no frames"):
        writer.result()
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.mp4").write_text("no video")
    assert count_frames(tmp_path / "text.mp4") == count_frames(tmp_path / "nowhere.mp4") == 0


def test_safe_file_name():
    assert [safe_file_name(prompt) for prompt in ("A cat, a/../dog!", "…", "ü" * 60)] == [
        "A-cat-a-dog",
        "video",
        "ü" * 40,
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_exception_leaves_no_file(tmp_path, error):
    with pytest.raises(error), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(30))
        assert len(list(tmp_path.iterdir())) == len(VideoWriter.partials) == 1
        raise error
    assert not list(tmp_path.iterdir()) and not encoders()


def test_segments(tmp_path):
    for path in (tmp_path / "a.mp4", tmp_path / "a.mp4"):
        with SegmentedVideoWriter(path, segment_seconds=0.5) as writer:
            for first in (0, 12, 24):
                writer.write(clip(12, first))
            assert writer.frames == 36
        files = writer.result()
        assert [count_frames(file) for file in files] == [8, 8, 8, 8, 4]
        assert (torch.cat([decoded(file) for file in files]) - clip(36)).square().mean().sqrt() < 0.01
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"a-{i:05d}.mp4" for i in range(5)] + [file.name for file in files]
    assert files[0].name == "a-2-00000.mp4"


def test_ctrl_c_completes_the_last_segment(tmp_path):
    with pytest.raises(KeyboardInterrupt), SegmentedVideoWriter(tmp_path / "a.mp4", segment_seconds=0.5) as writer:
        writer.write(clip(12))
        raise KeyboardInterrupt
    assert [count_frames(path) for path in writer.result()] == [8, 4]
