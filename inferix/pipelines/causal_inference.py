"""From noise to clean latents, block by block: the loop that all causal models share."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, repeat

import torch
from torch import Tensor
from tqdm import tqdm

from inferix.config import ParallelConfig, PipelineConfig
from inferix.distributed.context_parallel import ContextParallel, check_sizes
from inferix.errors import InputError
from inferix.models.attention import FP8
from inferix.models.base_model import WanCheckpoint
from inferix.models.causal_attention import rotate_sinks
from inferix.models.kv_cache import KVCache, WindowConfig
from inferix.models.kv_offload import OffloadedKVCache
from inferix.models.scheduler import DenoisingStep
from inferix.models.text_encoder import TextEncoder
from inferix.models.transformer import CausalWanTransformer, RotaryEmb
from inferix.models.vae import VAE
from inferix.pipelines.diffusion_wrapper import WanDiffusionWrapper
from inferix.pipelines.noise import randn
from inferix.pipelines.storyboard import switch_at_frames
from inferix.pipelines.workers import ClipPlan, PromptEmbeds, Workers
from inferix.runtime import triton_cache
from inferix.runtime.cuda_graphs import signature
from inferix.runtime.memory import num_bytes, use_expandable_segments
from inferix.runtime.overlap import short_switch_interval
from inferix.runtime.staging import move
from inferix.runtime.startup import STARTUP


class CausalInferencePipeline:
    """Text encoder, few-step causal generator and VAE.

    On several ranks the main process has all of them and is called; the others have the generator and the VAE's decoder
    and run ``worker_loop``.
    """

    def __init__(
        self,
        config: PipelineConfig,
        base: WanCheckpoint,
        device: torch.device,
        dtype: torch.dtype,
        parallel: ParallelConfig | None = None,
        enable_kv_offload: bool = False,
    ):
        parallel = parallel or ParallelConfig()
        if device.type == "cuda":
            triton_cache.prepare(device)
            if device.index is not None:
                torch.cuda.set_device(device)  # CUDA graphs, Triton's kernels and cuDNN's handle are its
        self.config, self.device, self.dtype = config, device, dtype
        self.generator = WanDiffusionWrapper(base.transformer(), config)
        height, width = config.image_or_video_shape[-2:]
        check_sizes(parallel, self.generator.model.config.num_heads, height * width // 4)
        self.context_parallel = ContextParallel(parallel, device) if parallel.world_size > 1 else None
        self.generator.model.context_parallel = self.context_parallel
        self.is_main_process = parallel.rank == 0
        # None on the other ranks, which have no use for them; so is a VAE that is not shared
        self.vae: VAE = base.vae()
        if self.context_parallel is not None:
            if self.vae.can_share:
                self.vae.share(self.context_parallel)
            elif not self.is_main_process:
                self.vae = None  # type: ignore[assignment]
        self.workers = Workers(self.context_parallel, device, dtype, self.vae)
        self.text_encoder: TextEncoder = base.text_encoder() if self.is_main_process else None  # type: ignore[assignment]
        self.offload_requested = enable_kv_offload
        self.kv_cache_dtype_name = "auto"
        self.low_memory = False
        self.kv_cache: KVCache | None = None
        self.cache_key: tuple = ()

    def set_transformer(self, model: CausalWanTransformer) -> None:
        """Generate with ``model``, of other sizes than the old one, from now on."""
        model.context_parallel = self.context_parallel
        self.generator = WanDiffusionWrapper(model, self.config)

    @property
    def enable_kv_offload(self) -> bool:
        """Whether the cache is kept in host memory."""
        return self.offload_requested or self.low_memory

    @property
    def kv_cache_dtype(self) -> torch.dtype:
        """The dtype of cached keys and values."""
        has_fp8 = self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) >= (8, 9)
        return FP8 if self.kv_cache_dtype_name == "fp8" or (self.low_memory and has_fp8) else self.dtype

    def set_kv_cache_dtype(self, name: str) -> None:
        """Set what keys and values are kept in.

        ``fp8``: 8 bits, half the cache, with 8-bit attention where the GPU has it. ``auto``: the dtype of the model, or, with
        low memory, 8 bits where the GPU has such a format. Raises InputError for another name.
        """
        if name not in ("auto", "fp8"):
            raise InputError(f"the key-value cache's dtype is auto or fp8, not {name!r}")
        self.kv_cache_dtype_name = name

    def to_device(self, low_memory: bool = False) -> None:
        """Move all parts to the device, in the dtype they run in, and compile the transformer on a GPU.

        With ``low_memory`` the text encoder's weights and the cache stay in host memory, one layer at a time is copied to the
        device, and the VAE decodes frame by frame. So does the transformer, until it is quantized (``quantize_dynamic`` with
        ``device``) or the first clip begins.
        """
        self.low_memory = low_memory
        if low_memory:
            use_expandable_segments()
        weights_device, on_gpu = torch.device("cpu") if low_memory else self.device, self.device.type == "cuda"
        with ThreadPoolExecutor(4) as threads, short_switch_interval():
            tasks: list[Future] = [threads.submit(move, self.generator.model, weights_device, self.dtype)]
            if self.text_encoder is not None:
                tasks.append(threads.submit(self.text_encoder.to, self.device, self.dtype, on_demand=low_memory))
            if on_gpu:
                tasks.append(threads.submit(self.generator.model.compile_repeated_blocks))  # imports the compiler
            if self.vae is not None:
                self.vae.low_memory = low_memory
                self.vae.to(self.device, self.dtype)
                if on_gpu:  # beside the others, in the thread that will decode
                    self.vae.warm_up((1, self.config.num_frame_per_block, *self.config.image_or_video_shape[2:]))
            for task in tasks:
                task.result()  # raises what went wrong

    def draw(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Return one draw of standard normal noise."""
        return randn(shape, generator, self.device, self.dtype)

    def randn(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Return the main process's draw on every rank."""
        drawn = self.draw(shape, generator) if self.is_main_process else None
        return self.workers.broadcast(drawn, tuple(shape))

    def plan(self, noise_shape: Sequence[int], num_context_frames: int, num_frames: int | None) -> ClipPlan:
        """Return the blocks of a clip of ``num_frames`` after the given ones (None: without end).

        Raises InputError where the frames are no whole number of blocks.
        """
        size = self.config.num_frame_per_block
        lone, generated = num_context_frames % size, num_frames or 0
        if lone > 1 or generated % size or generated < 0:
            raise InputError(
                f"{num_frames} latent frames after {num_context_frames} given ones: "
                f"both must come in blocks of {size} (one more given frame may come first)"
            )
        total = None if num_frames is None else num_context_frames + num_frames
        batch, _, channels, height, width = noise_shape
        return ClipPlan(batch, num_context_frames, total, size, (channels, height, width))

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        prompt_embeds: Tensor | Iterator[Tensor | PromptEmbeds],
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_frames: int | None = -1,
    ) -> Iterator[Tensor]:
        """Yield a clip's clean latents [B, b, C, h, w] block by block, the given ones first.

        Args:
            noise: [B, F, C, h, w], what the frames after the context start from.
            prompt_embeds: [B, L, text_dim], or an iterator that is asked before every block, gives the same object while the
                prompt stays, and may end the clip by ending.
            context: clean latents [B, F', C, h, w] that the clip starts with.
            generator: source of the re-noising draws.
            num_frames: frames after the context, where they are more than ``noise`` has (None: without end); the noise of
                the others is drawn block by block, so that memory does not grow with the length.
        """
        context = noise[:, :0] if context is None else context
        num_frames = noise.shape[1] if num_frames == -1 else num_frames
        plan = self.plan(noise.shape, context.shape[1], num_frames)
        plan = replace(plan, prompts_change=not isinstance(prompt_embeds, Tensor))
        noise, context = (tensor.to(self.device, self.dtype) for tensor in (noise, context))
        embeds = each_block(repeat(prompt_embeds) if isinstance(prompt_embeds, Tensor) else prompt_embeds)
        self.workers.start_clip(plan)
        done = 0
        for block in self._denoise_local(plan, embeds, noise, context, generator):
            self.workers.end_block()
            done += block.shape[1]
            try:
                yield block
            except GeneratorExit:
                if done != plan.num_frames:
                    self.workers.next_block(False)
                raise

    @torch.no_grad()
    def worker_loop(self) -> None:
        """On every rank but the main process: take part in what that one denoises, until it ends."""
        while (plan := self.workers.start_clip()) is not None:
            for _ in self._denoise_local(plan, None, None, None, None):
                pass

    def _denoise_local(
        self,
        plan: ClipPlan,
        embeds: Iterator[PromptEmbeds] | None,
        noise: Tensor | None,
        context: Tensor | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        """Compute ``denoise`` on this rank. The tensors are the main process's, None on the others."""
        kv_cache = self.new_cache(plan)
        context = self.workers.broadcast(context, (plan.batch, plan.num_context_frames, *plan.latent_shape))
        history: deque[Tensor] = deque(maxlen=-(-kv_cache.window.num_frames // plan.block_size) + 1)
        prompts, current = self.workers.prompts(embeds), None
        rotary_emb: RotaryEmb | None = None
        for start, size in plan.blocks():
            prompt = next(prompts, None)
            if prompt is None:
                return
            is_new = prompt is not current
            recache = is_new and start > 0 and (prompt.switch or self.config.prompt_switch) == "recache"
            if rotary_emb is not None and not recache:  # cache the last block clean
                self.generator.predict_flow(history[-1], self.config.context_noise, rotary_emb, kv_cache)
            if is_new:
                self.generator.set_prompt(prompt.embeds, kv_cache)
                current = prompt
            if recache:
                self.run_window(torch.cat(list(history), dim=1), start, plan, kv_cache)
            if start == 0:
                self.capture_ahead(plan, kv_cache)
            rotary_emb = self.set_positions(range(start, start + size), plan, kv_cache)
            if start < plan.num_context_frames:
                block = context[:, start : start + size]
            else:
                steps = self.generator.first_chunk_steps if start == plan.num_context_frames else self.generator.steps
                drawn = self.block_noise(noise, start, size, plan, generator)
                block = self.denoise_block(drawn, steps, rotary_emb, kv_cache, generator)
            history.append(block)
            yield block
            if start + size == plan.num_frames or not self.workers.next_block():
                return

    def capture_ahead(self, plan: ClipPlan, kv_cache: KVCache) -> None:
        """Compile and capture what the clip will need, before its first block, so that no later block waits for it."""
        if kv_cache.graphs is None or plan in kv_cache.prepared_plans:
            return
        if self.is_main_process and not kv_cache.prepared_plans:
            tqdm.write("compiling for this GPU: 10 to 40 s, less where it was done before", file=sys.stderr)
        window = kv_cache.window
        for start, size in islice(plan.blocks(), 2 * -(-window.num_frames // plan.block_size)):
            rotary_emb = self.set_positions(range(start, start + size), plan, kv_cache)
            latents = torch.zeros(plan.batch, size, *plan.latent_shape, device=self.device, dtype=self.dtype)
            self.generator.capture(latents, rotary_emb, kv_cache)
        if plan.prompts_change and self.config.prompt_switch == "recache" and not kv_cache.recached:
            zeros = latents.new_zeros(plan.batch, window.num_frames, *plan.latent_shape)
            for start in (window.num_frames, window.num_frames + plan.block_size):  # contiguous in the cache, and not
                self.run_window(zeros, start, plan, kv_cache)
        kv_cache.reset()
        kv_cache.prepared_plans.add(plan)
        STARTUP.mark("compile and capture")

    def block_noise(
        self, noise: Tensor | None, start: int, size: int, plan: ClipPlan, generator: torch.Generator | None
    ) -> Tensor:
        """Return the noise of a block [B, b, C, h, w]: of ``noise``, or drawn now where that has ended."""
        shape = (plan.batch, size, *plan.latent_shape)
        if not self.is_main_process:
            return self.workers.broadcast(None, shape)
        assert noise is not None
        first = start - plan.num_context_frames
        drawn = noise[:, first : first + size]
        return self.workers.broadcast(drawn if drawn.shape[1] else self.draw(shape, generator), shape)

    def denoise_block(
        self,
        noise: Tensor,
        steps: Sequence[DenoisingStep],
        rotary_emb: RotaryEmb,
        kv_cache: KVCache,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return the clean latents of a block [B, b, C, h, w]: predict, re-noise to the next level, predict again."""
        scheduler, x0 = self.generator.scheduler, None
        for timestep, sigma in steps:
            noisy = noise if x0 is None else scheduler.add_noise(x0, self.randn(noise.shape, generator), sigma)
            flow = self.generator.predict_flow(noisy, timestep, rotary_emb, kv_cache)
            x0 = scheduler.pred_x0(noisy, flow, sigma)
        assert x0 is not None  # there is at least one step
        return x0

    def set_positions(
        self, frames: Sequence[int], plan: ClipPlan, kv_cache: KVCache, keep_sinks: bool = True
    ) -> RotaryEmb:
        """Tell the cache which frames are computed next, move its sink frames, and return the frames' rotary table."""
        model, size = self.generator.model, plan.latent_shape[-2:]
        previous = kv_cache.sink_position
        kv_cache.set_positions(frames, keep_sinks)
        if kv_cache.sink_keys is not None and kv_cache.sink_position != previous:
            first = kv_cache.sink_position
            rotate_sinks(
                kv_cache, model.rotary_emb(range(first, first + kv_cache.window.sink_size), *size, cached=True)
            )
        return model.rotary_emb(frames, *size)

    def run_window(self, latents: Tensor, start: int, plan: ClipPlan, kv_cache: KVCache) -> None:
        """Cache the frames in the window before frame ``start`` anew, the last of the clean ``latents`` [B, F, C, h, w].

        In one forward, not from a graph, so that the cache holds what a new prompt makes of them (LongLive,
        arXiv 2509.22622). With ``global_sink`` the sink frames keep theirs once the window has rolled.
        """
        rolled, first = start > kv_cache.window.num_frames, max(0, start - kv_cache.window.num_frames)
        if rolled and self.config.global_sink:
            first += kv_cache.window.sink_size
        keep_sinks = not rolled or self.config.global_sink
        rotary_emb = self.set_positions(range(first, start), plan, kv_cache, keep_sinks)
        timestep = torch.full((plan.batch, 1), self.config.context_noise, device=self.device, dtype=torch.float32)
        window = latents[:, first - start :]
        self.generator.model.update_cache(window, timestep, rotary_emb, self.generator.encoder_kv, kv_cache)
        kv_cache.recached = True

    def new_cache(self, plan: ClipPlan) -> KVCache:
        """Return a cache for the whole clip, or for the rolling window of a longer one; the last clip's if it fits."""
        model, parallel = self.generator.model, self.context_parallel
        if self.low_memory:
            model.to(self.device)
        model.fuse_qkv_projections()
        height, width = plan.latent_shape[-2:]
        num_frames = min(plan.num_frames or self.config.window_frames, self.config.window_frames)
        tokens, heads = height * width // 4, model.config.num_heads
        if parallel is not None:
            tokens, heads = tokens // parallel.ring_size, heads // parallel.ulysses_size
        shape = (plan.batch, num_frames, tokens, heads, model.config.head_dim)
        sinks = min(self.config.sink_size, num_frames)
        window = WindowConfig(num_frames, sinks, plan.block_size, self.config.use_infinite_attention)
        kind = OffloadedKVCache if self.enable_kv_offload else KVCache
        wanted = (kind, shape, window, self.kv_cache_dtype, signature(model))
        if self.kv_cache is None or self.cache_key != wanted:
            self.kv_cache = None  # free the old one, and the graphs that belong to it, first
            self.kv_cache = kind(model.config.num_layers, shape, window, self.device, self.kv_cache_dtype, self.dtype)
            self.cache_key = wanted
            if self.low_memory and num_bytes(model) > 4e9:  # kernels so long gain nothing, and the VAE needs the memory
                self.kv_cache.graphs = None
        self.kv_cache.reset()
        return self.kv_cache

    @torch.no_grad()
    def inference(
        self,
        noise: Tensor,
        text_prompts: list[str] | None = None,
        initial_latent: Tensor | None = None,
        start_latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_latents: bool = False,
        text_prompts_list: Sequence[list[str]] | None = None,
        switch_frame_indices: Sequence[int] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Generate one clip.

        Args:
            noise: [B, F, 16, h, w].
            text_prompts: one for each batch entry.
            initial_latent: clean latents [B, F', 16, h, w] that come before the frames of ``noise``.
            start_latents: clean latents that take the place of the first frames of ``noise``.
            generator: source of the re-noising draws.
            return_latents: return the latents as well.
            text_prompts_list: instead of ``text_prompts``: prompts that follow on each other.
            switch_frame_indices: the latent frames from which on the second, third, ... of ``text_prompts_list`` are shown;
                each takes effect with the first block that does not begin before its frame.

        Returns:
            The video [B, T, 3, 8h, 8w] in [0, 1]; with ``return_latents`` also its latents [B, F, 16, h, w].

        Raises:
            InputError: if the frames are no whole number of blocks, or prompts and switches do not match.
        """
        noise = noise.to(self.device, self.dtype)
        context = initial_latent
        if start_latents is not None:
            context, noise = start_latents, noise[:, start_latents.shape[1] :]
        embeds: Tensor | Iterator[Tensor]
        if text_prompts_list is None:
            embeds = self.text_encoder(text_prompts or [])
        else:
            plan = self.plan(noise.shape, 0 if context is None else context.shape[1], noise.shape[1])
            encoded = [self.text_encoder(prompts) for prompts in text_prompts_list]
            embeds = switch_at_frames(encoded, switch_frame_indices, plan.blocks())
        latents = torch.cat(list(self.denoise(noise, embeds, context, generator)), dim=1)
        video = self.vae.decode(latents)
        return (video, latents) if return_latents else video


def each_block(prompts: Iterator[Tensor | PromptEmbeds]) -> Iterator[PromptEmbeds]:
    """Yield the prompt of every block, the same object while it stays."""
    given, current = None, None
    for prompt in prompts:
        if prompt is not given:
            given, current = prompt, prompt if isinstance(prompt, PromptEmbeds) else PromptEmbeds(prompt)
        assert current is not None
        yield current
