"""Measure clips that several GPUs of one host share: time, memory, NCCL's share, and the difference to one GPU.

What a user of the script sees (clips to their complete files, streams) is measured in the same run.

    torchrun --standalone --nproc-per-node=4 benchmarks/several_gpus.py --geometries 1.3b 14b --splits 4x1 2x2 1x4

A split is Ulysses x ring. Each setting is first measured on one GPU of the machine, several of them side by side. Every row
is printed and written to several_gpus.json as soon as it is there. Times are medians of CUDA events after warm-up; weights
are random and the same on all ranks. NCCL's share is that of the kernels' time in one block at full window and contains
the time that a GPU waits for the others. ``--help`` lists the flags.
"""

import time

STARTED = time.monotonic()

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import checkout  # noqa: F401
import torch
import torch.distributed as dist
from common import (
    GEOMETRIES,
    OUTPUT_FOLDER,
    Clock,
    Geometry,
    block_functions,
    clip_latents,
    median_seconds,
    random_prompt,
    repeat,
    timed,
    with_sampler,
)
from settings import SETTINGS, build, denoise_clip, free_memory
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from user import COLUMNS as USER_COLUMNS
from user import user_figures

from inferix.cli.figures import errors_by_block, machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.cli.report import format_bytes
from inferix.config import ParallelConfig
from inferix.distributed.context_parallel import ContextParallel, check_sizes
from inferix.errors import InputError
from inferix.runtime.memory import num_bytes

Split = tuple[int, int]
KEYS = ("geometry", "setting", "split")
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def read_split(text: str) -> Split:
    """Read ``ULYSSESxRING``. Raises InputError for anything else."""
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise InputError(f"--splits takes Ulysses x ring, such as 4x1 2x2, not {text}")
    return int(sizes[0]), int(sizes[1])


def parallel_config(split: Split) -> ParallelConfig:
    return ParallelConfig(*split, LOCAL_RANK, RANK, WORLD_SIZE)


def gather(job: ContextParallel, value: object) -> list:
    """Return every rank's ``value`` on every rank."""
    values = [None] * job.world_size
    dist.all_gather_object(values, value, group=job.control_group)
    return values


@torch.no_grad()
def measure(
    geometry: Geometry,
    name: str,
    split: Split | None,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    engine_only: bool,
) -> tuple[dict, list[Tensor]]:
    """Return the figures of a setting and a clip's latents by block; the main process's alone are complete.

    With a split all ranks call it; without one, this rank measures by itself. With ``engine_only`` nothing is decoded.
    """
    free_memory(device)
    clock, embeds, cuda = Clock(device), random_prompt(geometry, device, dtype), device.type == "cuda"
    began = time.perf_counter()
    pipeline = build(geometry, SETTINGS[name], device, dtype, None if split is None else parallel_config(split))
    row, latents = {"weights_gb": num_bytes(pipeline.generator.model) / 1e9}, []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if pipeline.is_main_process:
        latents = clip_latents(pipeline, embeds)  # warms up
        row["cold_start_s"] = time.perf_counter() - began
        times = [timed(lambda: denoise_clip(pipeline, embeds), clock) for _ in range(repeats)]
        row |= {"clip_s": median_seconds(times), "clip_runs_s": [milliseconds / 1000 for milliseconds in times]}
        if not engine_only:
            row |= user_figures(pipeline, geometry, embeds, clock, repeats)
        if split is not None:
            pipeline.context_parallel.close()
    else:
        pipeline.worker_loop()
    *_, block = block_functions(pipeline, embeds)
    row["full_window_block_ms"] = statistics.median(repeat(block, clock, repeats))
    if cuda:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row |= profile_kernels(block)
    if split is not None and cuda:
        row["peak_gb"] = max(gather(pipeline.context_parallel, row["peak_gb"]))
    return row, latents


def profile_kernels(function: Callable[[], None]) -> dict:
    """Return the GPU time of one call, NCCL's share of it, and the kernels that take most of it."""
    # With CUDA graphs the profiling interface must stay loaded after the first profile.
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"), strict=False)["traceEvents"]
    return summarize_kernels(events)


def summarize_kernels(events: Iterable[Mapping]) -> dict:
    """Return the sums of a Chrome trace's GPU events, whose durations are in microseconds; {} where it has none."""
    kernels: dict[str, float] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[event["name"]] = kernels.get(event["name"], 0.0) + event["dur"] / 1000
    if not kernels:
        return {}
    total = sum(kernels.values())
    nccl = sum(milliseconds for name, milliseconds in kernels.items() if "nccl" in name.lower())
    longest = sorted(kernels, key=kernels.get, reverse=True)[:12]
    kernels_ms = {name[:100]: round(kernels[name], 3) for name in longest}
    return {"gpu_ms": total, "nccl_ms": nccl, "nccl_share": nccl / total, "kernels_ms": kernels_ms}


def compare(row: dict, latents: list[Tensor], references: Mapping[str, tuple[dict, list[Tensor]]]) -> None:
    """Add to ``row`` how it differs from one GPU with the same setting, and from one GPU in bf16."""
    alone, exact = references[row["setting"]]
    row["error"], row["gain"] = errors_by_block(latents, exact)
    if "bf16" in references:
        row["error_to_bf16"], row["gain_to_bf16"] = errors_by_block(latents, references["bf16"][1])
    row["speedup"] = alone["clip_s"] / row["clip_s"]
    row["block_speedup"] = alone["full_window_block_ms"] / row["full_window_block_ms"]


class Benchmark:
    """Measures row by row, all ranks together; the main process prints and writes what there is after each.

    Args:
        args: the flags.
        job: all ranks.
        device: this rank's.
        dtype: of the model.
    """

    def __init__(self, args: argparse.Namespace, job: ContextParallel, device: torch.device, dtype: torch.dtype):
        self.args, self.job, self.device, self.dtype = args, job, device, dtype
        self.rows: list[dict] = []
        self.skipped: list[str] = []
        self.longest = 0.0

    def proceed(self) -> bool:
        """Return on all ranks whether there is time for a row as long as the longest one."""
        used = time.monotonic() - STARTED
        proceed = self.args.time_limit is None or used + self.longest < self.args.time_limit
        proceed = bool(self.job.broadcast_object(proceed))
        if not proceed:
            print(f"stopped after {used:.0f} s by --time_limit {self.args.time_limit:.0f}", flush=True)
        return proceed

    def measure(self, *arguments) -> tuple[dict, list[Tensor]]:
        began = time.monotonic()
        measured = measure(*arguments, self.device, self.dtype, self.args.repeats, self.args.engine_only)
        self.longest = max(self.longest, time.monotonic() - began)
        return measured

    def run(self) -> None:
        for name in self.args.geometries:
            geometry = with_sampler(GEOMETRIES[name], "self_forcing", self.args.num_frames)
            if not self.proceed():
                return
            references = self.measure_references(name, geometry)
            for split in self.usable_splits(name, geometry):
                for setting in self.args.settings:
                    if not self.proceed():
                        return
                    self.add(
                        name, "x".join(map(str, split)), setting, references, self.measure(geometry, setting, split)
                    )

    def measure_references(self, name: str, geometry: Geometry) -> dict[str, tuple[dict, list[Tensor]]]:
        """Return figures and latents of one GPU by setting. The ranks share the settings; each measures by itself."""
        mine = {setting: self.measure(geometry, setting, None) for setting in self.args.settings[RANK::WORLD_SIZE]}
        gathered = {setting: measured for part in gather(self.job, mine) for setting, measured in part.items()}
        references = {setting: gathered[setting] for setting in self.args.settings}
        for setting, measured in references.items():
            self.add(name, "1x1", setting, references, measured)
        return references

    def usable_splits(self, name: str, geometry: Geometry) -> list[Split]:
        """Return the splits that the model's sizes allow; say which are left out."""
        *_, height, width = geometry.config.image_or_video_shape
        usable = []
        for split in self.args.splits:
            try:
                check_sizes(parallel_config(split), geometry.transformer.num_heads, height * width // 4)
                usable.append(split)
            except InputError as error:
                self.skipped.append(f"{name} {split[0]}x{split[1]} left out: {error}")
                print(self.skipped[-1], flush=True)
        return usable

    def add(
        self, geometry: str, split: str, setting: str, references: dict, measured: tuple[dict, list[Tensor]]
    ) -> None:
        """Keep a row: compare it to one GPU, print it and write the report."""
        if not self.job.is_main_process:
            return
        row = {"geometry": geometry, "split": split, "setting": setting, **measured[0]}
        compare(row, measured[1], references)
        self.rows.append(row)
        print(
            f"{time.monotonic() - STARTED:.0f} s: " + ", ".join(f"{name} {cell}" for name, cell in cells(row).items())
        )
        sys.stdout.flush()
        write_report(
            self.args.output_folder / "several_gpus.json",
            {"gpus": WORLD_SIZE, "rows": self.rows, "skipped": self.skipped},
        )


def cells(row: Mapping) -> dict[str, str]:
    """Return a row of the first table by its header."""
    return {
        "geometry": row["geometry"],
        "setting": row["setting"],
        "split": row["split"],
        "clip s": f"{row['clip_s']:.3f}",
        "speed-up": f"{row['speedup']:.2f}",
        "full-window block ms": f"{row['full_window_block_ms']:.1f}",
        "block speed-up": f"{row['block_speedup']:.2f}",
        "NCCL": f"{row['nccl_share']:.1%}" if "nccl_share" in row else "",
        "peak memory of a GPU": format_bytes(row["peak_gb"] * 1e9) if "peak_gb" in row else "",
        "largest error": f"{max(row['error']):.4f}",
        "last gain": f"{row['gain'][-1]:.4f}",
    }


def tables(rows: list[dict]) -> str:
    """Return the figures, and errors and gains by block, as Markdown."""
    parts = [markdown_table(list(cells(rows[0])), [list(cells(row).values()) for row in rows])]
    measured = [row for row in rows if USER_COLUMNS.keys() <= row.keys()]
    if measured:
        body = [[*(row[key] for key in KEYS), *(f"{row[key]:.4g}" for key in USER_COLUMNS)] for row in measured]
        parts.append(markdown_table([*KEYS, *USER_COLUMNS.values()], body))
    titles = {
        "error": "Relative error to the same setting on one GPU:",
        "gain": "Gain:",
        "error_to_bf16": "Relative error to bf16 on one GPU:",
        "gain_to_bf16": "Gain:",
    }
    for key, title in titles.items():
        known = [row for row in rows if key in row]
        if known:
            header = [*KEYS, *(f"block {i}" for i in range(1, len(known[0][key]) + 1))]
            body = [[*(row[k] for k in KEYS), *(f"{x:.4f}" for x in row[key])] for row in known]
            parts += [title, markdown_table(header, body)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda, ours = torch.cuda.is_available(), [name for name, setting in SETTINGS.items() if setting.package is None]
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=["1.3b", "14b"] if cuda else ["demo"])
    parser.add_argument("--splits", nargs="+", help="Ulysses x ring (4x1 2x2); default: all")
    parser.add_argument("--settings", nargs="+", choices=ours, default=["bf16", "fp8+fp8kv"])
    parser.add_argument("--num_frames", type=int, default=21, help="latent frames of a clip (default: 21)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--engine_only", action="store_true", help="leave out decoding, files and streams")
    parser.add_argument("--time_limit", type=float, help="seconds after which no other row is begun")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    args = parser.parse_args(argv)
    if WORLD_SIZE < 2:
        raise InputError("start it with torchrun --standalone --nproc-per-node=N, N from 2")
    every = [f"{n}x{WORLD_SIZE // n}" for n in range(WORLD_SIZE, 0, -1) if WORLD_SIZE % n == 0]
    args.splits = [read_split(text) for text in args.splits or every]
    configs = [parallel_config(split) for split in args.splits]
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    job = ContextParallel(configs[0], device)
    benchmark = Benchmark(args, job, device, torch.bfloat16 if cuda else torch.float32)
    benchmark.run()
    if benchmark.rows:
        print(f"\n{WORLD_SIZE} x {machine_name()}, torch {torch.__version__}\n\n{tables(benchmark.rows)}")
    job.broadcast_object(None)


if __name__ == "__main__":
    sys.exit(run(main))
