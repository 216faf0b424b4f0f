"""How a program ends: exit codes, signals, and the ranks of a ``torchrun`` job."""

import atexit
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from inferix.errors import FailedVideosError, InputError
from inferix.runtime.startup import STARTUP

GRACE_SECONDS = 5
"""Time for an orderly end when a job has failed."""

received: list[int] = []
"""The signals that have asked this process to end."""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call ``main(argv)`` and return the exit code.

    0: done; 1: some videos of a batch failed; 2: bad input; 130: interrupted. All but the first with one line on stderr.

    With ``argv=None`` this is a process of its own: SIGINT, SIGTERM and SIGHUP end it in order, incomplete files removed.
    """
    if argv is None:
        STARTUP.mark("Python and imports")
        gc.freeze()  # what was imported stays: no collection needs to look at it
        gc.enable()
        atexit.register(gc.unfreeze)  # else Triton's binding reports leaks
        handle_signals()
        if "RANK" in os.environ:
            watch_sigterm()
    try:
        main(argv)
        return 0
    except Exception as error:
        if received:  # the code that the signal interrupted has made another exception of it
            return end_after_signal(received[0])
        if isinstance(error, FailedVideosError):
            print(f"error: {error}", file=sys.stderr)
            return 1
        if isinstance(error, InputError):
            if rank() > 0:  # rank 0 mostly finds the same; then the job ends before this rank prints it again
                time.sleep(GRACE_SECONDS)
            print(f"error: {error}", file=sys.stderr)
            return 2
        if argv is not None or "RANK" not in os.environ:
            raise
        if is_communication_error(error):
            time.sleep(GRACE_SECONDS)  # another rank has died: its error is the one to show
        traceback.print_exc()
        finish_files()
        os._exit(1)  # an orderly exit would wait for the other ranks, which wait for this one
    except KeyboardInterrupt:
        if argv is None:
            return end_after_signal(signal.SIGINT)
        print("stopped", file=sys.stderr)
        return 130


class Interrupt:
    """What SIGINT does: it raises KeyboardInterrupt; while ``graceful`` is set the first one is only noted."""

    graceful = False
    requested = False

    def handle(self, number: int, frame: object) -> None:
        if not self.graceful or self.requested:
            raise_for_signal(number, frame)
        self.requested = True
        if rank() == 0:
            print("\nfinishing the videos that were begun; Ctrl-C again stops now", file=sys.stderr)


interrupt = Interrupt()


def handle_signals() -> None:
    """Let SIGINT do what ``interrupt`` says, and SIGTERM and SIGHUP raise SystemExit, so that context managers clean up."""
    signal.signal(signal.SIGINT, interrupt.handle)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, raise_for_signal)
    sys.unraisablehook = after_signal


def raise_for_signal(number: int, _: object) -> None:
    """Handle a signal that asks this process to end."""
    received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def after_signal(unraisable: Any) -> None:
    """Send a signal once more whose exception Python ignores, as one that is raised in a destructor.

    Of other exceptions that it ignores nothing is printed then: an object whose construction the signal has interrupted may
    fail in its destructor.
    """
    if not received:
        sys.__unraisablehook__(unraisable)
    elif isinstance(unraisable.exc_value, (KeyboardInterrupt, SystemExit)):
        threading.Timer(0.05, os.kill, (os.getpid(), received[-1])).start()


def end_after_signal(number: int) -> int:
    """Complete the files, and return the exit code of a process that a signal has ended; after SIGINT exit with it."""
    if number != signal.SIGINT:
        return 128 + number
    if rank() == 0:
        print("stopped", file=sys.stderr)
    finish_files()
    sys.stdout.flush()
    os._exit(130)  # skips the interpreter's teardown, which takes seconds


def rank() -> int:
    """Return this process's rank in a ``torchrun`` job, 0 without one."""
    return int(os.environ.get("RANK", 0))


def is_communication_error(error: Exception) -> bool:
    """Return whether ``error`` says that another rank cannot be reached."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def finish_files() -> None:
    """Wait until the videos that are generated already are complete, and remove the incomplete ones."""
    if video := sys.modules.get("inferix.video"):  # else nothing was written; importing it would take seconds
        try:
            video.wait_for_writers()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        finally:
            remove_partials()


def remove_partials() -> None:
    """Remove the incomplete videos."""
    if video := sys.modules.get("inferix.video"):
        video.remove_partials()


def watch_sigterm() -> None:
    """Silence the standard output of ranks above 0, and start a thread that enforces the exit after a signal.

    torchrun sends SIGTERM (or the signal it got itself) to all ranks when one has died. A rank blocked in NCCL runs no
    Python signal handler, so the thread ends the process when ``GRACE_SECONDS`` are over.
    """
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)  # where the C-level handler writes each signal's number

    def watch() -> None:
        while (number := os.read(read_fd, 1)[0]) not in (signal.SIGTERM, signal.SIGHUP):
            pass
        time.sleep(GRACE_SECONDS)
        remove_partials()
        os._exit(128 + number)

    threading.Thread(target=watch, name="watch_sigterm", daemon=True).start()
