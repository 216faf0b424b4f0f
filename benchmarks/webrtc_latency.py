"""Measure how long a viewer on this machine waits: for the first frame, for each frame after that, and for a prompt to show.

Streams the demo model's video to Chromium, which reads the time that is drawn into each frame, and sends prompts, in turn for a
black and a white background, until it shows a frame that is as far from the old one as from the new one. Prints a Markdown table
and writes webrtc_latency.json.
"""

import argparse
import asyncio
import os
import random
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
from live import until
from streaming import Script
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


BLOCK_SECONDS = 12 / FPS
SEND = """new Promise(async done => {
    const copy = new OffscreenCanvas(128, 128).getContext("2d", { willReadFrequently: true });
    const brightness = () => {
        copy.drawImage(video, 0, 0);
        return copy.getImageData(2, 2, 124, 124).data.reduce((sum, value) => sum + value) / (124 * 124 * 4);
    };
    const start = performance.now(), before = brightness();
    send("A COLOR circle moves from left to right on a BACKGROUND background");
    video.requestVideoFrameCallback(function look(now, { expectedDisplayTime }) {
        if (Math.abs(brightness() - before) < 20) video.requestVideoFrameCallback(look);
        else done(expectedDisplayTime - start);
    });
})"""


async def send_to_change(url: str, name: str, count: int) -> list[float]:
    """Return the milliseconds from sending each of ``count`` prompts to the first frame that it has changed visibly."""
    milliseconds = []
    async with chromium() as page:
        await page.open(url)
        await page.until(FIRST_FRAME)
        for number in range(count):
            block = await page.run("state.block")
            await page.until(f"state.block >= {block + 4}")  # the last change is complete
            await asyncio.sleep(random.uniform(0, BLOCK_SECONDS))  # people send at any moment of a block
            words = ("red", "white") if number % 2 == 0 else ("blue", "black")
            milliseconds.append(await page.run(SEND.replace("COLOR", words[0]).replace("BACKGROUND", words[1])))
            print(f"{name}: {milliseconds[-1]:.0f} ms", flush=True)
    return milliseconds


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
        return asyncio.run(frame_delays(server.session.url, count))
    finally:
        ended.set()
        thread.join()
        server.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--frames", type=int, default=160, help="frames whose delay is measured")
    parser.add_argument("--prompts", type=int, default=10, help="prompts that are sent")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, Script("causvid", Path(folder) / "out", NUM_ROLLOUT="1000") as script:
        url = script.url()
        loads = [asyncio.run(page_load_to_first_frame(url)) for _ in range(args.loads)]
    delays = stream_clock(args.frames)
    prompts = {}
    for name, variables in (("self_forcing", {"ENDLESS": "1"}), ("causvid", {"NUM_ROLLOUT": "1000"})):
        with tempfile.TemporaryDirectory() as folder, Script(name, Path(folder) / "out", **variables) as script:
            prompts[f"send to change, {name}"] = asyncio.run(send_to_change(script.url(), name, args.prompts))
    report = {"page_load_ms": loads, "frame_delay_ms": delays, "prompt_ms": prompts, "load_average": os.getloadavg()[0]}
    write_report(args.output_folder / "webrtc_latency.json", report)
    rows = [
        [name, f"{statistics.median(values):.0f}", f"{min(values):.0f}", f"{max(values):.0f}"]
        for name, values in (("page load to first frame", loads), ("drawn to shown", delays), *prompts.items())
    ]
    print(
        f"\n{machine_name()}, load {os.getloadavg()[0]:.1f}\n\n{markdown_table(['milliseconds', 'median', 'least', 'most'], rows)}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
