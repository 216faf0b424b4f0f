"""Seconds and memory to load the 1.3B transformer (random weights): bfloat16, quantized after loading, and saved in 8 bits.

    .venv/bin/python benchmarks/loading.py            # needs 8 GB of disk under TMPDIR, and 6 GB of memory

Each way is a process of its own that finds the file out of the page cache. Time and memory count from the end of the
imports until every weight has been read (on a GPU: is there). The peak is that of the process, files mapped included.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "example/quantization")]

import torch
from torch import nn

from dax.quant.quantization import load_quantized, save_quantized
from inferix.checkpoints.containers import load_checkpoint
from inferix.checkpoints.files import load_strict
from inferix.models.transformer import CausalWanTransformer, TransformerConfig
from quantization import quantize_transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("bfloat16", "bfloat16, then fp8", "saved fp8")


def empty() -> CausalWanTransformer:
    with torch.device("meta"):
        return CausalWanTransformer(TransformerConfig()).eval().requires_grad_(False)


def write(folder: Path) -> None:
    """Random weights, as a checkpoint in bfloat16 and as saved fp8."""
    model = empty().to(torch.bfloat16).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.02)
    torch.save({"generator": model.state_dict()}, folder / "checkpoint.pt")
    quantize_transformer(model)
    save_quantized(model, folder / "saved")


def load(way: str, folder: Path) -> nn.Module:
    model = empty()
    if way == "saved fp8":
        load_quantized(model, folder / "saved")
    else:
        load_strict(model, load_checkpoint(folder / "checkpoint.pt").state, folder)
    model.to(DEVICE, torch.bfloat16)
    if way == "bfloat16, then fp8":
        quantize_transformer(model)
    return model


def touch(model: nn.Module) -> int:
    """Read every weight. Returns their bytes."""
    tensors = list(model.state_dict().values())
    for tensor in tensors:
        tensor.view(torch.uint8).amax()
    return sum(tensor.nbytes for tensor in tensors)


def memory(key: str) -> int:
    """``VmRSS`` or ``VmHWM``, its peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(way: str, folder: Path) -> tuple[float, int, int, int]:
    """Seconds, bytes of the weights, bytes by which resident memory grew at its peak, and the GPU's peak."""
    gc.collect()
    before, start = memory("VmRSS"), time.perf_counter()
    size = touch(load(way, folder))
    seconds, grown = time.perf_counter() - start, memory("VmHWM") - before
    return seconds, size, grown, torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def main() -> None:
    if len(sys.argv) > 1:
        print(*measured(sys.argv[1], Path(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        print("| | weights GB | seconds | memory GB at the peak | GPU memory GB at the peak |\n|---|---|---|---|---|")
        for way in WAYS:
            for path in Path(folder).rglob("*.*t*"):
                with path.open("rb") as file:
                    os.fsync(file)
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            command = [sys.executable, __file__, way, folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            seconds, size, grown, gpu = map(float, output)
            print(f"| {way} | {size / 1e9:.2f} | {seconds:.1f} | {grown / 1e9:.2f} | {gpu / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
