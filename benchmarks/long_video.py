"""Measure the blocks of a long video: does any take longer than the others, and what does a new prompt cost?

Prints the milliseconds of the median block at full window, of the slowest after the second, and of the first block under a new
prompt, which comes half-way; decoding is not included. Writes long_video.json. ``--help`` lists the flags.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace

import checkout  # noqa: F401
import torch
from common import Geometry, add_flags, default_device, find_geometry, random_prompt
from settings import SETTINGS, Setting, build, free_memory

from inferix.cli.figures import machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.errors import InputError

LONGLIVE = {"use_infinite_attention": True, "local_attn_size": 12, "sink_size": 3, "global_sink": True}
COLUMNS = ["setting", "median ms", "slowest ms", "ratio", "new prompt ms", "in blocks", "first block s"]


@torch.no_grad()
def block_seconds(geometry: Geometry, setting: Setting, num_blocks: int) -> list[float]:
    """Return the seconds of every block; from the middle one on the prompt is another one."""
    device, dtype = default_device()
    free_memory(device)
    pipeline = build(geometry, setting, device, dtype)
    first = random_prompt(geometry, device, dtype)
    second = first.flip(1)
    prompts = iter([first if number < num_blocks // 2 else second for number in range(num_blocks)])
    generator = torch.Generator(device).manual_seed(0)
    noise = pipeline.draw(geometry.config.image_or_video_shape, generator)
    num_frames = num_blocks * geometry.config.num_frame_per_block
    seconds, start = [], time.perf_counter()
    for _ in pipeline.denoise(noise, prompts, generator=generator, num_frames=num_frames):
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


def cells(seconds: list[float]) -> list[str]:
    """Return the columns of the table, but for the setting."""
    half = len(seconds) // 2
    steady = seconds[2:half] + seconds[half + 1 :]
    full, slowest = statistics.median(seconds[len(seconds) // 4 :]), max(steady)
    extra = seconds[half] - full
    milliseconds = [f"{1000 * full:.1f}", f"{1000 * slowest:.1f}", f"{slowest / full:.2f}"]
    return [*milliseconds, f"{1000 * extra:.1f}", f"{extra / full:.2f}", f"{seconds[0]:.2f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    ours = [name for name, setting in SETTINGS.items() if setting.package is None]
    parser.add_argument("--settings", nargs="+", choices=ours, default=["bf16", "fp8+fp8kv"])
    parser.add_argument("--num_blocks", type=int, default=80)
    parser.add_argument("--relative_positions", action="store_true", help="LongLive's: 3 sink frames, a window of 12")
    args = parser.parse_args(argv)
    if args.num_blocks < 6:
        raise InputError(f"--num_blocks must be at least 6, not {args.num_blocks}")
    geometry = find_geometry(args)
    if args.relative_positions:
        geometry = replace(geometry, config=replace(geometry.config, **LONGLIVE))
    rows, report = [], {}
    for name in args.settings:
        report[name] = block_seconds(geometry, SETTINGS[name], args.num_blocks)
        rows.append([name, *cells(report[name])])
        print(", ".join(f"{column} {cell}" for column, cell in zip(COLUMNS, rows[-1])), flush=True)
        write_report(args.output_folder / "long_video.json", {"geometry": args.geometry, "seconds": report})
    print(f"\n{machine_name()}, torch {torch.__version__}, {args.geometry}, {args.num_blocks} blocks\n")
    print(markdown_table(COLUMNS, rows))


if __name__ == "__main__":
    sys.exit(run(main))
