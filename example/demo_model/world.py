"""The synthetic world of the embedded model: one coloured shape that moves over a plain background.

128x128 pixels, 16 frames a second. The object goes 2 pixels a frame; what leaves on one side enters on the other, so a
clip can go on for ever. A prompt names colour, shape, direction and background, and a clip that no other came before
always starts from the same place, so that the prompt says all. A clip that goes on where another ended can start from
any of 8 places on either of 2 lines: 72 frames on, the object is 16 pixels further round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import imageio.v3 as iio
import torch

SIZE = 128
SPEED = 2  # pixels a frame: one latent pixel a latent frame
PLACES = tuple(range(0, SIZE, 16))  # starts along the direction of travel
LINES = (44, 84)  # where the line of travel can lie

COLORS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.98, 0.90, 0.10),
    "purple": (0.60, 0.10, 0.80),
    "orange": (1.00, 0.52, 0.02),
}
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5)}
LORA_COLORS = {"white": BACKGROUNDS["white"]}
"""Objects' colours that only the LoRA in weights/demo/lora knows. The VAE shows no other colours than the world's."""
ALL_COLORS = COLORS | LORA_COLORS
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {  # (x, y), y downwards
    "from left to right": (1, 0),
    "from right to left": (-1, 0),
    "from top to bottom": (0, 1),
    "from bottom to top": (0, -1),
}


@dataclass(frozen=True)
class Scene:
    """What a prompt says."""

    color: str
    shape: str
    direction: str
    background: str

    @property
    def prompt(self) -> str:
        return f"A {self.color} {self.shape} moves {self.direction} on a {self.background} background"


SCENES = tuple(Scene(*words) for words in product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))
LORA_SCENES = tuple(
    Scene(*words) for words in product(LORA_COLORS, SHAPES, DIRECTIONS, BACKGROUNDS) if words[0] != words[3]
)
STARTS = tuple(product(PLACES, LINES))
"""The first is that of a clip that no other came before."""


def centers(scene: Scene, start: tuple[float, float], frames: torch.Tensor) -> torch.Tensor:
    """The object's centre (x, y) in pixels at each frame: [T] -> [T, 2]."""
    dx, dy = DIRECTIONS[scene.direction]
    place, line = start
    along = (place + (dx + dy) * SPEED * frames) % SIZE
    across = torch.full_like(along, line)
    return torch.stack((along, across) if dx else (across, along), -1)


def coverage(shape: str, center: torch.Tensor) -> torch.Tensor:
    """How much of each pixel the shape covers, edges antialiased: centres [..., 2] -> [..., 128, 128] in [0, 1].

    All shapes have about the same area (1550 pixels) and their centroid at the centre.
    """
    pixels = torch.arange(SIZE, device=center.device) + 0.5
    # signed offset on the torus, in [-64, 64)
    x = (pixels - center[..., 0, None, None] + SIZE / 2) % SIZE - SIZE / 2
    y = (pixels[:, None] - center[..., 1, None, None] + SIZE / 2) % SIZE - SIZE / 2
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - 22.2
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - 19.7
    else:  # an equilateral triangle standing on its base; 17.3 is the radius of its inscribed circle
        distance = torch.maximum(y, x.abs() * math.sqrt(3) / 2 - y / 2) - 17.3
    return (0.5 - distance).clamp(0, 1)


def render(scene: Scene, start: tuple[float, float], frames: torch.Tensor) -> torch.Tensor:
    """The world's pixels at the given frame numbers (any integers): [T] -> [T, 3, 128, 128] in [0, 1]."""
    return render_many([scene], [start], frames)[0][0]


def render_many(
    scenes: list[Scene], starts: list[tuple[float, float]], frames: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several clips at once: their pixels [B, T, 3, 128, 128] and how much of each is the object's [B, T, 1, 128, 128]."""
    device = frames.device
    middle = torch.stack([centers(*clip, frames.float().cpu()) for clip in zip(scenes, starts)]).to(device)
    cover = torch.empty(*middle.shape[:2], SIZE, SIZE, device=device)
    for shape in {scene.shape for scene in scenes}:
        chosen = [i for i, scene in enumerate(scenes) if scene.shape == shape]
        cover[chosen] = coverage(shape, middle[chosen])
    cover = cover[:, :, None]
    color = torch.tensor([ALL_COLORS[scene.color] for scene in scenes], device=device)[:, None, :, None, None]
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device)
    background = background[:, None, :, None, None]
    return background + cover * (color - background), cover


def save_rows(path: Path, videos: torch.Tensor) -> None:
    """Write a picture of videos [N, T, 3, H, W] in [0, 1]: one in a row, its frames side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, (videos.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1) * 255).byte().cpu().numpy())
