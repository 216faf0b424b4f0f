"""What a pipeline is told: the YAML configs with the reference projects' keys, and how ranks share the work."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inferix.errors import InputError


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a ``torchrun`` job share one clip."""

    ulysses_size: int = 1
    """Ranks over which attention heads are split (DeepSpeed-Ulysses, arXiv 2309.14509)."""
    ring_size: int = 1
    """Ranks over which keys and values are passed round (Ring Attention, arXiv 2310.01889)."""
    local_rank: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if min(self.ulysses_size, self.ring_size) < 1:
            raise InputError(f"ulysses_size {self.ulysses_size} and ring_size {self.ring_size} must be at least 1")
        if self.ulysses_size * self.ring_size != self.world_size:
            raise InputError(
                f"ulysses_size {self.ulysses_size} x ring_size {self.ring_size} is not the number of processes "
                f"({self.world_size}); start that many with torchrun, or change the sizes"
            )


@dataclass(frozen=True)
class PipelineConfig:
    """The keys of a config file that inference reads; what training alone needs is ignored."""

    denoising_step_list: tuple[int, ...]
    """Descending timesteps; a trailing 0 is dropped."""
    timestep_shift: float
    """Shift of the noise schedule."""
    warp_denoising_step: bool = False
    """Take ``denoising_step_list`` as places in the shifted schedule rather than as timesteps."""
    num_frame_per_block: int = 3
    """Latent frames that are denoised together."""
    context_noise: int = 0
    """Timestep at which a finished block is run again to fill the cache."""
    local_attn_size: int = -1
    """Latent frames that attention sees, the block at hand included; -1: as many as ``image_or_video_shape`` has."""
    sink_size: int = 0
    """First latent frames that the window never drops when it rolls on over a longer video."""
    image_or_video_shape: tuple[int, ...] = (1, 21, 16, 60, 104)
    """Batch, latent frames of a clip, channels, latent height and width."""
    adapter: dict[str, float] | None = None
    """``rank`` and ``alpha`` of the LoRA that the config is for (LongLive), where its file does not say them."""
    prompt_template: str | None = None
    """What a small model understands: ``{a|b}`` marks a choice. None: any prompt."""

    def __post_init__(self):
        steps, (*_, height, width) = self.denoising_step_list, self.image_or_video_shape
        for right, wanted in (
            (steps and 0 < min(steps) and max(steps) <= 1000, "denoising_step_list between 0 and 1000"),
            (list(steps) == sorted(set(steps), reverse=True), "denoising_step_list in descending order"),
            (self.timestep_shift > 0, "timestep_shift above 0"),
            (self.num_frame_per_block > 0, "num_frame_per_block above 0"),
            (0 <= self.context_noise <= 1000, "context_noise between 0 and 1000"),
            (
                self.local_attn_size == -1 or self.local_attn_size >= self.num_frame_per_block,
                "local_attn_size of a block at least, or -1",
            ),
            (
                0 <= self.sink_size <= self.rolling_frames() - self.num_frame_per_block,
                "sink_size at least a block below local_attn_size",
            ),
            (
                len(self.image_or_video_shape) == 5 and min(self.image_or_video_shape) > 0,
                "image_or_video_shape of 5 sizes",
            ),
            (self.adapter is None or min(self.adapter.values(), default=1) > 0, "adapter with rank and alpha above 0"),
            (height % 2 == 0 and width % 2 == 0, "image_or_video_shape with even height and width"),
        ):
            if not right:
                raise ValueError(f"it needs {wanted}")

    def rolling_frames(self) -> int:
        """Latent frames that attention sees at most."""
        return (
            max(self.image_or_video_shape[1], self.num_frame_per_block)
            if self.local_attn_size == -1
            else self.local_attn_size
        )


KINDS = {
    "denoising_step_list": lambda steps: tuple(int(step) for step in steps if int(step) != 0),
    "timestep_shift": float,
    "warp_denoising_step": bool,
    "image_or_video_shape": lambda sizes: tuple(int(size) for size in sizes),
    "adapter": lambda adapter: {key: float(adapter[key]) for key in ("rank", "alpha") if dict(adapter).get(key) is not None},
    "prompt_template": str,
}
"""How a value of a config file is read; what is not listed is an integer."""


def load_config(path: str | Path, default_path: str | Path | None = None) -> PipelineConfig:
    """Read ``path`` over ``default_path``.

    Raises InputError where a file is missing, is no YAML mapping, or lacks or misuses a key.
    """
    merged = OmegaConf.merge(*(_read_yaml(Path(p)) for p in (default_path, path) if p is not None))
    raw = OmegaConf.to_container(merged)
    try:
        raw |= raw.get("model_kwargs") or {}  # Self-Forcing nests timestep_shift, local_attn_size and sink_size there
        names = [name for name in PipelineConfig.__dataclass_fields__ if raw.get(name) is not None]
        if missing := {"denoising_step_list", "timestep_shift"} - set(names):
            raise InputError(f"{path} has no {', '.join(sorted(missing))}; compare it with the configs under example/")
        return PipelineConfig(**{name: KINDS.get(name, int)(raw[name]) for name in names})
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} has a wrong value: {error}") from None


def _read_yaml(path: Path):
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"config {path} not found") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(config):
        raise InputError(f"config {path} is not a mapping of keys to values")
    return config
