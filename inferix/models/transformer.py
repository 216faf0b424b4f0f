"""The causal Wan 2.1 transformer that CausVid and Self-Forcing share.

The network is Wan's (https://arxiv.org/abs/2503.20314); what makes it causal is that its self-attention sees the keys
and values of earlier frames through a cache. Modules carry the names of diffusers' ``WanTransformer3DModel``.

Shapes: B batch, F latent frames, h x w latent pixels, S = h*w/4 tokens a frame, D = ``dim``, H heads of size d = D/H.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.errors import InputError
from inferix.models.attention import attention, saturating_cast
from inferix.parallel import SequenceParallel


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network; the defaults are Wan2.1-T2V-1.3B's."""

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = 4096
    text_len: int = 512
    """Tokens a prompt is padded to."""
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_json(cls, path: Path) -> "TransformerConfig":
        """Read a ``config.json`` of the original ``WanModel`` or of diffusers' ``WanTransformer3DModel``.

        Raises InputError where the file is missing, is no JSON or describes another kind of model.
        """
        try:
            raw = dict(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise InputError(f"{path} not found: it describes the base model's sizes; see weights/README.md") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is not a valid JSON object ({error}); download it again") from None
        if "num_attention_heads" in raw:  # diffusers' names
            raw |= {
                "num_heads": raw["num_attention_heads"],
                "dim": raw["num_attention_heads"] * raw["attention_head_dim"],
                "in_dim": raw["in_channels"],
                "out_dim": raw["out_channels"],
            }
        missing = {"dim", "ffn_dim", "num_heads", "num_layers"} - raw.keys()
        if missing:
            raise InputError(f"{path} has no {', '.join(sorted(missing))}: it is not the config of a Wan transformer")
        sizes = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        if not all(isinstance(size, int | float) and size > 0 for size in sizes.values()):
            raise InputError(f"{path} has a size that is no positive number; download it again")
        return cls(**sizes)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[...] timesteps in [0, 1000] to [..., dim]: cosines, then sines (Wan's order), angles taken in float64."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(frame_index: Tensor, height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [F*height*width, 1, head_dim/2], of the 3D rotary embedding (RoFormer, arXiv 2104.09864).

    A head's complex pairs are shared out over time, row and column; time gets what a third leaves over.
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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the dtype of x and of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class TwoLayer(nn.Module):
    """Linear, activation, linear: the timestep and the text embedder."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Embeds what the network is conditioned on: the timestep of every frame, and the prompt."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayer(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLayer(config.text_dim, config.dim, nn.GELU(approximate="tanh"))

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F or 1] timesteps to the embedding [B, F or 1, D] and the blocks' modulation [B, F or 1, 6, D]."""
        sinusoid = sinusoidal_embedding(timestep, self.freq_dim).to(self.time_proj.weight.dtype)
        embedding = self.time_embedder(sinusoid)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


def places(modules: Iterable[nn.Module]) -> list[int]:
    """Where in memory the weights of ``modules`` are."""
    return [tensor.data_ptr() for module in modules for tensor in chain(module.parameters(), module.buffers())]


def alike(linears: list[nn.Module]) -> bool:
    """Whether one layer can take the place of all: of one type, quantized (or to be) one way, watched by no hook."""
    kinds = {(type(linear), getattr(linear, "qconfig", None)) for linear in linears}
    return len(kinds) == 1 and not any(linear._forward_pre_hooks for linear in linears)


def fuse_linears(linears: list[nn.Module]) -> nn.Module:
    """One linear layer [out1 + out2 + ..., in] for several that read the same input; they become views of it.

    A quantized layer brings its own way, the class method ``fuse``.
    """
    if hasattr(type(linears[0]), "fuse"):
        return type(linears[0]).fuse(linears)
    ends = list(accumulate(linear.out_features for linear in linears))
    weight, bias = (torch.cat([getattr(linear, name).data for linear in linears]) for name in ("weight", "bias"))
    for linear, end in zip(linears, ends):
        rows = slice(end - linear.out_features, end)
        linear.weight.data, linear.bias.data = weight[rows], bias[rows]
    fused = nn.Linear(linears[0].in_features, ends[-1], device="meta").requires_grad_(False)
    fused.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return fused.requires_grad_(False)


class Attention(nn.Module):
    """Projections of one attention; who attends to what is decided by the caller."""

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
        """``to_q``, ``to_k`` and ``to_v`` as one layer, where ``fuse`` made it; in a tuple, so that it is no submodule."""
        self.fused_places: list[int] = []

    def fuse(self) -> None:
        """Let queries, keys and values come from one product; again after the layers were replaced, loaded or moved.

        Layers of different precision, and those that calibration watches, stay on their own.
        """
        layers = [self.to_q, self.to_k, self.to_v]
        if not alike(layers):
            self.fused = ()
        elif not self.fused or self.fused_places != places(layers):
            self.fused = ()  # so that a stale one does not stay in memory beside the new
            self.fused = (fuse_linears(layers),)
            self.fused_places = places(layers)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, ..., D] to [B, tokens, H, d]."""
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
    """Linear followed by GELU in its tanh form: (1 + tanh(u)) / 2 is written as sigmoid(2u), a third of a GPU's work."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        y = x.float()
        return (y * torch.sigmoid(math.sqrt(8 / math.pi) * y * (1 + 0.044715 * y * y))).to(x.dtype)


class FeedForward(nn.Module):
    """D to ``ffn_dim`` and back; index 1 of ``net`` is where diffusers keeps a dropout."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(config.dim, config.ffn_dim), nn.Identity(), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        project, _, out = self.net
        if hasattr(out, "forward_gelu"):  # quantizes its input: one kernel with GELU
            return out.forward_gelu(project.proj(x))
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention over time and space, cross-attention to the prompt, feed-forward.

    There is no ``forward``: self-attention, which needs the cache, stands between the two halves.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.attn1 = Attention(config)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.attn2 = Attention(config)
        self.norm3 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.dim))

    def modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """The six shifts, scales and gates, each [B, F or 1, 1, D], for time [B, F or 1, 6, D]."""
        return (self.scale_shift_table + time).float().split(1, dim=2)

    def before_attention(self, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor], room: tuple[Tensor, ...]) -> None:
        """Of x [B, F, S, D], write rotated queries, rotated keys, and values, each [B, F*S, H, d], to ``room``."""
        shift, scale, *_ = self.modulation(time)
        hidden = (self.norm1(x) * (1 + scale) + shift).to(x.dtype)
        query, key, value = self.attn1.query_key_value(hidden)
        for place, tensor in zip(room, (apply_rope(query, rope), apply_rope(key, rope), value)):
            place.copy_(saturating_cast(tensor, place.dtype).view(place.shape))

    def after_attention(self, x: Tensor, attended: Tensor, time: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """What follows self-attention: x [B, F, S, D] and its result [B, F*S, ..., D] to the block's output [B, F, S, D]."""
        *_, gate_attn, shift, scale, gate_ffn = self.modulation(time)
        x = (x + self.attn1.to_out[0](attended.flatten(2)).view_as(x) * gate_attn).to(x.dtype)
        attended = attention(self.attn2.query(self.norm2(x).to(x.dtype)), *text)
        x = x + self.attn2.to_out[0](attended).view_as(x)
        hidden = (self.norm3(x) * (1 + scale) + shift).to(x.dtype)
        return (x + self.ffn(hidden) * gate_ffn).to(x.dtype)


class CausalWanTransformer(nn.Module):
    """Predicts the flow (noise - clean) of a block of latent frames, given what the cache holds of earlier ones."""

    patch_size = (1, 2, 2)

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, self.patch_size, self.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(config.dim, config.out_dim * 4)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.parallel: SequenceParallel | None = None
        """The ranks that each work on some tokens of every frame; what comes in and goes out is whole."""

    def fuse_qkv(self) -> None:
        """Compute the queries, keys and values of self-attention in one product each; names and weights stay."""
        for block in self.blocks:
            block.attn1.fuse()

    def embed_text(self, prompt_embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Prompt embeddings [B, L, text_dim] to every layer's cross-attention keys and values [B, L, H, d]."""
        text = self.condition_embedder.text_embedder(prompt_embeds)
        return [block.attn2.key_value(text) for block in self.blocks]

    def rope(self, frame_index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The rotary table of the latent frames at positions ``frame_index`` [F] of ``height`` x ``width`` pixels."""
        table = rope_table(frame_index, height // 2, width // 2, self.config.head_dim)
        if self.parallel is None:
            return table
        return tuple(
            self.parallel.own(part.view(1, len(frame_index), -1, part.shape[-1])).flatten(0, 2)[:, None]
            for part in table
        )

    def forward(self, latents: Tensor, timestep: Tensor, rope: tuple[Tensor, Tensor], cache) -> Tensor:
        """Predict the flow.

        Args:
            latents: noisy latents [B, F, C, h, w]; h and w are even.
            timestep: [B, F], in [0, 1000], or [B, 1] where it is the same for all frames.
            rope: what ``self.rope`` gives for these frames.
            cache: has ``text``, what ``self.embed_text`` gives; ``room(layer)``, three tensors [B, F*S, H, d] that the
                block's queries, keys and values are written to; and ``attend(layer)``, which then returns the
                self-attention's result [B, F*S, D]. H and D may come in two dimensions. See ``KVCache``.

        Returns:
            The flow [B, F, C, h, w] in the dtype of ``latents``.
        """
        x, embedding, time = self.enter(latents, timestep, rope, cache.room(0))
        for layer, (block, following) in enumerate(pairwise(self.blocks)):
            attended = cache.attend(layer)
            x = self.between(block, following, x, attended, time, rope, cache.text[layer], cache.room(layer + 1))
        last = len(self.blocks) - 1
        tokens = self.leave(x, cache.attend(last), embedding, time, cache.text[last])
        return self.unpatch(tokens if self.parallel is None else self.parallel.whole(tokens), latents)

    # All that is not self-attention is in these three. They depend on nothing that changes from block to block of the
    # video, so that what ``compile`` makes of each serves every layer and every block.

    def enter(self, latents: Tensor, timestep: Tensor, rope: tuple[Tensor, Tensor], room: tuple[Tensor, ...]):
        """All before the first self-attention."""
        embedding, time = self.condition_embedder.embed_time(timestep)
        x = self.embed_patches(latents)
        self.blocks[0].before_attention(x, time, rope, room)
        return x, embedding, time

    @staticmethod
    def between(block, following, x: Tensor, attended: Tensor, time: Tensor, rope, text, room) -> Tensor:
        """From one block's self-attention to the next one's."""
        x = block.after_attention(x, attended, time, text)
        following.before_attention(x, time, rope, room)
        return x

    def leave(self, x: Tensor, attended: Tensor, embedding: Tensor, time: Tensor, text) -> Tensor:
        """All after the last self-attention."""
        return self.project_out(self.blocks[-1].after_attention(x, attended, time, text), embedding)

    def compile(self) -> None:
        """Let ``torch.compile`` fuse norms, modulation, rotation and quantization into few kernels."""
        from inferix.models.inductor import whole_rows  # seconds to import, and of no use on a CPU

        for part in ("enter", "between", "leave"):
            setattr(self, part, torch.compile(getattr(self, part), backend=whole_rows, dynamic=False))

    def embed_patches(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] to tokens [B, F, S, D]: the patch convolution, as one product."""
        tokens = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [B, F, C, h/2, 2, w/2, 2]
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        if self.parallel is not None:
            tokens = self.parallel.own(tokens)
        weight = self.patch_embedding.weight
        return F.linear(tokens.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def project_out(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Tokens [B, F, S, D] to those of the flow [B, F, S, 4*C]."""
        shift, scale = (self.scale_shift_table + embedding[:, :, None]).float().split(1, dim=2)
        return self.proj_out((self.norm_out(x) * (1 + scale) + shift).to(x.dtype))

    @staticmethod
    def unpatch(tokens: Tensor, latents: Tensor) -> Tensor:
        """Tokens of the flow [B, F, S, 4*C] to the flow, shaped like ``latents``."""
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        out = tokens.unflatten(-1, (2, 2, -1)).unflatten(2, (height, width))  # [B, F, h/2, w/2, 2, 2, C]
        return out.permute(0, 1, 6, 2, 4, 3, 5).reshape_as(latents).to(latents.dtype)
