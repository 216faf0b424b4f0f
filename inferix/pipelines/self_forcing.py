"""Self-Forcing (https://arxiv.org/abs/2506.08009) and its successors: text or image to a video of any length."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from inferix.errors import InputError
from inferix.pipelines.pipeline import Pipeline, file_stems, write_videos

MAX_PIXELS = 64_000_000
"""Of an image file. Decoding one takes four bytes for each."""


class SelfForcingPipeline(Pipeline):
    """One video for every prompt; see ``Pipeline`` for the arguments."""

    def stream(
        self,
        prompts: list[str] | Iterator[list[str]],
        num_output_frames: int | None = 21,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the video block by block.

        Args:
            prompts: one for each batch entry; or an iterator of such lists that is asked before every block, and may end
                the video by ending. A prompt that changes is taken over as the config's ``prompt_switch`` says.
            num_output_frames: latent frames, a multiple of the block size (one more with ``image``); None: without end.
            generator: source of all random draws.
            image: [3, H, W] or [B, 3, H, W] in [-1, 1], the first frame.

        Yields:
            Frames [B, t, 3, H, W] in [0, 1], float32.

        Raises:
            InputError: if the number of frames does not fit, or a prompt is empty.
        """
        given = 0 if image is None else 1
        self.num_blocks(num_output_frames, given)
        changing = self._embeddings([prompts] if isinstance(prompts, list) else prompts)
        if (first := next(changing, None)) is None:
            return
        batch, embeds = first.embeds.shape[0], first.embeds if isinstance(prompts, list) else chain([first], changing)
        context = None if image is None else self._encode_image(image, batch)
        num_frames = None if num_output_frames is None else num_output_frames - given
        noise = self._noise(batch, num_frames, generator)
        blocks = self.pipeline.denoise(noise, embeds, context, generator, num_frames)
        decode = self.pipeline.vae.streaming_decoder()
        while (latents := self.timed("denoise", next, blocks, None)) is not None:
            yield self.timed("decode", decode, latents)

    def _noise(self, batch: int, num_frames: int | None, generator: torch.Generator | None) -> Tensor:
        """Return a clip's noise, all of it, as the reference draws it; of a longer video the beginning."""
        _, clip, *shape = self.config.image_or_video_shape
        size = self.config.num_frame_per_block
        first = max(clip // size, 1) * size
        return self.pipeline.draw((batch, first if num_frames is None else min(num_frames, first), *shape), generator)

    def generate(
        self,
        prompts: list[str] | Iterator[list[str]],
        num_output_frames: int = 21,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Return the joined pieces of ``stream``: a video [B, T, 3, H, W] in [0, 1]."""
        return torch.cat(list(self.stream(prompts, num_output_frames, generator, image)), dim=1)

    def run_text_to_video(
        self,
        prompts: list[str],
        output_folder: str | Path,
        num_output_frames: int = 21,
        num_samples: int = 1,
        seed: int = 0,
        save_with_index: bool = False,
        image: Tensor | None = None,
    ) -> list[Path]:
        """Generate ``num_samples`` videos of every prompt, save each as an MP4 and return the files written."""
        num_blocks = self.num_blocks(num_output_frames, 0 if image is None else 1)
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, not {num_samples}")
        files: list[Path] = []
        for number, (prompt, stem) in enumerate(zip(prompts, file_stems(prompts, save_with_index)), start=1):
            paths = [Path(output_folder) / f"{stem}-{seed}-{sample}.mp4" for sample in range(num_samples)]
            pieces = self.stream([prompt] * num_samples, num_output_frames, self.seeded(seed), image)
            files += write_videos(pieces, paths, num_blocks, f"prompt {number}/{len(prompts)}")
        return files

    def run_image_to_video(
        self,
        prompts: list[str],
        image_path: str | Path,
        output_folder: str | Path,
        num_output_frames: int = 19,
        **options: Any,
    ) -> list[Path]:
        """Do as ``run_text_to_video``, starting from the image at ``image_path``, scaled and cropped to the video's size."""
        image = self.read_image(image_path)
        return self.run_text_to_video(prompts, output_folder, num_output_frames, image=image, **options)

    def num_blocks(self, num_output_frames: int | None, num_given: int = 0) -> int | None:
        """Return the number of pieces that ``stream`` yields, None without end.

        Raises InputError where the frames do not make a video.
        """
        if num_output_frames is None:
            return None
        size = self.config.num_frame_per_block
        if num_output_frames <= num_given or (num_output_frames - num_given) % size:
            wanted = f"a multiple of {size}" + (f" plus {num_given} for the image" if num_given else "")
            raise InputError(f"num_output_frames must be positive and {wanted}, not {num_output_frames}")
        return num_given + (num_output_frames - num_given) // size

    def read_image(self, path: str | Path | IO[bytes]) -> Tensor:
        """Return an image file as [3, H, W] in [-1, 1], scaled to cover the video's size and cropped in the middle.

        Raises InputError where it is missing, not an image, or larger than ``MAX_PIXELS``.
        """
        name = path if isinstance(path, str | Path) else "that was sent"
        height, width = (8 * size for size in self.config.image_or_video_shape[-2:])
        try:
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise InputError(f"image {name} has more than {MAX_PIXELS // 10**6} megapixels: scale it down")
                image = ImageOps.exif_transpose(file).convert("RGB")
        except FileNotFoundError:
            raise InputError(f"image {name} not found") from None
        except InputError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise InputError(f"image {name} cannot be read: use a PNG or JPEG file") from None
        self.pipeline.vae.load_encoder()  # which a clip that starts from the image needs
        scale = max(height / image.height, width / image.width)
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        cropped = np.array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1

    def _encode_image(self, image: Tensor, batch: int) -> Tensor:
        """Return one latent frame [B, 1, 16, h, w]."""
        image = image if image.ndim == 4 else image[None].expand(batch, -1, -1, -1)
        return self.pipeline.vae.encode(image[:, None])
