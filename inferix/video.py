"""Where frames go."""

import re
from pathlib import Path

import imageio.v2 as imageio
import torch
from torch import Tensor

from inferix.errors import InputError

FPS = 16
"""Frames a second of every Wan 2.1 video."""


def safe_file_name(prompt: str, limit: int = 80) -> str:
    """A prompt as a file name without an ending: letters, digits and dashes of any script, at most ``limit`` bytes."""
    name = re.sub(r"[^\w]+", "-", prompt).strip("-_").encode()[:limit]
    return name.decode(errors="ignore").strip("-_") or "video"


class VideoWriter:
    """Writes frames to an H.264 MP4 that browsers play; the file appears under its name only when it is complete.

    Use it as a context manager: leaving it by an exception leaves no file. Raises InputError where ``path`` cannot be
    written.
    """

    def __init__(self, path: str | Path, fps: int = FPS):
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        self.frames = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.touch()
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
        for frame in pixels:
            self.writer.append_data(frame)
        self.frames += len(pixels)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        self.writer.close()
        if error_type is None and self.frames:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)
