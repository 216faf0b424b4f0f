"""Frames on their way from the generator to the viewers."""

import asyncio
import math
import threading
import time
from collections import deque
from fractions import Fraction

import numpy as np
import torch
from aiortc import MediaStreamTrack
from av import VideoFrame
from torch import Tensor

from inferix.video import FPS

QUEUE_SECONDS = 10
CLOCK_RATE = 90000
"""Ticks a second of RTP video timestamps."""


class Playout:
    """A bounded queue of frames and the one clock that plays it for everybody.

    The generator pushes and never waits: what does not fit pushes out the oldest. The clock runs whether anybody watches
    or not, so that a late viewer sees the stream from now on; where nothing new is queued it repeats the last frame.
    """

    def __init__(self) -> None:
        self.queue: deque[np.ndarray] = deque()
        self.lock = threading.Lock()
        self.dropped = 0
        self.paused = False
        self.last_underrun = -math.inf
        """When the clock last found nothing new to play (``time.monotonic``)."""
        self.last: np.ndarray | None = None
        self.tick: asyncio.Future | None = None

    def push(self, frames: Tensor) -> None:
        """Queue frames [t, 3, H, W] in [0, 1]. Any thread."""
        pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        # Converted here, once, to what every encoder takes.
        planes = [VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p").to_ndarray() for frame in pixels]
        with self.lock:
            self.queue.extend(planes)
            while len(self.queue) > QUEUE_SECONDS * FPS:
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


class ViewerTrack(MediaStreamTrack):
    """What one viewer is sent. One whose encoder is late misses frames and holds up nobody."""

    kind = "video"

    def __init__(self, playout: Playout):
        super().__init__()
        self.playout = playout

    async def recv(self) -> VideoFrame:
        assert self.playout.tick is not None  # the clock runs before anybody can connect
        planes, timestamp = await asyncio.shield(self.playout.tick)
        # A frame of its own for every viewer: encoders write the picture type they want into it.
        frame = VideoFrame.from_ndarray(planes, "yuv420p")
        frame.pts, frame.time_base = timestamp, Fraction(1, CLOCK_RATE)
        return frame
