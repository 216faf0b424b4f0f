"""Encode 8-bit frames to an H.264 MP4 in an ffmpeg process."""

import errno
import functools
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from inferix.errors import InputError

PRESET, CRF = "superfast", 10
"""x264's speed and quality (0 lossless, 51 worst), chosen with ``benchmarks/video_encoder.py``."""

THREADS = 8
"""The same on every machine: the bytes that x264 writes depend on it."""


def encoder_command(path: Path, width: int, height: int, fps: float, preset: str = PRESET, crf: int = CRF) -> list[str]:
    """Return the ffmpeg command that reads planar 8-bit GBR frames from standard input and writes an MP4 to ``path``.

    The same frames give the same bytes on every CPU: x264's thread count is fixed, and neither it nor the conversion to
    4:2:0 picks approximations by instruction set. Odd sizes are scaled to even ones, as 4:2:0 needs.
    Raises InputError if there is no ffmpeg.
    """
    try:
        executable = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise InputError("there is no video encoder; pip install --force-reinstall imageio-ffmpeg") from None
    source = f"-f rawvideo -pixel_format gbrp -video_size {width}x{height} -framerate {fps} -i pipe:0"
    scale = "scale=w=ceil(iw/2)*2:h=ceil(ih/2)*2:flags=bicubic+accurate_rnd+full_chroma_inp+bitexact"
    encoder = f"-c:v libx264 -preset {preset} -crf {crf} -threads {THREADS} -x264-params cpu-independent=1"
    target = f"-vf {scale} -pix_fmt yuv420p -flags:v +bitexact -fflags +bitexact -movflags +faststart -f mp4"
    return [executable, *f"-loglevel error -y {source} {encoder} {target}".split(), f"file:{path}"]


def to_pixels(frames: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return frames [t, 3, H, W] in [0, 1] as uint8 in host memory, and the event after which they are there.

    The conversion runs on the frames' device. From a GPU they are copied to pinned memory on a stream of its own, and
    the call does not wait for it. The event is None for other devices.
    """
    if frames.device.type == "cpu":
        pixels, scaled = torch.empty(frames.shape, dtype=torch.uint8), torch.empty(frames.shape[1:])
        for frame, out in zip(frames, pixels):  # one after the other: a frame stays in the CPU's cache
            out.copy_(torch.mul(frame.float(), 255, out=scaled).round_().clamp_(0, 255))
        return pixels, None
    pixels = frames.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
    if frames.device.type != "cuda":
        return pixels.cpu(), None
    stream = _copy_stream(frames.device)
    stream.wait_stream(torch.cuda.current_stream(frames.device))
    with torch.cuda.stream(stream):
        host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(pixels, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps
        event.record(stream)
    pixels.record_stream(stream)
    return host, event


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which frames leave ``device``."""
    return torch.cuda.Stream(device)


class Encoder:
    """An ffmpeg process that writes one file.

    Args:
        command: as from ``encoder_command``.

    Raises InputError if it cannot be started.
    """

    def __init__(self, command: list[str]):
        self._messages, stderr = os.pipe()
        os.set_blocking(stderr, False)  # an encoder with very much to say loses words instead of blocking
        # a signal to the program's group may come before the encoder has left it; the mask stays with the encoder
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pipesize=2**20,
                process_group=0,  # Ctrl-C in a terminal stops the program, not the encoder of a video that is complete
            )
        except OSError as error:
            os.close(self._messages)
            raise InputError(
                f"the video encoder {command[0]} cannot be started ({error.strerror}); reinstall imageio-ffmpeg, "
                "or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(stderr)
        assert self._process.stdin is not None
        self._stdin, self._command = self._process.stdin, command
        self.pid = self._process.pid

    def write(self, frame: np.ndarray) -> None:
        """Append a frame uint8 [3, H, W], waiting until the encoder takes it. Raises OSError if the encoder has ended."""
        red, green, blue = frame
        for plane in (green, blue, red):
            self._stdin.write(plane)

    def finish(self, timeout: float | None = None) -> None:
        """Wait, at most ``timeout`` seconds, until the file is complete. Raises InputError if the encoder failed."""
        with suppress(OSError):  # the exit code says more
            self._stdin.close()
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise InputError(f"the encoder {self._command[0]} takes no more frames; is it an ffmpeg?") from None
        if code:
            raise InputError(self._reason(code))

    def _reason(self, code: int) -> str:
        """Return why the encoder ended with this exit code, and what to do."""
        if code == -signal.SIGXFSZ:
            return "the file is larger than the shell's limit on file sizes; raise it with ulimit -f"
        if code < 0:
            hint = "; if memory ran out, free some" if code == -signal.SIGKILL else ""
            return f"the encoder was ended by signal {-code} ({signal.strsignal(-code)}){hint}"
        messages = os.read(self._messages, 2**16).decode(errors="replace")
        if os.strerror(errno.ENOSPC) in messages:
            return "the disk is full; free some space or choose another folder"
        said = next(filter(None, map(str.strip, messages.splitlines())), "it said nothing")
        return f"the encoder {self._command[0]} ended with exit code {code} ({said}); is it an ffmpeg with libx264?"

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self._process.kill()

    def close(self) -> None:
        """Kill the process and free what belongs to it. Nothing writes to the file afterwards."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # frames that were not yet written
            self._stdin.close()
        os.close(self._messages)
