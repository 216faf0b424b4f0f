"""What a page shows: its picture, read back through a canvas, and what the small model's video has in it."""

import asyncio
import sys
from base64 import b64decode
from pathlib import Path

import imageio.v3 as iio
import torch
from chromium import Page
from live import LIMIT, ROOT

sys.path.insert(0, str(ROOT / "example/demo_model"))
from score import segment  # noqa: E402
from world import BACKGROUNDS, COLORS, Scene  # noqa: E402

RED = Scene("red", "square", "from left to right", "white")
BLUE = Scene("blue", "circle", "from right to left", "black")
RECORD_TIMESTAMPS = """
    window.timestamps = [];
    (function next() { video.requestVideoFrameCallback((_, meta) => { timestamps.push(meta.rtpTimestamp); next(); }); })();
"""
READ_PIXELS = """(() => {
    const copy = new OffscreenCanvas(128, 128).getContext("2d");
    copy.drawImage(canvas.hidden ? video : canvas, 0, 0);
    const pixels = copy.getImageData(0, 0, 128, 128).data;
    return btoa(Array.from(pixels, value => String.fromCharCode(value)).join(""));
})()"""


async def shows(page: Page) -> tuple[str, str]:
    """The object's colour and the background in the page's video, read back through a canvas."""
    pixels = torch.frombuffer(bytearray(b64decode(await page.run(READ_PIXELS))), dtype=torch.uint8)
    frame = pixels.view(128, 128, 4)[..., :3].permute(2, 0, 1) / 255
    color, background, mask = segment(frame[None])
    seen = [*COLORS, *BACKGROUNDS][color.item()] if 300 < mask.sum() < 4000 else "nothing"
    return seen, list(BACKGROUNDS)[background.item()]


async def until_shown(page: Page, scene: Scene, seconds: float = LIMIT) -> None:
    async with asyncio.timeout(seconds):
        while await shows(page) != (scene.color, scene.background):
            await asyncio.sleep(0.2)


def read_video(path: Path) -> torch.Tensor:
    """Return the frames of a file, [T, 3, H, W] in [0, 1]."""
    assert iio.immeta(path)["fps"] == 16
    return torch.from_numpy(iio.imread(path)).permute(0, 3, 1, 2) / 255


def assert_goes_over(frames: torch.Tensor) -> None:
    """The video begins with what ``RED`` says and ends with what ``BLUE`` does."""
    colors, backgrounds, _ = segment(frames)
    for part, scene in ((slice(0, 9), RED), (slice(-4, None), BLUE)):
        assert (colors[part] == list(COLORS).index(scene.color)).all()
        assert (backgrounds[part] == list(BACKGROUNDS).index(scene.background)).all()
