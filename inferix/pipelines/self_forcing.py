"""Self-Forcing (https://arxiv.org/abs/2506.08009): text or image to one clip."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from inferix.errors import InputError
from inferix.models.vae import StreamingDecoder
from inferix.pipelines.base import Pipeline, Sink, file_stems, joined, save


class SelfForcingPipeline(Pipeline):
    """One clip of ``num_output_frames`` latent frames for every prompt; see ``Pipeline`` for the arguments."""

    def stream(
        self,
        prompts: list[str],
        num_output_frames: int = 21,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the video block after block.

        Args:
            prompts: one for each batch entry.
            num_output_frames: latent frames, a multiple of the block (one more with ``image``).
            generator: source of all random draws.
            image: [3, H, W] or [B, 3, H, W] in [-1, 1], the first frame.

        Yields:
            Frames [B, t, 3, H, W] in [0, 1].
        """
        given = 0 if image is None else 1
        self.check(num_output_frames, given)
        embeds = self.timed("encode prompt", self._encode, prompts)
        context = None if image is None else self._encode_image(image, len(prompts))
        noise = self._noise(len(prompts), num_output_frames - given, generator)
        blocks = self.pipeline.denoise(noise, embeds, context, generator, num_output_frames - given)
        decode = StreamingDecoder(self.pipeline.vae)
        while (latents := self.timed("denoise", next, blocks, None)) is not None:
            yield self.timed("decode", decode, latents)

    def generate(
        self,
        prompts: list[str],
        num_output_frames: int = 21,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """The joined pieces of ``stream``: a video [B, T, 3, H, W] in [0, 1]."""
        return joined(self.stream(prompts, num_output_frames, generator, image))

    def run_text_to_video(
        self,
        prompts: list[str],
        output_folder: str | Path,
        num_output_frames: int = 21,
        num_samples: int = 1,
        seed: int = 0,
        save_with_index: bool = False,
        image: Tensor | None = None,
        sink: Sink = save,
    ) -> list[Path]:
        """Generate ``num_samples`` videos of every prompt and save each as an MP4; returns the files written."""
        given = 0 if image is None else 1
        blocks = self.check(num_output_frames, given)
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, not {num_samples}")
        files: list[Path] = []
        for number, (prompt, stem) in enumerate(zip(prompts, file_stems(prompts, save_with_index)), start=1):
            paths = [Path(output_folder) / f"{stem}-{seed}-{sample}.mp4" for sample in range(num_samples)]
            pieces = self.stream([prompt] * num_samples, num_output_frames, self.seeded(seed), image)
            files += sink(pieces, paths, len(blocks), f"prompt {number}/{len(prompts)}")
        return files

    def run_image_to_video(
        self,
        prompts: list[str],
        image_path: str | Path,
        output_folder: str | Path,
        num_output_frames: int = 19,
        **options,
    ) -> list[Path]:
        """``run_text_to_video`` that starts from the image at ``image_path``, scaled and cropped to the video's size."""
        image = self.read_image(image_path)
        return self.run_text_to_video(prompts, output_folder, num_output_frames, image=image, **options)

    def check(self, num_output_frames: int, num_given: int = 0) -> list[int]:
        """The frames of every block. Raises InputError where they do not make a video."""
        size = self.config.num_frame_per_block
        if num_output_frames <= num_given or (num_output_frames - num_given) % size:
            wanted = f"a multiple of {size}" + (f" plus {num_given} for the image" if num_given else "")
            raise InputError(f"num_output_frames must be positive and {wanted}, not {num_output_frames}")
        return self.pipeline.blocks(num_output_frames - num_given, num_given)

    def read_image(self, path: str | Path) -> Tensor:
        """An image file as [3, H, W] in [-1, 1], scaled to cover the video's size and cropped in the middle.

        Raises InputError where it is missing or no image.
        """
        height, width = (8 * size for size in self.config.image_or_video_shape[-2:])
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except FileNotFoundError:
            raise InputError(f"image {path} not found") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            raise InputError(f"image {path} cannot be read: use a PNG or JPEG file") from None
        scale = max(height / image.height, width / image.width)
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        cropped = np.array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1

    def _encode_image(self, image: Tensor, batch: int) -> Tensor:
        """One latent frame [B, 1, 16, h, w]."""
        image = image if image.ndim == 4 else image[None].expand(batch, -1, -1, -1)
        return self.pipeline.vae.encode(image[:, None])
