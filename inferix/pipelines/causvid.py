"""CausVid (https://arxiv.org/abs/2412.07772): long videos as rollouts that overlap."""

from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from inferix.errors import InputError
from inferix.file_name import safe_file_name
from inferix.pipelines.pipeline import Blending, Pipeline, write_videos

RolloutPrompt = str | Iterator[str]
"""A prompt for a whole rollout, or an iterator that is asked before each of its blocks."""


class CausVidPipeline(Pipeline):
    """Rollout after rollout, each starting from the end of the last; see ``Pipeline`` for the arguments."""

    default_kv_offload = True

    def stream(
        self,
        prompts: str | Iterable[RolloutPrompt],
        num_rollout: int | None = 3,
        num_overlap_frames: int = 3,
        num_frames: int = 21,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the video block by block, without the last frames of a rollout that the next one generates again.

        Args:
            prompts: one string (or a list of one) for all rollouts, a list with one for each rollout, or an iterator that is
                asked when a rollout begins and may end the video by ending. An iterator in place of a string is asked
                before each block of its rollout.
            num_rollout: rollouts; None: as many as there are prompts (one prompt: without end).
            num_overlap_frames: latent frames that a rollout takes over from the one before, a multiple of the block size.
            num_frames: latent frames of a rollout, those taken over included.
            generator: source of all random draws.

        Yields:
            Frames [1, t, 3, H, W] in [0, 1], float32.

        Raises:
            InputError: if the numbers do not make a video, or a prompt is empty.
        """
        prompts = as_list(prompts)
        self.num_blocks(prompts, num_rollout, num_overlap_frames, num_frames)
        if num_rollout != 1 and self.pipeline.vae.model is None:  # so that no rollout waits for its first call
            height, width = self.config.image_or_video_shape[-2:]
            self.pipeline.vae.encode(torch.zeros(1, 1, 3, 8 * height, 8 * width))
        visible = 4 * (num_frames - num_overlap_frames)  # pixel frames; the next rollout generates the others again
        blending, held = Blending(self.config.blend_blocks), list[Tensor]()
        latents, next_start = list[Tensor](), None  # of the rollout before
        for prompt in islice(each_rollout(prompts), num_rollout):
            if isinstance(prompt, str):
                embeds = self.timed("encode prompt", self.encode_prompts, [prompt])
            else:
                embeds = self._embeddings(([text] for text in prompt), blending)
            noise = self.pipeline.draw((1, num_frames, *self.config.image_or_video_shape[2:]), generator)
            start_latents = None
            if next_start is not None:
                first = self.pipeline.vae.encode(next_start * 2 - 1)
                last = torch.cat(latents, dim=1)[:, num_frames - num_overlap_frames + 1 :]
                start_latents = torch.cat([first, last], dim=1)
                noise = noise[:, num_overlap_frames:]
            blocks = self.pipeline.denoise(noise, embeds, start_latents, generator)
            decode, latents, done = self.pipeline.vae.streaming_decoder(), list[Tensor](), 0
            while (block := self.timed("denoise", next, blocks, None)) is not None:
                latents.append(block)
                pixels = self.timed("decode", decode, block)
                if done < visible:
                    piece = torch.cat([*held, pixels[:, : visible - done]], dim=1)
                    held = []
                    if (next_start := pixels[:, visible - done :][:, :1]).shape[1]:  # the first frame that is not shown
                        held = [piece]  # the next rollout's first frames follow at once
                    else:
                        yield piece
                done += pixels.shape[1]
            if sum(block.shape[1] for block in latents) < num_frames:  # the prompts have ended
                break
        yield from held

    def generate(
        self,
        prompts: str | Iterable[RolloutPrompt],
        num_rollout: int | None = 3,
        num_overlap_frames: int = 3,
        num_frames: int = 21,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the joined pieces of ``stream``: a video [1, T, 3, H, W] in [0, 1]."""
        return torch.cat(list(self.stream(prompts, num_rollout, num_overlap_frames, num_frames, generator)), dim=1)

    def run_text_to_video(
        self,
        prompts: str | Iterable[RolloutPrompt],
        output_folder: str | Path,
        num_rollout: int | None = 3,
        num_overlap_frames: int = 3,
        num_frames: int = 21,
        seed: int = 0,
        name: str | None = None,
    ) -> list[Path]:
        """Generate one video, save it as an MP4 named after the first prompt or ``name``, and return the file."""
        prompts = as_list(prompts)
        num_blocks = self.num_blocks(prompts, num_rollout, num_overlap_frames, num_frames)
        name = name or safe_file_name(prompts[0] if isinstance(prompts, list) else "video")
        path = Path(output_folder) / f"{name}-{seed}.mp4"
        pieces = self.stream(prompts, num_rollout, num_overlap_frames, num_frames, self.seeded(seed))
        return write_videos(pieces, [path], num_blocks, "video")

    def num_blocks(
        self,
        prompts: list[RolloutPrompt] | Iterator[RolloutPrompt],
        num_rollout: int | None,
        num_overlap_frames: int,
        num_frames: int,
    ) -> int | None:
        """Return the number of pieces that ``stream`` yields, None where that is open.

        That is one for each block of the video: the blocks that a rollout takes over are not counted again.

        Raises InputError where the numbers do not make a video.
        """
        size = self.config.num_frame_per_block
        if num_rollout is not None and num_rollout < 1:
            raise InputError(f"num_rollout must be at least 1, not {num_rollout}")
        if num_frames < 1 or num_frames % size:
            raise InputError(f"a rollout of {num_frames} latent frames is no multiple of the block size {size}")
        if num_overlap_frames < 1 or num_overlap_frames % size or num_overlap_frames >= num_frames:
            raise InputError(
                f"num_overlap_frames must be a multiple of {size} from {size} to below the rollout's {num_frames}, "
                f"not {num_overlap_frames}"
            )
        if isinstance(prompts, list) and len(prompts) != 1:
            num_rollout = num_rollout or len(prompts)
            if len(prompts) != num_rollout or not prompts:
                rollouts = "1 rollout" if num_rollout == 1 else f"{num_rollout} rollouts"
                raise InputError(f"{len(prompts)} prompts for {rollouts}: give one prompt, or one for each rollout")
        return None if num_rollout is None else num_rollout * ((num_frames - num_overlap_frames) // size) + 1


def as_list(prompts: str | Iterable[RolloutPrompt]) -> list[RolloutPrompt] | Iterator[RolloutPrompt]:
    """Return a string as a list of one, any collection as a list, an iterator as it is."""
    if isinstance(prompts, str):
        return [prompts]
    return prompts if isinstance(prompts, Iterator) else list(prompts)


def each_rollout(prompts: list[RolloutPrompt] | Iterator[RolloutPrompt]) -> Iterator[RolloutPrompt]:
    """Return one prompt for each rollout; a single one for all of them."""
    return cycle(prompts) if isinstance(prompts, list) and len(prompts) == 1 else iter(prompts)
