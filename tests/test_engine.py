"""The fast path against the plain one, and the cache that rolls."""

import pytest
import torch

from dax.quant.quantization import quantize_dynamic
from dax.quant.quantization.qconfig import (
    get_dynamic_fp8_per_token_act_per_channel_weight_qconfig as fp8,
)
from dax.quant.quantization.qconfig import (
    get_dynamic_int8_per_token_act_per_channel_weight_qconfig as int8,
)
from inferix.models.attention import FP8, attention, merge, num_splits, saturating_cast
from inferix.models.kv_cache import KVCache
from inferix.models.transformer import CausalWanTransformer, TransformerConfig

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


def run(model, cache, frames, seed=1, timestep=500.0):
    """One forward over the frames at these positions, after placing them."""
    cache.place(frames[0], len(frames))
    latents = torch.randn(1, len(frames), 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    rope = model.rope(torch.tensor(frames), HEIGHT, WIDTH)
    return model(latents, torch.full((1, 1), timestep), rope, cache)


def new_cache(model, frames=9, dtype=torch.float32, sink=0):
    cache = KVCache(CONFIG, (1, frames, TOKENS), torch.device("cpu"), dtype, torch.float32, sink)
    text = torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(7))
    cache.set_text(model.embed_text(text))
    return cache


def two_blocks(model, dtype=torch.float32):
    """The flow of the second block, which sees the first through the cache."""
    cache = new_cache(model, dtype=dtype)
    run(model, cache, [0, 1, 2], timestep=0.0)
    return run(model, cache, [3, 4, 5], seed=2)


@pytest.mark.parametrize("qconfig", [None, fp8, int8], ids=["full", "fp8", "int8"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=["cache32", "cache8"])
def test_fast_path_stays_close_to_the_float_one(qconfig, cache_dtype):
    exact = two_blocks(random_model())
    model = random_model()
    if qconfig is not None:
        quantize_dynamic(model, {"": qconfig(), "condition_embedder": None, "proj_out": None})
    model.fuse_qkv()
    fast = two_blocks(model, cache_dtype)
    cosine = torch.nn.functional.cosine_similarity(fast.flatten(), exact.flatten(), dim=0)
    lossless = qconfig is None and cache_dtype == torch.float32
    assert cosine >= (0.999 if lossless else 0.995)
    assert lossless or not torch.equal(fast, exact)  # something was rounded


def test_fusing_changes_no_name_and_follows_new_weights():
    model = random_model()
    names, before = list(model.state_dict()), two_blocks(model)
    model.fuse_qkv()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(two_blocks(model), before)
    for block in model.blocks:  # loaded in place, then replaced
        block.attn1.to_k.weight.mul_(2)
    changed = two_blocks(model)
    assert not torch.allclose(changed, before)
    for block in model.blocks:
        block.attn1.to_k = torch.nn.Linear(CONFIG.dim, CONFIG.dim).requires_grad_(False)
    model.fuse_qkv()
    fused = two_blocks(model)
    for block in model.blocks:
        block.attn1.fused = ()
    torch.testing.assert_close(fused, two_blocks(model))
    assert not torch.allclose(fused, changed)


def test_a_uniform_timestep_may_be_given_once():
    model = random_model()
    cache, latents = new_cache(model), torch.randn(1, 3, 16, HEIGHT, WIDTH)
    cache.place(0, 3)
    rope = model.rope(torch.arange(3), HEIGHT, WIDTH)
    once, each = (model(latents, torch.full(shape, 300.0), rope, cache) for shape in ((1, 1), (1, 3)))
    torch.testing.assert_close(once, each)


@pytest.mark.parametrize("window, sink", [(6, 0), (6, 3), (7, 1), (5, 1)])
def test_a_rolling_cache_holds_the_sink_and_the_newest_frames(window, sink):
    torch.manual_seed(0)
    cache = new_cache(random_model(), window, sink=sink)
    keys, values = (torch.randn(1, 15, TOKENS, 2, 48) for _ in range(2))
    q = torch.randn(1, 3 * TOKENS, 2, 48)
    for start in range(0, 15, 3):
        cache.place(start, 3)
        placed = (tensor[:, start : start + 3].flatten(1, 2) for tensor in (keys, values))
        for room, given in zip(cache.room(0), (q, *placed)):
            room.copy_(given)
        seen = cache.attend(0)
        end = start + 3
        kept = [*range(sink), *range(max(sink, end - (window - sink)), end)]
        expected = attention(q, keys[:, kept].flatten(1, 2), values[:, kept].flatten(1, 2))
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_merge_to_the_whole(parts):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (7, 12, 12))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    pieces = zip(scores.chunk(parts, -1), v.chunk(parts, 1))
    results = [(s.softmax(-1) @ x.transpose(1, 2), s.logsumexp(-1)) for s, x in pieces]
    out, lse = (torch.cat(each) for each in zip(*results))
    torch.testing.assert_close(merge(out.transpose(1, 2), lse, torch.float32), attention(q, k, v))


def test_keys_are_worked_on_in_parts_where_the_last_round_would_idle():
    assert num_splits(batch=1, tokens=4680, keys=32760, heads=12, processors=132) == 2  # 3.4 rounds
    assert num_splits(batch=1, tokens=4680, keys=32760, heads=6, processors=132) == 4  # 1.7 rounds
    assert num_splits(batch=1, tokens=11 * 128, keys=32760, heads=12, processors=132) == 1  # exactly one
    assert num_splits(batch=2, tokens=4680, keys=32760, heads=12, processors=132) == 1
    assert num_splits(batch=1, tokens=4680, keys=4681, heads=12, processors=132) == 1


def test_8_bit_keys_saturate():
    x = torch.tensor([0.0, 1.0, -500.0, 1e6, float("inf")])
    assert saturating_cast(x, FP8).float().tolist() == [0.0, 1.0, -448.0, 448.0, 448.0]
    assert saturating_cast(x, torch.float32) is x
