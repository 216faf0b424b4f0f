"""What does a clip cost? Seconds and GPU memory by part, on one GPU or several, offloaded or not, with random weights.

    ./example/quantization/memory_benchmark.sh --settings full fp8 int8 low          # the README's table
    NPROC=2 ./example/quantization/memory_benchmark.sh --settings full fp8 --model causvid
    ./example/quantization/memory_benchmark.sh --settings low --limit_gb 7

Seconds are those of the clip's latents (seven blocks at the real geometry), a median after warm-up. Memory is the peak of
everything: prompt encoded by a UMT5-XXL, latents, frames. "Device" is what the whole device has in use, CUDA itself and
other programs included. Settings that end in "+offload" keep the cache in host memory.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import threading
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout runs without being installed

import torch
from inferix.pipelines.inference import CausalInferencePipeline
from run_benchmark import GEOMETRIES, Clock, Geometry, RandomBase, denoise_clip
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

import quantization
from inferix.cli.devices import parallel_config
from inferix.cli.main import run
from inferix.models.text_encoder import TextEncoder, load_tokenizer
from inferix.models.vae import StreamingDecoder
from inferix.runtime.memory import num_bytes
from run_self_forcing_quantized import quantize_transformer

SAMPLERS = {
    "self_forcing": {},
    "causvid": {"denoising_step_list": (1000, 757, 522), "warp_denoising_step": False, "timestep_shift": 8.0},
}

QUANTIZED = {
    "full": "",
    "fp8": "fp8",
    "int8": "int8",
    "fp8+fp8kv": "fp8",
    "full+offload": "",
    "fp8+offload": "fp8",
    "fp8+fp8kv+offload": "fp8",
    "low": "fp8",
}
"""Every setting, and what its weights are quantized to; "low" is --low_memory."""

UMT5 = {
    4096: UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    ),
    64: UMT5Config(
        vocab_size=256384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    ),
}
"""The text encoders, by the width of what they give."""


class WholeBase(RandomBase):
    """Random weights in the dtype that they are stored in, the text encoder's among them."""

    def __init__(self, geometry: Geometry, device: torch.device, dtype: torch.dtype):
        super().__init__(geometry, device)
        self.dtype = dtype

    def transformer(self):
        torch.set_default_dtype(self.dtype)
        try:
            return super().transformer()
        finally:
            torch.set_default_dtype(torch.float32)

    def text_encoder(self) -> TextEncoder:
        """In host memory, where a file's would be mapped; each block is filled on the device, which is faster."""
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5[self.geometry.transformer.text_dim]).to(self.dtype)
        for part in (model.shared, *model.encoder.block, model.encoder.final_layer_norm):
            part.to_empty(device=self.device)
            for weight in part.parameters():
                weight.data.normal_(std=0.02)
            part.to("cpu")
        model.encoder.embed_tokens = model.shared
        tokenizer = load_tokenizer(ROOT / "weights/demo/Wan2.1-T2V-demo/google/umt5-xxl")
        return TextEncoder(model, tokenizer, self.geometry.transformer.text_len)


class DevicePeak:
    """The most memory that was in use on the whole GPU while entered, sampled a hundred times a second."""

    def __init__(self, device: torch.device):
        self.device, self.bytes, self.over = device, 0, threading.Event()

    def __enter__(self) -> "DevicePeak":
        if self.device.type == "cuda":
            threading.Thread(target=self.sample, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()

    def sample(self) -> None:
        while not self.over.wait(0.01):
            free, total = torch.cuda.mem_get_info(self.device)
            self.bytes = max(self.bytes, total - free)


def build(geometry: Geometry, setting: str, device, dtype, sizes: tuple[int | None, int | None]):
    base = WholeBase(geometry, device, dtype)
    parallel = parallel_config(*sizes, geometry.transformer.num_heads)
    pipeline = CausalInferencePipeline(geometry.config, base, device, dtype, parallel, setting.endswith("+offload"))
    pipeline.to_device(low_memory=setting == "low")
    if QUANTIZED[setting]:
        quantize_transformer(pipeline.generator.model, QUANTIZED[setting])  # per token: no scale to be shared
        if setting == "low" and pipeline.leads:
            quantization.quantize_text_encoder(pipeline.text_encoder, QUANTIZED[setting])
    pipeline.set_kv_cache_dtype("fp8" if "fp8kv" in setting else "auto")
    return pipeline


@torch.no_grad()
def whole_clip(pipeline: CausalInferencePipeline) -> Tensor:
    """Prompt to frames, these dropped as they come; the latents [B, F, 16, h, w] on the CPU."""
    generator = torch.Generator(pipeline.device).manual_seed(0)
    embeds = pipeline.text_encoder(["A cat walks on the moon"])
    noise = pipeline.draw(pipeline.config.image_or_video_shape, generator)
    decode, latents = StreamingDecoder(pipeline.vae), []
    for block in pipeline.denoise(noise, embeds, generator=generator):
        decode(block).cpu()
        latents.append(block.cpu())
    return torch.cat(latents, dim=1)


def on_device(tensors, device: torch.device) -> float:
    """GB of those tensors that are there, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type
    }
    return sum(storages.values()) / 1e9


def measure(pipeline: CausalInferencePipeline, device_peak: int, repeats: int) -> dict[str, float]:
    """GB by part, and seconds, once a clip was made."""
    device, cuda = pipeline.device, pipeline.device.type == "cuda"
    cache, encoder, vae = pipeline.cache, pipeline.text_encoder.model, pipeline.vae
    stored = [cache.keys, cache.values] if hasattr(cache, "keys") else [*cache.windows, *cache.resident.values()]
    parts = {
        "transformer": num_bytes(pipeline.generator.model) / 1e9,
        "text encoder": on_device([*encoder.parameters(), *encoder.buffers()], device),
        "cache": on_device(stored, device),
        "VAE": on_device([*vae.model.parameters(), *vae.decoder.parameters()], device),
    }
    allocated = torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan
    reserved = torch.cuda.max_memory_reserved() / 1e9 if cuda else math.nan
    parts |= {"activations": allocated - sum(parts.values()), "peak": allocated, "reserved": reserved}
    parts["device"] = device_peak / 1e9
    text = pipeline.generator.model.config
    embeds = torch.randn(1, text.text_len, text.text_dim).to(device, pipeline.dtype)
    times = [denoise_clip(pipeline, embeds, Clock(device), decode=False)["clip_ms"] for _ in range(repeats)]
    return parts | {"clip s": statistics.median(times) / 1000, "fastest s": min(times) / 1000}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--geometry", choices=GEOMETRIES, default="real" if cuda else "demo")
    parser.add_argument("--settings", nargs="+", choices=QUANTIZED, default=["full", "fp8", "int8", "low"])
    parser.add_argument("--model", choices=SAMPLERS, default="self_forcing")
    parser.add_argument("--ulysses_size", type=int)
    parser.add_argument("--ring_size", type=int)
    parser.add_argument("--repeats", type=int, default=3, help="timed clips of each")
    parser.add_argument("--limit_gb", type=float, help="fail where PyTorch's allocator needs more")
    args = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    geometry = GEOMETRIES[args.geometry]
    geometry = replace(geometry, config=replace(geometry.config, **SAMPLERS[args.model]))
    local_rank = parallel_config(None, None, 1).local_rank
    device, dtype = (torch.device("cuda", local_rank), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    if cuda:
        torch.cuda.set_device(device)
        if args.limit_gb:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(args.limit_gb * 1e9 / total, device)
    clips: dict[str, Tensor] = {}
    for setting in args.settings:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with DevicePeak(device) as peak:
            pipeline = build(geometry, setting, device, dtype, (args.ulysses_size, args.ring_size))
            clip = whole_clip(pipeline) if pipeline.leads else None
        if pipeline.leads:
            figures, clips[setting] = measure(pipeline, peak.bytes, args.repeats), clip
            print(
                args.model, setting, json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True
            )
            if setting.removesuffix("+offload") in clips and setting.endswith("+offload"):
                same = torch.equal(clips[setting], clips[setting.removesuffix("+offload")])
                print(f"{setting}: latents {'the same to the bit' if same else 'DIFFER'}", flush=True)
            if pipeline.parallel:
                pipeline.parallel.close()
        else:
            pipeline.follow()
        del pipeline
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(run(main))
