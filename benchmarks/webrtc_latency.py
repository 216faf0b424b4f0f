"""Measure how long a viewer on this machine waits: for the first frame after opening the page, and for each frame after that.

Streams the demo model's video to Chromium, which reads the time that is drawn into each frame. Prints a Markdown table and
writes webrtc_latency.json.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import checkout  # noqa: F401
import torch
from aiohttp import ClientSession
from chromium import chromium
from common import OUTPUT_FOLDER
from live import Script, until
from torch import Tensor

from inferix.cli.figures import machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.video import FPS
from inferix.webrtc.playout import Playout
from inferix.webrtc.server import Server
from inferix.webrtc.session import Session, WebRTCConfig

FIRST_FRAME = "document.readyState === 'complete' && performance.getEntriesByName('first-frame')[0]?.startTime"
READ_CLOCK = """new Promise(done => {
    const delays = [], canvas = new OffscreenCanvas(128, 128).getContext("2d", { willReadFrequently: true });
    video.requestVideoFrameCallback(function look(now, { expectedDisplayTime }) {
        canvas.drawImage(video, 0, 0);
        const shown = performance.timeOrigin + expectedDisplayTime;
        let drawn = 0;
        for (let bit = 0; bit < 16; bit++) drawn |= (canvas.getImageData(bit * 8 + 4, 64, 1, 1).data[0] > 127) << bit;
        delays.push((shown - drawn + 65536) % 65536);
        delays.length < COUNT ? video.requestVideoFrameCallback(look) : done(delays);
    });
})"""


async def page_load_to_first_frame(url: str) -> float:
    """Return the milliseconds from opening the page of a running stream to its first frame."""
    async with ClientSession(url) as session:
        await until(session, lambda now: now["block"] >= 1)
    async with chromium() as page:
        await page.open(url)
        return await page.until(FIRST_FRAME)


def draw_clock() -> Tensor:
    """Return a frame [1, 3, 128, 128] of 16 bars: the last bits of the time in milliseconds."""
    milliseconds = int(time.time() * 1000)
    bars = torch.tensor([float(milliseconds >> bit & 1) for bit in range(16)])
    return bars.repeat_interleave(8).expand(1, 3, 128, 128)


async def frame_delays(url: str, count: int) -> list[float]:
    """Return the milliseconds from drawing a frame to seeing it on the page, of ``count`` frames."""
    async with chromium() as page:
        await page.open(url)
        await page.until(FIRST_FRAME)
        return await page.run(READ_CLOCK.replace("COUNT", str(count)))


def stream_clock(count: int) -> list[float]:
    """Return ``frame_delays`` of a stream of clocks; nothing is generated besides."""
    playout, ended = Playout(), threading.Event()
    server = Server(Session(WebRTCConfig(port=0), playout))

    def draw() -> None:
        while not ended.wait(1 / FPS):
            playout.push(draw_clock())

    server.open()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        return asyncio.run(frame_delays(server.url, count))
    finally:
        ended.set()
        thread.join()
        server.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--frames", type=int, default=160, help="frames whose delay is measured")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, Script("causvid", Path(folder) / "out", NUM_ROLLOUT="1000") as script:
        url = script.url()
        loads = [asyncio.run(page_load_to_first_frame(url)) for _ in range(args.loads)]
    delays = stream_clock(args.frames)
    write_report(args.output_folder / "webrtc_latency.json", {"page_load_ms": loads, "frame_delay_ms": delays})
    rows = [
        [name, f"{statistics.median(values):.0f}", f"{min(values):.0f}", f"{max(values):.0f}"]
        for name, values in (("page load to first frame", loads), ("drawn to shown", delays))
    ]
    print(f"\n{machine_name()}\n\n{markdown_table(['milliseconds', 'median', 'least', 'most'], rows)}")


if __name__ == "__main__":
    sys.exit(run(main))
