"""The causal Wan 2.1 transformer that CausVid, Self-Forcing and their successors share.

The network is Wan's (https://arxiv.org/abs/2503.20314). It is causal because its self-attention sees the keys and values of
earlier frames through a cache. Modules carry the names of diffusers' ``WanTransformer3DModel``.

Shapes: B batch, F latent frames, h x w latent pixels, S = h*w/4 tokens of a frame, T = F*S tokens, D = ``dim``, H heads of
size d = D/H.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.distributed.context_parallel import ContextParallel
from inferix.models.attention import attention, saturating_cast
from inferix.models.causal_attention import CausalSelfAttention, QKVBuffers
from inferix.models.config import TransformerConfig
from inferix.models.kv_cache import KVCache
from inferix.models.layers import Attention, ConditionEmbedder, FeedForward, FP32LayerNorm
from inferix.models.rope import apply_rope, rope_table

RotaryEmb = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary position embedding."""


class TransformerBlock(nn.Module):
    """Self-attention over the window of frames, cross-attention to the prompt, feed-forward."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = FP32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.attn1 = Attention(config)
        self.norm2 = FP32LayerNorm(config.dim, config.eps)
        self.attn2 = Attention(config)
        self.norm3 = FP32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: RotaryEmb,
        encoder_kv: tuple[Tensor, Tensor],
        self_attention: CausalSelfAttention,
        qkv_buffers: QKVBuffers,
    ) -> Tensor:
        """Compute one layer.

        Args:
            hidden_states: [B, F, S, D].
            temb: modulation by the timestep [B, F or 1, 6, D].
            rotary_emb: for the frames' positions.
            encoder_kv: this layer's keys and values of the prompt [B, L, H, d].
            self_attention: this layer's attention to the cache.
            qkv_buffers: where it wants its inputs.

        Returns:
            [B, F, S, D].
        """
        query, key, value = self.project_qkv(hidden_states, temb, rotary_emb, qkv_buffers)
        attn_output = self_attention(query, key, value, qkv_buffers.key_unrotated)  # not compiled
        if self_attention.only_cache:
            return hidden_states
        return self.finish(hidden_states, attn_output, temb, encoder_kv)

    def project_qkv(
        self, hidden_states: Tensor, temb: Tensor, rotary_emb: RotaryEmb, qkv_buffers: QKVBuffers
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the self-attention's queries, keys and values, in ``qkv_buffers`` as far as they are wanted there."""
        shift_msa, scale_msa, *_ = self.modulation(temb)
        norm_hidden_states = (self.norm1(hidden_states) * (1 + scale_msa) + shift_msa).to(hidden_states.dtype)
        query, key, value = self.attn1.query_key_value(norm_hidden_states)
        if qkv_buffers.key_unrotated is not None:
            qkv_buffers.key_unrotated.copy_(key)
        query = write(qkv_buffers.query, apply_rope(query, rotary_emb))
        key = write(qkv_buffers.key, apply_rope(key, rotary_emb))
        return query, key, value if qkv_buffers.value is None else write(qkv_buffers.value, value)

    def finish(
        self, hidden_states: Tensor, attn_output: Tensor, temb: Tensor, encoder_kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the layer's output, given the self-attention's, which is not projected yet."""
        _, _, gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = self.modulation(temb)
        attn_output = self.attn1.to_out[0](attn_output.flatten(2))
        hidden_states = (hidden_states + attn_output.view_as(hidden_states) * gate_msa).to(hidden_states.dtype)

        query = self.attn2.query(self.norm2(hidden_states).to(hidden_states.dtype))
        attn_output = self.attn2.to_out[0](attention(query, *encoder_kv))
        hidden_states = hidden_states + attn_output.view_as(hidden_states)

        norm_hidden_states = (self.norm3(hidden_states) * (1 + c_scale_msa) + c_shift_msa).to(hidden_states.dtype)
        return (hidden_states + self.ffn(norm_hidden_states) * c_gate_msa).to(hidden_states.dtype)

    def modulation(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of the self-attention, then of the feed-forward [B, F or 1, 1, D], float32."""
        return (self.scale_shift_table + temb).float().split(1, dim=2)


def write(buffer: Tensor, tensor: Tensor) -> Tensor:
    """Write ``tensor`` to ``buffer`` in the buffer's dtype and shape, and return the buffer."""
    return buffer.copy_(saturating_cast(tensor, buffer.dtype).view(buffer.shape))


class CausalWanTransformer(nn.Module):
    """Predict the flow (noise - clean) of a block of latent frames, given what the cache holds of earlier frames."""

    patch_size = (1, 2, 2)

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, self.patch_size, self.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks: Any = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = FP32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(config.dim, config.out_dim * 4)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.context_parallel: ContextParallel | None = None
        """The ranks that each compute some tokens of every frame; inputs and outputs are whole."""

    def fuse_qkv_projections(self) -> None:
        """Compute the queries, keys and values of every self-attention as one product. Names and weights stay."""
        for block in self.blocks:
            block.attn1.fuse()

    def embed_text(self, prompt_embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return every layer's cross-attention keys and values [B, L, H, d] of prompt embeddings [B, L, text_dim]."""
        text = self.condition_embedder.text_embedder(prompt_embeds)
        return [block.attn2.key_value(text) for block in self.blocks]

    def rotary_emb(self, positions: Sequence[int], height: int, width: int, cached: bool = False) -> RotaryEmb:
        """Return the rotary table of latent frames of ``height`` x ``width`` pixels at consecutive ``positions``.

        On several ranks it is that of this rank's tokens: those it computes, or, with ``cached``, those in its cache.
        """
        # on the device, so that nothing is copied: a copy from pageable memory would wait for the block before
        frame_index = torch.arange(positions[0], positions[-1] + 1, device=self.scale_shift_table.device)
        cos, sin = rope_table(frame_index, height // 2, width // 2, self.config.head_dim)
        parallel = self.context_parallel
        if parallel is not None:
            shard = parallel.ring_shard if cached else parallel.shard
            frames = (part.view(1, len(positions), -1, part.shape[-1]) for part in (cos, sin))
            cos, sin = (shard(part).flatten(0, 2)[:, None] for part in frames)
        return cos, sin

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        rotary_emb: RotaryEmb,
        encoder_kv: list[tuple[Tensor, Tensor]],
        kv_cache: KVCache,
    ) -> Tensor:
        """Predict the flow and store the frames' keys and values.

        Args:
            latents: noisy latents [B, F, C, h, w]; h and w are even.
            timestep: [B, F] in [0, 1000], or [B, 1] where it is the same for all frames.
            rotary_emb: what ``self.rotary_emb`` returns for these frames.
            encoder_kv: what ``embed_text`` returns.
            kv_cache: told by ``set_positions`` which frames these are.

        Returns:
            The flow [B, F, C, h, w] in the dtype of ``latents``.
        """
        embedding, temb = self.condition_embedder.embed_time(timestep)
        hidden_states = self._run_blocks(latents, temb, rotary_emb, encoder_kv, kv_cache)
        out = self.project_out(hidden_states, embedding)
        return self.unpatchify(out if self.context_parallel is None else self.context_parallel.all_gather(out), latents)

    def update_cache(
        self,
        latents: Tensor,
        timestep: Tensor,
        rotary_emb: RotaryEmb,
        encoder_kv: list[tuple[Tensor, Tensor]],
        kv_cache: KVCache,
    ) -> None:
        """Store what ``forward`` stores, without what follows on the last layer's keys and values."""
        _, temb = self.condition_embedder.embed_time(timestep)
        self._run_blocks(latents, temb, rotary_emb, encoder_kv, kv_cache, only_cache=True)

    def _run_blocks(
        self,
        latents: Tensor,
        temb: Tensor,
        rotary_emb: RotaryEmb,
        encoder_kv: list[tuple[Tensor, Tensor]],
        kv_cache: KVCache,
        only_cache: bool = False,
    ) -> Tensor:
        """Return the last layer's output [B, F, S, D]; with ``only_cache`` that layer stops at its keys and values."""
        hidden_states = self.patchify(latents)
        batch, frames, tokens, _ = hidden_states.shape
        shape = (batch, frames * tokens, self.config.num_heads, self.config.head_dim)
        for layer, block in enumerate(self.blocks):
            last = layer == self.config.num_layers - 1
            self_attention = CausalSelfAttention(layer, kv_cache, self.context_parallel, only_cache and last)
            qkv_buffers = self_attention.qkv_buffers(shape)
            hidden_states = block(hidden_states, temb, rotary_emb, encoder_kv[layer], self_attention, qkv_buffers)
        return hidden_states

    def compile_repeated_blocks(self) -> None:
        """Compile what a block computes before and after its self-attention, one code for all blocks. Idempotent."""
        from inferix.runtime.compile_cache import compile_methods  # takes seconds to import

        compile_methods(self.blocks, "project_qkv", "finish")

    def patchify(self, latents: Tensor) -> Tensor:
        """Return the tokens [B, F, S, D] of latents [B, F, C, h, w]: the patch convolution, as one product."""
        tokens = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # [B, F, C, h/2, 2, w/2, 2]
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        if self.context_parallel is not None:
            tokens = self.context_parallel.shard(tokens)
        weight = self.patch_embedding.weight
        return F.linear(tokens.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def project_out(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """Return the flow's tokens [B, F, S, 4*C] of hidden states [B, F, S, D]."""
        shift, scale = (self.scale_shift_table + embedding[:, :, None]).float().split(1, dim=2)
        return self.proj_out((self.norm_out(hidden_states) * (1 + scale) + shift).to(hidden_states.dtype))

    @staticmethod
    def unpatchify(tokens: Tensor, latents: Tensor) -> Tensor:
        """Return the flow, shaped like ``latents``, of its tokens [B, F, S, 4*C]."""
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        out = tokens.unflatten(-1, (2, 2, -1)).unflatten(2, (height, width))  # [B, F, h/2, w/2, 2, 2, C]
        return out.permute(0, 1, 6, 2, 4, 3, 5).reshape_as(latents).to(latents.dtype)
