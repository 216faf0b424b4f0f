"""The Triton kernel against plain arithmetic, interpreted on the CPU."""

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
got = functional.scaled_int8_mm(x, x_scale, w, w_scale, bias)
plain = functional.linear(x, x_scale, w, w_scale, bias, torch.bfloat16)
assert got.dtype == plain.dtype == torch.bfloat16 and got.shape == plain.shape == (m, n)
torch.testing.assert_close(got, plain, rtol=2**-7, atol=0.01)  # one rounding to bfloat16
assert torch.equal(kernels.int8_scaled_mm(x, w, x_scale[:, 0] * 0, w_scale[:, 0], bias), bias.expand(m, n))
print("equal")
"""


@pytest.mark.parametrize("shape", [(1, 16, 128), (17, 48, 256), (130, 272, 384)])
def test_int8_kernel_computes_what_the_plain_product_does(shape):
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(shape=shape)], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr
