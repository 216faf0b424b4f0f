"""What run_compare.py measures of two videos, and how it shows it."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

GAIN = 8
"""How much the difference of two videos is amplified."""
SMALLEST = 256
"""Videos of fewer rows are enlarged to at least as many, so that the labels can be read."""
IDENTICAL = 100.0
"""dB that stand for the infinite PSNR of two frames without a difference."""
FRAMES_AT_ONCE = 27
"""Bounds the memory that comparing and showing take."""


@dataclass(frozen=True)
class Clip:
    video: Tensor
    """[T, 3, H, W] in [0, 1]"""
    latents: Tensor
    """[F, 16, h, w]"""


@dataclass
class Figures:
    """What one setting costs and saves; a list holds one value for every clip."""

    setting: str
    weights_gb: float
    peak_gb: float = 0.0
    seconds: list[float] = field(default_factory=list)
    clip_psnr: list[float] = field(default_factory=list)
    """dB, of all pixels of a clip"""
    clip_ssim: list[float] = field(default_factory=list)
    latent_cosine: list[float] = field(default_factory=list)
    frame_psnr: list[list[float]] = field(default_factory=list)
    """of every clip, dB of each of its frames"""
    frame_ssim: list[list[float]] = field(default_factory=list)

    def add(self, reference: Clip, made: Clip, device: torch.device) -> None:
        """Compare one clip with the reference's, on ``device``."""
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
        cosine = F.cosine_similarity(made.latents.flatten().double(), reference.latents.flatten().double(), dim=0)
        self.latent_cosine.append(cosine.item())

    @property
    def psnr(self) -> float:
        return mean(self.clip_psnr)

    @property
    def error(self) -> float:
        """Mean square error, of pixels in [0, 1]."""
        return mean(10 ** (-psnr / 10) for psnr in self.clip_psnr)

    def cells(self) -> list[str]:
        """In the order of ``COLUMNS``; the reference has nothing to be compared with."""
        fidelity = ["", "", "", ""]
        if self.clip_psnr:
            fidelity = [f"{self.psnr:.2f}", f"{min(self.clip_psnr):.2f}"]
            fidelity += [f"{mean(self.clip_ssim):.4f}", f"{mean(self.latent_cosine):.5f}"]
        costs = [f"{median(self.seconds):.2f}", f"{self.weights_gb:.4g}", f"{self.peak_gb:.3g}"]
        return [self.setting, *fidelity, *costs]

    def line(self) -> str:
        """For a terminal, while the rest is still to come."""
        return f"{self.setting}: " + ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS[1:], self.cells()[1:]))


COLUMNS = ["setting", "PSNR dB", "worst clip dB", "SSIM", "latent cosine", "seconds", "weights GB", "peak GB"]


def table(results: list[Figures]) -> str:
    """The results as Markdown: means over the clips, the median of the seconds."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(figures.cells() for figures in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def side_by_side(reference: Tensor, video: Tensor, name: str) -> Tensor:
    """Reference, other video and their amplified difference, each [T, 3, H, W], labelled: [T, 3, H', 3 W']."""
    difference = (GAIN * (video - reference).abs()).clamp(max=1)
    panels = torch.cat([reference, video, difference], dim=3)
    zoom = -(-SMALLEST // panels.shape[2])
    panels = panels.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    labels = label(["full precision", name, f"difference x {GAIN}"], panels.shape[3])
    return torch.cat([labels.expand(len(panels), -1, -1, -1), panels], dim=2)


def label(texts: list[str], width: int, height: int = 24) -> Tensor:
    """White on gray, each above its share of the width: [3, height, width]."""
    bar = Image.new("RGB", (width, height), "dimgray")
    for i, text in enumerate(texts):
        place = ((i + 0.5) * width / len(texts), height / 2)
        ImageDraw.Draw(bar).text(place, text, fill="white", font=ImageFont.load_default(height * 0.6), anchor="mm")
    return torch.from_numpy(np.array(bar)).permute(2, 0, 1) / 255


def save_picture(frame: Tensor, path: Path) -> None:
    """A frame [3, H, W] in [0, 1] as an image file."""
    Image.fromarray((frame * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


def plot(results: list[Figures], path: Path) -> None:
    """PSNR and SSIM of every frame, means over the clips: what each block adds to the error of those before."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, sharex=True, figsize=(9, 7), layout="constrained")
    for figures in results:
        for axes, frames in zip(panels, (figures.frame_psnr, figures.frame_ssim)):
            axes.plot(np.mean(np.array(frames), axis=0), label=figures.setting)
    panels[0].set_ylabel("PSNR, dB")
    panels[1].set_ylabel("SSIM")
    panels[1].set_xlabel("frame")
    panels[0].legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def reset_peak() -> None:
    """Begin to measure ``peak_gb`` anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")  # the kernel's word for it


def peak_gb() -> float:
    """The most GPU memory in use since ``reset_peak``; without a GPU, the most memory of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), float("nan"))
