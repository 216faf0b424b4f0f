"""The scripts that stream, as processes: started as a user does, or forked from a process that has imported PyTorch."""

import os
import re
import signal
from pathlib import Path

import forks
from live import LIMIT, ROOT
from processes import Process


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
        command = [*prefix, ROOT / f"example/quantization/{name}_quantized.sh"]
        defaults = {"ENABLE_WEBRTC": "1", "WEBRTC_PORT": "0", "OUTPUT_FOLDER": str(output_folder)}
        super().__init__(command, env=os.environ | defaults | variables)

    def url(self) -> str:
        """Return where it says that it streams."""
        self.wait_until(lambda: "watch it at" in self.stdout, LIMIT)
        return re.search(r"watch it at (\S+)", self.stdout)[1]

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.popen.send_signal(signal.SIGINT)
        return self.wait(LIMIT).returncode


class ForkedScript(Script, forks.ForkedScript):
    """The same without the seconds of a new interpreter's imports."""
