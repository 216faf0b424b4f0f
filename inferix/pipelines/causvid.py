"""CausVid (https://arxiv.org/abs/2412.07772): long videos as rollouts that overlap."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from inferix.config import ParallelConfig
from inferix.errors import InputError
from inferix.models.vae import StreamingDecoder
from inferix.pipelines.base import Pipeline, joined, save
from inferix.video import safe_file_name


class CausVidPipeline(Pipeline):
    """Rollout after rollout, each starting from the end of the last; see ``Pipeline`` for the arguments."""

    def __init__(
        self,
        config_path: str | Path,
        default_config_path: str | Path | None = None,
        wan_base_model_path: str | Path | None = None,
        enable_kv_offload: bool = True,
        parallel_config: ParallelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            config_path, default_config_path, wan_base_model_path, enable_kv_offload, parallel_config, device, dtype
        )

    def load_checkpoint(self, path: str | Path, use_ema: bool = False) -> None:
        """Load ``model.pt`` in the folder ``path`` (or the file ``path`` itself)."""
        path = Path(path)
        if path.is_dir():
            path = path / "model.pt"
        self._load(path, "generator_ema" if use_ema else "generator")

    def stream(
        self,
        prompts: str | Iterable[str],
        num_rollout: int = 3,
        num_overlap_frames: int = 3,
        num_frames: int = 21,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the video block after block, without end-of-rollout frames that the next rollout generates again.

        Args:
            prompts: one string (or a list of one) for all rollouts, a list with one a rollout, or an iterator, which is
                asked for the next prompt when its rollout begins and may end the video by ending.
            num_rollout: rollouts.
            num_overlap_frames: latent frames that a rollout takes over from the one before, a multiple of the block.
            num_frames: latent frames of a rollout, those taken over included.
            generator: source of all random draws.

        Yields:
            Frames [1, t, 3, H, W] in [0, 1].
        """
        self.check(num_rollout, num_overlap_frames, num_frames)
        repeated = 4 * (num_overlap_frames - 1) + 1  # pixel frames at a rollout's end that the next one makes anew
        start_latents = None
        for _, prompt in zip(range(num_rollout), each_rollout(prompts, num_rollout)):
            embeds = self._encode([prompt])
            noise = self._noise(1, num_frames, generator)
            if start_latents is not None:
                noise = noise[:, num_overlap_frames:]
            decode, latents = StreamingDecoder(self.pipeline.vae), []
            held = None
            for block in self.pipeline.denoise(noise, embeds, start_latents, generator):
                latents.append(block)
                pixels = decode(block) if held is None else torch.cat([held, decode(block)], dim=1)
                if pixels.shape[1] > repeated:
                    yield pixels[:, :-repeated]
                held = pixels[:, -repeated:]
            first = self.pipeline.vae.encode(held[:, :1] * 2 - 1)
            start_latents = torch.cat([first, torch.cat(latents, dim=1)[:, num_frames - num_overlap_frames + 1 :]], dim=1)

    def generate(
        self,
        prompts: str | Iterable[str],
        num_rollout: int = 3,
        num_overlap_frames: int = 3,
        num_frames: int = 21,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The joined pieces of ``stream``: a video [1, T, 3, H, W] in [0, 1]."""
        return joined(self.stream(prompts, num_rollout, num_overlap_frames, num_frames, generator))

    def run_text_to_video(
        self,
        prompts: str | Iterable[str],
        output_folder: str | Path,
        num_rollout: int = 3,
        num_overlap_frames: int = 3,
        num_frames: int = 21,
        seed: int = 0,
        name: str | None = None,
    ) -> list[Path]:
        """Generate one video and save it as an MP4, named after the first prompt or ``name``; returns the file."""
        self.check(num_rollout, num_overlap_frames, num_frames)
        if not isinstance(prompts, str) and not isinstance(prompts, Iterator):
            prompts = list(prompts)
        first = prompts if isinstance(prompts, str) else prompts[0] if isinstance(prompts, list) and prompts else "video"
        path = Path(output_folder) / f"{name or safe_file_name(first)}-{seed}.mp4"
        pieces = self.stream(prompts, num_rollout, num_overlap_frames, num_frames, self.seeded(seed))
        blocks = num_rollout * len(self.pipeline.blocks(num_frames))
        return save(pieces, [path], blocks, "video")

    def check(self, num_rollout: int, num_overlap_frames: int, num_frames: int) -> None:
        """Raises InputError where the numbers do not make a video."""
        size = self.config.num_frame_per_block
        if num_rollout < 1:
            raise InputError(f"num_rollout must be at least 1, not {num_rollout}")
        if num_frames < 1 or num_frames % size:
            raise InputError(f"a rollout of {num_frames} latent frames is no multiple of the block of {size}")
        if num_overlap_frames < 1 or num_overlap_frames % size or num_overlap_frames >= num_frames:
            raise InputError(
                f"num_overlap_frames must be a multiple of {size} below the rollout's {num_frames}, "
                f"not {num_overlap_frames}"
            )


def each_rollout(prompts: str | Iterable[str], num_rollout: int) -> Iterator[str]:
    """One prompt a rollout. Raises InputError where a list is neither one prompt nor as many as there are rollouts."""
    if isinstance(prompts, str):
        return repeat(prompts)
    if isinstance(prompts, Iterator):
        return prompts
    prompts = list(prompts)
    if len(prompts) not in (1, num_rollout):
        raise InputError(f"{len(prompts)} prompts for {num_rollout} rollouts: give one, or one for each")
    return repeat(prompts[0]) if len(prompts) == 1 else iter(prompts)
