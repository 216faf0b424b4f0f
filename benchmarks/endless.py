"""Generate a long video with the small model, twelve prompts in turn: does anything change from the first minute to the last?

Prints, for the first round of the prompts and the last one, the process's memory, the seconds of a block (of the processor where
there is no GPU), and how many prompts the video follows in colour, shape, direction and background. Ends with an error where memory
or the block time has grown by more than a twentieth, or fewer prompts are right. Writes endless.json. ``--help`` lists the flags.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import checkout  # noqa: F401
import psutil
import torch
from common import OUTPUT_FOLDER
from torch import Tensor

from inferix.cli.figures import machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.video import FPS

sys.path.insert(1, str(checkout.ROOT / "example/demo_model"))
from score import load_pipeline, score  # noqa: E402
from world import SCENES, Scene  # noqa: E402

NUM_PROMPTS = 12
PROMPT_BLOCKS = 7
SETTLING_BLOCKS = 2
"""Blocks after a new prompt that are not scored."""
ROUND_BLOCKS = NUM_PROMPTS * PROMPT_BLOCKS
MAX_GROWTH = 0.05
RELATIVE = {"use_infinite_attention": True, "local_attn_size": 12, "sink_size": 3, "global_sink": True}
PROMPTS = [SCENES[number * len(SCENES) // NUM_PROMPTS + number % 3] for number in range(NUM_PROMPTS)]


def scenes() -> Iterator[Scene]:
    """Yield the scene of every block."""
    for number in count():
        yield PROMPTS[number // PROMPT_BLOCKS % NUM_PROMPTS]


def rounds(pieces: Iterator[Tensor], num_rounds: int) -> Iterator[dict]:
    """Yield the figures of every round of the prompts."""
    process, clock = psutil.Process(), time.perf_counter if torch.cuda.is_available() else time.process_time
    for number in range(num_rounds):
        megabytes, seconds, right = [], [], 0
        for scene in PROMPTS:
            frames = []
            for _ in range(PROMPT_BLOCKS):
                start = clock()
                frames.append(next(pieces)[0])
                seconds.append(clock() - start)
                megabytes.append(process.memory_info().rss / 1e6)
            right += all(score(torch.cat(frames[SETTLING_BLOCKS:]), scene).values())
        yield {
            "round": number,
            "mb": statistics.mean(megabytes),
            "block_s": statistics.median(seconds),
            "right": right,
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="of the video")
    parser.add_argument("--quant", choices=("none", "fp8", "int8"), default="fp8")
    parser.add_argument("--kv_cache_dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--relative_positions", action="store_true", help="LongLive's: 3 sink frames, a window of 12")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    args = parser.parse_args(argv)
    torch.compiler.set_stance("force_eager")
    pipeline = load_pipeline("self_forcing", args.quant, checkout.ROOT / "weights/demo")
    if args.relative_positions:
        pipeline.config = pipeline.pipeline.config = replace(pipeline.config, **RELATIVE)
    pipeline.pipeline.set_kv_cache_dtype(args.kv_cache_dtype)
    prompts = ([scene.prompt] for scene in scenes())
    pieces = pipeline.stream(prompts, None, pipeline.seeded(0))
    size = 4 * pipeline.config.num_frame_per_block
    report = []
    for figures in rounds(pieces, max(2, round(args.minutes * 60 * FPS / size / ROUND_BLOCKS))):
        report.append(figures)
        write_report(args.output_folder / "endless.json", {"rounds": report})
        print(", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    first, last = report[0], report[-1]
    rows = [
        [name, f"{figures['mb']:.0f}", f"{figures['block_s']:.3f}", f"{figures['right']} of {NUM_PROMPTS}"]
        for name, figures in (("first", first), ("last", last))
    ]
    print(f"\n{machine_name()}, torch {torch.__version__}, {len(report) * ROUND_BLOCKS} blocks\n")
    print(markdown_table(["minute", "MB", "s a block", "right"], rows))
    grown = [key for key in ("mb", "block_s") if last[key] > first[key] * (1 + MAX_GROWTH)]
    if grown or last["right"] < first["right"]:
        sys.exit(f"error: worse at the end: {', '.join(grown) or 'right'}")


if __name__ == "__main__":
    sys.exit(run(main))
