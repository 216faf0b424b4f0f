"""The Triton kernels: interpreted on the CPU against plain arithmetic, and compiled for every architecture."""

import os
import subprocess
import sys

import pytest
import torch
from dax_layers import E4M3, E5M2, INT8
from triton_targets import KIB, SHARED_MEMORY, compile_for

from dax.quant.devices import check_device

PROGRAM = """
import torch
from dax.quant import functional, kernels

torch.manual_seed(0)
for m, n, k in ((1, 16, 128), (17, 48, 256), (150, 272, 384)):  # the last one is of more tiles than the kernel has programs
    x, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    x_scale, w_scale = torch.rand(m, 1), torch.rand(n, 1)
    bias = torch.randn(n, dtype=torch.bfloat16)
    # scales per token and channel, and per tensor
    for x_rows, w_rows in ((m, n), (m, 1), (1, n), (1, 1)) if m < 100 else ((m, n),):
        scales = x_scale[:x_rows].clone(), w_scale[:w_rows].clone()
        got = functional.scaled_int8_mm(x, scales[0], w, scales[1], bias)
        plain = functional.linear(x, scales[0], w, scales[1], bias, torch.bfloat16)
        assert got.dtype == plain.dtype == torch.bfloat16 and got.shape == plain.shape == (m, n)
        torch.testing.assert_close(got, plain, rtol=2**-7, atol=0.01)  # one rounding to bfloat16
    hopper = kernels.int8_scaled_mm_hopper(x, w, x_scale[:, 0], w_scale[:, 0], bias)
    assert torch.equal(hopper, kernels.int8_scaled_mm(x, w, x_scale[:, 0], w_scale[:, 0], bias))
    assert torch.equal(kernels.int8_scaled_mm(x, w, x_scale[:, 0] * 0, w_scale[:, 0], bias), bias.expand(m, n))

dtype, real = torch.int8, torch.float32  # the interpreter's casts to 8-bit floats are not a GPU's
for m, k in ((8, 256), (7, 280), (5, 8960)):
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(real)
    x[-1] = 0
    x[0, k // 2] = torch.inf
    x[1, -1] = torch.nan
    q, scale = functional.quantize_per_token(functional.gelu(x), dtype)
    limits = functional.QMAX[dtype], functional.FLOAT32.tiny, functional.LARGEST[real] / functional.QMAX[dtype]
    got_q, got_scale = kernels.gelu_quantize(x, dtype, *limits)
    assert got_q.dtype == dtype and got_scale.shape == (m, 1)
    torch.testing.assert_close(got_scale, scale, rtol=1e-6, atol=0, equal_nan=True)
    assert got_scale[1].isnan() and got_scale[0].isfinite() and got_scale[2:].isfinite().all()
    off = got_q[2:].float() - q[2:].float()
    # the sigmoid's last bit may decide how a value rounds
    assert off.ne(0).float().mean() < 0.01 and off.abs().max() <= 1
print("equal")
"""


def test_the_kernels_compute_what_plain_torch_does():
    """In a process of its own: Triton reads the variable where a kernel is defined."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=110)
    assert done.stdout == "equal\n", done.stderr


@pytest.fixture(autouse=True)
def quiet_new_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is without, said aloud


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_int8_kernel_fits_every_architecture(capability):
    kernels = pytest.importorskip("dax.quant.kernels")
    config = kernels.INT8_CONFIGS[kernels.int8_config(SHARED_MEMORY[capability])]
    pointers = {"x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*bf16", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    signature = {**pointers, "bias_ptr": "*bf16", "n": "i32", "k": "i32"}
    constants = {"BLOCK_K": kernels.BLOCK_K, "GROUP_M": 8}
    shared = compile_for(capability, kernels.int8_scaled_mm_kernel, signature | {"m": "i32"}, constants, config)
    assert 0 < shared <= SHARED_MEMORY[capability]


def test_the_int8_kernel_for_hopper_fits_it():
    """It runs on compute capability 9.0 alone, with three stages or, which takes more, with four."""
    kernels = pytest.importorskip("dax.quant.kernels")
    import triton

    pointers = {"y_ptr": "*bf16", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
    signature = {"x_desc": "tensordesc<i8[128, 128]>", "w_desc": "tensordesc<i8[256, 128]>", **pointers}
    constants = {"BLOCK_K": 128, "GROUP_M": 8, "BLOCK_M": 128, "BLOCK_N": 256, "NUM_PROGRAMS": 132}
    config = triton.Config({}, num_warps=8, num_stages=4)
    sizes = {"m": "i32", "n": "i32", "k": "i32"}
    shared = compile_for(90, kernels.int8_scaled_mm_tma_kernel, signature | sizes, constants, config)
    assert 0 < shared <= SHARED_MEMORY[90]


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("capability", [80, 86])
def test_gpus_that_multiply_no_fp8_are_told_so(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    with pytest.raises(RuntimeError, match="compute capability 8.9 or more; .* use int8"):
        check_device(dtype, torch.device("cuda"))


WAN_1_3B, LONGEST = (8192, 1024), (8192, 8192)
"""The two parts of a row."""


@pytest.mark.parametrize(
    ("dtype", "capability", "row"),
    [
        *((INT8, capability, LONGEST) for capability in SHARED_MEMORY),
        *((dtype, capability, LONGEST) for dtype in (E4M3, E5M2) for capability in SHARED_MEMORY if capability >= 89),
        (E4M3, 90, WAN_1_3B),
    ],
    ids=str,
)
def test_the_gelu_kernel_fits_every_architecture_that_multiplies_its_type(dtype, capability, row):
    kernels = pytest.importorskip("dax.quant.kernels")
    names = {INT8: "*i8", E4M3: "*fp8e4nv", E5M2: "*fp8e5"}
    signature = {"x_ptr": "*bf16", "q_ptr": names[dtype], "scale_ptr": "*fp32", "k": "i32"}
    limits = {"qmax": 127.0, "smallest": 1e-38, "largest": 1e36}
    constants = limits | dict(zip(("HEAD", "TAIL"), row))
    shared = compile_for(capability, kernels.gelu_quantize_kernel, signature, constants, kernels.GELU_CONFIG)
    assert shared <= SHARED_MEMORY[capability]


def test_the_kernels_ask_the_gpu_for_its_shared_memory(monkeypatch):
    kernels = pytest.importorskip("dax.quant.kernels")

    class Properties:
        shared_memory_per_block_optin = 227 * KIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    gpu = torch.device("cuda")
    assert kernels.shared_memory(gpu) == 227 * KIB
    Properties.shared_memory_per_block_optin = 99 * KIB
    small = kernels.INT8_CONFIGS[kernels.int8_config(kernels.shared_memory(gpu))]
    assert small is not kernels.INT8_CONFIGS[0]
    del Properties.shared_memory_per_block_optin  # a version of torch that does not say
    assert kernels.shared_memory(gpu) == 99 * KIB
