"""Building blocks of the transformer. Modules carry the names of diffusers' ``WanTransformer3DModel``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.models.config import TransformerConfig
from inferix.models.rope import sinusoidal_embedding
from inferix.runtime.fusion import can_fuse, data_ptrs, fuse_linears, has_fused_gelu


class RMSNorm(nn.Module):
    """Normalize the last dimension by its root mean square in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class FP32LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 and returned in float32, whatever the dtype of x and of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class MLPEmbedder(nn.Module):
    """Linear, activation, linear: embeds the timestep or the text."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Embed the timestep of every frame and the prompt."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = MLPEmbedder(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = MLPEmbedder(config.text_dim, config.dim, nn.GELU(approximate="tanh"))

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding [B, F or 1, D] of timesteps [B, F or 1] and the blocks' modulation [B, F or 1, 6, D]."""
        sinusoid = sinusoidal_embedding(timestep, self.freq_dim).to(self.time_proj.weight.dtype)
        embedding = self.time_embedder(sinusoid)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class Attention(nn.Module):
    """Projections of one attention; the caller decides which keys the queries see."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.to_q = nn.Linear(config.dim, config.dim)
        self.to_k = nn.Linear(config.dim, config.dim)
        self.to_v = nn.Linear(config.dim, config.dim)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)
        self.fused: tuple[nn.Module, ...] = ()
        """``to_q``, ``to_k`` and ``to_v`` as one layer, set by ``fuse``; in a tuple, so that it is no submodule."""
        self.fused_data_ptrs: list[int] = []

    def fuse(self) -> None:
        """Compute queries, keys and values as one product. Call it again after the layers were replaced or moved.

        Layers that are quantized differently or have hooks keep their own products.
        """
        layers = [self.to_q, self.to_k, self.to_v]
        if not can_fuse(layers):
            self.fused = ()
        elif not self.fused or self.fused_data_ptrs != data_ptrs(layers):
            self.fused = ()  # free the old one before the new one is built
            self.fused = (fuse_linears(layers),)
            self.fused_data_ptrs = data_ptrs(layers)

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape [B, ..., D] to [B, T, H, d]."""
        return x.reshape(x.shape[0], -1, x.shape[-1] // self.head_dim, self.head_dim)

    def query(self, x: Tensor) -> Tensor:
        return self.split_heads(self.norm_q(self.to_q(x)))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split_heads(self.norm_k(self.to_k(x))), self.split_heads(self.to_v(x))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused:
            return self.query(x), *self.key_value(x)
        q, k, v = self.fused[0](x).chunk(3, dim=-1)
        return self.split_heads(self.norm_q(q)), self.split_heads(self.norm_k(k)), self.split_heads(v)


class GELUProjection(nn.Module):
    """Linear followed by GELU in its tanh form."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with GELU between them; index 1 of ``net`` is where diffusers keeps a dropout."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.net: Any = nn.Sequential(
            GELUProjection(config.dim, config.ffn_dim), nn.Identity(), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        project, _, out = self.net
        if has_fused_gelu(out):
            return out.forward_gelu(project.proj(x))
        return self.net(x)
