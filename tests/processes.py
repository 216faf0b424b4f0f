"""Child processes of the tests: every wait for one has a limit, and none outlives its test."""

import atexit
import multiprocessing
import os
import pickle
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

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

    def start(self, command: list[str], env: dict[str, str], **options):
        stdout, stderr = self.files
        return subprocess.Popen(
            command, env=env, stdout=stdout, stderr=stderr, **({"stdin": subprocess.PIPE} | options)
        )

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
                if env.items() <= process.environ().items():
                    found.append(process)
        return found

    def wait_until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Return when ``condition()`` is true; fails when the process ends before that, or time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}: {self.stdout}{self.stderr}"
            assert time.monotonic() < deadline, f"{seconds} s are over: {self.stdout}{self.stderr}"
            time.sleep(0.02)

    def wait(self, seconds: float = 60) -> subprocess.CompletedProcess:
        """Close the standard input, wait for the end and return exit code and output; fails when time is up."""
        if self.popen.stdin:
            self.popen.stdin.close()
        code = self.popen.wait(seconds)
        return subprocess.CompletedProcess(self.popen.args, code, self.stdout, self.stderr)


PRELOAD = [
    "pytest",
    "imageio.v3",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "transformers.models.umt5.modeling_umt5",
    "dax.quant.quantization",
    "inferix.pipelines.causvid",
    "inferix.pipelines.self_forcing",
    "inferix.cli.figures",
]
"""Modules that the fork server imports once, so that no rank has to. It computes nothing and has a single thread."""


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

    The processes are forks of a server that has imported ``PRELOAD``, which ends with this process; they see no GPU. With
    ``start_method="spawn"`` they import everything anew and see all GPUs. The module of ``function`` is imported after the
    variables are set.

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
        context.set_forkserver_preload(PRELOAD)
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
