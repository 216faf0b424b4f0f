"""Does a video show what its prompt says?  Checks colour, shape, direction of travel and background automatically.

    python example/demo_model/score.py                    # the table of the README: 216 prompts, both samplers
    python example/demo_model/score.py --sampler causvid --quant int8 --prompts 12
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from world import BACKGROUNDS, COLORS, DIRECTIONS, SCENES, SHAPES, SIZE, SPEED, Scene, coverage

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "weights/demo"
CRITERIA = ("colour", "shape", "direction", "background")
ENOUGH = 0.9  # share of the frames that must show the right thing
MIN_OVERLAP = 0.8  # intersection over union of what is seen and the shape where it is seen
PALETTE = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()])


def segment(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is seen in each frame of a video [T, 3, H, W].

    Returns the index of the object's colour [T], that of the background [T], and the object's pixels [T, H, W]: those
    nearer to the object's colour, or to any other that is not the background's, than to the background's.
    """
    pixels = video.float().permute(0, 2, 3, 1).flatten(1, 2)  # [T, H*W, 3]
    distance = torch.cdist(pixels, PALETTE.to(video.device).expand(len(pixels), -1, -1))
    counts = torch.nn.functional.one_hot(distance.argmin(-1), len(PALETTE)).sum(1)  # [T, 9]
    background = counts[:, len(COLORS) :].argmax(-1)
    is_object = distance.argmin(-1) != len(COLORS) + background[:, None]
    inside = torch.where(is_object[..., None], pixels, torch.nan).nanmedian(dim=1).values  # [T, 3]
    color = torch.cdist(inside.nan_to_num(-1), PALETTE[: len(COLORS)].to(video.device)).argmin(-1)
    # an antialiased edge pixel is half one, half the other: cut half way
    foreground, behind = PALETTE.to(video.device)[color], PALETTE.to(video.device)[len(COLORS) + background]
    axis = foreground - behind
    share = ((pixels - behind[:, None]) * axis[:, None]).sum(-1) / axis.square().sum(-1, keepdim=True)
    off_axis = (pixels - behind[:, None] - share[..., None] * axis[:, None]).norm(dim=-1)
    mask = (share > 0.5) | (off_axis > 0.35)
    return color, background, mask.view(len(video), *video.shape[2:])


def centroids(mask: Tensor) -> Tensor:
    """Centroid (x, y) in pixels of each mask [T, H, W] on the torus, where the frame's edges meet: [T, 2]."""
    angle = (torch.arange(SIZE, device=mask.device) + 0.5) * (2 * torch.pi / SIZE)
    wave = torch.polar(torch.ones_like(angle), angle)
    profiles = torch.stack((mask.sum(1), mask.sum(2)), 1).float()  # [T, 2, SIZE]
    return (profiles.to(wave.dtype) @ wave).angle() % (2 * torch.pi) * SIZE / (2 * torch.pi)


def overlaps(mask: Tensor, center: Tensor) -> Tensor:
    """Intersection over union of each mask [T, H, W] with every shape at its centroid: [T, shapes].

    Anything else in the frame, a second object say, counts against it.
    """
    result = []
    for shape in SHAPES:
        template = coverage(shape, torch.full((1, 2), SIZE / 2, device=mask.device)) > 0.5
        template = coverage(shape, center + SIZE / 2 - centroids(template)) > 0.5
        both, either = (template & mask).sum((1, 2)), (template | mask).sum((1, 2))
        result.append(both / either)
    return torch.stack(result, 1)


def travel(center: Tensor) -> Tensor:
    """How far (x, y) centroids [T, 2] go in all, wraps around the edges counted through: [2]."""
    steps = (center.diff(dim=0) + SIZE / 2) % SIZE - SIZE / 2
    return steps.sum(0)


def score(video: Tensor, scene: Scene) -> dict[str, bool]:
    """Check a video [T, 3, 128, 128] in [0, 1] against the scene that its prompt asks for."""
    color, background, mask = segment(video)
    center = centroids(mask)
    overlap = overlaps(mask, center)
    moved, (dx, dy) = travel(center), DIRECTIONS[scene.direction]
    expected = SPEED * (len(video) - 1)
    along, across = (moved[0] * dx + moved[1] * dy).item(), (moved[0] * dy + moved[1] * dx).abs().item()
    seen = overlap.amax(1) >= MIN_OVERLAP  # exactly one known shape, of the right size

    def often(right: Tensor) -> bool:
        return right.float().mean().item() >= ENOUGH

    return {
        "colour": often(seen & (color == list(COLORS).index(scene.color))),
        "shape": often(seen & (overlap.argmax(1) == SHAPES.index(scene.shape))),
        "direction": often(seen) and expected / 2 <= along <= expected * 1.5 and across <= expected / 10,
        "background": often(background == list(BACKGROUNDS).index(scene.background)),
    }
