"""Configuration of a pipeline: YAML files with the reference projects' keys, and how ranks share the work."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inferix.errors import InputError

FPS = 16
"""Frames per second of every Wan 2.1 video."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a ``torchrun`` job share one clip."""

    ulysses_size: int = 1
    """Ranks over which attention heads are split (DeepSpeed-Ulysses, arXiv 2309.14509)."""
    ring_size: int = 1
    """Ranks over which keys and values are split (Ring Attention, arXiv 2310.01889)."""
    local_rank: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if min(self.ulysses_size, self.ring_size) < 1:
            raise InputError(f"ulysses_size {self.ulysses_size} and ring_size {self.ring_size} must be at least 1")
        if self.ulysses_size * self.ring_size != self.world_size:
            raise InputError(
                f"ulysses_size {self.ulysses_size} x ring_size {self.ring_size} is not the number of processes "
                f"({self.world_size}); start that many with torchrun, or change the sizes"
            )


@dataclass(frozen=True)
class PipelineConfig:
    """The keys of a config file that inference reads."""

    denoising_step_list: tuple[int, ...]
    """Descending timesteps; a trailing 0 is dropped."""
    timestep_shift: float
    """Shift of the noise schedule."""
    warp_denoising_step: bool = False
    """Take ``denoising_step_list`` as places in the shifted schedule instead of timesteps."""
    denoising_step_list_first_chunk: tuple[int, ...] | None = None
    """Steps of the first generated block; None: those of the others."""
    num_frame_per_block: int = 3
    """Latent frames that are denoised together."""
    context_noise: int = 0
    """Timestep at which a finished block is run again to fill the cache."""
    local_attn_size: int = -1
    """Latent frames in the attention window, those of the current block included; -1: as many as a clip has."""
    sink_size: int = 0
    """First latent frames that the window keeps when it rolls on over a longer video."""
    use_infinite_attention: bool = False
    """Positions relative to the window, so that they do not grow with the video."""
    global_sink: bool = False
    """Keep the sink frames' keys and values when the prompt changes after the window has rolled."""
    prompt_switch: str = "recache"
    """What a new prompt changes: the cached window too (``recache``), or cross-attention alone (``cross_attention``)."""
    image_or_video_shape: tuple[int, ...] = (1, 21, 16, 60, 104)
    """Batch, latent frames of a clip, channels, latent height and width."""
    prompt_template: str | None = None
    """Prompts that a small model understands: ``{a|b}`` marks a choice. None: any prompt."""
    adapter: dict[str, float] | None = None
    """``rank`` and ``alpha`` of the LoRA that the config is for (LongLive), where its file does not say them."""

    def __post_init__(self) -> None:
        (*_, height, width), block = self.image_or_video_shape, self.num_frame_per_block
        for fulfilled, requirement in (
            (descending(self.denoising_step_list), "denoising_step_list descending between 0 and 1000"),
            (
                self.denoising_step_list_first_chunk is None or descending(self.denoising_step_list_first_chunk),
                "denoising_step_list_first_chunk descending between 0 and 1000",
            ),
            (self.timestep_shift > 0, "timestep_shift above 0"),
            (block > 0, "num_frame_per_block above 0"),
            (0 <= self.context_noise <= 1000, "context_noise between 0 and 1000"),
            (self.local_attn_size == -1 or self.local_attn_size >= block, "local_attn_size of a block at least, or -1"),
            (0 <= self.sink_size <= self.window_frames - block, "sink_size at least a block below local_attn_size"),
            (self.prompt_switch in ("recache", "cross_attention"), "prompt_switch recache or cross_attention"),
            (
                len(self.image_or_video_shape) == 5 and min(self.image_or_video_shape) > 0,
                "image_or_video_shape of 5 sizes",
            ),
            (self.adapter is None or min(self.adapter.values(), default=1) > 0, "adapter with rank and alpha above 0"),
            (height % 2 == 0 and width % 2 == 0, "image_or_video_shape with even height and width"),
        ):
            if not fulfilled:
                raise ValueError(f"it needs {requirement}")

    @property
    def window_frames(self) -> int:
        """Latent frames in the attention window."""
        if self.local_attn_size != -1:
            return self.local_attn_size
        return max(self.image_or_video_shape[1], self.num_frame_per_block)


def descending(steps: tuple[int, ...]) -> bool:
    """Return whether ``steps`` are timesteps in (0, 1000] in descending order."""
    return bool(steps) and 0 < min(steps) <= max(steps) <= 1000 and list(steps) == sorted(set(steps), reverse=True)


def read_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def read_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def read_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def read_ints(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list of whole numbers")
    return tuple(map(read_int, value))


def read_steps(value: object) -> tuple[int, ...]:
    return tuple(step for step in read_ints(value) if step != 0)


def read_mapping(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a mapping")
    return value


def read_adapter(value: object) -> dict[str, float]:
    adapter = read_mapping(value)
    return {key: read_float(adapter[key]) for key in ("rank", "alpha") if adapter.get(key)}


READERS: dict[str, Callable] = {
    "denoising_step_list": read_steps,
    "timestep_shift": read_float,
    "warp_denoising_step": read_bool,
    "denoising_step_list_first_chunk": read_steps,
    "use_infinite_attention": read_bool,
    "global_sink": read_bool,
    "prompt_switch": read_text,
    "image_or_video_shape": read_ints,
    "prompt_template": read_text,
    "adapter": read_adapter,
}
"""How the value of a key is read; the others are whole numbers."""

TRAINING_KEYS = frozenset(
    """batch_size beta1 beta1_critic beta2 beta2_critic causal critic_lora_rank denoising_loss_type dfake_gen_update_ratio
    discriminator_lr_multiplier distribution_loss ema_start_step ema_weight fake_guidance_scale fake_name
    fake_score_fsdp_wrap_strategy gan_d_weight gan_g_weight generator_fsdp_wrap_strategy generator_grad generator_name
    generator_task generator_type gradient_checkpointing guidance_scale last_step_only load_raw_video log_iters lr lr_critic
    max_iters max_step_percent min_num_training_frames min_step_percent mixed_precision negative_prompt no_save no_visualize
    num_denoising_step num_train_timestep num_training_frames real_guidance_scale real_name real_score_fsdp_wrap_strategy
    same_step_across_blocks sharding_strategy slice_last_frames start_from_middle teacher_forcing
    text_encoder_fsdp_wrap_strategy total_batch_size trainer ts_schedule ts_schedule_max wandb_entity wandb_host wandb_key
    wandb_name wandb_project warmup_steps weight_decay""".split()
)
"""Keys of the reference projects' files that only their trainers read."""

COMMAND_LINE_KEYS = frozenset(
    """data_path extended_prompt_path generator_ckpt i2v inference_iter log_dir logdir lora_ckpt model_kwargs model_name
    num_output_frames num_samples output_folder save_with_index seed switch_frame_indices use_ema""".split()
)
"""Keys of the reference projects' files for what is a flag or an argument here."""

UNSUPPORTED_KEYS = {"independent_first_frame": (False, None)}
"""Keys that change the result, and the values that are computed here."""


def load_config(path: str | Path, default_path: str | Path | None = None) -> PipelineConfig:
    """Read ``path`` over ``default_path``.

    Warns about keys that are not known. Raises InputError where a file is missing, is not a YAML mapping, or lacks or
    misuses a key.
    """
    merged = OmegaConf.merge(*(_read_yaml(Path(p)) for p in (default_path, path) if p is not None))
    raw: Any = OmegaConf.to_container(merged)
    try:
        raw |= read_mapping(
            raw.get("model_kwargs") or {}
        )  # Self-Forcing nests timestep_shift, local_attn_size, sink_size
        names = [name for name in PipelineConfig.__dataclass_fields__ if raw.get(name) is not None]
        if missing := {"denoising_step_list", "timestep_shift"} - set(names):
            raise InputError(f"{path} has no {', '.join(sorted(missing))}; compare it with the configs under example/")
        for key, supported in UNSUPPORTED_KEYS.items():
            if key in raw and raw[key] not in supported:
                raise InputError(f"{path}: {key}: {raw[key]} is not supported; remove it or set it to {supported[0]}")
        known = PipelineConfig.__dataclass_fields__.keys() | TRAINING_KEYS | COMMAND_LINE_KEYS | UNSUPPORTED_KEYS.keys()
        if unknown := raw.keys() - known:
            warnings.warn(f"{path}: unknown keys are ignored: {', '.join(sorted(map(str, unknown)))}", stacklevel=2)
        return PipelineConfig(**{name: _read(name, raw[name]) for name in names})
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} has a wrong value: {error}") from None


def with_size(config: PipelineConfig, height: int | None = None, width: int | None = None) -> PipelineConfig:
    """Return ``config`` for videos of ``height`` x ``width`` pixels; None: as it says.

    Raises InputError where one is no multiple of 16: 8 pixels are a latent pixel, 2 of those a token.
    """
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < 16 or size % 16):
            raise InputError(f"{name} must be a multiple of 16, not {size}")
    *shape, old_height, old_width = config.image_or_video_shape
    shape += [height // 8 if height else old_height, width // 8 if width else old_width]
    return replace(config, image_or_video_shape=tuple(shape))


def _read(name: str, value: object) -> Any:
    try:
        return READERS.get(name, read_int)(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _read_yaml(path: Path) -> DictConfig | ListConfig:
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"config {path} not found") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(config):
        raise InputError(f"config {path} is not a mapping of keys to values")
    return config
