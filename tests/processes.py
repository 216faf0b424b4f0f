"""Child processes of the tests: every wait for one has a limit, and none outlives its test."""

import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import psutil

MARK = "INFERIX_TEST_PROCESS"
"""Environment variable by which the descendants of a test's process are found."""


class Process:
    """Start ``command`` as a context manager; leaving it kills the process and all its descendants.

    The output goes to files, so that the process never blocks on a full pipe.
    """

    def __init__(self, command: list, env: dict[str, str] | None = None, **options):
        self.mark = uuid.uuid4().hex
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        env = (os.environ if env is None else env) | {MARK: self.mark}
        self.popen = self.start([str(word) for word in command], env, **options)

    def start(self, command: list[str], env: dict[str, str], **options) -> subprocess.Popen:
        """Return the process, its output going to ``self.files``."""
        stdout, stderr = self.files
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, **options)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error) -> None:
        self.popen.kill()
        for process in psutil.process_iter():  # torchrun's ranks have sessions of their own
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()
        self.popen.wait()

    @property
    def stdout(self) -> str:
        return self._read(0)

    @property
    def stderr(self) -> str:
        return self._read(1)

    def _read(self, number: int) -> str:
        descriptor = self.files[number].fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def type(self, text: bytes) -> None:
        """Write ``text`` to the standard input."""
        self.popen.stdin.write(text)
        self.popen.stdin.flush()

    def descendants(self, **env: str) -> list[psutil.Process]:
        """Return the processes below this one whose environment has ``env``; they may end at any time."""
        found = []
        for process in psutil.Process(self.popen.pid).children(recursive=True):
            with suppress(psutil.Error):
                if env.items() <= self.environ(process).items():
                    found.append(process)
        return found

    def environ(self, process: psutil.Process) -> dict[str, str]:
        """Return the variables of a descendant."""
        return process.environ()

    def wait_until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Return when ``condition()`` is true; fails when the process ends before that, or time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            code = self.popen.poll()
            assert code is None, f"ended with {code}: {self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"{seconds} s are over: {self.stdout}{self.stderr}"
            time.sleep(0.02)

    def wait(self, seconds: float = 60) -> subprocess.CompletedProcess:
        """Close the standard input, wait for the end and return exit code and output; fails when time is up."""
        if self.popen.stdin:
            self.popen.stdin.close()
        code = self.popen.wait(seconds)
        return subprocess.CompletedProcess(self.popen.args, code, self.stdout, self.stderr)
