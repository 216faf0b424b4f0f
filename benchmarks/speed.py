"""Measure the speed and the accuracy of every precision in one run, with random weights at the size of a real model.

Prints tables and writes benchmark.json, benchmark.png (seconds) and benchmark_error.png (error by block). Times are medians of
CUDA events after warm-up; text embeddings are given. Errors are those of a whole clip's latents against float32 with plain
attention (bfloat16 for the 14B model, as a GPU cannot hold more), from the same weights and draws. ``--help`` lists the flags.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import checkout  # noqa: F401
import torch
from common import (
    Clock,
    Geometry,
    RandomCheckpoint,
    add_flags,
    clip_latents,
    default_device,
    find_geometry,
    median_seconds,
    random_prompt,
    reference_latents,
    repeat,
    time_blocks,
)
from peers import block_figures, measure_flashdreams
from settings import SETTINGS, build, denoise_clip, free_memory, missing
from torch import Tensor
from user import COLUMNS as USER_COLUMNS
from user import decode_clip, user_figures

from inferix.cli.figures import (
    axes,
    block_table,
    errors_by_block,
    format_error,
    format_gain,
    machine_name,
    markdown_table,
    plot_errors_by_block,
    write_report,
)
from inferix.cli.main import run
from inferix.cli.report import format_bytes
from inferix.errors import InputError
from inferix.runtime.memory import num_bytes


def measure(geometry: Geometry, name: str, exact: list[Tensor] | None, repeats: int, user: bool) -> dict:
    """Return the figures of one setting; with ``user`` those of the scripts too."""
    setting, (device, dtype) = SETTINGS[name], default_device()
    clock = Clock(device)
    free_memory(device)
    if setting.package == "flashdreams":
        return measure_flashdreams(geometry.transformer, geometry.config, device, dtype, clock, repeats)
    embeds = random_prompt(geometry, device, dtype)
    began = time.perf_counter()
    pipeline = build(geometry, setting, device, dtype)
    decode_clip(pipeline, pipeline.vae, embeds, clock)
    if device.type == "cuda":
        torch.cuda.synchronize()
    result = {"cold_start_s": time.perf_counter() - began, "weights_gb": num_bytes(pipeline.generator.model) / 1e9}
    result["clip_s"] = median_seconds(repeat(lambda: denoise_clip(pipeline, embeds), clock, repeats))
    result |= block_figures(time_blocks(pipeline, embeds, clock, repeats))
    runs = [decode_clip(pipeline, pipeline.vae, embeds, clock) for _ in range(repeats)]
    result["end_to_end_s"] = median_seconds([run["clip_ms"] for run in runs])
    result["fps"] = (4 * (geometry.config.image_or_video_shape[1] - 1) + 1) / result["end_to_end_s"]
    if device.type == "cuda":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if user:
        result |= user_figures(pipeline, geometry, embeds, clock, repeats)
    if exact is not None:
        result["error"], result["gain"] = errors_by_block(clip_latents(pipeline, embeds), exact)
    return result


@torch.no_grad()
def measure_vae(geometry: Geometry, repeats: int) -> float:
    """Return the seconds to decode a clip block by block."""
    device, dtype = default_device()
    vae = RandomCheckpoint(geometry, device, dtype).vae().to(device, dtype)
    latents = torch.randn(geometry.config.image_or_video_shape, device=device, dtype=dtype)

    def decode() -> None:
        decoder = vae.streaming_decoder()
        for block in latents.split(geometry.config.num_frame_per_block, dim=1):
            decoder(block)

    decode()
    return median_seconds(repeat(decode, Clock(device), repeats))


COLUMNS = {
    "weights_gb": "weights",
    "peak_gb": "peak memory",
    "cold_start_s": "cold start s",
    "clip_s": "clip s",
    "seven_blocks_s": "7 blocks s",
    "full_window_block_ms": "full-window block ms",
    "end_to_end_s": "end to end s",
    "fps": "frames/s",
}


def cells(result: Mapping, columns: Iterable[str] = COLUMNS) -> list[str]:
    """Return figures of a setting as text; nothing where there is none."""

    def text(key: str) -> str:
        if key not in result:
            return ""
        return format_bytes(result[key] * 1e9) if key.endswith("_gb") else f"{result[key]:.4g}"

    return [text(key) for key in columns]


def tables(results: Mapping[str, dict], reference: str) -> str:
    """Return the figures, the relative error to the ``reference`` and the gain by block, and the milliseconds, as Markdown."""
    parts = []
    for columns in (COLUMNS, USER_COLUMNS):
        if not any(column in result for column in columns for result in results.values()):
            continue
        rows = [[name, *cells(result, columns)] for name, result in results.items()]
        parts.append(markdown_table(["setting", *columns.values()], rows))
    compared = {name: result for name, result in results.items() if "error" in result}
    if compared:
        errors = {name: [format_error(error, name) for error in r["error"]] for name, r in compared.items()}
        gains = {name: [format_gain(gain) for gain in r["gain"]] for name, r in compared.items()}
        parts += [f"Relative error to {reference}:", block_table(errors), "Gain:", block_table(gains)]
    times = {
        name: [f"{ms:.1f} ({low:.1f}–{high:.1f})" for ms, (low, high) in zip(r["block_ms"], r["block_spread_ms"])]
        for name, r in results.items()
    }
    return "\n\n".join([*parts, "Milliseconds, fastest and slowest run:", block_table(times)])


def plot_seconds(results: dict[str, dict], path: Path) -> None:
    with axes(path, height=0.6 * len(results) + 1.5) as plot:
        for offset, key, label in ((0.2, "seven_blocks_s", "7 blocks"), (-0.2, "end_to_end_s", "with VAE decode")):
            known = {i - offset: result[key] for i, result in enumerate(results.values()) if key in result}
            plot.bar_label(plot.barh(list(known), list(known.values()), 0.38, label=label), fmt="%.2f", padding=3)
        plot.set_yticks(range(len(results)), results)
        plot.invert_yaxis()
        plot.set_xlabel("seconds for a clip (less is better)")
        plot.margins(x=0.1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="default: all that can be run here")
    parser.add_argument("--no_error", action="store_true", help="do not compute the reference")
    parser.add_argument(
        "--no_user", action="store_true", help="leave out what a user of the scripts sees, which takes longest"
    )
    args = parser.parse_args(argv)
    names = args.settings or [name for name in SETTINGS if not missing(name)]
    for name in names:
        if reason := missing(name):
            raise InputError(reason)
    geometry = find_geometry(args)
    exact = None if args.no_error else reference_latents(geometry, default_device()[0])
    report = {"geometry": args.geometry, "vae_decode_s": measure_vae(geometry, args.repeats), "settings": {}}
    print(f"VAE decode of the clip: {report['vae_decode_s']:.3f} s", flush=True)
    for name in names:
        report["settings"][name] = measure(geometry, name, exact, args.repeats, not args.no_user)
        known = zip(COLUMNS.values(), cells(report["settings"][name]))
        print(f"{name}: " + ", ".join(f"{header} {cell}" for header, cell in known if cell), flush=True)
        write_report(args.output_folder / "benchmark.json", report)
    reference = str(geometry.reference_dtype).removeprefix("torch.")
    print(f"\n{machine_name()}, torch {torch.__version__}, {args.geometry} geometry\n")
    print(tables(report["settings"], reference))
    plot_seconds(report["settings"], args.output_folder / "benchmark.png")
    if exact is not None:
        compared = {name: result for name, result in report["settings"].items() if "error" in result}
        errors, gains = ({name: result[key] for name, result in compared.items()} for key in ("error", "gain"))
        plot_errors_by_block(errors, gains, args.output_folder / "benchmark_error.png")


if __name__ == "__main__":
    sys.exit(run(main))
