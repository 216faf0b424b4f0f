"""The ranks that tests start: none outlives what has started it, and what went wrong is seen."""

import os
import sys
import time
import uuid
from contextlib import suppress

import psutil
import pytest
from forks import run_ranks
from processes import Process

NAME = "INFERIX_TEST_RANKS"
"""Environment variable of a test's ranks."""


def sleep(seconds: float) -> str:
    """Return the rank after ``seconds``; rank 1 fails if they are many."""
    if os.environ["RANK"] == "1" and seconds == 600:
        raise ValueError("what went wrong")
    print("asleep")
    time.sleep(seconds)
    return os.environ["RANK"]


def test_values_and_output():
    ranks = run_ranks(2, sleep, 0)
    assert [(rank.value, rank.output) for rank in ranks] == [("0", "asleep\n"), ("1", "asleep\n")]


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2 ended with 1.*ValueError: what went wrong"):
        run_ranks(2, sleep, 600)


def test_time_limit():
    with pytest.raises(AssertionError, match=r"^0.5 s are over\n"):
        run_ranks(2, sleep, 500, seconds=0.5)


def processes_with(mark: str) -> list[psutil.Process]:
    """Return the processes that were started with ``mark`` among their variables, zombies left out."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(NAME) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_no_process_outlives_one_that_is_killed(tmp_path):
    """Neither the ranks nor their fork server, which here imports nothing."""
    mark, began = uuid.uuid4().hex, tmp_path / "began"
    code = "import forks, test_ranks; forks.FORKSERVER.set_forkserver_preload(['os']); "
    code += f"forks.run_ranks(2, test_ranks.begin, {str(began)!r})"
    env = os.environ | {NAME: mark, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Process([sys.executable, "-c", code], env) as process:
        process.wait_until(lambda: len(list(tmp_path.glob("began*"))) == 2)
        assert len(processes_with(mark)) >= 4  # the process, the server, two ranks
        process.popen.kill()
        process.popen.wait()
        deadline = time.monotonic() + 60
        while processes_with(mark):
            assert time.monotonic() < deadline, processes_with(mark)
            time.sleep(0.02)


def begin(path: str) -> None:
    """Leave a file and sleep."""
    open(path + os.environ["RANK"], "w").close()
    time.sleep(600)
