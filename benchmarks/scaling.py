"""Measure how the cost of a video grows with its length, its size, the batch, and the number of GPUs that share it.

    python benchmarks/scaling.py --setting fp8+fp8kv
    python benchmarks/scaling.py --lengths 21 240 --sizes --batches --ranks 1 2

Every video is generated and decoded block by block by processes of its own, so that its peak memory is its own, with random
weights of a real model's sizes. Seconds are those after warm-up; GB are the most that a GPU needs
(without one: what the process grows by). Along each axis the other sizes are the usual ones: 21 latent frames of 480x832, one
video, one rank. A flag without values leaves its axis out. Prints tables and, in words, the slopes; writes scaling.json and a
picture for each axis, such as scaling_length.png.
"""

import argparse
import json
import math
import os
import resource
import socket
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import checkout  # noqa: F401
import torch
import torch.multiprocessing as mp
from common import GEOMETRIES, OUTPUT_FOLDER, Clock, random_prompt, timed, with_sampler
from settings import SETTINGS, build
from torch import Tensor

from inferix.cli.devices import parallel_config
from inferix.cli.figures import axes, machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.config import with_size
from inferix.distributed.context_parallel import shutdown
from inferix.errors import InputError
from inferix.pipelines.causal_inference import CausalInferencePipeline


@dataclass(frozen=True)
class Video:
    """What is generated, and by how many ranks."""

    length: int
    """Latent frames."""
    height: int
    width: int
    batch: int = 1
    ranks: int = 1


AXES = {
    "length": "latent frames",
    "size": "pixels of a frame",
    "batch": "videos in a batch",
    "ranks": "ranks",
}
QUANTITIES = {"seconds": "seconds", "gb": "GB"}
DEFAULTS = {
    "1.3b": ([21, 60, 240, 960], ["320x576", "480x832", "720x1280"], [1, 2, 4, 8]),
    "14b": ([21, 60, 240], ["320x576", "480x832", "720x1280"], [1, 2]),
    "demo": ([21, 42, 84], ["96x96", "128x128", "192x192"], [1, 2, 4]),
}
"""Lengths, sizes and batches by geometry."""


def position(video: Video, axis: str) -> int:
    """Return where a video stands on an axis."""
    return video.height * video.width if axis == "size" else getattr(video, axis)


@torch.no_grad()
def generate(pipeline: CausalInferencePipeline, embeds: Tensor, num_frames: int) -> None:
    """Generate and decode a video, and drop its frames."""
    generator = torch.Generator(pipeline.device).manual_seed(0)
    noise = pipeline.draw(pipeline.config.image_or_video_shape, generator)
    decode = pipeline.vae.streaming_decoder()
    for block in pipeline.denoise(noise, embeds, generator=generator, num_frames=num_frames):
        decode(block)


def measure(video: Video, geometry_name: str, setting: str, repeats: int) -> dict | None:
    """Return seconds and GB of a video, as one of its ranks; None on ranks that take part only."""
    geometry, cuda = with_sampler(GEOMETRIES[geometry_name], "self_forcing", 21), torch.cuda.is_available()
    config = with_size(geometry.config, video.height, video.width)
    geometry = replace(
        geometry, config=replace(config, image_or_video_shape=(video.batch, *config.image_or_video_shape[1:]))
    )
    parallel = parallel_config(None, None, geometry.transformer.num_heads)
    device = torch.device("cuda", parallel.local_rank) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipeline, seconds = build(geometry, SETTINGS[setting], device, dtype, parallel), []
    if pipeline.is_main_process:
        embeds = random_prompt(geometry, device, dtype).expand(video.batch, -1, -1)
        window = pipeline.config.window_frames
        generate(pipeline, embeds, min(video.length, 2 * window))  # all that a longer video compiles and captures
        times = 1 if video.length > 2 * window else repeats
        seconds = [timed(lambda: generate(pipeline, embeds, video.length), Clock(device)) / 1000 for _ in range(times)]
        if pipeline.context_parallel is not None:
            pipeline.context_parallel.close()
    else:
        pipeline.worker_loop()
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    peaks = [torch.cuda.max_memory_allocated() if cuda else peak] * parallel.world_size
    if pipeline.context_parallel is not None:
        torch.distributed.all_gather_object(peaks, peaks[0], group=pipeline.context_parallel.control_group)
    return {"seconds": statistics.median(seconds), "gb": max(peaks) / 1e9} if seconds else None


def measure_rank(rank: int, video: Video, args: argparse.Namespace, port: int, result: Path) -> None:
    """Be one of a video's ranks, in a process of its own; rank 0 writes the figures to ``result``."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": video.ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in ranks.items()}
    figures = measure(video, args.geometry, args.setting, args.repeats)
    if figures is not None:
        result.write_text(json.dumps(figures))
    shutdown()


def measure_in_processes(video: Video, args: argparse.Namespace) -> dict | None:
    """Return seconds and GB of a video that new processes generate; None where the GPU's memory is too small."""
    method = "spawn" if torch.cuda.is_available() else "fork"  # a fork imports nothing, but cannot use CUDA
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, result = free.getsockname()[1], Path(folder) / "result.json"
        free.close()
        arguments = (video, args, port, result)
        processes = mp.start_processes(measure_rank, arguments, video.ranks, join=False, start_method=method)
        try:
            while not processes.join():  # returns as each ends
                pass
        except mp.ProcessRaisedException as error:
            if "OutOfMemoryError" not in str(error):
                raise
            return None
        return json.loads(result.read_text())


def exponent(positions: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of log(value) over log(position), by least squares: 1 is growth in proportion."""
    x, y = ([math.log(number) for number in numbers] for numbers in (positions, values))
    return statistics.linear_regression(x, y).slope


def in_words(axis: str, quantity: str, positions: Sequence[float], values: Sequence[float]) -> str:
    """Return how a quantity changes along an axis."""
    slope = exponent(positions, values)
    if abs(slope) < 0.1:
        change = "stay as they are"
    elif slope < 0:
        change = "fall in inverse proportion" if slope < -0.9 else "fall, less than in inverse proportion"
    else:
        grades = ((0.9, "grow, less than in proportion"), (1.1, "grow in proportion"))
        change = next((words for limit, words in grades if slope < limit), "grow more than in proportion")
    return f"{quantity} against {axis}: {change} (exponent {slope:.2f}; twice as much makes them {2**slope:.2f} times)"


def plot(axis: str, positions: Sequence[int], results: Mapping[str, Sequence[float]], words: Sequence[str], path: Path):
    """Draw seconds and GB along an axis, both on logarithmic scales, beside what growth in proportion would be."""
    with axes(path, rows=2, height=7) as panels:
        for panel, (quantity, values), title in zip(panels, results.items(), words):
            panel.loglog(positions, values, marker="o")
            proportional = [values[0] * at / positions[0] for at in positions]
            panel.loglog(positions, proportional, color="gray", linestyle=":", linewidth=0.8)
            for at, value in zip(positions, values):
                panel.annotate(f"{value:.3g}", (at, value), textcoords="offset points", xytext=(0, 6), ha="center")
            panel.set_ylabel(quantity)
            panel.set_title(title, fontsize=9)
            panel.set_xticks(positions, [f"{at:,}" for at in positions], minor=False)
            panel.minorticks_off()
            panel.margins(y=0.15)
        panels[-1].set_xlabel(AXES[axis])


def read_sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Read HEIGHTxWIDTH. Raises InputError for anything else."""
    sizes = [text.split("x") for text in texts]
    for size, text in zip(sizes, texts):
        if len(size) != 2 or not all(number.isdecimal() and int(number) % 16 == 0 for number in size):
            raise InputError(f"--sizes takes HEIGHTxWIDTH in pixels, multiples of 16, such as 480x832, not {text}")
    return [(int(height), int(width)) for height, width in sizes]


def videos(args: argparse.Namespace) -> dict[str, list[Video]]:
    """Return the videos of every axis that the flags give two values or more."""
    *_, height, width = GEOMETRIES[args.geometry].config.image_or_video_shape
    usual = Video(args.num_frames, 8 * height, 8 * width)
    along = {
        "length": [replace(usual, length=length) for length in args.lengths],
        "size": [replace(usual, height=height, width=width) for height, width in read_sizes(args.sizes)],
        "batch": [replace(usual, batch=batch) for batch in args.batches],
        "ranks": [replace(usual, ranks=ranks) for ranks in args.ranks],
    }
    return {axis: chosen for axis, chosen in along.items() if len(chosen) > 1}


def report(args: argparse.Namespace, results: Mapping[str, Mapping[Video, dict]]) -> None:
    """Print a table and the slopes of every axis, and draw it."""
    for axis, measured in results.items():
        rows = [
            [
                f"{v.height}x{v.width}" if axis == "size" else str(position(v, axis)),
                f"{r['seconds']:.3g}",
                f"{r['gb']:.3g}",
            ]
            for v, r in measured.items()
        ]
        print(f"\n{markdown_table([AXES[axis], *QUANTITIES.values()], rows)}\n")
        if len(measured) < 2:
            continue
        positions = [position(video, axis) for video in measured]
        values = {name: [r[key] for r in measured.values()] for key, name in QUANTITIES.items()}
        words = [in_words(axis, name, positions, numbers) for name, numbers in values.items()]
        print("\n".join(words))
        plot(axis, positions, values, words, args.output_folder / f"scaling_{axis}.png")


def main(argv: list[str] | None = None) -> None:
    cuda, ours = torch.cuda.is_available(), [name for name, setting in SETTINGS.items() if setting.package is None]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.3b" if cuda else "demo")
    parser.add_argument("--setting", choices=ours, default="fp8+fp8kv" if cuda else "bf16")
    parser.add_argument("--lengths", nargs="*", type=int, help="latent frames")
    parser.add_argument("--sizes", nargs="*", help="height x width in pixels, such as 480x832")
    parser.add_argument("--batches", nargs="*", type=int, help="videos that are generated at once")
    parser.add_argument("--ranks", nargs="*", type=int, help="GPUs; default: 1, 2, 4, 8 as far as there are so many")
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames along the other axes (default: 21)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; one of videos beyond two windows")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    args = parser.parse_args(argv)
    for name, default in zip(("lengths", "sizes", "batches"), DEFAULTS[args.geometry]):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.ranks is None:
        args.ranks = [n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() if cuda else 2)]
    known: dict[Video, dict | None] = {}
    results: dict[str, dict[Video, dict]] = {}
    for axis, chosen in videos(args).items():
        results[axis] = {}
        for video in chosen:
            if video not in known:
                known[video] = measure_in_processes(video, args)
                print(f"{video}: {known[video] or 'out of memory'}", flush=True)
            if figures := known[video]:
                results[axis][video] = figures
        rows = {name: [asdict(v) | r for v, r in measured.items()] for name, measured in results.items()}
        write_report(args.output_folder / "scaling.json", {"geometry": args.geometry, "setting": args.setting, **rows})
    print(f"\n{machine_name()}, torch {torch.__version__}, {args.geometry}, {args.setting}")
    report(args, results)


if __name__ == "__main__":
    sys.exit(run(main))
