"""The merge of partial attention: the Triton kernel interpreted on the CPU, and compiled for every architecture."""

import pytest
import torch
from triton_targets import SHARED_MEMORY, compile_for, interpreted_module

from inferix.models import attention_kernels
from inferix.models.attention import PartialAttention, merge_partials

pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch):
    return interpreted_module("inferix.models.merge_kernel", monkeypatch)


@pytest.mark.parametrize("shape", [(1, 1, 5, 2, 16), (3, 2, 40, 3, 128), (9, 1, 33, 2, 24)], ids=str)
@pytest.mark.parametrize("with_mean", [True, False])
def test_it_computes_what_plain_torch_does(interpreted, shape, with_mean):
    parts, batch, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(shape, generator=generator)
    lse = 30 * torch.randn(parts, batch, heads, tokens, generator=generator)
    mean = torch.randn(parts, batch, heads, head_dim, generator=generator) if with_mean else None
    exact = merge_partials(PartialAttention(out.double(), lse.double(), mean), torch.float64)
    merged = interpreted.merge(out, lse, mean, 1.0, torch.float32)
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-5)


def test_results_in_eight_bits_are_scaled(interpreted):
    out, lse = torch.randn(2, 1, 4, 1, 8), torch.randn(2, 1, 1, 4)
    scale = 1 / attention_kernels.FP8_OUTPUT_SCALE
    assert torch.allclose(
        interpreted.merge(out, lse, None, scale, torch.float32),
        interpreted.merge(out * scale, lse, None, 1.0, torch.float32),
    )


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [*((capability, "*bf16") for capability in SHARED_MEMORY), (90, "*fp32"), (90, "*fp8e4nv")],
)
def test_it_fits_every_architecture(capability, dtype, tmp_path, monkeypatch):
    import triton

    from inferix.models.merge_kernel import BLOCK_TOKENS, merge_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"out_ptr": dtype, "lse_ptr": "*fp32", "mean_ptr": "*fp32", "result_ptr": "*bf16", "scale": "fp32"}
    signature |= dict.fromkeys(("parts", "batch", "tokens", "heads"), "i32")
    constants = {"HAS_MEAN": True, "HEAD_DIM": 128, "HEAD_BLOCK": 128, "BLOCK_TOKENS": BLOCK_TOKENS}
    config = triton.Config({}, num_warps=4, num_stages=3)
    assert compile_for(capability, merge_kernel, signature, constants, config) <= SHARED_MEMORY[capability]
