"""Stream for ten minutes, viewers coming and going and prompts changing: does memory grow?

Ends with an error where the process has more than a tenth more memory in the last minute than in the first: means, since what
a block needs comes and goes. Writes webrtc_soak.json.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

import checkout  # noqa: F401
import psutil
from aiohttp import ClientSession
from common import OUTPUT_FOLDER
from live import Viewer, state
from streaming import Script

from inferix.cli.figures import write_report
from inferix.cli.main import run

PROMPTS = cycle(
    f"A {color} {shape} moves from left to right on a white background"
    for color in ("blue", "green", "red")
    for shape in ("circle", "square")
)
MAX_GROWTH = 0.1


async def soak(script: Script, minutes: float, guest_seconds: int, interval: float) -> list[float]:
    """Return the mean megabytes of every interval of ``interval`` seconds."""
    megabytes, samples, process = [], [], psutil.Process(script.popen.pid)
    async with ClientSession(script.url()) as session:
        resident = Viewer(session)
        await resident.connect()
        start = time.monotonic()
        while len(megabytes) < max(2, 60 * minutes / interval):
            guest = Viewer(session)
            await guest.connect()
            await session.post("/prompt", json={"prompt": next(PROMPTS)})
            for _ in range(guest_seconds):
                await asyncio.sleep(1)
                samples.append(process.memory_info().rss / 1e6)
            await guest.close()
            if time.monotonic() - start >= interval * (len(megabytes) + 1):
                now = await state(session)
                megabytes.append(statistics.mean(samples))
                samples.clear()
                print(
                    f"{time.monotonic() - start:.0f} s: {megabytes[-1]:.0f} MB, block {now['block']}, "
                    f"{now['generation_fps']} fps, {now['dropped']} dropped, {resident.frames} frames seen, "
                    f"{guest.frames} by the guest",
                    flush=True,
                )
        await resident.close()
    return megabytes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    args = parser.parse_args(argv)
    interval = min(60.0, 30 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        with Script("causvid", Path(folder) / "out", NUM_ROLLOUT="1000000") as script:
            megabytes = asyncio.run(soak(script, args.minutes, min(10, round(interval)), interval))
            start = time.monotonic()
            code = script.interrupt()
            print(f"Ctrl-C: ended with {code} after {time.monotonic() - start:.2f} s")
    growth = megabytes[-1] / megabytes[0] - 1
    write_report(args.output_folder / "webrtc_soak.json", {"interval_s": interval, "mb": megabytes, "growth": growth})
    print(f"memory: {growth:+.1%} from the first {interval:.0f} s to the last")
    if growth > MAX_GROWTH:
        sys.exit(f"error: more than {MAX_GROWTH:.0%}")


if __name__ == "__main__":
    sys.exit(run(main))
