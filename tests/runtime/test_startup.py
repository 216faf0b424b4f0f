"""The stages of start-up add up to the time since the process began."""

import json
import subprocess
import sys
import time

from inferix.runtime.startup import Startup

PROGRAM = """
import json, time
time.sleep(0.5)
from inferix.runtime.startup import STARTUP
STARTUP.mark("imports")
STARTUP.mark("model")
STARTUP.finish("decode")
STARTUP.mark("later")
print(json.dumps(STARTUP.seconds))
"""


def test_from_the_start_of_the_process():
    start = time.monotonic()
    command = ["sh", "-c", 'sleep 0.5; exec "$0" -c "$1"', sys.executable, PROGRAM]  # as the scripts start it
    seconds = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert list(seconds) == ["imports", "model", "decode"]
    assert 1 < sum(seconds.values()) < time.monotonic() - start + 0.05  # the clock of processes ticks in 0.01 s


def test_a_stage_that_comes_again_is_added():
    startup = Startup()
    startup.mark("imports")
    startup.mark("LoRA")
    before = startup.seconds["LoRA"]
    time.sleep(0.02)
    startup.mark("LoRA")
    assert startup.seconds["LoRA"] >= before + 0.02
