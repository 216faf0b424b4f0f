"""Measure seconds and memory to load a transformer of random weights: bfloat16, quantized after loading, saved in 8 bits.

Each way is a process of its own that finds the file out of the page cache. Time and memory count from the end of the imports
until every weight has been read (on a GPU: is there). The peak is that of the process, mapped files included. The 1.3B model
needs 8 GB of disk under TMPDIR and 6 GB of memory. Prints a Markdown table and writes loading.json.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import checkout  # noqa: F401
import torch
from common import GEOMETRIES, OUTPUT_FOLDER, Geometry, RandomCheckpoint, default_device
from torch import nn

from dax.quant.quantization import load_quantized, save_quantized
from inferix.checkpoints.containers import load_checkpoint
from inferix.checkpoints.files import load_strict
from inferix.cli.figures import machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.cli.report import format_bytes
from inferix.models.transformer import CausalWanTransformer
from quantization import quantize_transformer

WAYS = ("bfloat16", "bfloat16, then fp8", "saved fp8")


def empty(geometry: Geometry) -> CausalWanTransformer:
    """Return a transformer on the meta device."""
    with torch.device("meta"):
        return CausalWanTransformer(geometry.transformer).eval().requires_grad_(False)


def write(geometry: Geometry, folder: Path) -> None:
    """Write random weights, as a checkpoint in bfloat16 and as saved fp8."""
    model = RandomCheckpoint(geometry, torch.device("cpu"), torch.bfloat16).transformer()
    torch.save({"generator": model.state_dict()}, folder / "checkpoint.pt")
    quantize_transformer(model)
    save_quantized(model, folder / "saved")


def load(geometry: Geometry, way: str, folder: Path, device: torch.device) -> nn.Module:
    """Return a transformer with the weights in ``folder``, on ``device``."""
    model = empty(geometry)
    if way == "saved fp8":
        load_quantized(model, folder / "saved")
    else:
        load_strict(model, load_checkpoint(folder / "checkpoint.pt").state, folder)
    model.to(device, torch.bfloat16)
    if way == "bfloat16, then fp8":
        quantize_transformer(model)
    return model


def read_all(model: nn.Module) -> int:
    """Read every weight; return their bytes."""
    tensors = list(model.state_dict().values())
    for tensor in tensors:
        tensor.view(torch.uint8).amax()
    return sum(tensor.nbytes for tensor in tensors)


def process_bytes(key: str) -> int:
    """Return this process's resident memory, ``VmRSS``, or its peak, ``VmHWM`` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(geometry: Geometry, way: str, folder: Path) -> dict[str, float]:
    """Load in this process; return the seconds and the bytes: of the weights, by which the process grew, on the GPU."""
    device, _ = default_device()
    gc.collect()
    before, start = process_bytes("VmRSS"), time.perf_counter()
    weights = read_all(load(geometry, way, folder, device))
    result = {"seconds": time.perf_counter() - start, "weights": weights}
    result["peak"] = process_bytes("VmHWM") - before
    if device.type == "cuda":
        result["gpu_peak"] = torch.cuda.max_memory_allocated()
    return result


def drop_from_page_cache(folder: Path) -> None:
    """Write the files in ``folder`` to disk and let go of their pages."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return the figures of every way as Markdown."""
    columns = {"weights": "weights", "peak": "peak memory", "gpu_peak": "peak memory of the GPU"}
    columns = {key: column for key, column in columns.items() if all(key in result for result in results.values())}
    rows = [
        [way, f"{result['seconds']:.1f}", *(format_bytes(result[key]) for key in columns)]
        for way, result in results.items()
    ]
    return markdown_table(["way", "seconds", *columns.values()], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.3b")
    parser.add_argument("--output_folder", type=Path, default=OUTPUT_FOLDER)
    parser.add_argument("--way", choices=WAYS, help="measure this way alone, in this process, from --weights_folder")
    parser.add_argument("--weights_folder", type=Path, help="holds checkpoint.pt and saved/")
    args = parser.parse_args(argv)
    geometry = GEOMETRIES[args.geometry]
    if args.way:
        print(json.dumps(measure(geometry, args.way, args.weights_folder)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write(geometry, Path(folder))
        for way in WAYS:
            drop_from_page_cache(Path(folder))
            command = [sys.executable, __file__, "--geometry", args.geometry, "--way", way, "--weights_folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[way] = json.loads(output)
            write_report(args.output_folder / "loading.json", {"geometry": args.geometry, "ways": results})
            print(f"{way}: {results[way]['seconds']:.1f} s", flush=True)
    print(f"\n{machine_name()}, {args.geometry}\n\n{table(results)}")


if __name__ == "__main__":
    sys.exit(run(main))
