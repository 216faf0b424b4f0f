"""The seconds from the command to the first frames, stage by stage."""

import os
import time


class Startup:
    """Counts the time since the last mark, at first since the command was given, under the stage that ends now.

    So the stages leave nothing out. What comes after ``finish`` is not counted.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.finished = False
        self.last = time.monotonic() - process_age()

    def mark(self, stage: str) -> None:
        """Say that ``stage`` ends now."""
        if not self.finished:
            now = time.monotonic()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
            self.last = now

    def finish(self, stage: str) -> None:
        """Say that the first frames are there, with the end of ``stage``."""
        self.mark(stage)
        self.finished = True


def process_age() -> float:
    """Return the seconds since the command was given, the shell before an ``exec`` included; 0 where Linux does not say.

    A rank's command is the ``torchrun`` that started it.
    """
    process = os.getppid() if "RANK" in os.environ else "self"
    try:
        with open(f"/proc/{process}/stat") as stat:
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


STARTUP = Startup()
"""Of this process."""
