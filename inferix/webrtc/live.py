"""A generation that people watch and steer while it runs."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from inferix.pipelines.base import Pipeline, save
from inferix.video import FPS
from inferix.webrtc.playout import Playout
from inferix.webrtc.server import Server

Prompts = list[str] | Iterator[str]
"""What one call of a pipeline takes."""

HOLD_SECONDS = 1
"""So long does the page say that playback had to wait: blocks come in bursts, the message should not flicker."""


@dataclass(frozen=True)
class WebRTCConfig:
    """Where the page is served and when it ends."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    exit_when_done: bool = False
    """Leave after the last frame instead of offering the files and waiting for another prompt."""
    wait_for_viewer: bool = False
    """Generate nothing before somebody watches."""


class Live:
    """Serves the page while it is entered, as a context manager; raises InputError where host or port cannot be had.

    The thread that generates asks ``clips`` (and ``steered``) for prompts and hands its frames to ``save``; the server's
    thread calls ``control``, ``steer`` and ``snapshot``. ``changed`` guards what they share.
    """

    def __init__(self, config: WebRTCConfig):
        self.config = config
        self.playout = Playout()
        self.server = Server(self, config.host, config.port)
        self.changed = threading.Condition()
        self.status = "loading"
        """loading, waiting (for a viewer), generating, paused, idle or closing"""
        self.model: dict[str, str | float] = {}
        self.prompt: str | None = None
        self.note: str | None = None
        """What the model has to say about the prompt."""
        self.next_prompt: str | None = None
        self.cut = False
        """End the clip after this block."""
        self.block = self.blocks = 0
        self.pace: deque[tuple[int, float]] = deque(maxlen=8)
        """Frames and seconds of the last blocks."""
        self.first_frame_seconds: float | None = None
        self.files: dict[str, Path] = {}

    def __enter__(self) -> "Live":
        self.server.open()
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self.server.close()

    # --- the thread that generates ---

    def ready(self, pipeline: Pipeline, quantization: str, weight_bytes: int, steers: str) -> None:
        """The model is loaded; say so, and wait for a viewer where that was asked for.

        Args:
            pipeline: knows which prompts its model was not made for.
            quantization: how the page names it.
            weight_bytes: of the transformer.
            steers: what a typed prompt changes next, ``clip`` or ``rollout``.
        """
        with self.changed:
            self.pipeline = pipeline
            self.model = {"quantization": quantization, "weight_mb": round(weight_bytes / 1e6, 1), "steers": steers}
            if self.config.wait_for_viewer and self.status == "loading":
                self.status = "waiting"
                self.changed.wait_for(lambda: self.server.viewers or self.status == "closing")

    def clips(self, given: Iterable[Prompts]) -> Iterator[Prompts]:
        """The prompts of clip after clip: the given ones, with a typed one before the rest; after them whatever is typed.

        Ends when the server is told to close, or after the given ones where the config says so.
        """
        given = iter(given)
        while self._go_on():
            prompts = self._take_typed() or next(given, None)
            if prompts is not None:
                if isinstance(prompts, list):
                    self._announce(prompts[0])
                yield prompts
                if self.cut:
                    given = iter(())
            elif self.config.exit_when_done:
                self._play_out()
                return
            else:
                self._idle()

    def steered(self, prompts: Iterator[str]) -> Iterator[str]:
        """One prompt a rollout: the given ones, until one is typed; that one then holds."""
        typed = []
        for prompt in prompts:
            typed = self._take_typed() or typed
            self._announce(*typed or [prompt])
            yield self.prompt

    def save(self, pieces: Iterator[Tensor], paths: list[Path], total_blocks: int, description: str) -> list[Path]:
        """``save`` of the pipelines that shows the frames as they come (of a batch, the first video).

        A clip that is stopped is saved as far as it got. Names that this run has used before get a number.
        """
        paths = [self._unused(path) for path in paths]
        written = save(self._shown(pieces, total_blocks), paths, total_blocks, description)
        with self.changed:
            self.files |= {path.name: path for path in written}
        return written

    def _shown(self, pieces: Iterator[Tensor], total_blocks: int) -> Iterator[Tensor]:
        """Pass the pieces on, showing them; pause and stop between two of them."""
        with self.changed:
            self.block, self.blocks, self.first_frame_seconds = 0, total_blocks, None
            if self.cut or self.status == "closing":
                return
            self.status = "generating"
        begun = time.monotonic()
        for piece in pieces:
            with self.changed:
                seconds = time.monotonic() - begun
                self.block += 1
                self.pace.append((piece.shape[1], seconds))
                if self.first_frame_seconds is None and piece.shape[1]:
                    self.first_frame_seconds = seconds
            self.playout.push(piece[0])
            yield piece
            self._wait_while_paused()
            if self.cut:
                return
            begun = time.monotonic()

    def _go_on(self) -> bool:
        self._wait_while_paused()
        with self.changed:
            self.cut = False
            return self.status != "closing"

    def _wait_while_paused(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.status != "paused")

    def _take_typed(self) -> list[str]:
        """The typed prompt, if there is one."""
        with self.changed:
            typed, self.next_prompt = self.next_prompt, None
            return [typed] if typed else []

    def _announce(self, prompt: str) -> None:
        with self.changed:
            self.prompt, self.note = prompt, self.pipeline.note_unknown(prompt)

    def _idle(self) -> None:
        with self.changed:
            if self.status != "closing":
                self.status, self.playout.paused = "idle", False
            self.changed.wait_for(lambda: self.next_prompt or self.status == "closing")

    def _play_out(self) -> None:
        """Let those who watch see what is queued."""
        while self.server.viewers and self.playout.queue and self.status != "closing":
            time.sleep(1 / FPS)

    def _unused(self, path: Path) -> Path:
        names = (path.name, *(f"{path.stem}-{number}{path.suffix}" for number in range(2, len(self.files) + 3)))
        return path.with_name(next(name for name in names if name not in self.files))

    # --- the server's thread ---

    def viewer_came(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def steer(self, prompt: str) -> None:
        """Make ``prompt`` what comes next; one that is still waiting is replaced."""
        with self.changed:
            self.next_prompt = prompt
            self.changed.notify_all()

    def control(self, action: str) -> bool:
        """Carry out pause, resume, stop (the clip) or close (the server); False where there is nothing to do it to."""
        with self.changed:
            allowed = {"pause": ["generating"], "resume": ["paused"], "stop": ["generating", "paused"]}
            if self.status not in allowed.get(action, [self.status]):
                return False
            self.status = {"pause": "paused", "close": "closing"}.get(action, "generating")
            self.playout.paused = action == "pause"
            if action in ("stop", "close"):
                self.cut, self.next_prompt = True, None
                self.playout.clear()
            self.changed.notify_all()
            return True

    def snapshot(self) -> dict:
        """What the page shows."""
        with self.changed:
            seconds = sum(seconds for _, seconds in self.pace)
            return {
                "status": self.status,
                "prompt": self.prompt,
                "note": self.note,
                "next_prompt": self.next_prompt,
                "block": self.block,
                "blocks": self.blocks,
                "generation_fps": round(sum(frames for frames, _ in self.pace) / seconds, 1) if seconds else None,
                "playback_fps": FPS,
                "first_frame_seconds": self.first_frame_seconds,
                "holding": self.status == "generating" and time.monotonic() - self.playout.starved < HOLD_SECONDS,
                "queued_seconds": round(len(self.playout.queue) / FPS, 1),
                "dropped": self.playout.dropped,
                "viewers": self.server.viewers,
                "files": [
                    {"name": name, "bytes": path.stat().st_size} for name, path in self.files.items() if path.exists()
                ],
                **self.model,
            }
