"""Writers in programs that end: by themselves, by signals, or two at once."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from forks import Fork
from processes import Process

from inferix.video import count_frames

INTERPRETER = f"""
import sys, types
package = types.ModuleType("inferix")  # without its __init__: of all there is, a writer needs just these modules
package.__path__ = [{str(ROOT / "inferix")!r}]
sys.modules["inferix"] = package
"""
"""What a program begins with that is not a fork."""
PROGRAM = """
import os, signal, sys, time
import torch
from inferix.video import SegmentedVideoWriter, VideoWriter, wait_for_writers

def clip(num_frames):
    return torch.linspace(0, 1, num_frames * 3 * 48 * 64).view(num_frames, 3, 48, 64)

def tell(*words):
    print(*words, flush=True)

def stop_encoder(writer):
    while not writer._encoder:
        time.sleep(0.01)
    os.kill(writer._encoder.pid, signal.SIGSTOP)
    return writer._encoder.pid
"""


def start(program: str, folder: Path) -> tuple[subprocess.Popen, str]:
    """Start an interpreter with ``program`` in a session of its own, and return it and the first line that it prints."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", INTERPRETER + PROGRAM + program]
    process = subprocess.Popen(command, cwd=folder, text=True, start_new_session=True, **pipes)
    line = process.stdout.readline().strip()
    assert line, process.communicate()
    return process, line


class ForkedProgram(Process):
    """Start ``program`` in ``folder`` as a fork, for what does not depend on how an interpreter ends."""

    def __init__(self, program: str, folder: Path):
        self.source = tempfile.TemporaryDirectory()
        path = Path(self.source.name, "program.py")
        path.write_text(PROGRAM + program)
        super().__init__([path], cwd=folder)

    def start(self, command: list[str], env: dict[str, str], cwd: Path) -> Fork:
        return Fork(command, env, cwd, self.files, num_ranks=0, ranks="")


def contents(folder: Path) -> dict[str, int]:
    """Return every file's name and number of frames."""
    return {path.name: count_frames(path) for path in folder.iterdir()}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_the_clip_at_work_and_no_other(tmp_path, sent):
    """It goes to all processes of the group, as from a terminal, while the last clip's encoder is not done."""
    program = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
with VideoWriter("a.mp4") as writer:
    writer.write(clip(5))
    stopped = stop_encoder(writer)
with VideoWriter("b.mp4") as writer:
    writer.write(clip(5))
    tell(stopped)
    for _ in range(3000):  # at least half a minute
        writer.write(clip(1))
        time.sleep(0.01)
"""
    process, encoder = start(program, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    os.killpg(process.pid, sent)
    os.kill(int(encoder), signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + sent, errors
    assert contents(tmp_path) == {"a.mp4": 5}


def test_two_processes_write_the_same_name(tmp_path):
    programs = [
        f"""
with VideoWriter("a.mp4") as writer, VideoWriter("same.mp4") as same:
    writer.write(clip({num_frames}))
    same.write(clip(3))
    tell("ready")
    sys.stdin.readline()
tell(writer.result())
tell(same.result())
"""
        for num_frames in (5, 7)
    ]
    written = {}
    with ForkedProgram(programs[0], tmp_path) as first, ForkedProgram(programs[1], tmp_path) as second:
        for process in (first, second):
            process.wait_until(lambda: process.stdout)
        assert len(list(tmp_path.iterdir())) == 4
        for process in (first, second):
            process.type(b"go\n")
        for process, num_frames in ((first, 5), (second, 7)):
            result = process.wait()
            assert result.returncode == 0, result.stderr
            _ready, name, same = result.stdout.split()
            written[name] = num_frames
            assert same == "same.mp4"
    assert sorted(written) == ["a-2.mp4", "a.mp4"]
    assert contents(tmp_path) == written | {"same.mp4": 3}


def test_a_program_ends_when_its_files_are_complete(tmp_path):
    program = """
left = VideoWriter("never-left.mp4")
left.write(clip(3))
with VideoWriter("a.mp4") as writer:
    writer.write(clip(5))
    stopped = stop_encoder(writer)
tell(stopped)
"""
    process, encoder = start(program, tmp_path)
    os.kill(int(encoder), signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0 and contents(tmp_path) == {"a.mp4": 5}


def test_a_program_ends_with_an_error_if_a_file_failed(tmp_path):
    program = """
with VideoWriter("a.mp4") as writer:
    writer.write(clip(5))
    stopped = stop_encoder(writer)
os.kill(stopped, signal.SIGKILL)
print("done")
"""
    command = [sys.executable, "-c", INTERPRETER + PROGRAM + program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "done\n")
    assert result.stderr.startswith("error: writing a.mp4 failed: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_kill_9_loses_the_last_segment_only(tmp_path):
    program = """
with SegmentedVideoWriter("a.mp4", segment_seconds=0.5) as writer:
    writer.write(clip(20))
    while len([name for name in os.listdir() if name.startswith("a")]) < 2:
        time.sleep(0.01)
    tell("ready")
    time.sleep(100)
"""
    with ForkedProgram(program, tmp_path) as process:
        process.wait_until(lambda: process.stdout)
        process.popen.kill()
        process.popen.wait()
    pieces = {name: frames for name, frames in contents(tmp_path).items() if not name.startswith(".")}
    assert pieces == {"a-00000.mp4": 8, "a-00001.mp4": 8}


def test_a_signal_at_any_moment_blocks_nothing(tmp_path):
    """Wherever it comes in the main thread, no lock is left that the writer's thread waits for."""
    program = """
class Stop(BaseException):
    pass

def stop(*_):
    raise Stop

signal.signal(signal.SIGALRM, stop)
for moment in range(70):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0003 * moment, 5)  # again if Python ignores it in a destructor
        with VideoWriter("a.mp4") as writer:
            while True:
                writer.write(clip(1))
    except Stop:
        signal.setitimer(signal.ITIMER_REAL, 0)
tell("done")
"""
    with ForkedProgram(program, tmp_path) as process:
        result = process.wait(100)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert not list(tmp_path.iterdir())


def test_no_signal_to_the_group_reaches_an_encoder_that_starts(tmp_path):
    """As from a terminal that is closed at any moment: an encoder that has left the group a moment too late would die."""
    program = """
with VideoWriter("first.mp4") as writer:  # finds ffmpeg, which imageio runs to see whether it works
    writer.write(clip(2))
writer.result()
signal.signal(signal.SIGHUP, lambda *_: None)
program, sender = os.getpid(), os.fork()
if not sender:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    while os.getppid() == program:
        os.killpg(os.getpgid(0), signal.SIGHUP)
        time.sleep(0.0003)
    os._exit(0)
for number in range(8):
    with VideoWriter(f"{number}.mp4") as writer:
        writer.write(clip(2))
    writer.result()
os.kill(sender, signal.SIGKILL)  # a program that ends has no handler any more
os.waitpid(sender, 0)
tell("complete")
"""
    process, said = start(program, tmp_path)
    process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "complete") and len(list(tmp_path.glob("*.mp4"))) == 9
