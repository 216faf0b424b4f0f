"""How long a viewer on this machine waits: for the first frame after opening the page, and for each frame after that.

python benchmarks/webrtc_latency.py
"""

import asyncio
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "tests/webrtc")]

import torch
from aiohttp import ClientSession
from chromium import chromium
from live import Script, until

from inferix.video import FPS
from inferix.webrtc.server import serve
from inferix.webrtc.session import Session, WebRTCConfig

FIRST_FRAME = "performance.getEntriesByName('first-frame')[0]?.startTime"
READ_CLOCK = """new Promise(done => {
    const delays = [], canvas = new OffscreenCanvas(128, 128).getContext("2d", { willReadFrequently: true });
    video.requestVideoFrameCallback(function look(now, { expectedDisplayTime }) {
        canvas.drawImage(video, 0, 0);
        const shown = performance.timeOrigin + expectedDisplayTime;
        let drawn = 0;
        for (let bit = 0; bit < 16; bit++) drawn |= (canvas.getImageData(bit * 8 + 4, 64, 1, 1).data[0] > 127) << bit;
        delays.push((shown - drawn) % 65536);
        delays.length < 160 ? video.requestVideoFrameCallback(look) : done(delays);
    });
})"""


async def page_load_to_first_frame(url: str) -> float:
    """Milliseconds, on a stream that is under way."""
    async with ClientSession(url) as session:
        await until(session, lambda now: now["block"] >= 1, 60)
    async with chromium() as page:
        await page.open(url)
        return await page.until(f"document.readyState === 'complete' && {FIRST_FRAME}", 30)


def draw_clock() -> torch.Tensor:
    """A frame [1, 3, 128, 128] of 16 bars: the last bits of the time in milliseconds."""
    milliseconds = int(time.time() * 1000)
    bars = torch.tensor([float(milliseconds >> bit & 1) for bit in range(16)])
    return bars.repeat_interleave(8).expand(1, 3, 128, 128)


async def glass_to_glass(session: Session) -> list[float]:
    """Milliseconds from drawing a frame to seeing it on the page, frame by frame."""
    ended = threading.Event()

    def draw():
        while not ended.wait(1 / FPS):
            session.playout.push(draw_clock())

    threading.Thread(target=draw).start()
    try:
        async with chromium() as page:
            await page.open(session.url)
            await page.until(f"document.readyState === 'complete' && {FIRST_FRAME}", 30)
            return await page.run(READ_CLOCK)
    finally:
        ended.set()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Script("causvid", Path(folder) / "out", NUM_ROLLOUT="1000") as script:
            loads = [asyncio.run(page_load_to_first_frame(script.url())) for _ in range(5)]
    with serve(WebRTCConfig(port=0)) as session:
        delays = asyncio.run(glass_to_glass(session))
    print(f"page load to first frame: {statistics.median(loads):.0f} ms ({min(loads):.0f} to {max(loads):.0f})")
    tenths = statistics.quantiles(delays, n=10)
    print(f"drawn to shown: {statistics.median(delays):.0f} ms (nine of ten frames within {tenths[-1]:.0f} ms)")


if __name__ == "__main__":
    main()
