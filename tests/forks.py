"""Processes that begin with PyTorch, diffusers and transformers imported, which takes a new interpreter seconds.

They are forks of a server, multiprocessing's, which computes nothing and has a single thread.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import reduction
from pathlib import Path

from processes import Process

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "pytest",
        "imageio.v3",
        "dax.quant.quantization",
        "inferix.pipelines.causvid",
        "inferix.pipelines.self_forcing",
        "inferix.webrtc.server",
        "inferix.cli.devices",
        "inferix.cli.figures",
        "inferix.cli.jobs",
    ]
)


def python_command(command: list, env: dict[str, str], folder: Path) -> list[str]:
    """Return the program, with its arguments, that a script starts: a program in the place of Python prints it."""
    with tempfile.TemporaryDirectory() as stub:
        python = Path(stub) / "python3"
        python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        python.chmod(0o755)
        env = env | {"VIRTUAL_ENV": "set", "PATH": f"{stub}:{os.environ['PATH']}"}
        output = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return output.stdout.split("\0")[:-1]


class ForkedScript(Process):
    """Start the Python program that a script starts, with the same arguments, as a fork instead of a new interpreter.

    Not for what is read when Python starts or imports, such as PYTHONPATH.
    """

    def start(self, command: list[str], env: dict[str, str], cwd: Path = Path()) -> "Fork":
        return Fork(python_command(command, env, cwd), env, cwd, self.files)


class Fork:
    """What ``Process`` needs of ``subprocess.Popen``.

    Args:
        args: a Python program and its arguments.
        env: all environment variables.
        cwd: its working folder.
        files: for the standard output and error.
    """

    def __init__(self, args: list[str], env: dict[str, str], cwd: Path, files: tuple):
        self.args = args
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")
        descriptors = [Descriptor(number) for number in (read, *(file.fileno() for file in files))]
        self.process = FORKSERVER.Process(target=run_program, args=(args, env, cwd.resolve(), descriptors))
        self.process.start()
        os.close(read)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Descriptor:
    """A file descriptor, duplicated for the new process that it is sent to."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple:
        return received_descriptor, (reduction.DupFd(self.number),)


def received_descriptor(duplicate) -> Descriptor:
    return Descriptor(duplicate.detach())


def run_program(args: list[str], env: dict[str, str], cwd: Path, descriptors: list[Descriptor]) -> None:
    """Do in this process what ``python3 ARGS`` does in a new one."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor.number, number)
        os.close(descriptor.number)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.path[:0] = args, [os.path.dirname(args[0])]
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
