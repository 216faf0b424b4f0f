"""The Triton kernels against plain arithmetic, interpreted on the CPU."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from dax.quant import functional, kernels

torch.manual_seed(0)
m, n, k = {shape}
x, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
x_scale, w_scale = torch.rand(m, 1), torch.rand(n, 1)
bias = torch.randn(n, dtype=torch.bfloat16)
for x_rows, w_rows in ((m, n), (m, 1), (1, n), (1, 1)):  # scales per token and channel, and per tensor
    scales = x_scale[:x_rows].clone(), w_scale[:w_rows].clone()
    got = functional.scaled_int8_mm(x, scales[0], w, scales[1], bias)
    plain = functional.linear(x, scales[0], w, scales[1], bias, torch.bfloat16)
    assert got.dtype == plain.dtype == torch.bfloat16 and got.shape == plain.shape == (m, n)
    torch.testing.assert_close(got, plain, rtol=2**-7, atol=0.01)  # one rounding to bfloat16
assert torch.equal(kernels.int8_scaled_mm(x, w, x_scale[:, 0] * 0, w_scale[:, 0], bias), bias.expand(m, n))
print("equal")
"""


GELU_PROGRAM = """
import torch
from dax.quant import functional, kernels

torch.manual_seed(0)
m, k = {shape}
dtype, real = torch.int8, torch.float32  # the interpreter's casts to 8-bit floats are not a GPU's
x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(real)
x[-1] = 0
x[0, k // 2] = torch.inf
x[1, -1] = torch.nan
q, scale = functional.quantize_per_token(functional.gelu(x), dtype)
limits = functional.QMAX[dtype], functional.FLOAT32.tiny, functional.largest_scale(real, dtype)
got_q, got_scale = kernels.gelu_quantize(x, dtype, *limits)
assert got_q.dtype == dtype and got_scale.shape == (m, 1)
torch.testing.assert_close(got_scale, scale, rtol=1e-6, atol=0, equal_nan=True)
assert got_scale[1].isnan() and got_scale[0].isfinite() and got_scale[2:].isfinite().all()
off = got_q[2:].float() - q[2:].float()
assert off.ne(0).float().mean() < 0.01 and off.abs().max() <= 1  # the sigmoid's last bit may decide how a value rounds
print("equal")
"""


def interpret(program: str) -> None:
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("shape", [(1, 16, 128), (17, 48, 256), (130, 272, 384)])
def test_int8_kernel_computes_what_the_plain_product_does(shape):
    interpret(PROGRAM.format(shape=shape))


@pytest.mark.parametrize("shape", [(8, 256), (7, 280), (5, 8960)])
def test_gelu_kernel_computes_what_gelu_and_quantization_do(shape):
    interpret(GELU_PROGRAM.format(shape=shape))
