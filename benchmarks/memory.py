"""Measure what a clip costs, seconds and GPU memory by part, on one GPU or several, offloaded or not, with random weights.

    ./benchmarks/memory_benchmark.sh --settings bf16 fp8 int8 low
    NPROC=2 ./benchmarks/memory_benchmark.sh --settings bf16 fp8 --model causvid
    ./benchmarks/memory_benchmark.sh --settings low --limit_gb 7

Seconds are those of the clip's latents (seven blocks), a median after warm-up. Memory is the peak of everything: prompt
encoded by a UMT5-XXL, latents, frames; of the first GPU. "Device" is what the whole device has in use, CUDA itself and other
programs included. Settings that end in "+offload" keep the cache in host memory; "low" is --low_memory. Prints a Markdown
table and writes memory.json.
"""

import argparse
import sys
import threading
from collections.abc import Iterable

import checkout  # noqa: F401
import torch
from common import (
    ROOT,
    Clock,
    Geometry,
    RandomCheckpoint,
    add_flags,
    clip_latents,
    find_geometry,
    median_seconds,
    random_prompt,
    repeat,
)
from settings import FP8, SETTINGS, Setting, build, denoise_clip, free_memory
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from inferix.cli.devices import parallel_config
from inferix.cli.figures import machine_name, markdown_table, write_report
from inferix.cli.main import run
from inferix.cli.report import format_bytes
from inferix.config import ParallelConfig
from inferix.models.text_encoder import TextEncoder
from inferix.models.tokenizer import PromptTokenizer
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.runtime.memory import num_bytes
from quantization import quantize_text_encoder

SETTINGS = {name: setting for name, setting in SETTINGS.items() if setting.package is None} | {
    "bf16+offload": Setting(offload=True),
    "fp8+offload": Setting(FP8, offload=True),
    "low": Setting(FP8, low_memory=True),
}
TEXT_ENCODERS = {
    4096: UMT5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
    64: UMT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"),
}
"""By the width of their embeddings: UMT5-XXL, and one for the demo's size."""
VOCABULARY_SIZE = 256384
PROMPT = "A cat walks on the moon"


class CheckpointWithText(RandomCheckpoint):
    """``RandomCheckpoint`` with a text encoder, in host memory, where that of a file would be mapped."""

    def text_encoder(self) -> TextEncoder:
        config = TEXT_ENCODERS[self.geometry.transformer.text_dim]
        config.vocab_size = VOCABULARY_SIZE
        with torch.device("meta"):
            model = UMT5EncoderModel(config).to(self.dtype)
        for part in (model.shared, *model.encoder.block, model.encoder.final_layer_norm):
            part.to_empty(device=self.device)  # filled on the device, which is faster
            for weight in part.parameters():
                weight.data.normal_(std=0.02)
            part.to("cpu")
        model.encoder.embed_tokens = model.shared
        folder = ROOT / "weights/demo/Wan2.1-T2V-demo/google/umt5-xxl"
        return TextEncoder(model, PromptTokenizer(folder, self.geometry.transformer.text_len))


class DevicePeak:
    """The most memory in use on the whole GPU while entered, sampled a hundred times a second."""

    def __init__(self, device: torch.device):
        self.device, self.bytes, self.ended = device, 0, threading.Event()

    def __enter__(self) -> "DevicePeak":
        if self.device.type == "cuda":
            threading.Thread(target=self.sample, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()

    def sample(self) -> None:
        while not self.ended.wait(0.01):
            free, total = torch.cuda.mem_get_info(self.device)
            self.bytes = max(self.bytes, total - free)


@torch.no_grad()
def prompt_to_frames(pipeline: CausalInferencePipeline) -> None:
    """Generate a clip as the scripts do, and drop its frames."""
    generator = torch.Generator(pipeline.device).manual_seed(0)
    embeds = pipeline.text_encoder([PROMPT])
    noise = pipeline.draw(pipeline.config.image_or_video_shape, generator)
    decode = pipeline.vae.streaming_decoder()
    for block in pipeline.denoise(noise, embeds, generator=generator):
        decode(block).cpu()


def bytes_on_device(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes of those tensors that are on the device, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory_by_part(pipeline: CausalInferencePipeline, device_peak: int) -> dict[str, int]:
    """Return the bytes on the device by part, once a clip was generated; the peaks on a GPU alone."""
    cache, encoder, vae = pipeline.kv_cache, pipeline.text_encoder.model, pipeline.vae
    if pipeline.enable_kv_offload:
        cached = [tensor for pair in (*cache.resident.values(), *cache.staging_buffers) for tensor in pair]
    else:
        cached = [cache.keys, cache.values]
    parts = {
        "transformer": num_bytes(pipeline.generator.model),
        "text encoder": bytes_on_device([*encoder.parameters(), *encoder.buffers()], pipeline.device),
        "cache": bytes_on_device(cached, pipeline.device),
        "VAE": bytes_on_device([p for m in (vae.decoder, vae.model) if m for p in m.parameters()], pipeline.device),
    }
    if pipeline.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        parts |= {"activations": peak - sum(parts.values()), "peak": peak}
        parts |= {"reserved": torch.cuda.max_memory_reserved(), "device": device_peak}
    return parts


def measure(
    geometry: Geometry,
    setting: Setting,
    parallel: ParallelConfig,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> tuple[dict, list[Tensor]]:
    """Return the figures of a setting and a clip's latents by block; {} and [] on ranks that take part only."""
    free_memory(device)
    with DevicePeak(device) as peak:
        pipeline = build(geometry, setting, device, dtype, parallel, CheckpointWithText)
        if not pipeline.is_main_process:
            pipeline.worker_loop()
            return {}, []
        if setting.low_memory:
            quantize_text_encoder(pipeline.text_encoder, "fp8")
        prompt_to_frames(pipeline)
    parts = memory_by_part(pipeline, peak.bytes)
    embeds = random_prompt(geometry, device, dtype)
    times = repeat(lambda: denoise_clip(pipeline, embeds), Clock(device), repeats)
    latents = clip_latents(pipeline, embeds)
    if pipeline.context_parallel is not None:
        pipeline.context_parallel.close()
    return {"bytes": parts, "clip_s": median_seconds(times), "fastest_s": min(times) / 1000}, latents


def check_offload(name: str, latents: dict[str, list[Tensor]]) -> None:
    """Say whether an offloaded cache gave the same latents, to the bit, as the setting without."""
    kept = latents.get(name.removesuffix("+offload"))
    if name.endswith("+offload") and kept is not None:
        same = all(map(torch.equal, kept, latents[name]))
        print(f"{name}: latents {'the same to the bit' if same else 'DIFFER'}", flush=True)


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["bf16", "fp8", "int8", "low"])
    parser.add_argument("--ulysses_size", type=int)
    parser.add_argument("--ring_size", type=int)
    parser.add_argument("--limit_gb", type=float, help="fail where PyTorch's allocator needs more")
    args = parser.parse_args(argv)
    geometry = find_geometry(args)
    parallel = parallel_config(args.ulysses_size, args.ring_size, geometry.transformer.num_heads)
    device, dtype = torch.device("cpu"), torch.float32
    if cuda:
        device, dtype = torch.device("cuda", parallel.local_rank), torch.bfloat16
        torch.cuda.set_device(device)
        if args.limit_gb:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.limit_gb * 1e9 / total, device)
    results, latents = {}, {}
    for name in args.settings:
        figures, latents[name] = measure(geometry, SETTINGS[name], parallel, device, dtype, args.repeats)
        if figures:
            results[name] = figures
            parts = ", ".join(f"{part} {format_bytes(size)}" for part, size in figures["bytes"].items())
            print(f"{name}: clip {figures['clip_s']:.3f} s, {parts}", flush=True)
            check_offload(name, latents)
            report = {"geometry": args.geometry, "model": args.model, "processes": parallel.world_size}
            write_report(args.output_folder / "memory.json", report | {"settings": results})
    if results:
        parts = list(next(iter(results.values()))["bytes"])
        rows = [
            [name, *(format_bytes(figures["bytes"][part]) for part in parts), f"{figures['clip_s']:.3f}"]
            for name, figures in results.items()
        ]
        print(f"\n{parallel.world_size} x {machine_name()}, {args.geometry}, {args.model}\n")
        print(markdown_table(["setting", *parts, "clip s"], rows))


if __name__ == "__main__":
    sys.exit(run(main))
