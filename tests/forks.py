"""Processes that begin with PyTorch, diffusers and transformers imported, which takes a new interpreter seconds.

They are forks of a server, multiprocessing's, which computes nothing and has a single thread.
"""

import atexit
import ctypes
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
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
        "torch.distributed.run",
    ]
)
FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1
"""Linux's prctl: the signal that a process gets when its parent ends."""


# --- scripts


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

    Args:
        num_ranks: how many processes torchrun starts in this program, restarts counted; they are forks too.
    """

    def start(self, command: list[str], env: dict[str, str], cwd: Path = Path(), num_ranks: int = 0) -> "Fork":
        self.ranks = tempfile.TemporaryDirectory()
        return Fork(python_command(command, env, cwd), env, cwd, self.files, num_ranks, self.ranks.name)

    def environ(self, process: psutil.Process) -> dict[str, str]:
        path = Path(self.ranks.name, str(process.pid))
        return json.loads(path.read_text()) if path.exists() else super().environ(process)


class Popen:
    """What ``Process`` and torchrun need of ``subprocess.Popen``, for a fork."""

    process: BaseProcess
    args: Sequence[str]

    @property
    def pid(self) -> int:
        return self.process.pid

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


class Fork(Popen):
    """A program as a fork of the server.

    Args:
        args: a Python program and its arguments.
        env: all environment variables.
        cwd: its working folder.
        files: for the standard output and error.
        num_ranks: how many processes torchrun starts.
        ranks: folder in which each of them leaves its variables.
    """

    def __init__(self, args: list[str], env: dict[str, str], cwd: Path, files: tuple, num_ranks: int, ranks: str):
        self.args = args
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")
        descriptors = [Descriptor(number) for number in (read, *(file.fileno() for file in files))]
        options = args, env, cwd.resolve(), descriptors, num_ranks, ranks
        self.process = FORKSERVER.Process(target=run_script, args=options)
        self.process.start()
        os.close(read)


class Descriptor:
    """A file descriptor, duplicated for the new process that it is sent to."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple:
        return received_descriptor, (reduction.DupFd(self.number),)


def received_descriptor(duplicate) -> Descriptor:
    return Descriptor(duplicate.detach())


def run_script(
    args: list[str], env: dict[str, str], cwd: Path, descriptors: list[Descriptor], num_ranks: int, ranks: str
) -> None:
    """Do in this process what ``python3 ARGS`` does in a new one."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor.number, number)
        os.close(descriptor.number)
    sys.stdin = open(0, closefd=False)
    os.chdir(cwd)
    if num_ranks:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        spares = [SpareRank(ranks) for _ in range(num_ranks)]
        subprocess_handler.Popen = lambda args, env, **options: spares.pop(0).begin(args, env)
    run_program(args, env)


def run_program(args: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[:0] = args, [os.path.dirname(args[0])]
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


class ForkedPython:
    """A ``python3`` for PATH that runs its program as a fork, for what others start, such as Slurm.

    The process that they start passes its signals on and ends as the fork does; when it is killed, so is the fork.

    Args:
        folder: where to write ``python3``, made here.
        num_ranks: how many processes torchrun starts in a program.
    """

    CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
call = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(connection, [len(call).to_bytes(4, "big")], [0, 1, 2])
connection.sendall(call)
reply = connection.makefile()
pid = int(reply.readline())
def forward(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended
        pass
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, forward)
code = int(reply.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""

    def __init__(self, folder: Path, num_ranks: int):
        self.folder, self.num_ranks, self.lock = folder, num_ranks, threading.Lock()
        address = f"\0{uuid.uuid4().hex}"  # Linux's: no file
        folder.mkdir()
        (folder / "python3").write_text(self.CLIENT.format(python=sys.executable, address=address))
        (folder / "python3").chmod(0o755)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.run, args=(connection,), daemon=True).start()

    def run(self, connection: socket.socket) -> None:
        """Run a program for the process at the other end of ``connection``."""
        with connection, connection.makefile("rb") as file, tempfile.TemporaryDirectory() as ranks:
            size, numbers, *_ = socket.recv_fds(connection, 4, 3)
            args, env, cwd = json.loads(file.read(int.from_bytes(size, "big")))
            descriptors = [Descriptor(number) for number in numbers]
            options = args, env, Path(cwd), descriptors, self.num_ranks, ranks
            process = FORKSERVER.Process(target=run_script, args=options)
            with self.lock:  # a start looks for what has ended, and of two threads that do one reads how
                process.start()
            for number in numbers:
                os.close(number)
            connection.sendall(b"%d\n" % process.pid)
            wait([process.sentinel, connection])
            with self.lock:
                if process.exitcode is None:  # the other end is gone
                    process.kill()
                process.join()
            with suppress(OSError):
                connection.sendall(b"%d\n" % process.exitcode)


class SpareRank(Popen):
    """A child of torchrun's process, made before that has threads, which waits to be one of the processes it starts.

    It ends with its parent, however that ends.

    Args:
        folder: where it leaves its variables in a file called by its process id.
    """

    def __init__(self, folder: str):
        receiver, self.sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self.run, args=(receiver, Path(folder), os.getpid()), daemon=True)
        self.process.start()
        receiver.close()

    def run(self, receiver: Connection, folder: Path, parent: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a rank that does not run yet
        args, env = receiver.recv()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        (folder / f".{os.getpid()}").write_text(json.dumps(env))
        (folder / f".{os.getpid()}").rename(folder / f"{os.getpid()}")
        python, unbuffered, *args = args
        assert (python, unbuffered) == (sys.executable, "-u")
        run_program(args, env)

    def begin(self, args: tuple[str, ...], env: dict[str, str]) -> "SpareRank":
        self.args = args
        self.sender.send((args, env))
        return self


# --- ranks


@dataclass(frozen=True)
class Rank:
    """What a rank has left."""

    value: Any
    """What its function returned."""
    output: str
    """What it wrote to the standard output and error."""


def run_ranks(
    num_ranks: int,
    function: Callable,
    *arguments: object,
    env: dict[str, str] | None = None,
    seconds: float = 100,
    start_method: str = "forkserver",
) -> list[Rank]:
    """Call ``function(*arguments)`` in ``num_ranks`` new processes that have the variables of a ``torchrun`` job.

    They are forks and see no GPU; with ``start_method="spawn"`` they import everything anew and see all GPUs. The module of
    ``function`` is imported after the variables are set.

    Args:
        num_ranks: how many processes.
        function: a module's function; what it takes and returns is pickled.
        env: variables besides this process's.
        seconds: after these all ranks are killed.

    Raises:
        AssertionError: a rank has failed, upon which the others are killed, or time is up; with the output of all.
    """
    from torch.distributed import TCPStore

    context = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        env = {"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has one
    env = os.environ | (env or {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(num_ranks)}
    with tempfile.TemporaryDirectory() as name:
        folder, call, processes = Path(name), pickle.dumps((function, arguments)), []
        try:
            for rank in range(num_ranks):
                (folder / f"{rank}.out").touch()
                its_env = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = context.Process(target=_be_rank, args=(call, its_env, folder / str(rank)))
                process.start()
                processes.append(process)
            complaint = _wait_for(processes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        outputs = [(folder / f"{rank}.out").read_text(errors="replace") for rank in range(num_ranks)]
        assert complaint is None, "\n".join([complaint, *outputs])
        values = [pickle.loads((folder / f"{rank}.value").read_bytes()) for rank in range(num_ranks)]
    return [Rank(value, output) for value, output in zip(values, outputs)]


def _wait_for(processes: list, seconds: float) -> str | None:
    """Wait until all have ended, one has failed or time is up; return what went wrong."""
    deadline, running = time.monotonic() + seconds, dict(enumerate(processes))
    while running:
        if not wait([process.sentinel for process in running.values()], max(0, deadline - time.monotonic())):
            return f"{seconds} s are over"
        for rank, process in list(running.items()):
            if process.exitcode is not None:
                del running[rank]
                if process.exitcode:
                    return f"rank {rank} of {len(processes)} ended with {process.exitcode}"
    return None


def _be_rank(call: bytes, env: dict[str, str], path: Path) -> None:
    """Be one rank: leave what the function returns and what is written in ``path`` with the endings .value and .out."""
    server = psutil.Process().parent()
    assert server.pid == multiprocessing.parent_process().pid or server.num_threads() == 1, "forked beside a thread"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(env)
    with open(f"{path}.out", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    function, arguments = pickle.loads(call)
    value = function(*arguments)
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    Path(f"{path}.value").write_bytes(pickle.dumps(value))


def _end_with_parent() -> None:
    """Kill this process when the one that started it is gone, however that ended."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)
