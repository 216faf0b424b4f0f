"""Less memory, the same video: the cache in host memory, the text encoder block by block, videos longer than a clip."""

import ctypes
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, SELF_FORCING, small_config
from forks import run_ranks

from inferix import CausVidPipeline, SelfForcingPipeline
from inferix.cli.devices import gpu_memory
from inferix.cli.figures import relative_error_and_gain as relative_error
from inferix.models.attention import FP8
from inferix.models.config import TransformerConfig
from inferix.models.kv_cache import KVCache, WindowConfig
from inferix.models.kv_offload import OffloadedKVCache
from inferix.models.transformer import CausalWanTransformer
from quantization import quantize_text_encoder

CONFIG = TransformerConfig(dim=96, ffn_dim=192, freq_dim=64, text_dim=32, text_len=16, num_heads=2, num_layers=6)
PROMPT = "A red cat walks on the moon"


def new_cache(kind: type[KVCache], dtype: torch.dtype, batch: int, num_layers: int = 6) -> KVCache:
    window = WindowConfig(num_frames=7, sink_size=1)
    return kind(num_layers, (batch, 7, 24, 2, 48), window, torch.device("cpu"), dtype, torch.float32)


def flows(kind: type[KVCache], dtype: torch.dtype, batch: int) -> list[torch.Tensor]:
    """Return what the model predicts for six blocks, each run twice, in a window of seven frames, the first one a sink."""
    torch.manual_seed(0)
    model = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
    for table in (block.scale_shift_table for block in model.blocks):
        table.normal_(std=0.3)
    cache, text = new_cache(kind, dtype, batch), model.embed_text(torch.randn(batch, 16, 32))
    results = []
    for start in (0, 1, 4, 7, 10, 13):
        frames = range(start, start + (3 if start else 1))
        cache.set_positions(frames)
        for timestep in (500.0, 0.0):
            latents = torch.randn(batch, len(frames), 16, 8, 12)
            rotary_emb = model.rotary_emb(frames, 8, 12)
            results.append(model(latents, torch.full((batch, 1), timestep), rotary_emb, text, cache))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_an_offloaded_cache_changes_not_a_bit(dtype, batch):
    for here, there in zip(flows(KVCache, dtype, batch), flows(OffloadedKVCache, dtype, batch)):
        assert torch.equal(here, there)


def test_an_offloaded_cache_keeps_few_layers_on_the_device():
    cache = new_cache(OffloadedKVCache, torch.bfloat16, 1, num_layers=30)
    pairs = (*cache.staging_buffers, *cache.resident.values())
    on_device = sum(tensor.nbytes for pair in pairs for tensor in pair)
    whole = new_cache(KVCache, torch.bfloat16, 1, num_layers=30)
    assert on_device * 30 == (whole.keys.nbytes + whole.values.nbytes) * 4


def pipeline(folder: Path, low_memory: bool = False, **changes: str) -> SelfForcingPipeline:
    config = small_config("self_forcing/configs/self_forcing_dmd", folder, **changes)
    built = SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu")
    built.load_checkpoint(SELF_FORCING, use_ema=True)
    built.setup_devices(low_memory)
    return built


def test_low_memory(tmp_path, self_forcing):
    small = pipeline(tmp_path, low_memory=True)
    embeds = self_forcing.pipeline.text_encoder([PROMPT])
    assert torch.equal(small.pipeline.text_encoder([PROMPT]), embeds)
    video = small.generate([PROMPT], 9, torch.Generator().manual_seed(0))
    assert isinstance(small.pipeline.kv_cache, OffloadedKVCache) and small.pipeline.kv_cache.dtype == FP8
    usual = self_forcing.generate([PROMPT], 9, torch.Generator().manual_seed(0))
    error, gain = relative_error(video, usual)
    assert error < 0.05 and abs(gain - 1) < 0.005
    quantize_text_encoder(small.pipeline.text_encoder, "int8")
    blocks = small.pipeline.text_encoder.model.encoder.block
    assert not any(type(module) is torch.nn.Linear for module in blocks.modules())
    quantized = small.pipeline.text_encoder([PROMPT])
    assert relative_error(quantized, embeds)[0] < 0.1
    assert not torch.equal(quantized, embeds)


def test_the_estimate_counts_what_stays(tmp_path):
    ours = pipeline(tmp_path).pipeline
    whole, small = (gpu_memory(ours, low) for low in (False, True))
    model = ours.generator.model
    assert whole["transformer"] == sum(weight.nbytes for weight in model.parameters())
    assert whole["key-value cache"] == 2 * 2 * 9 * 24 * 96 * 4  # keys and values, layers, frames, tokens, dim, bytes
    assert small["text encoder"] < whole["text encoder"] and small["VAE's activations"] < whole["VAE's activations"]


def test_a_long_video_begins_as_a_short_one_and_sees_a_window(tmp_path):
    usual = pipeline(tmp_path)
    clip, long = (usual.generate([PROMPT], frames, torch.Generator().manual_seed(0)) for frames in (9, 18))
    assert long.shape[1] == 69 and usual.pipeline.kv_cache.window.num_frames == 9
    torch.testing.assert_close(long[:, :33], clip)
    rolling = pipeline(tmp_path, local_attn_size="6", sink_size="1")
    rolled = rolling.generate([PROMPT], 18, torch.Generator().manual_seed(0))
    assert rolling.pipeline.kv_cache.window == WindowConfig(6, 1)
    torch.testing.assert_close(rolled[:, :21], long[:, :21])
    assert not torch.allclose(rolled[:, 21:33], long[:, 21:33], atol=1e-3)  # the third block sees no more than six


M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Parameters of glibc's mallopt (malloc.h)."""


def peaks_of_a_stream(
    num_blocks: int, pipeline: SelfForcingPipeline | CausVidPipeline, *prompts: object, **length: int
) -> list[int]:
    """Return the peak of this process, in bytes, when the window is full and at the video's 20th block of ``num_blocks``."""
    pipeline.setup_devices()
    peaks, generator = [], torch.Generator().manual_seed(0)
    for number, _ in enumerate(pipeline.stream(*prompts, **length, generator=generator), start=1):
        if number == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        if number in (6, 20):
            lines = Path("/proc/self/status").read_text().splitlines()
            peaks += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    assert number == num_blocks
    return peaks


def stream(config: Path, causvid_config: Path) -> list[list[int]]:
    """Return the peaks of Self-Forcing and of CausVid."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_THRESHOLD, 65536) and libc.mallopt(M_ARENA_MAX, 2)  # freed memory goes back at once
    self_forcing = SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu")
    self_forcing.load_checkpoint(SELF_FORCING, use_ema=True)
    peaks = [peaks_of_a_stream(20, self_forcing, ["A cat"], num_output_frames=60)]
    causvid = CausVidPipeline(causvid_config, wan_base_model_path=BASE, device="cpu")
    causvid.load_checkpoint(CAUSVID)
    return [*peaks, peaks_of_a_stream(21, causvid, "A cat", num_rollout=10, num_frames=9)]


def test_memory_does_not_grow_with_the_length(tmp_path):
    """The peak of a process when the window is full and at the video's end; the frames in between are 6 MB."""
    names = ("self_forcing/configs/self_forcing_dmd", "causvid/configs/causvid")
    configs = [small_config(name, tmp_path, image_or_video_shape="[1, 9, 16, 8, 6]") for name in names]
    (process,) = run_ranks(1, stream, *configs)
    for full_window, end in process.value:
        assert end - full_window < 3e6, process.value
