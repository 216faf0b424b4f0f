"""The scripts that stream, as processes: started as a user does, or forked from a process that has imported PyTorch."""

import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from live import LIMIT
from processes import MARK, Process
from scripts import SCRIPTS, flags_of

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "inferix.cli.devices",
        "inferix.cli.jobs",
        "inferix.pipelines.causvid",
        "inferix.pipelines.self_forcing",
        "inferix.webrtc.server",
        "dax.quant.quantization",
        "pytest",
    ]
)


class Script(Process):
    """A script under example/quantization that streams on a free port, as a context manager.

    Args:
        name: self_forcing or causvid.
        output_folder: of the files.
        prefix: command that starts the script.
        variables: of the script.
    """

    def __init__(self, name: str, output_folder: Path, prefix: tuple = (), **variables: str):
        self.folder = output_folder
        command = [*prefix, SCRIPTS / f"{name}_quantized.sh"]
        super().__init__(command, env=self.environment(variables))

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        defaults = {"ENABLE_WEBRTC": "1", "WEBRTC_PORT": "0", "OUTPUT_FOLDER": str(self.folder)}
        return os.environ | defaults | variables

    def url(self) -> str:
        """Return where it says that it streams."""
        self.wait_until(lambda: "watch it at" in self.stdout, LIMIT)
        return re.search(r"watch it at (\S+)", self.stdout)[1]

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.popen.send_signal(signal.SIGINT)
        return self.wait(LIMIT).returncode


class ForkedScript(Script):
    """What the script starts, with the flags that it makes, in a fork of a process that has imported PyTorch and the rest.

    A process of its own all the same, with its own signals and exit code, that begins seconds earlier.
    """

    def __init__(self, name: str, output_folder: Path, **variables: str):
        self.folder, self.mark = output_folder, uuid.uuid4().hex
        env = self.environment(variables)
        flags = flags_of(f"{name}_quantized.sh", env, output_folder.parent)
        command = [str(SCRIPTS / "launch.py"), str(SCRIPTS / f"run_{name}_quantized.py"), *flags]
        self.files = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()
        self.popen = Fork(command, env | {MARK: self.mark}, [file.name for file in self.files])


class Fork:
    """As much of ``subprocess.Popen`` as ``Process`` needs, for a fork.

    Args:
        command: a Python program and its arguments.
        env: all environment variables.
        outputs: paths of the files for stdout and stderr.
    """

    stdin = None

    def __init__(self, command: list[str], env: dict[str, str], outputs: list[str]):
        self.args = command
        self.process = FORKSERVER.Process(target=run_program, args=(command, env, outputs))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self.process.join(seconds)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, seconds)
        return code

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_program(command: list[str], env: dict[str, str], outputs: list[str]) -> None:
    """Do in this process what ``python3 COMMAND`` does in a new one."""
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
