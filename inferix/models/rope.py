"""Sinusoidal timestep embedding and 3D rotary position embedding."""

import torch
from torch import Tensor


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return the embedding [..., dim] of timesteps [...] in [0, 1000], angles in float64: cosines, then sines (Wan's order)."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(frame_index: Tensor, height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [F*height*width, 1, head_dim/2], of the 3D rotary embedding (arXiv 2104.09864).

    A head's complex pairs are divided among time, row and column: a third each, and time gets the remainder.
    ``frame_index`` [F] holds absolute frame positions, ``height`` and ``width`` count tokens.
    """
    device = frame_index.device
    pairs = head_dim // 2
    spatial = pairs // 3

    def angles(position: Tensor, count: int) -> Tensor:
        exponent = torch.arange(count, dtype=torch.float64, device=device) / count
        return position.double()[:, None] * 10000.0**-exponent

    grid = (len(frame_index), height, width)
    time = angles(frame_index, pairs - 2 * spatial)[:, None, None, :].expand(*grid, -1)
    row = angles(torch.arange(height, device=device), spatial)[None, :, None, :].expand(*grid, -1)
    column = angles(torch.arange(width, device=device), spatial)[None, None, :, :].expand(*grid, -1)
    table = torch.cat([time, row, column], dim=-1).reshape(-1, 1, pairs)
    return table.cos().float(), table.sin().float()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [B, T, H, d] by the angles of ``rope``, in float32."""
    cos, sin = rope
    pairs = x.float().unflatten(-1, (-1, 2))
    # (a, b) becomes (a cos - b sin, b cos + a sin). Without a concatenation it is one GPU kernel with what is around it.
    sign = torch.arange(-1, 2, 2, device=x.device)
    return (pairs * cos[..., None] + pairs.flip(-1) * (sin[..., None] * sign)).flatten(-2).to(x.dtype)
