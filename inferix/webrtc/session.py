"""The state of a generation that is watched and steered while it runs, shared by the generating and the server's thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from inferix.video import FPS

if TYPE_CHECKING:
    from inferix.webrtc.playout import Playout

Clip = TypeVar("Clip")
Prompt = TypeVar("Prompt")

HOLD_SECONDS = 1
"""How long the page says that playback had to wait: blocks come in bursts, and the message should not flicker."""
MAX_BLOCKS_TIMED = 8
"""The generation rate is that of the last so many blocks."""


@dataclass(frozen=True)
class WebRTCConfig:
    """Where the page is served, when generation begins and when the server ends."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    exit_when_done: bool = False
    """End after the last frame instead of offering the files and waiting for another prompt."""
    wait_for_viewer: bool = False
    """Generate nothing before the first viewer has connected."""


class Session:
    """The state of the page.

    The generating thread takes its clips from ``clips``, its prompts from ``steer`` and ``until_stopped``, and passes frames to
    ``show``.
    The server's thread calls ``set_viewers``, ``submit_prompt``, ``control`` and ``snapshot``. ``changed`` guards the rest.
    """

    def __init__(self, config: WebRTCConfig, playout: "Playout"):
        self.config = config
        self.playout = playout
        self.changed = threading.Condition()
        self.status = "loading"
        """loading, waiting (for a viewer), generating, paused, idle or closing"""
        self.model: dict[str, str | float] = {}
        self.prompt: str | None = None
        self.note: str | None = None
        """What the model has to say about the prompt."""
        self.next_prompt: str | None = None
        self.stop_requested = False
        """End the clip after the current block."""
        self.block = 0
        self.num_blocks: int | None = 0
        self.block_times: deque[tuple[int, float]] = deque(maxlen=MAX_BLOCKS_TIMED)
        """Frames and seconds of the last blocks."""
        self.block_start = 0.0
        self.first_frame_seconds: float | None = None
        self.viewers = 0
        self.url: str | None = None
        """Where the page is, once it is served."""
        self.files: dict[str, Path] = {}

    # --- the generating thread

    def ready(self, quantization: str, weight_bytes: int, steers: str) -> None:
        """Say that the model is loaded, and wait for a viewer where the config asks for one.

        Args:
            quantization: as the page names it.
            weight_bytes: of the transformer.
            steers: what a typed prompt changes next, ``clip`` or ``rollout``.
        """
        with self.changed:
            self.model = {"quantization": quantization, "weight_mb": round(weight_bytes / 1e6, 1), "steers": steers}
            if self.config.wait_for_viewer and self.status == "loading":
                self.status = "waiting"
                self.changed.wait_for(lambda: self.viewers or self.status == "closing")

    def clips(self, given: Iterable[Clip], from_prompt: Callable[[str], Clip]) -> Iterator[Clip]:
        """Yield the given clips, a typed prompt's before the rest; then, as they are typed, those of further prompts.

        Ends when the server is told to close, or after the given clips where the config says so.
        """
        given = iter(given)
        while self._may_continue():
            typed = self._take_typed()
            clip = next(given, None) if typed is None else from_prompt(typed)
            if clip is not None:
                yield clip
            elif self.config.exit_when_done:
                self._play_out()
                return
            else:
                self._wait_for_prompt()

    def steer(self, prompts: Iterator[str]) -> Iterator[str]:
        """Yield a prompt for each rollout: the given one, after a prompt was typed that one."""
        typed = None
        for prompt in prompts:
            typed = self._take_typed() or typed
            yield typed or prompt

    def until_stopped(self, prompts: Iterator[Prompt]) -> Iterator[Prompt]:
        """Yield the prompts of block after block; end early, and with that the clip, when it is stopped on the page."""
        for prompt in prompts:
            if self.stop_requested:
                return
            yield prompt

    def announce(self, prompt: str, note: str | None) -> None:
        """Say which prompt is generated now, and what the model has to say about it."""
        with self.changed:
            self.prompt, self.note = prompt, note

    def begin_clip(self, num_blocks: int | None) -> None:
        """Say that a clip of so many blocks begins; None: of any number."""
        with self.changed:
            self.block, self.num_blocks, self.first_frame_seconds = 0, num_blocks, None
            if self.status not in ("paused", "closing"):
                self.status = "generating"
            self.block_start = time.monotonic()

    def show(self, frames: Tensor) -> None:
        """Queue a block's frames [t, 3, H, W] in [0, 1] for playing; return after the pause where there is one."""
        with self.changed:
            seconds = time.monotonic() - self.block_start
            self.block += 1
            self.block_times.append((len(frames), seconds))
            if self.first_frame_seconds is None and len(frames):
                self.first_frame_seconds = seconds
        self.playout.push(frames)
        self._wait_while_paused()
        self.block_start = time.monotonic()

    def add_file(self, path: Path) -> None:
        """Offer a finished file on the page."""
        with self.changed:
            self.files[path.name] = path

    def _may_continue(self) -> bool:
        self._wait_while_paused()
        with self.changed:
            self.stop_requested = False
            return self.status != "closing"

    def _wait_while_paused(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.status != "paused")

    def _take_typed(self) -> str | None:
        with self.changed:
            typed, self.next_prompt = self.next_prompt, None
            return typed

    def _wait_for_prompt(self) -> None:
        with self.changed:
            if self.status != "closing":
                self.status, self.playout.paused = "idle", False
            self.changed.wait_for(lambda: self.next_prompt or self.status == "closing")

    def _play_out(self) -> None:
        """Return when all queued frames were played, at once where there is no viewer."""
        while self.viewers and self.playout.queue and self.status != "closing":
            time.sleep(1 / FPS)

    # --- the server's thread

    def set_viewers(self, count: int) -> None:
        """Say how many viewers are connected."""
        with self.changed:
            self.viewers = count
            self.changed.notify_all()

    def submit_prompt(self, prompt: str) -> None:
        """Make ``prompt`` what comes next, instead of one that is still waiting."""
        with self.changed:
            self.next_prompt = prompt
            self.changed.notify_all()

    def control(self, action: str) -> bool:
        """Carry out pause, resume, stop (the clip) or close (the server); return False where it does not apply now."""
        with self.changed:
            allowed = {"pause": ["generating"], "resume": ["paused"], "stop": ["generating", "paused"]}
            if self.status not in allowed.get(action, [self.status]):
                return False
            self.status = {"pause": "paused", "close": "closing"}.get(action, "generating")
            self.playout.paused = action == "pause"
            if action in ("stop", "close"):
                self.stop_requested = True
                self.playout.clear()
            self.changed.notify_all()
            return True

    def snapshot(self) -> dict:
        """Return what the page shows, as JSON."""
        with self.changed:
            seconds = sum(seconds for _, seconds in self.block_times)
            holding = time.monotonic() - self.playout.last_underrun < HOLD_SECONDS
            return {
                "status": self.status,
                "prompt": self.prompt,
                "note": self.note,
                "next_prompt": self.next_prompt,
                "block": self.block,
                "blocks": self.num_blocks,
                "generation_fps": round(sum(frames for frames, _ in self.block_times) / seconds, 1)
                if seconds
                else None,
                "playback_fps": FPS,
                "first_frame_seconds": self.first_frame_seconds,
                "holding": self.status == "generating" and holding,
                "queued_seconds": round(len(self.playout.queue) / FPS, 1),
                "dropped": self.playout.dropped,
                "viewers": self.viewers,
                "files": [
                    {"name": name, "bytes": path.stat().st_size} for name, path in self.files.items() if path.exists()
                ],
                **self.model,
            }
