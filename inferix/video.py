"""Write videos as MP4 files without making the generator wait for the encoder."""

import atexit
import errno
import filecmp
import itertools
import os
import re
import sys
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from inferix.config import FPS
from inferix.errors import InputError
from inferix.video_encoder import Encoder, encoder_command, to_pixels

QUEUE_BYTES = 128 * 2**20
"""Bytes of 8-bit frames that may wait for one encoder before ``VideoWriter.write`` blocks (112 frames of 480x832)."""

MAX_FINISHING = 2
"""Encoders that may still be finishing earlier videos when a new one is begun."""


def safe_file_name(prompt: str, limit: int = 80) -> str:
    """Return ``prompt`` as a file name without a suffix: letters, digits and dashes of any script.

    The name has at most ``limit`` bytes in UTF-8; it is "video" if nothing else is left.
    """
    name = re.sub(r"[^\w]+", "-", prompt).strip("-_").encode()[:limit]
    return name.decode(errors="ignore").strip("-_") or "video"


def count_frames(path: str | Path) -> int:
    """Return the number of frames that a video file's index lists, without decoding; 0 if it is no video."""
    import av  # here, because importing it takes a noticeable part of a program's start

    try:
        with av.open(f"file:{path}") as container:
            return container.streams.video[0].frames
    except (av.error.FFmpegError, IndexError):
        return 0


class VideoWriter:
    """Writes frames to an H.264 MP4 that browsers play, encoded by a process of its own.

    Use it as a context manager. Neither ``write`` nor leaving the context waits for the encoder, unless ``QUEUE_BYTES``
    of frames already do: the file is finished in the background, and appears under its name when it is complete.
    Leaving the context by an exception leaves no file.

    No file is overwritten. If ``path`` exists, the new file gets a number (``name-2.mp4``), unless an existing one holds
    the same bytes, which then stays.

    A failure in the background is raised as InputError by the next call of ``write`` (of any writer), by a new writer,
    by ``result`` or by ``wait_for_writers``; at the latest it is printed when the process ends, with exit code 2.

    Args:
        path: the file to write; its folder is created if it does not exist.
        fps: frames per second.

    Attributes:
        path: the file's name; the final one as soon as the file is complete.
        frames: number of frames written so far.

    Raises InputError if the folder cannot be written to.
    """

    partials: ClassVar[set[Path]] = set()
    """The incomplete files of all writers. Iterate over a copy: writers finish in other threads."""

    _running: ClassVar[list["VideoWriter"]] = []
    """Writers that are open or still being finished, oldest first."""

    _failed: ClassVar[list["VideoWriter"]] = []
    """Writers whose error has not been raised yet."""

    _numbers = itertools.count()

    def __init__(self, path: str | Path, fps: float = FPS):
        self.path, self.fps, self.frames = Path(path), fps, 0
        self._size: tuple[int, int] | None = None  # height, width
        self._state = threading.Condition()  # guards what follows, which the thread shares
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._pending_bytes = 0
        self._encoder: Encoder | None = None
        self._closed = self._aborted = False
        self._error: Exception | None = None
        self._finished = threading.Event()
        while len(finishing := [writer for writer in list(self._running) if writer._closed]) >= MAX_FINISHING:
            finishing[0]._finished.wait()
        self._raise_failure()
        try:
            self._partial = self._create_partial()
        except OSError as error:
            raise InputError(f"cannot write to {self.path.parent}: {error.strerror}; choose another folder") from None
        self._running.append(self)
        threading.Thread(target=self._run, name=f"writer of {self.path.name}", daemon=True).start()

    def _create_partial(self) -> Path:
        """Create the incomplete file under a name that no other writer of any process has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}-{next(self._numbers)}.partial.mp4")
            self.partials.add(partial)
            try:
                partial.open("xb").close()
                return partial
            except OSError as error:
                self.partials.discard(partial)
                if not isinstance(error, FileExistsError):  # else of a process with this number on another machine
                    raise

    def write(self, frames: Tensor) -> None:
        """Append frames [t, 3, H, W] in [0, 1].

        Raises InputError if an encoder has failed, ValueError if the shape is wrong or not that of the first call.
        """
        self._raise_failure()
        if self._closed or frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"expected an open writer and frames [t, 3, H, W], got {list(frames.shape)}")
        if not len(frames):
            return
        size = (frames.shape[2], frames.shape[3])
        self._size = self._size or size
        if size != self._size:
            raise ValueError(f"frames of {size} (height, width) in a video of {self._size}")
        for chunk in frames.detach().split(max(1, QUEUE_BYTES // 4 // (3 * size[0] * size[1]))):
            room = max(QUEUE_BYTES - chunk.numel(), 0)  # a frame that is larger goes into an empty queue
            with self._state:
                self._state.wait_for(lambda: self._error or self._pending_bytes <= room)
            self._raise_failure()
            pixels = to_pixels(chunk)
            with self._state:
                self._pending.append(pixels)
                self._pending_bytes += chunk.numel()
                self.frames += len(chunk)
                self._state.notify_all()

    def _run(self) -> None:
        """Encode the frames and finish the file, in the writer's thread."""
        try:
            if self._wait_for_frames():
                self._encode()
        except Exception as error:
            if not self._aborted:
                self._failed.append(self)
                self._error = error
        if self._encoder:
            self._encoder.close()
        with suppress(OSError):
            self._partial.unlink()
        self.partials.discard(self._partial)
        with self._state:
            self._pending.clear()
            self._state.notify_all()
        self._running.remove(self)
        self._finished.set()

    def _wait_for_frames(self) -> bool:
        """Wait until there are frames or no more will come. Return whether there are frames to encode."""
        with self._state:
            self._state.wait_for(lambda: self._pending or self._closed)
            return bool(self._pending) and not self._aborted

    def _encode(self) -> None:
        """Encode the frames until the writer is closed, then give the file its name. Raises InputError."""
        try:
            command = encoder_command(self._partial, self._size[1], self._size[0], self.fps)
            with self._state:
                self._encoder = Encoder(command)
            try:
                self._feed()
                self._encoder.finish()
            except OSError:  # the encoder has ended or the file is gone
                self._encoder.finish(timeout=10)
            if self._aborted:
                return
            if (frames := count_frames(self._partial)) != self.frames:
                raise InputError(f"only {frames} of {self.frames} frames are in the file; is {command[0]} an ffmpeg?")
            self.path = _publish(self._partial, self.path)
        except (InputError, OSError) as error:
            reason = self._missing() or getattr(error, "strerror", None) or error
            raise InputError(f"writing {self.path} failed: {reason}") from None

    def _feed(self) -> None:
        """Give the encoder the frames until the writer is closed. Raises OSError if it has ended or the file is gone."""
        while self._wait_for_frames():
            pixels, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            self._partial.stat()
            for frame in pixels.numpy():
                self._encoder.write(frame)
            with self._state:
                self._pending_bytes -= pixels.numel()
                self._state.notify_all()

    def _missing(self) -> str | None:
        """Return what became of the incomplete file or its folder; None if it is there."""
        folder = self._partial.parent
        try:
            self._partial.stat()
        except FileNotFoundError:
            gone = "its unfinished file" if folder.is_dir() else f"the folder {folder}"
            return f"{gone} was deleted in the meantime; run again"
        except OSError as error:
            return f"{folder} was replaced or locked in the meantime ({error.strerror}); choose another folder"

    def _close(self, abort: bool) -> None:
        """Let the thread finish the file, or with ``abort`` give it up and wait until nothing of it is left."""
        with self._state:
            self._closed, self._aborted = True, abort
            self._state.notify_all()
            if abort and self._encoder:
                self._encoder.kill()
        if abort:
            self._finished.wait()

    def _raise_failure(self) -> None:
        """Raise this writer's error, or one that has not been raised yet."""
        if failed := self if self._error else next(iter(self._failed), None):
            with suppress(ValueError):
                self._failed.remove(failed)
            raise failed._error

    def result(self) -> Path:
        """Wait until the file is complete and return its final name. Call it after leaving the context.

        Raises InputError if the encoder failed, or if no frame was written.
        """
        if not self._closed:
            raise RuntimeError("the file is complete only after the writer's context was left")
        self._finished.wait()
        if self._error:
            self._raise_failure()
        if self._aborted or not self.frames:
            raise InputError(f"{self.path} was not written: {'an error came first' if self.frames else 'no frames'}")
        return self.path

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self._close(abort=error_type is not None)
        if self._error and error_type is None:
            self._raise_failure()


def _publish(partial: Path, path: Path) -> Path:
    """Give a complete file its name, or the first numbered one that is free, and return it.

    A file of such a name with the same bytes stays and is returned instead. Nothing is overwritten, whatever other
    processes do at the same time. ``partial`` may be left.
    """
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            _link(partial, candidate)
            return candidate
        except FileExistsError:
            with suppress(OSError):  # a dangling link, or removed in the meantime
                if filecmp.cmp(partial, candidate, shallow=False):
                    return candidate


def _link(partial: Path, path: Path) -> None:
    """Make ``partial`` appear as ``path``. Raises FileExistsError if there is such a file."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        path.open("xb").close()  # a file system without hard links: reserve the name first
        partial.replace(path)


class SegmentedVideoWriter:
    """Writes a video that may never end as complete MP4 files: ``name-00000.mp4``, ``name-00001.mp4``, …

    Used like ``VideoWriter``. Each piece appears under its final name as soon as it is full, so that whatever ends the
    process loses at most the last one. Leaving the context, also by Ctrl-C, completes the last piece.

    If there are pieces of an earlier video, those of this one are called ``name-2-00000.mp4`` and so on.

    Args:
        path: ``name.mp4``.
        segment_seconds: length of every piece but the last.
        fps: frames per second.

    Attributes:
        frames: number of frames written so far.
    """

    def __init__(self, path: str | Path, segment_seconds: float = 60, fps: float = FPS):
        self.path, self.fps, self.frames = Path(path), fps, 0
        self._segment_frames = max(1, round(segment_seconds * fps))
        self._writers: list[VideoWriter] = []
        for number in itertools.count(2):
            if not self._piece(0).exists():
                break
            self.path = Path(path).with_stem(f"{Path(path).stem}-{number}")
        self._begin_piece()

    def _piece(self, index: int) -> Path:
        return self.path.with_stem(f"{self.path.stem}-{index:05d}")

    def _begin_piece(self) -> None:
        self._writers.append(VideoWriter(self._piece(len(self._writers)), self.fps))

    def write(self, frames: Tensor) -> None:
        """Append frames [t, 3, H, W] in [0, 1]. Raises as ``VideoWriter.write``."""
        while len(frames):
            if self._writers[-1].frames == self._segment_frames:
                self._writers[-1].__exit__(None, None, None)
                self._begin_piece()
            room = self._segment_frames - self._writers[-1].frames
            self._writers[-1].write(frames[:room])
            self.frames += len(frames[:room])
            frames = frames[room:]

    def result(self) -> list[Path]:
        """Wait until all pieces are complete and return their files. Raises as ``VideoWriter.result``."""
        return [writer.result() for writer in self._writers]

    def __enter__(self) -> "SegmentedVideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        last = self._writers[-1]
        last.__exit__(*((error_type, error, traceback) if last._error else (None, None, None)))


def wait_for_writers() -> None:
    """Wait until the files of all writers whose context was left are complete.

    Raises InputError if one of them failed and the error has not been raised before. An exception that ends the wait,
    such as Ctrl-C's, gives up the files that are not complete.
    """
    running = [writer for writer in list(VideoWriter._running) if writer._closed]
    try:
        for writer in running:
            writer._finished.wait()
    except BaseException:
        for writer in running:
            writer._close(abort=True)
        raise
    if failed := list(VideoWriter._failed):
        VideoWriter._failed.clear()
        raise failed[0]._error


@atexit.register
def _finish_at_exit() -> None:
    """Complete the files, remove those of writers whose context was never left, and exit with 2 if one failed."""
    for writer in list(VideoWriter._running):
        if not writer._closed:
            writer._close(abort=True)
    try:
        wait_for_writers()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
