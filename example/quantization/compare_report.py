"""What run_compare.py measures of two videos, and how it shows it."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from inferix.cli.figures import axes, block_table, errors_by_block, format_error, format_gain, markdown_table
from inferix.cli.report import format_bytes

DIFFERENCE_SCALE = 8
"""How much the difference of two videos is amplified."""
SMALLEST = 256
"""Videos of fewer rows are enlarged to at least as many, so that the labels can be read."""
IDENTICAL = 100.0
"""dB that stand for the infinite PSNR of two frames without a difference."""
FRAMES_AT_ONCE = 27
"""Bounds the memory that comparing and showing take."""


@dataclass(frozen=True)
class Clip:
    """What a pipeline generates for one prompt."""

    video: Tensor
    """[T, 3, H, W] in [0, 1]"""
    latents: Tensor
    """[F, 16, h, w]"""


@dataclass
class Figures:
    """What one setting costs and saves; a list holds one value for every clip."""

    setting: str
    weight_bytes: int
    peak_bytes: int = 0
    """0: not known"""
    seconds: list[float] = field(default_factory=list)
    clip_psnr: list[float] = field(default_factory=list)
    """dB, of all pixels of a clip"""
    clip_ssim: list[float] = field(default_factory=list)
    block_error: list[list[float]] = field(default_factory=list)
    """of every clip, the relative error of each block's latents"""
    block_gain: list[list[float]] = field(default_factory=list)
    """of every clip, the gain of each block's latents"""
    frame_psnr: list[list[float]] = field(default_factory=list)
    """of every clip, dB of each of its frames"""
    frame_ssim: list[list[float]] = field(default_factory=list)

    def add(self, reference: Clip, made: Clip, block_size: int, device: torch.device) -> None:
        """Compare one clip with the reference's, on ``device``; ``block_size`` latent frames were made together."""
        psnr, ssim = [], []
        for pair in zip(reference.video.split(FRAMES_AT_ONCE), made.video.split(FRAMES_AT_ONCE)):
            target, frames = (chunk.to(device) for chunk in pair)
            psnr.append(peak_signal_noise_ratio(frames, target, 1.0, reduction="none", dim=(1, 2, 3)))
            ssim.append(structural_similarity_index_measure(frames, target, data_range=1.0, reduction="none"))
        self.frame_psnr.append(torch.cat(psnr).clamp(max=IDENTICAL).tolist())
        self.frame_ssim.append(torch.cat(ssim).tolist())
        psnr = peak_signal_noise_ratio(made.video, reference.video, 1.0)
        self.clip_psnr.append(psnr.clamp(max=IDENTICAL).item())
        self.clip_ssim.append(mean(self.frame_ssim[-1]))
        errors, gains = errors_by_block(made.latents.split(block_size), reference.latents.split(block_size))
        self.block_error.append(errors)
        self.block_gain.append(gains)

    @property
    def psnr(self) -> float:
        """The mean over the clips, in dB."""
        return mean(self.clip_psnr)

    @property
    def mse(self) -> float:
        """The mean square error of pixels in [0, 1]."""
        return mean(10 ** (-psnr / 10) for psnr in self.clip_psnr)

    def error_by_block(self) -> list[float]:
        """Return the relative error of each block's latents, the mean over the clips."""
        return np.mean(self.block_error, axis=0).tolist()

    def gain_by_block(self) -> list[float]:
        """Return the gain of each block's latents, the mean over the clips."""
        return np.mean(self.block_gain, axis=0).tolist()

    def cells(self) -> list[str]:
        """Return the row of ``COLUMNS``; the reference has nothing to be compared with."""
        fidelity = [""] * 5
        if self.clip_psnr:
            fidelity = [f"{self.psnr:.2f}", f"{min(self.clip_psnr):.2f}", f"{mean(self.clip_ssim):.4f}"]
            fidelity += [format_error(max(self.error_by_block()), self.setting), format_gain(self.gain_by_block()[-1])]
        peak = format_bytes(self.peak_bytes) if self.peak_bytes else ""
        return [self.setting, *fidelity, f"{median(self.seconds):.2f}", format_bytes(self.weight_bytes), peak]

    def line(self) -> str:
        """Return the row as a line for a terminal."""
        return f"{self.setting}: " + ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS[1:], self.cells()[1:]))


COLUMNS = [
    "setting",
    "PSNR dB",
    "worst clip dB",
    "SSIM",
    "largest error",
    "last gain",
    "seconds",
    "weights",
    "peak memory",
]


def report_text(results: list[Figures]) -> str:
    """Return the results as Markdown: means over the clips, the median of the seconds; then errors and gains by block."""
    parts = [markdown_table(COLUMNS, [figures.cells() for figures in results])]
    compared = [figures for figures in results if figures.clip_psnr]
    if compared:
        errors = {f.setting: [format_error(error, f.setting) for error in f.error_by_block()] for f in compared}
        gains = {f.setting: [format_gain(gain) for gain in f.gain_by_block()] for f in compared}
        parts += ["Relative error of the latents:", block_table(errors), "Gain of the latents:", block_table(gains)]
    return "\n\n".join(parts)


def side_by_side(reference: Tensor, video: Tensor, name: str) -> Tensor:
    """Return [T, 3, H', 3 W']: reference, other video and their amplified difference, each [T, 3, H, W], with labels."""
    difference = (DIFFERENCE_SCALE * (video - reference).abs()).clamp(max=1)
    panels = torch.cat([reference, video, difference], dim=3)
    zoom = -(-SMALLEST // panels.shape[2])
    panels = panels.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    labels = label(["full precision", name, f"difference x {DIFFERENCE_SCALE}"], panels.shape[3])
    return torch.cat([labels.expand(len(panels), -1, -1, -1), panels], dim=2)


def label(texts: list[str], width: int, height: int = 24) -> Tensor:
    """Return [3, height, width]: white texts on gray, each in the middle of its share of the width."""
    bar = Image.new("RGB", (width, height), "dimgray")
    for i, text in enumerate(texts):
        place = ((i + 0.5) * width / len(texts), height / 2)
        ImageDraw.Draw(bar).text(place, text, fill="white", font=ImageFont.load_default(height * 0.6), anchor="mm")
    return torch.from_numpy(np.array(bar)).permute(2, 0, 1) / 255


def save_picture(frame: Tensor, path: Path) -> None:
    """Write a frame [3, H, W] in [0, 1] to an image file."""
    Image.fromarray((frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


def plot_frames(results: list[Figures], path: Path) -> None:
    """Draw PSNR and SSIM of every frame, means over the clips: what each block adds to the error of those before."""
    with axes(path, rows=2, width=9, height=7) as (upper, lower):
        for figures in results:
            for panel, frames in ((upper, figures.frame_psnr), (lower, figures.frame_ssim)):
                panel.plot(np.mean(frames, axis=0), label=figures.setting)
        upper.set_ylabel("PSNR, dB")
        lower.set_ylabel("SSIM")
        lower.set_xlabel("frame")


def reset_peak() -> None:
    """Begin to measure ``peak_bytes`` anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")  # resets VmHWM


def peak_bytes() -> int:
    """Return the most GPU memory in use since ``reset_peak``; without a GPU, of this process's memory (Linux; else 0)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
