"""Less memory, the same video: the cache in host memory, the text encoder block by block, videos longer than a clip."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING, small_config

from inferix import SelfForcingPipeline
from inferix.cli.devices import gpu_memory
from inferix.models.attention import FP8
from inferix.models.kv_cache import KVCache, OffloadedKVCache
from inferix.models.transformer import CausalWanTransformer, TransformerConfig
from quantization import quantize_text_encoder

CONFIG = TransformerConfig(dim=96, ffn_dim=192, freq_dim=64, text_dim=32, text_len=16, num_heads=2, num_layers=6)
PROMPT = "A red cat walks on the moon"


def flows(cache_type: type[KVCache], dtype: torch.dtype, batch: int) -> list[torch.Tensor]:
    """What the model predicts for six blocks, each run twice, in a window of seven frames, the first one a sink."""
    torch.manual_seed(0)
    model = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
    for table in (block.scale_shift_table for block in model.blocks):
        table.normal_(std=0.3)
    cache = cache_type(CONFIG, (batch, 7, 24), torch.device("cpu"), dtype, torch.float32, sink_frames=1)
    cache.set_text(model.embed_text(torch.randn(batch, 16, 32)))
    results = []
    for start in (0, 1, 4, 7, 10, 13):
        size = 3 if start else 1
        cache.place(start, size)
        rope = model.rope(torch.arange(start, start + size), 8, 12)
        for timestep in (500.0, 0.0):
            latents = torch.randn(batch, size, 16, 8, 12)
            results.append(model(latents, torch.full((batch, 1), timestep), rope, cache))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_an_offloaded_cache_changes_not_a_bit(dtype, batch):
    for here, there in zip(flows(KVCache, dtype, batch), flows(OffloadedKVCache, dtype, batch)):
        assert torch.equal(here, there)


def test_an_offloaded_cache_keeps_few_layers_on_the_device():
    cache = OffloadedKVCache(TransformerConfig(), (1, 21, 4), torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    on_device = sum(tensor.nbytes for tensor in (*cache.windows, *cache.resident.values()))
    whole = KVCache(TransformerConfig(), (1, 21, 4), torch.device("cpu"), torch.bfloat16, torch.bfloat16)
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
    assert isinstance(small.pipeline.cache, OffloadedKVCache) and small.pipeline.cache.dtype == FP8
    usual = self_forcing.generate([PROMPT], 9, torch.Generator().manual_seed(0))
    assert torch.nn.functional.cosine_similarity(video.flatten(), usual.flatten(), dim=0) > 0.999
    quantize_text_encoder(small.pipeline.text_encoder, "int8")
    blocks = small.pipeline.text_encoder.model.encoder.block
    assert not any(type(module) is torch.nn.Linear for module in blocks.modules())
    quantized = small.pipeline.text_encoder([PROMPT])
    assert torch.nn.functional.cosine_similarity(quantized.flatten(), embeds.flatten(), dim=0) > 0.99
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
    assert long.shape[1] == 69 and usual.pipeline.cache.num_frames == 9
    torch.testing.assert_close(long[:, :33], clip)
    rolling = pipeline(tmp_path, local_attn_size="6", sink_size="1")
    rolled = rolling.generate([PROMPT], 18, torch.Generator().manual_seed(0))
    assert rolling.pipeline.cache.num_frames == 6 and rolling.pipeline.cache.sink_frames == 1
    torch.testing.assert_close(rolled[:, :21], long[:, :21])
    assert not torch.allclose(rolled[:, 21:33], long[:, 21:33], atol=1e-3)  # the third block sees no more than six


def peak_bytes(process: subprocess.Popen) -> int:
    """The most memory it has had so far; 0 where it has ended."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int((re.findall(r"VmHWM:\s+(\d+)", status) or [0])[0])


@pytest.mark.parametrize(
    ("runner", "flags"),
    [
        ("self_forcing", [f"--checkpoint_path={SELF_FORCING}", "--use_ema", "--num_output_frames=120"]),
        ("causvid", [f"--checkpoint_folder={CAUSVID}", "--num_rollout=20"]),
    ],
)
def test_memory_does_not_grow_with_the_length(tmp_path, runner, flags):
    """Of a real process, from a fifth of the video on; the frames that follow are 28 MB.

    glibc gives every tensor's memory back at once here; what it keeps otherwise is 17 MB in one run, nothing in the next.
    """
    kind = {"self_forcing": "self_forcing_dmd", "causvid": "causvid"}[runner]
    flags = [*flags, f"--config_path={small_config(f'{runner}/configs/{kind}', tmp_path)}"]
    flags += [f"--wan_base_model_path={BASE}", f"--output_folder={tmp_path}"]
    command = [sys.executable, str(ROOT / f"example/quantization/run_{runner}_quantized.py"), *flags]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env) as process:
        shown, first, last = b"", 0, 0
        while chunk := process.stderr.read1():
            shown += chunk
            last = peak_bytes(process) or last
            first = first or (last if re.search(rb" ([89]|[1-3]\d)/40 ", shown) else 0)
    assert process.returncode == 0, shown
    assert first and last - first < 3e6
