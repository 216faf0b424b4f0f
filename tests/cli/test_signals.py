"""Signals end a program in order, whatever the code does that they interrupt."""

import signal
import sys

import pytest
from processes import Process

PROGRAM = """
import sys, time
from inferix.cli.main import run
from inferix.errors import InputError

class Destructor:
    def __del__(self):
        wait()

def wait():
    print("waiting", flush=True)
    time.sleep(100)

def convert():
    try:
        wait()
    except BaseException:
        raise InputError("what a library makes of the interruption") from None

def lose():
    Destructor()
    time.sleep(100)

class Half:
    def __init__(self):
        wait()
        self.whole = True
    def __del__(self):
        self.whole

def main(argv):
    {}()

raise SystemExit(run(main))
"""


def test_nohup_ignores_the_closed_terminal():
    program = PROGRAM.format("wait").replace("time.sleep(100)", "sys.stdin.readline()")
    with Process(["bash", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, program]) as process:
        process.wait_until(lambda: "waiting" in process.stdout)
        process.popen.send_signal(signal.SIGHUP)
        assert process.wait().returncode == 0


@pytest.mark.parametrize("function", ["wait", "convert", "lose", "Half"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_program(function, sent, code):
    """Also where a library turns the exception into another, where it is raised in a destructor and so ignored, and where
    it leaves an object half-made, whose destructor fails.
    """
    with Process([sys.executable, "-c", PROGRAM.format(function)]) as process:
        process.wait_until(lambda: "waiting" in process.stdout)
        process.popen.send_signal(sent)
        result = process.wait(90)
    assert result.returncode == code
    assert result.stderr == ("stopped\n" if sent == signal.SIGINT else "")
