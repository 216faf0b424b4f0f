"""Write videos as MP4 files without making the generator wait for the encoder."""

import atexit
import itertools
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from inferix.config import FPS
from inferix.errors import InputError, WriteError
from inferix.video_encoder import Encoder, encoder_command, to_pixels
from inferix.video_files import lock, publish

QUEUE_BYTES = 128 * 2**20
"""Bytes of 8-bit frames that may wait for one encoder before ``VideoWriter.write`` blocks (112 frames of 480x832)."""

MAX_FINISHING = 2
"""Encoders that may still be finishing earlier videos when a new one is begun."""


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
        overwrite: take the place of the file at ``path``, if there is one.
        on_complete: called with the writer, in the writer's thread, when the file is complete. An exception is one of the
            writer. If the process is killed before it returns, ``remove_stale_partials`` removes the file.

    Attributes:
        path: the file's name; the final one as soon as the file is complete.
        frames: number of frames written so far.

    Raises InputError if the folder cannot be written to.
    """

    partials: ClassVar[set[Path]] = set()
    """The incomplete files of all writers. Iterate over a copy: writers finish in other threads."""

    _running: ClassVar[list["VideoWriter"]] = []
    """Writers whose thread may not have ended, oldest first."""

    _failed: ClassVar[list["VideoWriter"]] = []
    """Writers whose error has not been raised yet."""

    _numbers = itertools.count()

    def __init__(
        self,
        path: str | Path,
        fps: float = FPS,
        overwrite: bool = False,
        on_complete: Callable[["VideoWriter"], None] | None = None,
    ):
        self.path, self.fps, self.frames = Path(path), fps, 0
        self.overwrite, self.on_complete = overwrite, on_complete
        self._size: tuple[int, int] | None = None  # height, width
        self._closed = self._aborted = False
        self._encoder: Encoder | None = None
        self._error: Exception | None = None
        # A signal may raise an exception anywhere in the main thread, in the middle of threading.Condition's or Event's
        # methods too, which then keep their lock for ever. So the threads share only what C code does in one piece.
        self._pending: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | None] = SimpleQueue()  # None: the end
        self._encoded: SimpleQueue[int] = SimpleQueue()  # bytes of frames that wait no more
        self._pending_bytes = 0
        self._busy = threading.Lock()  # held until the file is complete or given up
        for writer in list(self._running):
            if not writer._busy.locked():
                writer._wait()
        while len(finishing := [writer for writer in list(self._running) if writer._closed]) >= MAX_FINISHING:
            finishing[0]._wait()
        self._raise_failure()
        try:
            self._partial = self._create_partial()
        except OSError as error:
            raise WriteError(f"cannot write to {self.path.parent}: {error.strerror}; choose another folder") from None
        self._busy.acquire()
        self._thread = threading.Thread(target=self._run, name=f"writer of {self.path.name}", daemon=True)
        self._thread.start()
        self._running.append(self)

    def _create_partial(self) -> Path:
        """Create the incomplete file under a name that no other writer of any process has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}-{next(self._numbers)}.partial.mp4")
            self.partials.add(partial)
            try:
                self._lock = partial.open("xb")  # held as long as the process lives: see remove_stale_partials
                lock(self._lock)
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
            limit = max(QUEUE_BYTES - chunk.numel(), 0)  # a frame that is larger goes into an empty queue
            while self._pending_bytes > limit and not self._error:
                self._pending_bytes -= self._encoded.get()
            self._raise_failure()
            self._pending.put(to_pixels(chunk))
            self._pending_bytes += chunk.numel()
            self.frames += len(chunk)

    def _run(self) -> None:
        """Encode the frames and finish the file, in the writer's thread."""
        try:
            if (first := self._next_chunk()) is not None:
                self._encode(first)
        except Exception as error:
            if not self._aborted:
                self._failed.append(self)
                self._error = error
        if self._encoder:
            self._encoder.close()
        with suppress(OSError):
            self._partial.unlink()
        self._lock.close()
        self.partials.discard(self._partial)
        self._pending = SimpleQueue()  # frees the frames of an encoder that has failed
        self._encoded.put(0)  # wakes up ``write``
        self._busy.release()

    def _next_chunk(self) -> np.ndarray | None:
        """Wait for frames and return them, uint8 [t, 3, H, W]; None if no more will come."""
        chunk = self._pending.get()
        if chunk is None or self._aborted:
            return None
        pixels, event = chunk
        if event is not None:
            event.synchronize()
        return pixels.numpy()

    def _encode(self, first: np.ndarray) -> None:
        """Encode this and all other chunks, then give the file its name. Raises InputError."""
        chunk: np.ndarray | None = first
        try:
            command = encoder_command(self._partial, first.shape[3], first.shape[2], self.fps)
            self._encoder, num_frames = Encoder(command), 0
            import_module("av")  # for ``count_frames``, while the encoder starts
            try:
                while chunk is not None and not self._aborted:
                    self._partial.stat()
                    for frame in chunk:
                        self._encoder.write(frame)
                    num_frames += len(chunk)
                    self._encoded.put(chunk.size)
                    chunk = self._next_chunk()
                self._encoder.finish()
            except OSError:  # the encoder has ended or the file is gone
                self._encoder.finish(timeout=10)
                raise WriteError(f"the encoder took only a part; is {command[0]} an ffmpeg?") from None
            if self._aborted:
                return
            if count_frames(self._partial) != num_frames:
                raise WriteError(f"the encoder left frames out; is {command[0]} an ffmpeg?")
            self.path = publish(self._partial, self.path, self.overwrite)
            if self.on_complete is not None:
                self._call_on_complete(self.on_complete)
        except (InputError, OSError) as error:
            reason = self._missing() or getattr(error, "strerror", None) or error
            raise WriteError(f"writing {self.path} failed: {reason}") from None

    def _call_on_complete(self, on_complete: Callable[["VideoWriter"], None]) -> None:
        """Call ``on_complete``; if it fails, remove the file, unless it was there before."""
        try:
            on_complete(self)
        except Exception:
            with suppress(OSError):
                if self._partial.samefile(self.path):
                    self.path.unlink()
            raise

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
        return None

    def _close(self, abort: bool) -> None:
        """Let the thread finish the file, or with ``abort`` give it up and wait until nothing of it is left."""
        self._aborted = abort
        self._pending.put(None)
        self._closed = True  # last: those who wait for closed writers wait for ever if a signal comes in between
        if abort:
            if self._encoder:  # otherwise the thread sees ``_aborted`` when it has started one
                self._encoder.kill()
            self._wait()

    def _wait(self) -> None:
        """Wait until the thread has ended."""
        with self._busy:  # ``join`` alone takes a thread for ended if Ctrl-C interrupts it
            pass
        self._thread.join()
        with suppress(ValueError):  # if another thread waited too
            self._running.remove(self)

    def _raise_failure(self) -> None:
        """Raise this writer's error, or one that has not been raised yet."""
        if failed := self if self._error else next(iter(self._failed), None):
            with suppress(ValueError):
                self._failed.remove(failed)
            raise failed._error  # type: ignore[misc]

    def result(self) -> Path:
        """Wait until the file is complete and return its final name. Call it after leaving the context.

        Raises InputError if the encoder failed, or if no frame was written.
        """
        if not self._closed:
            raise RuntimeError("the file is complete only after the writer's context was left")
        self._wait()
        if self._error:
            self._raise_failure()
        if self._aborted or not self.frames:
            raise WriteError(f"{self.path} was not written: {'an error came first' if self.frames else 'no frames'}")
        return self.path

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        self._close(abort=error_type is not None)
        if self._error and error_type is None:
            self._raise_failure()


class SegmentedVideoWriter:
    """Writes a video that may never end as complete MP4 files: ``name-00000.mp4``, ``name-00001.mp4``, …

    Used like ``VideoWriter``. Each piece appears under its final name as soon as it is full, so that whatever ends the
    process loses at most the last one. Leaving the context, also by Ctrl-C, completes the last piece.

    If there are pieces of an earlier video, those of this one are called ``name-2-00000.mp4`` and so on.

    Args:
        path: ``name.mp4``.
        segment_seconds: length of every piece but the last.
        fps: frames per second.
        on_complete: called with the ``VideoWriter`` of every piece that is complete.

    Attributes:
        frames: number of frames written so far.
    """

    def __init__(
        self,
        path: str | Path,
        segment_seconds: float = 60,
        fps: float = FPS,
        on_complete: Callable[[VideoWriter], None] | None = None,
    ):
        self.path, self.fps, self.frames, self.on_complete = Path(path), fps, 0, on_complete
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
        self._writers.append(VideoWriter(self._piece(len(self._writers)), self.fps, on_complete=self.on_complete))

    def write(self, frames: Tensor) -> None:
        """Append frames [t, 3, H, W] in [0, 1]. Raises as ``VideoWriter.write``."""
        while len(frames):
            if self._writers[-1].frames == self._segment_frames:
                self._writers[-1].__exit__(None, None, None)
                self._begin_piece()
            num_left = self._segment_frames - self._writers[-1].frames
            self._writers[-1].write(frames[:num_left])
            self.frames += len(frames[:num_left])
            frames = frames[num_left:]

    def result(self) -> list[Path]:
        """Wait until all pieces are complete and return their files. Raises as ``VideoWriter.result``."""
        return [writer.result() for writer in self._writers]

    def __enter__(self) -> "SegmentedVideoWriter":
        return self

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
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
            writer._wait()
    except BaseException:
        for writer in running:
            writer._close(abort=True)
        raise
    if failed := list(VideoWriter._failed):
        VideoWriter._failed.clear()
        raise failed[0]._error  # type: ignore[misc]


def remove_partials() -> None:
    """Remove the incomplete files of all writers, for a process that is about to end without waiting for them."""
    for partial in list(VideoWriter.partials):
        with suppress(OSError):
            partial.unlink()


@atexit.register
def _finish_at_exit() -> None:
    """Complete the files, give up those of writers whose context was never left, and exit with 2 if one failed."""
    try:
        for writer in list(VideoWriter._running):
            if not writer._closed:
                writer._close(abort=True)
        wait_for_writers()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    finally:
        remove_partials()  # of writers whose start a signal has interrupted
