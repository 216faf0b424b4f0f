"""From noise to clean latents, block by block: the loop that Self-Forcing and CausVid share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from inferix.config import PipelineConfig
from inferix.errors import InputError
from inferix.models.attention import FP8
from inferix.models.base_model import BaseModel
from inferix.models.kv_cache import KVCache
from inferix.models.transformer import CausalWanTransformer, places
from inferix.scheduler import FlowMatchScheduler


class WanDiffusionWrapper:
    """The transformer and its noise schedule: ``model`` is what gets quantized."""

    def __init__(self, model: CausalWanTransformer, config: PipelineConfig):
        self.model = model
        self.scheduler = FlowMatchScheduler(
            config.timestep_shift, config.denoising_step_list, config.warp_denoising_step
        )
        self.weights: list[int] = []
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """To be called when what the graphs were captured of is gone."""
        self.graphs: dict[tuple, CapturedForward] = {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        """Memory that all graphs share: they run one after the other, and each result is used before the next."""

    def prepare(self) -> None:
        """Before a clip: fuse what can be fused, and forget what was captured of other weights."""
        self.model.fuse_qkv()
        if self.weights != places([self.model]):
            self.weights = places([self.model])
            self.forget_graphs()

    def flow(self, latents: Tensor, timestep: float, rope: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """The predicted flow of latents [B, F, C, h, w] that are all at ``timestep``; valid until the next call."""
        timesteps = torch.full((latents.shape[0], 1), timestep, device=latents.device, dtype=torch.float32)
        if not latents.is_cuda:
            return self.model(latents, timesteps, rope, cache)
        key = (id(cache), *cache.slots, cache.valid_frames, latents.shape)
        if key not in self.graphs:
            self.graphs[key] = CapturedForward(self.model, latents, timesteps, rope, cache, self.pool)
        return self.graphs[key](latents, timesteps, *rope)


class CapturedForward:
    """One forward of the transformer as a CUDA graph: for one place in one cache, whose tensors must stay where they are."""

    def __init__(self, model: CausalWanTransformer, latents: Tensor, timesteps: Tensor, rope, cache: KVCache, pool):
        self.inputs = [tensor.clone() for tensor in (latents, timesteps, *rope)]
        latents, timesteps, *rope = self.inputs
        stream = torch.cuda.Stream()  # warm up where nothing else runs: compiling and choosing kernels is not captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(latents, timesteps, tuple(rope), cache)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = model(latents, timesteps, tuple(rope), cache)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static, tensor in zip(self.inputs, inputs):
            static.copy_(tensor)
        self.graph.replay()
        return self.output


class CausalInferencePipeline:
    """Text encoder, few-step causal generator and VAE."""

    def __init__(self, config: PipelineConfig, base: BaseModel, device: torch.device, dtype: torch.dtype):
        self.config = config
        self.device = device
        self.dtype = dtype
        self.generator = WanDiffusionWrapper(base.transformer(), config)
        self.text_encoder = base.text_encoder()
        self.vae = base.vae()
        self.kv_cache_dtype = dtype
        self.cache: KVCache | None = None

    def set_kv_cache_dtype(self, name: str) -> None:
        """``fp8``: keys and values in 8 bits, half the cache, and attention in 8 bits where the GPU can; ``auto``: not."""
        self.kv_cache_dtype = FP8 if name == "fp8" else self.dtype

    def to_device(self) -> None:
        for part in (self.generator.model, self.text_encoder, self.vae):
            if part is not None:
                part.to(self.device, self.dtype)
        if self.device.type == "cuda":
            self.generator.model.compile()

    def randn(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None) -> Tensor:
        """One draw, on the generator's own device, so that a seed means the same wherever the model runs."""
        source = generator.device if generator is not None else self.device
        return torch.randn(shape, generator=generator, device=source, dtype=self.dtype).to(self.device)

    def blocks(self, num_noise_frames: int, num_context_frames: int = 0) -> list[int]:
        """Frames of every block: those of the context first, where a lone first frame (an image) is a block of its own.

        Raises InputError where the frames are no whole number of blocks.
        """
        size = self.config.num_frame_per_block
        lone = num_context_frames % size if size > 1 else 0
        if lone > 1 or num_noise_frames % size or num_noise_frames < 0:
            raise InputError(
                f"{num_noise_frames} latent frames after {num_context_frames} given ones: "
                f"both must come in blocks of {size} (one more given frame may come first)"
            )
        return [1] * lone + [size] * ((num_context_frames - lone + num_noise_frames) // size)

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the clip's clean latents block after block, the given ones first.

        Args:
            noise: [B, F, C, h, w], what the frames after the context start from.
            prompt_embeds: [B, L, text_dim].
            context: clean latents [B, F', C, h, w] that the clip starts with.
            generator: source of the re-noising draws.
        """
        context = noise[:, :0] if context is None else context
        given, (batch, _, _, height, width) = context.shape[1], noise.shape
        self.generator.prepare()
        model, cache = self.generator.model, self.empty_cache(batch, given + noise.shape[1], height * width // 4)
        cache.set_text(model.embed_text(prompt_embeds.to(self.dtype)))
        latents = torch.cat([context.to(noise), noise], dim=1).to(self.dtype)
        start = 0
        for size in self.blocks(noise.shape[1], given):
            cache.place(start, size)
            rope = model.rope(torch.arange(start, start + size, device=self.device), height, width)
            block = latents[:, start : start + size]
            if start >= given:
                block = self.denoise_block(block, rope, cache, generator)
            yield block
            start += size
            if start < latents.shape[1]:  # nothing will look back at the last block
                self.generator.flow(block, self.config.context_noise, rope, cache)

    def denoise_block(
        self, noise: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, generator: torch.Generator | None
    ) -> Tensor:
        """Noise [B, F, C, h, w] to clean latents: predict, re-noise to the next level, predict again."""
        scheduler, x0 = self.generator.scheduler, None
        for timestep, sigma in zip(scheduler.denoising_timesteps, scheduler.denoising_sigmas):
            noisy = noise if x0 is None else scheduler.add_noise(x0, self.randn(noise.shape, generator), sigma)
            x0 = scheduler.to_x0(noisy, self.generator.flow(noisy, timestep, rope, cache), sigma)
        return x0

    def empty_cache(self, batch: int, num_frames: int, tokens_per_frame: int) -> KVCache:
        """A cache for the whole clip, or for the rolling window that the config asks for; the last clip's if it fits."""
        window = num_frames if self.config.local_attn_size == -1 else min(self.config.local_attn_size, num_frames)
        shape = (batch, window, tokens_per_frame)
        if self.cache is None or self.cache.shape != shape or self.cache.dtype != self.kv_cache_dtype:
            self.cache = None  # so that the old one's memory is free before the new one is made
            self.generator.forget_graphs()
            self.cache = KVCache(
                self.generator.model.config, shape, self.device, self.kv_cache_dtype, self.dtype, self.config.sink_size
            )
        return self.cache

    @torch.no_grad()
    def inference(
        self,
        noise: Tensor,
        text_prompts: list[str],
        initial_latent: Tensor | None = None,
        start_latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_latents: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate one clip.

        Args:
            noise: [B, F, 16, h, w].
            text_prompts: one for each batch entry.
            initial_latent: clean latents [B, F', 16, h, w] that come before the frames of ``noise``.
            start_latents: clean latents that take the place of the first frames of ``noise``.
            generator: source of the re-noising draws.
            return_latents: give the latents as well.

        Returns:
            The video [B, T, 3, 8h, 8w] in [0, 1]; with ``return_latents`` also its latents [B, F, 16, h, w].
        """
        noise = noise.to(self.device, self.dtype)
        context = initial_latent
        if start_latents is not None:
            context, noise = start_latents, noise[:, start_latents.shape[1] :]
        blocks = self.denoise(noise, self.text_encoder(text_prompts), context, generator)
        latents = torch.cat(list(blocks), dim=1)
        video = self.vae.decode(latents)
        return (video, latents) if return_latents else video
