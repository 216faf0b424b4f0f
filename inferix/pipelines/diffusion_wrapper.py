"""The transformer together with its noise schedule and the current prompt."""

from collections.abc import Callable

import torch
from torch import Tensor

from inferix.config import PipelineConfig
from inferix.models.kv_cache import KVCache
from inferix.models.scheduler import FlowMatchScheduler
from inferix.models.transformer import CausalWanTransformer, RotaryEmb


class WanDiffusionWrapper:
    """The transformer, its noise schedule and the current prompt; ``model`` is what gets quantized."""

    def __init__(self, model: CausalWanTransformer, config: PipelineConfig):
        self.model = model
        self.scheduler = FlowMatchScheduler(config.timestep_shift)
        self.steps = self.scheduler.steps(config.denoising_step_list, config.warp_denoising_step)
        first_chunk = config.denoising_step_list_first_chunk or config.denoising_step_list
        self.first_chunk_steps = self.scheduler.steps(first_chunk, config.warp_denoising_step)
        self.encoder_kv: list[tuple[Tensor, Tensor]] = []
        """Every layer's cross-attention keys and values [B, L, H, d], always in the same memory."""

    def set_prompt(self, prompt_embeds: Tensor, kv_cache: KVCache) -> None:
        """Compute the cross-attention keys and values of embeddings [B, L, text_dim].

        On a GPU all prompts but the first are computed by a CUDA graph, which belongs to ``kv_cache``.
        """
        if not self.encoder_kv or self.encoder_kv[0][0].shape[:2] != prompt_embeds.shape[:2]:
            self.encoder_kv = self.model.embed_text(prompt_embeds)
        elif kv_cache.graphs is None:
            self._store_prompt(prompt_embeds)
        else:
            key = ("prompt", self.encoder_kv[0][0].data_ptr())
            kv_cache.graphs(key, key, self._store_prompt, prompt_embeds)

    def _store_prompt(self, prompt_embeds: Tensor) -> Tensor:
        for old_layer, new_layer in zip(self.encoder_kv, self.model.embed_text(prompt_embeds)):
            for old, new in zip(old_layer, new_layer):
                old.copy_(new)
        return prompt_embeds

    def predict_flow(self, latents: Tensor, timestep: float, rotary_emb: RotaryEmb, kv_cache: KVCache) -> Tensor:
        """Return the flow of latents [B, F, C, h, w] that are all at ``timestep``; valid until the next call.

        On a GPU the forward is replayed from a CUDA graph, captured at the first call for these frames of the cache.
        """
        inputs = (latents, self._timesteps(latents, timestep), *rotary_emb)
        if kv_cache.graphs is None:
            return self._forward(kv_cache)(*inputs)
        return kv_cache.graphs(*self._graph_keys(latents, kv_cache), self._forward(kv_cache), *inputs)

    def capture(self, latents: Tensor, rotary_emb: RotaryEmb, kv_cache: KVCache) -> None:
        """Capture the graph that ``predict_flow`` will replay for latents of this shape and the cache's current frames."""
        assert kv_cache.graphs is not None
        inputs = (latents, self._timesteps(latents, 0.0), *rotary_emb)
        kv_cache.graphs.capture(*self._graph_keys(latents, kv_cache), self._forward(kv_cache), *inputs)

    def _forward(self, kv_cache: KVCache) -> Callable[..., Tensor]:
        def forward(latents: Tensor, timesteps: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return self.model(latents, timesteps, (cos, sin), self.encoder_kv, kv_cache)

        return forward

    @staticmethod
    def _timesteps(latents: Tensor, timestep: float) -> Tensor:
        return torch.full((latents.shape[0], 1), timestep, device=latents.device, dtype=torch.float32)

    @staticmethod
    def _graph_keys(latents: Tensor, kv_cache: KVCache) -> tuple[tuple, tuple]:
        memory, shapes = kv_cache.graph_key
        return (memory, latents.shape), (shapes, latents.shape)
