"""Measure the blocks of a long video: does any take longer than the others, and what does a new prompt cost?

Prints the milliseconds of the median and of the slowest block after the second, and of the first block under a new prompt, in
full precision and in 8 bits, decoding not included. ``--help`` lists the flags.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import GEOMETRIES, default_device, machine_name, markdown_table, random_prompt, write_report
from speed import SETTINGS, build

ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def block_seconds(geometry, setting, num_blocks: int, switch_at: int | None) -> list[float]:
    """Return the seconds of every block; from block ``switch_at`` on the prompt is another one."""
    device, dtype = default_device()
    pipeline = build(geometry, setting, device, dtype)
    size, shape = geometry.config.num_frame_per_block, geometry.config.image_or_video_shape
    first = random_prompt(geometry, device, dtype)
    prompts = iter([first if i < (switch_at or num_blocks) else first.flip(1) for i in range(num_blocks)])
    if switch_at is not None:
        second = first.flip(1)
        prompts = iter([first if i < switch_at else second for i in range(num_blocks)])
    generator = torch.Generator(device).manual_seed(0)
    noise = pipeline.draw(shape, generator)
    blocks = pipeline.denoise(noise, prompts, generator=generator, num_frames=num_blocks * size)
    seconds, start = [], time.perf_counter()
    for _ in blocks:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.3b" if torch.cuda.is_available() else "demo")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["bf16", "fp8+fp8kv"])
    parser.add_argument("--num_blocks", type=int, default=80)
    parser.add_argument("--relative_positions", action="store_true", help="LongLive's, with 3 sink frames and window 12")
    parser.add_argument("--output_folder", type=Path, default=ROOT / "outputs")
    args = parser.parse_args(argv)
    geometry = GEOMETRIES[args.geometry]
    if args.relative_positions:
        config = replace(geometry.config, use_infinite_attention=True, local_attn_size=12, sink_size=3, global_sink=True)
        geometry = replace(geometry, config=config)
    rows, report = [], {}
    for name in args.settings:
        torch._dynamo.reset()
        seconds = block_seconds(geometry, SETTINGS[name], args.num_blocks, args.num_blocks // 2)
        report[name] = seconds
        switch = seconds[args.num_blocks // 2]
        steady = seconds[2 : args.num_blocks // 2] + seconds[args.num_blocks // 2 + 1 :]
        full = statistics.median(seconds[len(seconds) // 4 :])
        rows.append([name, f"{1000 * full:.1f}", f"{1000 * max(steady):.1f}", f"{max(steady) / full:.2f}", f"{1000 * (switch - full):.1f}", f"{(switch - full) / full:.2f}", f"{seconds[0]:.2f}"])
        print(name, *rows[-1][1:], flush=True)
    write_report(args.output_folder / "long_video.json", {"geometry": args.geometry, "seconds": report})
    print(f"\n{machine_name()}, torch {torch.__version__}, {args.geometry}, {args.num_blocks} blocks\n")
    print(markdown_table(["setting", "median ms", "slowest ms", "ratio", "new prompt ms", "in blocks", "first block s"], rows))


if __name__ == "__main__":
    sys.exit(main())
