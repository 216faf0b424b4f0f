"""Measure attention alone on a GPU: time, relative error and gain of the kernels, by heads and keys.

Values have a mean of half and of twice their spread, another one for each block of frames, as in a trained network. The exact
result is computed in float32 by PyTorch. ``--help`` lists the flags.
"""

import argparse
import statistics
from collections.abc import Callable

import checkout  # noqa: F401
import torch
from common import Clock, repeat
from torch import Tensor

from inferix.cli.figures import machine_name, markdown_table, relative_error_and_gain
from inferix.models import attention_kernels as kernels
from inferix.models.attention import FP8, Part, attention_by_part, merge_partials, partial_attention, saturating_cast

TOKENS, HEAD_DIM = 4680, 128


def inputs(heads: int, keys: int, mean: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries [1, 4680, H, 128], and keys and values [1, K, H, 128], in float32."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, HEAD_DIM, device="cuda") for n in (TOKENS, keys, keys))
    means = mean * torch.randn(keys // TOKENS, heads, HEAD_DIM, device="cuda").sign()
    return q, k, v + means.repeat_interleave(TOKENS, 0)[None]


def fp8_by_part(kernel: Callable, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Return 8-bit attention with one part for each block of frames, as the 8-bit cache does it."""
    parts = [Part(start, TOKENS) for start in range(0, k.shape[1], TOKENS)]
    means = torch.stack([v[:, part.start : part.start + TOKENS].mean(1) for part in parts])
    centred = torch.cat([v[:, p.start : p.start + TOKENS] - m[:, None] for p, m in zip(parts, means)], dim=1)
    q, k, v = (saturating_cast(x, FP8) for x in (q, k, centred))
    return lambda: merge_partials(attention_by_part(kernel, q, k, v, parts, means), torch.bfloat16)


def with_kernel(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    q, k, v = (saturating_cast(x, dtype) for x in (q, k, v))

    def attend() -> Tensor:
        out, _ = kernel(q, k, v)
        out = out.float() / (kernels.FP8_OUTPUT_SCALE if dtype == FP8 else 1)
        return out.flatten(2) if out.ndim == 4 else out

    return attend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[6, 12, 40])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 7], help="blocks of 4680 keys in the window")
    args = parser.parse_args()
    device, clock, rows = torch.device("cuda"), Clock(torch.device("cuda")), []
    fa3, fa3_fp8 = (kernels.flash_attention_3(device, dtype) for dtype in (torch.bfloat16, FP8))
    for heads in args.heads:
        for blocks in args.blocks:
            for mean in (0.5, 2.0):
                q, k, v = inputs(heads, blocks * TOKENS, mean)
                exact = kernels.aten_efficient_attention(q, k, v)[0].flatten(2)
                ways = {"fp8 by part": fp8_by_part(kernels.cudnn_fp8_attention, q, k, v)}
                if fa3_fp8:
                    ways["fp8 by part, FlashAttention-3"] = fp8_by_part(fa3_fp8, q, k, v)
                ways["fp8 as a whole"] = with_kernel(kernels.cudnn_fp8_attention, q, k, v, FP8)
                if mean == 0.5:
                    split = lambda q, k, v: (merge_partials(partial_attention(q, k, v, q.dtype), q.dtype), None)  # noqa: E731
                    ways["bf16 as picked"] = with_kernel(split, q, k, v, torch.bfloat16)
                    if fa3:
                        ways["bf16 FlashAttention-3"] = with_kernel(fa3, q, k, v, torch.bfloat16)
                for name, attend in ways.items():
                    error, gain = relative_error_and_gain(attend().view(exact.shape), exact)
                    ms = statistics.median(repeat(attend, clock, 10))
                    rows.append(
                        [name, str(heads), str(blocks * TOKENS), str(mean), f"{error:.4f}", f"{gain:.4f}", f"{ms:.3f}"]
                    )
                    print(" ".join(rows[-1]), flush=True)
    print(f"\n{machine_name()}, torch {torch.__version__}\n")
    print(markdown_table(["kernel", "heads", "keys", "mean / spread", "relative error", "gain", "ms"], rows))


if __name__ == "__main__":
    main()
