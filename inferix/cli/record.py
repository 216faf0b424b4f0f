"""What the manifest says of a video: how it was made, by what, and how fast."""

import os
import time
from argparse import Namespace
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import inferix
from inferix.background import in_background
from inferix.checkpoints.hashes import file_hash
from inferix.checkpoints.weight_files import find_weights
from inferix.cli.figures import machine_name
from inferix.cli.manifest import Manifest, Record
from inferix.cli.model_paths import ROOT, resolve_model_paths
from inferix.cli.report import quantization_name
from inferix.config import FPS
from inferix.pipelines.pipeline import Pipeline
from inferix.video import VideoWriter

if TYPE_CHECKING:
    from inferix.cli.planner import Job


def output_folder(args: Namespace) -> Path:
    """Return where the videos go."""
    return args.output_folder or ROOT / "outputs"


class Recorder:
    """Appends the record of each video to ``manifest.jsonl`` in the output folder.

    Files are hashed in the background, as a checkpoint takes seconds; the first record waits for it.

    Args:
        args: the flags.
        pipeline: with its weights.
    """

    def __init__(self, args: Namespace, pipeline: Pipeline):
        self.pipeline, self.manifest = pipeline, Manifest(output_folder(args) / "manifest.jsonl")
        self._model = in_background(describe_model, args, pipeline)

    def identity(self, args: Namespace, prompt: str, sample: int, video_id: str | None = None) -> Record:
        """Return the part of a record that says which video it is, for the flags of a run that makes it."""
        given = args.prompts[0] if args.entries is not None else prompt
        image = getattr(args, "image_path", None)
        return {
            "id": video_id,
            "prompt": prompt,
            "extended_prompt": None if given == prompt else given,
            "seed": args.seed,
            "sample": sample,
            "num_samples": getattr(args, "num_samples", 1),
            "image": image and str(image),
            "image_sha256": image and file_hash(image),
            "settings": self._model.result() | describe_length(args, self.pipeline),
        }

    def add(self, identity: Record, job: "Job", writer: VideoWriter) -> None:
        """Record a complete file: first it is on the disk, then its line."""
        descriptor = os.open(writer.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        height, width = (8 * size for size in self.pipeline.config.image_or_video_shape[-2:])
        seconds = time.perf_counter() - job.start
        result = {
            "bytes": writer.path.stat().st_size,
            "width": width,
            "height": height,
            "frames": writer.frames,
            "fps": FPS,
            "seconds": round(seconds, 3),
            "frames_per_second": round(writer.frames / seconds, 3),
        }
        self.manifest.append({"file": writer.path.name} | identity | result | self._run())

    def add_error(self, identity: Record, error: BaseException) -> None:
        """Record why a video was not made."""
        message = " ".join(str(error).split()) or type(error).__name__
        self.manifest.append({"file": None} | identity | {"error": message[:1000]} | self._run())

    def _run(self) -> Record:
        """Return what was at work."""
        return {
            "device": machine_name(),
            "processes": self.pipeline.parallel.world_size,
            "version": inferix.__version__,
            "torch": torch.__version__,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def describe_model(args: Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Return the settings that all videos of a run share: the model, its files' hashes, and how it computes."""
    paths, _ = resolve_model_paths(args)
    config = pipeline.config
    settings = {
        "model": args.model,
        "preset": args.preset,
        "config": paths.config.name,
        "config_sha256": file_hash(paths.config),
        "default_config_sha256": args.default_config_path and file_hash(args.default_config_path),
        "base_model": paths.base.name,
        "checkpoint": paths.checkpoint.name,
        "checkpoint_sha256": file_hash(*find_weights(paths.checkpoint)),
        "use_ema": bool(getattr(args, "use_ema", False)),
        "loras": [
            {"file": path.name, "strength": strength, "sha256": file_hash(path)}
            for path, strength in args.lora_path or ()
        ],
        "quantization": quantization_name(args),
        "qconfig_sha256": args.qconfig and file_hash(args.qconfig),
        "kv_cache_dtype": args.kv_cache_dtype,
        "quantize_text_encoder": args.quantize_text_encoder,
        "low_memory": args.low_memory,
        "vae": args.vae,
        "size": list(config.image_or_video_shape[-2:]),
    }
    return settings | {name: value for name, value in asdict(config).items() if name.startswith("denoising_step_list")}


def describe_length(args: Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Return the settings that say how long a video is, in latent frames or rollouts."""
    if args.model == "self_forcing":
        return {"num_output_frames": args.num_output_frames}
    return {"num_rollout": args.num_rollout or 3, "num_overlap_frames": args.num_overlap_frames}
