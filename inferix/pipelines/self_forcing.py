"""Self-Forcing (https://arxiv.org/abs/2506.08009): text or image to one clip."""

from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from inferix.errors import InputError
from inferix.models.vae import StreamingDecoder
from inferix.pipelines.base import Pipeline, joined, save
from inferix.video import safe_file_name


class SelfForcingPipeline(Pipeline):
    """One clip of ``num_output_frames`` latent frames for every prompt; see ``Pipeline`` for the arguments."""

    def load_checkpoint(self, path: str | Path, use_ema: bool = False) -> None:
        """Load ``self_forcing_dmd.pt``: its ``generator_ema`` or its ``generator``."""
        self._load(Path(path), "generator_ema" if use_ema else "generator")

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
        if num_output_frames - given < 1:
            raise InputError(f"num_output_frames must be positive, not {num_output_frames}")
        self.pipeline.blocks(num_output_frames - given, given)
        embeds = self._encode(prompts)
        context = None if image is None else self._encode_image(image, len(prompts))
        noise = self._noise(len(prompts), num_output_frames - given, generator)
        decode = StreamingDecoder(self.pipeline.vae)
        for latents in self.pipeline.denoise(noise, embeds, context, generator):
            yield decode(latents)

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
    ) -> list[Path]:
        """Generate ``num_samples`` videos of every prompt and save each as an MP4; returns the files written."""
        files: list[Path] = []
        for index, prompt in enumerate(prompts):
            stem = str(index) if save_with_index else safe_file_name(prompt)
            paths = [Path(output_folder) / f"{stem}-{seed}-{sample}.mp4" for sample in range(num_samples)]
            pieces = self.stream([prompt] * num_samples, num_output_frames, self.seeded(seed), image)
            given = 0 if image is None else 1
            blocks = self.pipeline.blocks(num_output_frames - given, given)
            files += save(pieces, paths, len(blocks), f"prompt {index + 1}/{len(prompts)}")
        return files

    def run_image_to_video(
        self, prompts: list[str], image_path: str | Path, output_folder: str | Path, num_output_frames: int = 19, **options
    ) -> list[Path]:
        """``run_text_to_video`` that starts from the image at ``image_path``, scaled and cropped to the video's size."""
        image = self.read_image(image_path)
        return self.run_text_to_video(prompts, output_folder, num_output_frames, image=image, **options)

    def read_image(self, path: str | Path) -> Tensor:
        """An image file as [3, H, W] in [-1, 1], scaled to cover the video's size and cropped in the middle.

        Raises InputError where it is missing or no image.
        """
        height, width = (8 * size for size in self.config.image_or_video_shape[-2:])
        try:
            pixels = iio.imread(path, mode="RGB", index=0)
        except FileNotFoundError:
            raise InputError(f"image {path} not found") from None
        except (OSError, ValueError, UnidentifiedImageError):
            raise InputError(f"image {path} cannot be read; use a PNG or JPEG file") from None
        image = Image.fromarray(pixels)
        scale = max(height / image.height, width / image.width)
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        cropped = np.array(image.crop((left, top, left + width, top + height)))
        return torch.from_numpy(cropped).permute(2, 0, 1) / 127.5 - 1

    def _encode_image(self, image: Tensor, batch: int) -> Tensor:
        """One latent frame [B, 1, 16, h, w]."""
        image = image if image.ndim == 4 else image[None].expand(batch, -1, -1, -1)
        return self.pipeline.vae.encode(image[:, None])
