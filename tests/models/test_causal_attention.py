"""The fast path against the plain one, and the cache that rolls."""

import pytest
import torch

from dax.quant.quantization import quantize_dynamic
from dax.quant.quantization.qconfig import get_dynamic_fp8_per_token_act_per_channel_weight_qconfig as fp8
from dax.quant.quantization.qconfig import get_dynamic_int8_per_token_act_per_channel_weight_qconfig as int8
from inferix.cli.figures import relative_error_and_gain as relative_error
from inferix.models.attention import FP8, attention
from inferix.models.causal_attention import CausalSelfAttention
from inferix.models.config import TransformerConfig
from inferix.models.kv_cache import KVCache, WindowConfig
from inferix.models.transformer import CausalWanTransformer

CONFIG = TransformerConfig(dim=96, ffn_dim=192, freq_dim=64, text_dim=32, text_len=16, num_heads=2, num_layers=3)
HEIGHT, WIDTH, TOKENS = 8, 12, 24


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def random_model() -> CausalWanTransformer:
    torch.manual_seed(0)
    model = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("scale_shift_table"):
            weight.normal_(std=0.3)
    return model


def new_cache(frames=9, dtype=torch.float32, sink=0, relative=False) -> KVCache:
    shape = (1, frames, TOKENS, 2, 48)
    return KVCache(
        3, shape, WindowConfig(frames, sink, relative_positions=relative), torch.device("cpu"), dtype, torch.float32
    )


def encoder_kv(model):
    text = torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(7))
    return model.embed_text(text)


def run(model, cache, frames, seed=1, timestep=500.0):
    """Return the flow of random latents at these positions."""
    cache.set_positions(frames)
    latents = torch.randn(1, len(frames), 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    rotary_emb = model.rotary_emb(frames, HEIGHT, WIDTH)
    return model(latents, torch.full((1, 1), timestep), rotary_emb, encoder_kv(model), cache)


def two_blocks(model, dtype=torch.float32):
    """Return the flow of the second block, which sees the first through the cache."""
    cache = new_cache(dtype=dtype)
    run(model, cache, [0, 1, 2], timestep=0.0)
    return run(model, cache, [3, 4, 5], seed=2)


@pytest.mark.parametrize("qconfig", [None, fp8, int8], ids=["full", "fp8", "int8"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=["cache32", "cache8"])
def test_fast_path_stays_close_to_the_float_one(qconfig, cache_dtype):
    exact = two_blocks(random_model())
    model = random_model()
    if qconfig is not None:
        quantize_dynamic(model, {"": qconfig(), "condition_embedder": None, "proj_out": None})
    model.fuse_qkv_projections()
    fast = two_blocks(model, cache_dtype)
    lossless = qconfig is None and cache_dtype == torch.float32
    error, gain = relative_error(fast, exact)
    assert error < (1e-5 if lossless else 0.04) and abs(gain - 1) < (1e-5 if lossless else 0.01)
    assert lossless or error > 1e-4  # something was rounded


def test_fusing_changes_no_name_and_follows_new_weights():
    model = random_model()
    names, before = list(model.state_dict()), two_blocks(model)
    model.fuse_qkv_projections()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(two_blocks(model), before)
    for block in model.blocks:  # loaded in place, then replaced
        block.attn1.to_k.weight.mul_(2)
    changed = two_blocks(model)
    assert not torch.allclose(changed, before)
    for block in model.blocks:
        block.attn1.to_k = torch.nn.Linear(CONFIG.dim, CONFIG.dim).requires_grad_(False)
    model.fuse_qkv_projections()
    fused = two_blocks(model)
    for block in model.blocks:
        block.attn1.fused = ()
    torch.testing.assert_close(fused, two_blocks(model))
    assert not torch.allclose(fused, changed)


def test_a_uniform_timestep_may_be_given_once():
    model = random_model()
    cache, latents = new_cache(), torch.randn(1, 3, 16, HEIGHT, WIDTH)
    cache.set_positions([0, 1, 2])
    rotary_emb = model.rotary_emb([0, 1, 2], HEIGHT, WIDTH)
    once, each = (
        model(latents, torch.full(shape, 300.0), rotary_emb, encoder_kv(model), cache) for shape in ((1, 1), (1, 3))
    )
    torch.testing.assert_close(once, each)


def test_compiled_blocks_compute_the_same():
    """One code for all layers and all places in the window: nothing is compiled again when the window moves."""
    torch.compiler.reset()
    model, compiled = random_model(), random_model()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in compiled.blocks:
        block.forward = torch.compile(block.forward, backend=count, dynamic=False)
    caches = new_cache(6, sink=1), new_cache(6, sink=1)
    for start in range(0, 15, 3):
        frames = range(start, start + 3)
        actual, wanted = (run(m, cache, frames, seed=start) for m, cache in zip((compiled, model), caches))
        torch.testing.assert_close(actual, wanted)
    assert len(graphs) == 2  # before and behind self-attention
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("window, sink", [(6, 0), (6, 3), (7, 1), (5, 1)])
def test_a_rolling_cache_holds_the_sink_and_the_newest_frames(window, sink, dtype):
    """Values with a mean that changes from block to block; 8 bits store them without it and give it back."""
    torch.manual_seed(0)
    cache = new_cache(window, dtype=dtype, sink=sink)
    keys, values = (torch.randn(1, 15, TOKENS, 2, 48) for _ in range(2))
    values += torch.randn(5, 48).repeat_interleave(3, 0)[None, :, None, None] * 3
    query = torch.randn(1, 3 * TOKENS, 2, 48)
    layer = CausalSelfAttention(0, cache, None)
    for start in range(0, 15, 3):
        cache.set_positions(range(start, start + 3))
        new = [tensor[:, start : start + 3].flatten(1, 2) for tensor in (keys, values)]
        buffers = layer.qkv_buffers(query.shape)
        for buffer, tensor in zip(buffers[:3], (query, *new)):
            if buffer is not None:
                buffer.copy_(tensor)
        seen = layer(buffers.query, buffers.key, buffers.value if buffers.value is not None else new[1], None)
        end = start + 3
        kept = [*range(sink), *range(max(sink, end - (window - sink)), end)]
        expected = attention(query, keys[:, kept].flatten(1, 2), values[:, kept].flatten(1, 2))
        error, gain = relative_error(seen, expected)
        assert error < (1e-5 if dtype == torch.float32 else 0.02) and abs(gain - 1) < 0.002


def test_relative_positions_see_the_same_differences():
    """Sink frames right before the oldest other frame: the flow is that of a window that began with them."""
    model = random_model()
    rolled, fresh = new_cache(6, sink=3, relative=True), new_cache(6)
    latents = torch.randn(1, 9, 16, HEIGHT, WIDTH)
    timestep, text = torch.zeros(1, 1), encoder_kv(model)

    def forward(cache, frames, source):
        cache.set_positions(frames)
        return model(latents[:, source], timestep, model.rotary_emb(frames, HEIGHT, WIDTH), text, cache)

    for start in (0, 3):
        forward(rolled, range(start, start + 3), slice(start, start + 3))
    rolled.set_positions(range(6, 9))
    from inferix.models.causal_attention import rotate_sinks

    rotate_sinks(rolled, model.rotary_emb(range(3, 6), HEIGHT, WIDTH, cached=True))
    seen = forward(rolled, range(6, 9), slice(6, 9))
    for frames, source in ((range(3), slice(0, 3)), (range(3, 6), slice(6, 9))):
        direct = forward(fresh, frames, source)
    torch.testing.assert_close(seen, direct, rtol=0, atol=1e-4)
