"""The state of a generation that is watched and steered while it runs, shared by the generating and the server's thread."""

import io
import math
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from torch import Tensor

from inferix.errors import InputError
from inferix.pipelines.storyboard import Entry, Prompt, Storyboard
from inferix.video import FPS

if TYPE_CHECKING:
    from inferix.webrtc.playout import Playout

Clip = TypeVar("Clip")

HOLD_SECONDS = 1
"""How long the page says that playback had to wait: blocks come in bursts, and the message should not flicker."""
MAX_HISTORY = 20
"""Prompts that the page offers to send again."""
MAX_BLOCKS_TIMED = 8
"""The generation rate is that of the last so many blocks."""
LEAD = 1.25
"""The next block is begun when what is queued plays so many times as long as a block takes to generate."""


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
    token: str | None = None
    """What a request must have; None: whoever reaches the page may watch and steer."""

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch(r"[A-Za-z0-9._~+/=-]{8,}", self.token):
            raise InputError("WEBRTC_TOKEN must be 8 or more letters, digits and characters of -._~+/=")


class Session:
    """The state of the page.

    The generating thread takes its clips from ``clips``, the prompt of every block from ``prompts``, and passes frames to
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
        self.prompt_block = 0
        """The block of the clip, counted from 1 as ``block``, since which the prompt is shown."""
        self.next_prompt: Prompt | None = None
        self.sent: deque[tuple[int, float]] = deque()
        """Typed prompts of which no frame was queued yet: since which block they are shown, and when they were sent."""
        self.sent_time = 0.0
        """When ``next_prompt`` was sent (``time.monotonic``)."""
        self.history: list[str] = []
        """Prompts that were shown or typed, each once, the last one last."""
        self.read_image: Callable[[IO[bytes]], Tensor] | None = None
        """Makes an image file the model's first frame; None: the model cannot start from one."""
        self.next_image: Tensor | None = None
        """An image that the next typed prompt's clip starts from."""
        self.problem: str | None = None
        """What has gone wrong with a file."""
        self.first_frame: Callable[[int], int] = int
        """Number of the frame that a block of the clip begins with, both counted from 0."""
        self.num_frames = 0
        """Frames of the clip so far."""
        self.has_generated = False
        """Whether any clip has got a frame."""
        self.clip_prompts: list[Entry] = []
        """The prompts of the clip so far."""
        self.was_steered = False
        """Whether one of them was typed."""
        self.current = 0
        """The block that is generated, or was generated last, counted from 1."""
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

    def ready(
        self, quantization: str, weight_bytes: int, read_image: Callable[[IO[bytes]], Tensor] | None = None
    ) -> None:
        """Say that the model is loaded, and wait for a viewer where the config asks for one.

        Args:
            quantization: as the page names it.
            weight_bytes: of the transformer.
            read_image: makes an image file the model's first frame, or raises InputError; None: it cannot start from one.
        """
        with self.changed:
            self.read_image = read_image
            self.model = {"quantization": quantization, "weight_mb": round(weight_bytes / 1e6, 1)}
            if self.config.wait_for_viewer and self.status == "loading":
                self.status = "waiting"
                self.changed.wait_for(lambda: self.viewers or self.status == "closing")

    def clips(self, given: Iterable[Clip], from_prompt: Callable[[str, Tensor | None], Clip]) -> Iterator[Clip]:
        """Yield the given clips, a typed prompt's before the rest; then, as they are typed, those of further prompts.

        Ends when the server is told to close, or after the given clips where the config says so.

        Args:
            given: clips.
            from_prompt: makes one of a typed prompt and the image that it starts from (None: of the prompt alone).
        """
        given = iter(given)
        while self._may_continue():
            typed, image = self._take_typed()
            clip = next(given, None) if typed is None else from_prompt(typed, image)
            if clip is not None:
                yield clip
            elif self.config.exit_when_done:
                self._play_out()
                return
            else:
                self._wait_for_prompt()

    def prompts(self, given: Iterator[tuple[int, str]]) -> Iterator[str]:
        """Yield the prompt of block after block: the given one, from a typed one on that one, to the end of the clip.

        Ends early, and with that the clip, when it is stopped on the page, or when a prompt is typed for a clip that starts
        from an image; what is left of ``given`` then stays there, and a typed prompt for the next clip.

        Args:
            given: for every block of the clip its number in the video, counted from 0, and its prompt. A number that comes
                again keeps its prompt.
        """
        typed, last = None, -1
        while self._may_generate() and (item := next(given, None)) is not None:
            block, prompt = item
            with self.changed:
                self.current = self.block + 1
                if block != last and self.next_prompt is not None:
                    typed, self.next_prompt, self.was_steered = self.next_prompt, None, True
                    self.sent.append((block, self.sent_time))
                prompt = prompt if typed is None else typed
                if not self.clip_prompts or self.clip_prompts[-1].prompt != prompt:
                    self.clip_prompts.append(Entry(block, Prompt.of(prompt)))
                    self.prompt, self.note, self.prompt_block = prompt, None, self.current
                    self._remember(prompt)
            last = block
            yield prompt

    def announce(self, prompt: str, note: str | None) -> None:
        """Say which prompt is generated now, and what the model has to say about it."""
        with self.changed:
            self.prompt, self.note = prompt, note

    def begin_clip(self, num_blocks: int | None, first_frame: Callable[[int], int] = int) -> None:
        """Say that a clip begins.

        Args:
            num_blocks: how many blocks it has; None: any number.
            first_frame: returns the number of the frame that a block begins with, both counted from 0.
        """
        with self.changed:
            self.block, self.num_blocks, self.first_frame_seconds = 0, num_blocks, None
            self.first_frame, self.num_frames = first_frame, 0
            self.sent.clear()
            self.current, self.prompt_block, self.clip_prompts, self.was_steered = 0, 0, [], False
            if self.status not in ("paused", "closing"):
                self.status = "generating"
            self.block_start = time.monotonic()

    def end_clip(self) -> Storyboard | None:
        """Return the prompts of the clip that ends where one of them was typed, None otherwise."""
        with self.changed:
            return Storyboard(tuple(self.clip_prompts)) if self.was_steered else None

    def show(self, frames: Tensor) -> None:
        """Queue a block's frames [t, 3, H, W] in [0, 1] for playing; return after the pause where there is one."""
        with self.changed:
            seconds = time.monotonic() - self.block_start
            self.block += 1
            self.block_times.append((len(frames), seconds))
            if self.first_frame_seconds is None and len(frames):
                self.first_frame_seconds = seconds
            self.has_generated = True
            labels = [self._label_frame() for _ in frames]
        self.playout.push(frames, labels)
        self._wait_while_paused()
        self.block_start = time.monotonic()

    def report_problem(self, problem: str) -> None:
        """Say on the page what has gone wrong with a file."""
        with self.changed:
            self.problem = problem

    def add_file(self, path: Path) -> None:
        """Offer a finished file on the page."""
        with self.changed:
            self.files[path.name] = path

    def _may_continue(self) -> bool:
        self._wait_while_paused()
        with self.changed:
            self.stop_requested = False
            return self.status != "closing"

    def _may_generate(self) -> bool:
        """Wait while viewers have enough to watch, so that they soon see what they type; return False after a stop."""
        start = time.monotonic()
        with self.changed:
            while self._is_ahead():
                self.changed.wait(0.5 / FPS)
            self.block_start += time.monotonic() - start
            if self.next_prompt is not None and self.next_image is not None:
                self.stop_requested = True
            return not self.stop_requested

    def _is_ahead(self) -> bool:
        if not self.viewers or not self.block_times or self.stop_requested or self.next_prompt is not None:
            return False
        typical = statistics.median(seconds for _, seconds in self.block_times)
        longest = max(frames for frames, _ in self.block_times)
        return len(self.playout.queue) > min(longest, math.ceil(LEAD * FPS * typical))

    def _wait_while_paused(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.status != "paused")

    def _take_typed(self) -> tuple[Prompt | None, Tensor | None]:
        with self.changed:
            if self.next_prompt is None:
                return None, None
            typed, self.next_prompt = self.next_prompt, None
            image, self.next_image = self.next_image, None
            return typed, image

    def _remember(self, prompt: str) -> None:
        self.history = [*(text for text in self.history if text != prompt), str(prompt)][-MAX_HISTORY:]

    def _label_frame(self) -> tuple[str | None, float | None]:
        """Return the prompt of the clip's next frame, and when it was sent where this is the first one that it changes."""
        begun = [entry for entry in self.clip_prompts if self.first_frame(entry.block) <= self.num_frames]
        is_new = self.sent and self.first_frame(self.sent[0][0]) <= self.num_frames
        self.num_frames += 1
        return begun[-1].prompt if begun else None, self.sent.popleft()[1] if is_new else None

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
            self.next_prompt, self.sent_time = Prompt.of(prompt), time.monotonic()
            self._remember(prompt)
            self.changed.notify_all()

    def submit_image(self, content: bytes) -> None:
        """Let the next typed prompt begin a clip that starts from an image file; b"": no more.

        Raises InputError where ``content`` is no image.
        """
        assert self.read_image is not None
        image = self.read_image(io.BytesIO(content)) if content else None
        with self.changed:
            self.next_image = image

    def storyboard(self) -> Storyboard | None:
        """Return the prompts of the clip so far; None before the first one."""
        with self.changed:
            return Storyboard(tuple(self.clip_prompts)) if self.clip_prompts else None

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

    def _next_prompt_block(self) -> int | None:
        """Return the block at which a typed prompt takes effect; None where there is none, or it begins the next clip."""
        waits = self.next_prompt is not None and self.next_image is None and self.status in ("generating", "paused")
        return self.current + 1 if waits and self.current < (self.num_blocks or math.inf) else None

    def snapshot(self) -> dict:
        """Return what the page shows, as JSON."""
        with self.changed:
            seconds = sum(seconds for _, seconds in self.block_times)
            holding = time.monotonic() - self.playout.last_underrun < HOLD_SECONDS
            return {
                "status": self.status,
                "prompt": self.prompt,
                "note": self.note,
                "problem": self.problem,
                "prompt_block": self.prompt_block,
                "playing_prompt": self.playout.last.prompt if self.playout.last else None,
                "response_seconds": self.playout.response_seconds,
                "history": self.history,
                "next_prompt": self.next_prompt,
                "next_prompt_block": self._next_prompt_block(),
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
                "can_start_from_image": self.read_image is not None,
                "has_image": self.next_image is not None,
                "files": [
                    {"name": name, "bytes": size} for name, path in self.files.items() if (size := file_size(path))
                ],
                **self.model,
            }


def file_size(path: Path) -> int:
    """Return a file's bytes, 0 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
