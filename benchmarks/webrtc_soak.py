"""Stream for ten minutes, viewers coming and going and prompts changing: does memory grow?

python benchmarks/webrtc_soak.py [MINUTES]

Ends with an error where the process has more than a tenth more memory in the last minute than in the first: means, since
what a block needs while it is made comes and goes.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/webrtc")]

from aiohttp import ClientSession
from live import Script, Viewer, state

PROMPTS = cycle(
    f"A {color} {shape} moves from left to right on a white background"
    for color in ("blue", "green", "red")
    for shape in ("circle", "square")
)


def memory(process_id: int) -> float:
    """Resident megabytes."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def soak(script: Script, minutes: float) -> list[float]:
    """Mean megabytes of every minute."""
    megabytes, samples = [], []
    async with ClientSession(script.url()) as session:
        stays = Viewer(session)
        await stays.connect()
        begun = time.monotonic()
        while len(megabytes) < minutes:
            guest = Viewer(session)
            await guest.connect()
            await session.post("/prompt", json={"prompt": next(PROMPTS)})
            for _ in range(10):
                await asyncio.sleep(1)
                samples.append(memory(script.popen.pid))
            await guest.close()
            if time.monotonic() - begun >= 60 * (len(megabytes) + 1):
                now = await state(session)
                megabytes.append(statistics.mean(samples))
                samples.clear()
                print(
                    f"minute {len(megabytes)}: {megabytes[-1]:.0f} MB, block {now['block']}, "
                    f"{now['generation_fps']} fps, {now['dropped']} dropped, {stays.frames} frames seen, {guest.frames} by guest",
                    flush=True,
                )
        await stays.close()
    return megabytes


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        with Script("causvid", Path(folder) / "out", NUM_ROLLOUT="1000000") as script:
            megabytes = asyncio.run(soak(script, minutes))
            begun = time.monotonic()
            script.interrupt()
            print(f"Ctrl-C: gone after {time.monotonic() - begun:.2f} s")
    growth = megabytes[-1] / megabytes[0] - 1
    print(f"memory: {growth:+.1%} from the first minute to the last")
    sys.exit(growth > 0.1)


if __name__ == "__main__":
    main()
