"""What a user of the scripts sees, measured in one run with the engine: clips to their complete files, and streams."""

import statistics
import time
from collections import deque
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import Clock, Geometry
from torch import Tensor
from video_encoder import smooth

from inferix.models.tiny_vae import TAEHV, TinyVAE
from inferix.models.vae import VAE
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.video import VideoWriter

COLUMNS = {
    "script_clip_s": "script's clip s",
    "script_smooth_clip_s": "of smooth frames",
    "stream_fps": "stream frames/s",
    "tiny_stream_fps": "tiny VAE",
    "first_frames_ms": "first frames ms",
    "tiny_first_frames_ms": "tiny VAE",
}
"""The figures and their headers. Frames of random weights are almost noise, harder to encode than a real video's."""


def tiny_vae(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> TinyVAE:
    """Return a tiny VAE of random weights: of the public file's sizes, or small ones for the demo's geometry."""
    torch.manual_seed(0)
    model = TAEHV(64, (256, 128, 64, 64)) if geometry.vae_base_dim == 96 else TAEHV(16, (32, 16, 16, 16))
    return TinyVAE(model).to(device, dtype)


@torch.no_grad()
def decode_clip(pipeline: CausalInferencePipeline, vae: VAE, embeds: Tensor, clock: Clock) -> dict[str, float]:
    """Return the milliseconds of a clip with decoding, and those to its first frames."""
    generator = torch.Generator(pipeline.device).manual_seed(0)
    noise = pipeline.draw(pipeline.config.image_or_video_shape, generator)
    decoder, start, first = vae.streaming_decoder(), clock.now(), None
    for block in pipeline.denoise(noise, embeds, generator=generator):
        decoder(block)
        first = first or clock.now()
    return {"clip_ms": clock.between(start, clock.now()), "first_frames_ms": clock.between(start, first)}


@torch.no_grad()
def stream_fps(pipeline: CausalInferencePipeline, vae: VAE, embeds: Tensor, clock: Clock, num_blocks: int = 4) -> float:
    """Return the frames a second of an endless video once its window is full, decoding included; a median of blocks."""
    size, shape = pipeline.config.num_frame_per_block, pipeline.config.image_or_video_shape
    window = -(-pipeline.config.window_frames // size)
    noise = pipeline.draw(shape, torch.Generator(pipeline.device).manual_seed(0))
    decoder, points = vae.streaming_decoder(), []
    for block in pipeline.denoise(noise, embeds, num_frames=(window + 1 + num_blocks) * size):
        frames = decoder(block).shape[1]
        points.append(clock.now())
    times = [clock.between(start, end) for start, end in zip(points[window:], points[window + 1 :])]
    return 1000 * frames / statistics.median(times)


@torch.no_grad()
def script_clip_seconds(
    pipeline: CausalInferencePipeline, embeds: Tensor, num_clips: int, smooth_frames: bool = False
) -> float:
    """Return the seconds from one complete file of the scripts' loop to the next, a mean over the clips after the first.

    With ``smooth_frames`` the clips are generated all the same, and what is written is like a real video.
    """
    _, num_frames, _, height, width = pipeline.config.image_or_video_shape
    frames_per_clip = 4 * (num_frames - 1) + 1
    content = smooth_video(frames_per_clip, 8 * height, 8 * width, pipeline.device) if smooth_frames else None
    writers, completed = deque[VideoWriter](), list[float]()
    with TemporaryDirectory() as folder:
        for number in range(1 + num_clips):
            noise = pipeline.draw(pipeline.config.image_or_video_shape, None)
            decoder = pipeline.vae.streaming_decoder()
            path = Path(folder) / f"{number}.mp4"
            with VideoWriter(path, on_complete=lambda _: completed.append(time.perf_counter())) as writer:
                for block in pipeline.denoise(noise, embeds):
                    frames = decoder(block)[0]
                    writer.write(frames if content is None else content[writer.frames :][: len(frames)])
            writers.append(writer)
            while len(writers) > 1:
                writers.popleft().result()
        writers.pop().result()
    return (completed[-1] - completed[0]) / num_clips


@cache
def smooth_video(num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return frames [t, 3, H, W] as a real video's."""
    return smooth(num_frames, height, width).to(device)


def user_figures(
    pipeline: CausalInferencePipeline, geometry: Geometry, embeds: Tensor, clock: Clock, repeats: int
) -> dict[str, float]:
    """Return the figures of ``COLUMNS``. On several ranks the main process calls it, while the others are in their loop."""
    figures = {
        "script_clip_s": script_clip_seconds(pipeline, embeds, repeats),
        "script_smooth_clip_s": script_clip_seconds(pipeline, embeds, repeats, smooth_frames=True),
    }
    for prefix, vae in (("", pipeline.vae), ("tiny_", tiny_vae(geometry, pipeline.device, pipeline.dtype))):
        figures[f"{prefix}stream_fps"] = stream_fps(pipeline, vae, embeds, clock, repeats)
        first = [decode_clip(pipeline, vae, embeds, clock)["first_frames_ms"] for _ in range(repeats)]
        figures[f"{prefix}first_frames_ms"] = statistics.median(first)
    return figures
