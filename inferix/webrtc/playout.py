"""Frames on their way from the generator to the viewers."""

import asyncio
import io
import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from fractions import Fraction
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from aiortc import MediaStreamTrack
from av import VideoFrame
from PIL import Image
from torch import Tensor

from inferix.video import FPS

QUEUE_SECONDS = 10
CLOCK_RATE = 90000
"""Ticks a second of RTP video timestamps."""
JPEG_QUALITY = 85


class Frame(NamedTuple):
    """A frame in the queue."""

    planes: np.ndarray
    """YUV 4:2:0, what every encoder takes."""
    prompt: str | None = None
    sent: float | None = None
    """For the first frame that a typed prompt has changed: when the prompt was sent (``time.monotonic``)."""


class Playout:
    """A bounded queue of frames and the one clock that plays it for everybody.

    The generator pushes and never waits: what does not fit pushes out the oldest. The clock runs whether anybody watches
    or not, so that a late viewer sees the stream from now on; where nothing new is queued it repeats the last frame.
    """

    def __init__(self) -> None:
        self.queue: deque[Frame] = deque()
        self.lock = threading.Lock()
        self.dropped = 0
        self.paused = False
        self.last_underrun = -math.inf
        """When the clock last found nothing new to play (``time.monotonic``)."""
        self.last: Frame | None = None
        self.response_seconds: float | None = None
        """From the last typed prompt to the first frame played that it changed."""
        self.tick: asyncio.Future[tuple[Frame, int]] | None = None
        self._jpeg: tuple[np.ndarray, asyncio.Future[bytes]] | None = None

    def push(self, frames: Tensor, labels: Iterable[tuple[str | None, float | None]] = repeat((None, None))) -> None:
        """Queue frames [t, 3, H, W] in [0, 1], with the ``prompt`` and ``sent`` of each ``Frame``. Any thread.

        The first frames that a typed prompt has changed are played at once, in place of those that are still queued.
        """
        pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        labelled = list(zip(pixels, labels))
        if any(sent is not None for _, (_, sent) in labelled):
            self.clear()
        for frame, (prompt, sent) in labelled:  # each as soon as it is there
            planes = VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p").to_ndarray()
            with self.lock:
                self.queue.append(Frame(planes, prompt, sent))
                if len(self.queue) > QUEUE_SECONDS * FPS:
                    self.queue.popleft()
                    self.dropped += 1

    def clear(self) -> None:
        """Forget what is queued; the last frame played stays. Any thread."""
        with self.lock:
            self.queue.clear()

    async def run(self) -> None:
        """Play at FPS, until cancelled."""
        loop = asyncio.get_running_loop()
        self.tick = loop.create_future()
        due = loop.time()
        while True:
            due = max(due + 1 / FPS, loop.time())  # late is late: never hurry to catch up
            await asyncio.sleep(due - loop.time())
            self._take()
            if self.last is not None:
                played, self.tick = self.tick, loop.create_future()
                played.set_result((self.last, round(due * CLOCK_RATE)))

    def _take(self) -> None:
        with self.lock:
            if not self.queue:
                self.last_underrun = time.monotonic()
            elif not self.paused:
                self.last = self.queue.popleft()
                if self.last.sent is not None:
                    self.response_seconds = time.monotonic() - self.last.sent

    async def next_frame(self) -> tuple[np.ndarray, int]:
        """Wait for the next frame that is played, and return its planes and its time in ticks of ``CLOCK_RATE``."""
        assert self.tick is not None  # the clock runs before anybody can connect
        frame, timestamp = await asyncio.shield(self.tick)
        return frame.planes, timestamp

    async def jpeg(self, planes: np.ndarray) -> bytes:
        """Return a frame that is played now as a JPEG file, which is encoded once for all viewers."""
        if self._jpeg is None or self._jpeg[0] is not planes:
            self._jpeg = planes, asyncio.get_running_loop().run_in_executor(None, encode_jpeg, planes)
        return await asyncio.shield(self._jpeg[1])


def encode_jpeg(planes: np.ndarray) -> bytes:
    """Return planes of YUV 4:2:0 as a JPEG file."""
    file = io.BytesIO()
    pixels = VideoFrame.from_ndarray(planes, "yuv420p").to_ndarray(format="rgb24")
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


class ViewerTrack(MediaStreamTrack):
    """What one viewer is sent. One whose encoder is late misses frames and holds up nobody."""

    kind = "video"

    def __init__(self, playout: Playout):
        super().__init__()
        self.playout = playout

    async def recv(self) -> VideoFrame:
        planes, timestamp = await self.playout.next_frame()
        # A frame of its own for every viewer: encoders write the picture type they want into it.
        frame = VideoFrame.from_ndarray(planes, "yuv420p")
        frame.pts, frame.time_base = timestamp, Fraction(1, CLOCK_RATE)
        return frame
