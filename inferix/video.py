"""Where frames go."""

import re
from pathlib import Path
from typing import ClassVar

import imageio.v2 as imageio
import imageio_ffmpeg
import torch
from torch import Tensor

from inferix.errors import InputError

FPS = 16
"""Frames a second of every Wan 2.1 video."""


def safe_file_name(prompt: str, limit: int = 80) -> str:
    """A prompt as a file name without an ending: letters, digits and dashes of any script, at most ``limit`` bytes."""
    name = re.sub(r"[^\w]+", "-", prompt).strip("-_").encode()[:limit]
    return name.decode(errors="ignore").strip("-_") or "video"


def count_frames(path: Path) -> int:
    """Frames in a video file; 0 where it is none."""
    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:
        return 0


class VideoWriter:
    """Writes frames to an H.264 MP4 that browsers play; the file appears under its name only when it is complete.

    Use it as a context manager: leaving it by an exception leaves no file. Raises InputError where ``path`` cannot be
    written.
    """

    partials: ClassVar[set[Path]] = set()
    """Of all writers: the incomplete files there are."""

    def __init__(self, path: str | Path, fps: int = FPS):
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        self.frames = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()
            self.partials.add(self.partial)
        except OSError as error:
            raise InputError(f"cannot write to {self.path.parent}: {error.strerror}; choose another folder") from None
        self.writer = imageio.get_writer(
            self.partial,
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=2,  # what yuv420p needs
            output_params=["-movflags", "+faststart"],
        )

    def write(self, frames: Tensor) -> None:
        """Append frames [t, 3, H, W] in [0, 1]."""
        pixels = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        try:
            for frame in pixels:
                self.writer.append_data(frame)
        except OSError:  # the encoder has died; what imageio knows of it fills a page
            raise self.failure() from None
        self.frames += len(pixels)

    def failure(self) -> InputError:
        return InputError(f"writing {self.path} failed: is the disk full?")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        complete = error_type is None and self.frames > 0
        try:
            self.writer.close()
            if complete and count_frames(self.partial) == self.frames:
                self.partial.replace(self.path)
            elif complete:  # the encoder ended badly and said so to nobody
                raise self.failure()
        finally:  # also where a signal comes in between
            self.partial.unlink(missing_ok=True)
            self.partials.discard(self.partial)
