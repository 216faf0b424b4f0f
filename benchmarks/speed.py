"""How fast is it? Self-Forcing with random weights at the real geometry (or the demo's), in every precision, in one run.

Prints a table and writes benchmark.json and benchmark.png. Times are medians of CUDA events after warm-up, with the
spread; text embeddings are given. ``--help`` lists the flags.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a checkout runs without being installed

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from benchmark_peers import block_figures, measure_flashdreams, quantize_with_torchao
from inferix.cli.main import run
from inferix.runtime.memory import num_bytes
from inferix.config import PipelineConfig
from inferix.errors import InputError
from inferix.models.attention import attention
from inferix.models.transformer import CausalWanTransformer, TransformerConfig
from inferix.models.vae import StreamingDecoder, WanVAE
from inferix.pipelines.inference import CausalInferencePipeline
from run_self_forcing_quantized import quantize_transformer

SAMPLER = {"denoising_step_list": (1000, 750, 500, 250), "warp_denoising_step": True, "timestep_shift": 5.0}


@dataclass(frozen=True)
class Geometry:
    transformer: TransformerConfig
    vae_base_dim: int
    config: PipelineConfig


GEOMETRIES = {
    "real": Geometry(TransformerConfig(), 96, PipelineConfig(**SAMPLER)),
    "demo": Geometry(
        TransformerConfig(dim=128, ffn_dim=512, freq_dim=128, text_dim=64, text_len=64, num_heads=4, num_layers=6),
        8,
        PipelineConfig(**SAMPLER, image_or_video_shape=(1, 21, 16, 16, 16)),
    ),
}

Setting = tuple[str, str, str, str]  # name, quantized by, granularity, key-value cache
SETTINGS: dict[str, Setting] = {
    name: (name, *rest)
    for name, *rest in (
        ("full", "", "", "auto"),
        ("fp8", "fp8", "per_token", "auto"),
        ("fp8+fp8kv", "fp8", "per_token", "fp8"),
        ("int8", "int8", "per_token", "auto"),
        ("fp8-tensor", "fp8", "per_tensor", "auto"),
        ("int8-tensor", "int8", "per_tensor", "auto"),
        ("torchao-fp8", "torchao", "per_token", "auto"),
        ("flashdreams", "flashdreams", "", ""),
    )
}

PEERS = ("torchao", "flashdreams")
"""What quantizes, or is, another library's: the names of their packages."""


def missing(setting: str) -> str | None:
    """Why a setting cannot be run here; None if it can."""
    _, package, *_ = SETTINGS[setting]
    if package not in PEERS:
        return None
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install {package}, or leave {setting} out of --settings"
    if not torch.cuda.is_available():
        return f"{setting} is measured on a GPU alone; leave it out of --settings"
    return None


class RandomBase:
    """A base model of random weights, of the sizes of a real one."""

    def __init__(self, geometry: Geometry, device: torch.device):
        self.geometry, self.device = geometry, device

    def transformer(self) -> CausalWanTransformer:
        torch.manual_seed(0)
        with self.device:
            model = CausalWanTransformer(self.geometry.transformer)
        for name, weight in model.named_parameters():
            if name.endswith("scale_shift_table"):
                weight.data.normal_(std=0.2)
        return model.eval().requires_grad_(False)

    def vae(self) -> WanVAE:
        torch.manual_seed(0)
        return WanVAE(AutoencoderKLWan(base_dim=self.geometry.vae_base_dim))

    def text_encoder(self) -> None:
        return None


class Clock:
    """Milliseconds between points on the device's own time line."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)


def build(geometry: Geometry, setting: Setting, device: torch.device, dtype: torch.dtype) -> CausalInferencePipeline:
    _, quantized, granularity, kv_cache = setting
    pipeline = CausalInferencePipeline(geometry.config, RandomBase(geometry, device), device, dtype)
    pipeline.to_device()
    pipeline.set_kv_cache_dtype(kv_cache)
    transformer = pipeline.generator.model
    if quantized == "torchao":
        quantize_with_torchao(transformer)
    elif quantized:
        quantize_transformer(transformer, quantized, granularity)
    return pipeline


@torch.no_grad()
def denoise_clip(pipeline: CausalInferencePipeline, embeds: Tensor, clock: Clock, decode: bool) -> dict[str, float]:
    """Milliseconds of one clip and, where it is decoded too, those to its first frames."""
    generator = torch.Generator(pipeline.device).manual_seed(0)
    noise = pipeline.draw(pipeline.config.image_or_video_shape, generator)
    decoder, start, first = StreamingDecoder(pipeline.vae), clock.now(), None
    for block in pipeline.denoise(noise, embeds, generator=generator):
        if decode:
            decoder(block)
            first = first or clock.now()
    result = {"clip_ms": clock.between(start, clock.now())}
    return result | {"first_frames_ms": clock.between(start, first)} if decode else result


@torch.no_grad()
def time_blocks(pipeline: CausalInferencePipeline, clock: Clock, repeats: int) -> list[list[float]]:
    """Milliseconds of one block, four denoising steps and a cache update, at each place in the window, run by run."""
    batch, frames, channels, height, width = pipeline.config.image_or_video_shape
    size = pipeline.config.num_frame_per_block
    pipeline.generator.prepare()
    cache = pipeline.empty_cache(batch, frames, height * width // 4)
    model, times = pipeline.generator.model, []
    for start in range(0, frames, size):
        cache.place(start, size)
        rope = model.rope(torch.arange(start, start + size, device=pipeline.device), height, width)
        noise = pipeline.randn((batch, size, channels, height, width), None)

        def block():
            x0 = pipeline.denoise_block(noise, rope, cache, None)
            pipeline.generator.flow(x0, pipeline.config.context_noise, rope, cache)

        times.append(repeat(block, clock, repeats))
    return times


def repeat(function, clock: Clock, times: int) -> list[float]:
    """Milliseconds of each call, after one that is not counted."""
    function()
    result = []
    for _ in range(times):
        start = clock.now()
        function()
        result.append(clock.between(start, clock.now()))
    return result


class PlainCache:
    """What a cache holds of earlier frames, for a forward in float32 with attention as PyTorch has it."""

    def __init__(self, cache, text: list[tuple[Tensor, Tensor]]):
        self.cache, self.text, self.past = cache, text, cache.slots[0]

    def room(self, layer: int) -> list[Tensor]:
        self.q, *self.new = new = [torch.empty_like(room, dtype=torch.float32) for room in self.cache.room(layer)]
        return new

    def attend(self, layer: int) -> Tensor:
        stored = (self.cache.keys[layer], self.cache.values[layer])
        past = [tensor[:, : self.past].flatten(1, 2).float() for tensor in stored]
        return attention(self.q, *(torch.cat(pair, dim=1) for pair in zip(past, self.new)))


@torch.no_grad()
def fidelity(pipeline: CausalInferencePipeline, reference: CausalWanTransformer, embeds: Tensor) -> float:
    """Cosine between the fast path's flow and a plain float32 forward's, on the same input, at full window."""
    cache, config = pipeline.cache, pipeline.config
    _, frames, channels, height, width = config.image_or_video_shape
    size = config.num_frame_per_block
    start = frames - size
    cache.place(start, size)
    rope = reference.rope(torch.arange(start, frames, device=pipeline.device), height, width)
    latents = pipeline.randn((1, size, channels, height, width), torch.Generator(pipeline.device).manual_seed(1))
    fast = pipeline.generator.flow(latents, 500.0, rope, cache).float().clone()
    plain = PlainCache(cache, reference.embed_text(embeds.float()))
    exact = reference(latents.float(), torch.full((1, size), 500.0, device=pipeline.device), rope, plain)
    return torch.nn.functional.cosine_similarity(fast.flatten(), exact.flatten(), dim=0).item()


def measure(geometry: Geometry, setting: Setting, device: torch.device, dtype: torch.dtype, repeats: int) -> dict:
    """All figures of one setting."""
    clock, cuda = Clock(device), device.type == "cuda"
    if cuda:
        gc.collect()  # the setting before holds on to itself: a compiled model refers to what was compiled of it
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if setting[0] == "flashdreams":
        return measure_flashdreams(geometry.transformer, geometry.config, device, dtype, clock, repeats)
    text = geometry.transformer
    embeds = torch.randn(1, text.text_len, text.text_dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    began = time.perf_counter()
    pipeline = build(geometry, setting, device, dtype)
    denoise_clip(pipeline, embeds, clock, decode=True)
    if cuda:
        torch.cuda.synchronize()
    cold = time.perf_counter() - began
    clips = [denoise_clip(pipeline, embeds, clock, decode=False)["clip_ms"] for _ in range(repeats)]
    blocks = time_blocks(pipeline, clock, repeats)
    whole = [denoise_clip(pipeline, embeds, clock, decode=True) for _ in range(repeats)]
    frames = 4 * (geometry.config.image_or_video_shape[1] - 1) + 1
    total = statistics.median(run["clip_ms"] for run in whole)
    result = {
        "weights_gb": num_bytes(pipeline.generator.model) / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan"),
        "cold_start_s": cold,
        **block_figures(blocks),
        "clip_s": statistics.median(clips) / 1000,
        "clip_spread_s": [min(clips) / 1000, max(clips) / 1000],
        "first_frames_ms": statistics.median(run["first_frames_ms"] for run in whole),
        "end_to_end_s": total / 1000,
        "fps": frames / total * 1000,
    }
    reference = RandomBase(geometry, device).transformer().to(device)
    return result | {"cosine": fidelity(pipeline, reference, embeds)}


@torch.no_grad()
def measure_vae(geometry: Geometry, device: torch.device, dtype: torch.dtype, repeats: int) -> dict:
    """Seconds to decode the clip of 81 frames, block after block."""
    vae = RandomBase(geometry, device).vae().to(device, dtype)
    latents = torch.randn(geometry.config.image_or_video_shape, device=device, dtype=dtype)

    def decode():
        decoder = StreamingDecoder(vae)
        for block in latents.split(geometry.config.num_frame_per_block, dim=1):
            decoder(block)

    decode()
    times = repeat(decode, Clock(device), repeats)
    return {"vae_decode_s": statistics.median(times) / 1000, "spread_s": [min(times) / 1000, max(times) / 1000]}


COLUMNS = {
    "weights_gb": "weights GB",
    "peak_gb": "peak GB",
    "cold_start_s": "cold start s",
    "seven_blocks_s": "7 blocks s",
    "full_window_block_ms": "full-window block ms",
    "first_frames_ms": "first frames ms",
    "end_to_end_s": "end to end s",
    "fps": "fps",
    "cosine": "cosine",
}


def cell(setting: str, key: str, value: float) -> str:
    """A figure as text; a cosine that is too far from 1 says so."""
    if key != "cosine":
        return f"{value:.4g}"
    return f"{value:.4f}" + ("" if value >= (0.999 if setting == "full" else 0.995) else " TOO LOW")


def table(columns: list[str], rows: dict[str, list[str]]) -> str:
    """As Markdown."""
    lines = [["setting", *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def tables(results: dict[str, dict]) -> str:
    """All figures; then the milliseconds of each block, and those of its fastest and slowest run."""
    figures, blocks = {}, {}
    for name, result in results.items():
        figures[name] = [cell(name, key, result[key]) if key in result else "" for key in COLUMNS]
        spreads = zip(result["block_ms"], result["block_spread_ms"])
        blocks[name] = [f"{median:.1f} ({low:.1f}–{high:.1f})" for median, (low, high) in spreads]
    columns = [f"block {i} ms" for i in range(len(next(iter(blocks.values()))))]
    return table(list(COLUMNS.values()), figures) + "\n\n" + table(columns, blocks)


def plot(results: dict[str, dict], path: Path) -> None:
    """Bars: seconds of the 7 blocks, and end to end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(results) + 1.5), layout="constrained")
    for offset, key, label in (
        (0.2, "seven_blocks_s", "transformer, 7 blocks"),
        (-0.2, "end_to_end_s", "with VAE decode"),
    ):
        known = {i - offset: result[key] for i, result in enumerate(results.values()) if key in result}
        bars = axes.barh(list(known), list(known.values()), 0.38, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(results)), results)
    axes.invert_yaxis()
    axes.set_xlabel("seconds for 81 frames (less is better)")
    axes.margins(x=0.1)  # room for the numbers
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--geometry", choices=GEOMETRIES, default="real" if cuda else "demo")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=[name for name in SETTINGS if not missing(name)]
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--output_folder", type=Path, default=ROOT / "outputs")
    args = parser.parse_args(argv)
    for name in args.settings:
        if reason := missing(name):
            raise InputError(reason)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    geometry = GEOMETRIES[args.geometry]
    torch.set_grad_enabled(False)

    results = {}
    vae = measure_vae(geometry, device, dtype, args.repeats)
    print(f"VAE decode of the clip: {vae['vae_decode_s']:.3f} s", flush=True)
    for name in args.settings:
        results[name] = measure(geometry, SETTINGS[name], device, dtype, args.repeats)
        print(name, json.dumps(results[name]), flush=True)
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{machine}, torch {torch.__version__}, {args.geometry} geometry\n\n{tables(results)}")
    args.output_folder.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine,
        "torch": torch.__version__,
        "geometry": args.geometry,
        "vae": vae,
        "settings": results,
    }
    (args.output_folder / "benchmark.json").write_text(json.dumps(report, indent=1))
    plot(results, args.output_folder / "benchmark.png")


if __name__ == "__main__":
    sys.exit(run(main))
