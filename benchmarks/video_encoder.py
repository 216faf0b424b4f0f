"""Measure the settings of the video encoder: speed, size and quality of x264's presets, on smooth frames and on noise.

Prints a Markdown table. Frames are encoded as ``inferix.video`` does it, by the same ffmpeg command. CPU seconds tell what
a machine with other cores will do: a video of 81 frames that is generated in 1.2 s on 32 cores leaves the encoder at most
1.2 times the cores that it can use (8 threads and the conversion to 4:2:0).
"""

import argparse
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a checkout runs without being installed

import av
import numpy as np
import torch
from torch import Tensor

from inferix.video_encoder import CRF, PRESET, Encoder, encoder_command, to_pixels

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium")


def smooth(num_frames: int, height: int, width: int) -> Tensor:
    """Return frames [t, 3, H, W] in [0, 1] as a real video's: moving light, five moving shapes, fine texture."""
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, width / height, width)
    noise = torch.rand(1, 3, height // 6, width // 3, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(noise, size=(height, 2 * width), mode="bicubic")[0]
    frames = []
    for number in range(num_frames):
        t, left = number / 16, 3 * number % width
        light = torch.stack(
            [torch.sin(3 * x + t + 0 * y), torch.sin(2 * y - 0.7 * t + x), torch.cos(2 * x - 3 * y + t)]
        )
        frame = 0.4 + 0.32 * light + 0.15 * texture[:, :, left : left + width]
        for shape in range(5):
            center_x, center_y = (
                0.87 + 0.7 * math.sin(0.6 * t + 1.3 * shape),
                0.5 + 0.35 * math.cos(0.8 * t + 2.1 * shape),
            )
            distance = ((x - center_x) ** 2 + (y - center_y) ** 2).sqrt()
            mask = torch.sigmoid((0.06 + 0.03 * shape - distance) * 200)
            color = torch.tensor([0.37 * shape % 1, (0.61 * shape + 0.3) % 1, (0.83 * shape + 0.6) % 1]).view(3, 1, 1)
            frame = torch.lerp(frame, 0.8 * color + 0.2 * texture[:, :, :width], mask)
        frames.append(frame.clamp(0, 1))
    return torch.stack(frames)


def noise(num_frames: int, height: int, width: int) -> Tensor:
    """Return frames [t, 3, H, W] of noise, the hardest that there is; random weights come near it."""
    return torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def psnr(error: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of an error in 8-bit values."""
    return 10 * math.log10(255**2 / np.mean(np.square(error, dtype=np.float64)))


def quality(path: Path, pixels: np.ndarray) -> tuple[float, float]:
    """Return the PSNR in dB of a file's luma and of its RGB values, against uint8 [t, 3, H, W]."""
    luma_error, rgb_error = [], []
    with av.open(str(path)) as container:
        for frame, expected in zip(container.decode(video=0), pixels, strict=True):
            luma = 16 + np.tensordot([65.481, 128.553, 24.966], expected / 255, 1)  # BT.601
            luma_error.append(frame.to_ndarray(format="yuv420p")[: len(luma)] - luma)
            rgb_error.append(frame.to_ndarray(format="rgb24").transpose(2, 0, 1) - expected.astype(np.float64))
    return psnr(np.stack(luma_error)), psnr(np.stack(rgb_error))


def cpu_seconds() -> float:
    """Return the CPU time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(path: Path, pixels: np.ndarray, preset: str, crf: int, repeats: int) -> tuple[float, float]:
    """Encode the frames; return the seconds and the CPU seconds of the fastest of ``repeats`` runs."""
    runs = []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), cpu_seconds()
        encoder = Encoder(encoder_command(path, pixels.shape[3], pixels.shape[2], 16, preset, crf))
        for frame in pixels:
            encoder.write(frame)
        encoder.finish()
        encoder.close()
        runs.append((time.perf_counter() - start, cpu_seconds() - cpu_start))
    return min(seconds for seconds, _ in runs), min(cpu for _, cpu in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=84)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--crfs", nargs="+", type=int, default=(10, 14, 18))
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    args = parser.parse_args()
    print(f"{args.frames} frames of {args.height}x{args.width}; in use: {PRESET}, CRF {CRF}\n")
    print("| frames | preset | CRF | frames/s here | CPU s | MB | PSNR luma / RGB, dB |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        for content in (smooth, noise):
            pixels = to_pixels(content(args.frames, args.height, args.width))[0].numpy()
            for preset in args.presets:
                for crf in args.crfs:
                    seconds, cpu = measure(path, pixels, preset, crf, args.repeats)
                    luma, rgb = quality(path, pixels)
                    row = f"| {content.__name__} | {preset} | {crf} | {args.frames / seconds:.0f} | {cpu:.2f} "
                    print(f"{row}| {path.stat().st_size / 1e6:.2f} | {luma:.1f} / {rgb:.1f} |", flush=True)


if __name__ == "__main__":
    main()
