"""Scripts as processes that begin with their imports done, which takes a new interpreter seconds.

A server has imported PyTorch, diffusers and transformers. For every script it forks a process with the variables, folder and
descriptors that are asked for, which does what ``python3 launch.py RUNNER FLAGS`` does, to the interpreter's own end.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from processes import Process

IMPORTS = "inferix.pipelines.self_forcing", "inferix.pipelines.causvid", "inferix.webrtc.server", "inferix.cli.jobs"


# --- the tests' side


class Preloaded(Process):
    """Start ``script``, a file under example/quantization, as ``Process`` does, but forked from the server.

    Not for what is read when Python starts or imports: PYTHONPATH, OMP_NUM_THREADS.
    """

    def start(self, command: list[str], env: dict[str, str], cwd: Path) -> "Popen":
        return Popen(python_command(command, env, cwd), env, cwd, self.files)


def python_command(command: list[str], env: dict[str, str], folder: Path) -> list[str]:
    """Return the command that a script starts: a program in the place of Python prints it."""
    with tempfile.TemporaryDirectory() as bin:
        python = Path(bin) / "python3"
        python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        python.chmod(0o755)
        env = env | {"VIRTUAL_ENV": "set", "PATH": f"{bin}:{os.environ['PATH']}"}
        output = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return output.stdout.split("\0")[:-1]


@cache
def server() -> tuple[str, socket.socket]:
    """Start the server; return the path of its socket, and a connection that keeps it alive."""
    path = f"{tempfile.mkdtemp()}/socket"
    process = subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    atexit.register(process.kill)
    assert process.stdout.readline() == b"ready\n"
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return path, connection


class Popen:
    """What ``Process`` needs of ``subprocess.Popen``."""

    def __init__(self, args: list[str], env: dict[str, str], cwd: Path, files: tuple):
        self.args, self.returncode = args, None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(server()[0])
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")
        request = json.dumps([args, env, str(cwd)]).encode()
        descriptors = [read, *(file.fileno() for file in files)]
        socket.send_fds(self.connection, [len(request).to_bytes(4, "little")], descriptors)
        self.connection.sendall(request)
        os.close(read)
        self.pid = int(self._line(60))

    def _line(self, seconds: float | None) -> bytes:
        """Return what the server says next, of 12 bytes; nothing once ``seconds`` are over."""
        ready, *_ = select.select([self.connection], [], [], seconds)
        return self.connection.recv(12, socket.MSG_WAITALL) if ready else b""

    def poll(self) -> int | None:
        return self.wait(0, raises=False)

    def wait(self, timeout: float | None = None, raises: bool = True) -> int | None:
        if self.returncode is None and (line := self._line(timeout)):
            self.returncode = int(line)
        if self.returncode is None and raises:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- the server's side


def receive(connection: socket.socket) -> tuple[list, list[int]]:
    size, descriptors, *_ = socket.recv_fds(connection, 4, 3)
    request = connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL)
    return json.loads(request), descriptors


def serve(path: str) -> tuple[list, list[int]]:
    """Fork a process for every request; return in that process, with the request. End with the first connection."""
    children: dict[int, socket.socket] = {}
    wakeup, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        owner, _ = listener.accept()
        while True:
            ready, *_ = select.select([listener, owner, wakeup], [], [])
            if owner in ready:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if wakeup in ready:
                os.read(wakeup, 1000)
                for pid in list(children):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        with children.pop(pid) as connection, suppress(OSError):  # nobody waits for it any more
                            connection.sendall(b"%12d" % os.waitstatus_to_exitcode(status))
            if listener in ready:
                connection, _ = listener.accept()
                request, descriptors = receive(connection)
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for end in (wakeup, write):
                        os.close(end)
                    for other in (owner, connection, *children.values()):
                        other.close()
                    return request, descriptors
                for descriptor in descriptors:
                    os.close(descriptor)
                children[pid] = connection
                connection.sendall(b"%12d" % pid)


def main() -> None:
    """Run the script of a request as ``__main__``, in its folder, with its variables and descriptors."""
    (argv, env, cwd), descriptors = serve(sys.argv[1])
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.path[0] = argv, os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTS:
        __import__(name)
    gc.freeze()
    main()
