"""From noise to clean latents, block by block: the loop that Self-Forcing and CausVid share."""

import sys
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn
from tqdm import tqdm

from inferix.config import ParallelConfig, PipelineConfig
from inferix.errors import InputError
from inferix.models.attention import FP8
from inferix.models.base_model import BaseModel
from inferix.models.kv_cache import KVCache, OffloadedKVCache
from inferix.models.transformer import CausalWanTransformer, places
from inferix.parallel import GRAPHS, SequenceParallel, check_sizes
from inferix.scheduler import FlowMatchScheduler


def num_bytes(module: nn.Module, itemsize: int) -> int:
    """Bytes of the weights of ``module`` at so many for each."""
    return sum(weight.numel() for weight in module.parameters()) * itemsize


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
            if not self.graphs and (self.model.parallel is None or self.model.parallel.leads):
                tqdm.write("compiling for this GPU: 10 to 40 s, less where it was done before", file=sys.stderr)
            self.graphs[key] = CapturedForward(self.model, latents, timesteps, rope, cache, self.pool)
        return self.graphs[key](latents, timesteps, *rope)


@cache
def warm_up_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 34 MB for every stream that it was ever used on."""
    return torch.cuda.Stream()


class CapturedForward:
    """One forward of the transformer as a CUDA graph: for one place in one cache, whose tensors must stay where they are."""

    def __init__(self, model: CausalWanTransformer, latents: Tensor, timesteps: Tensor, rope, cache: KVCache, pool):
        self.inputs = [tensor.clone() for tensor in (latents, timesteps, *rope)]
        latents, timesteps, *rope = self.inputs
        stream = warm_up_stream()  # where nothing else runs: compiling and choosing kernels is not captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(latents, timesteps, tuple(rope), cache)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # What other threads do, such as NCCL's watchdog, is none of the capture's business.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = model(latents, timesteps, tuple(rope), cache)
        if model.parallel is not None:
            GRAPHS.add(self.graph)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static, tensor in zip(self.inputs, inputs):
            static.copy_(tensor)
        self.graph.replay()
        return self.output


class CausalInferencePipeline:
    """Text encoder, few-step causal generator and VAE.

    Of several ranks the first has them all, and is the one to be called; the others have the generator, and ``follow``.
    """

    def __init__(
        self,
        config: PipelineConfig,
        base: BaseModel,
        device: torch.device,
        dtype: torch.dtype,
        parallel: ParallelConfig | None = None,
        enable_kv_offload: bool = False,
    ):
        parallel = parallel or ParallelConfig()
        self.config = config
        self.device = device
        self.dtype = dtype
        self.generator = WanDiffusionWrapper(base.transformer(), config)
        height, width = config.image_or_video_shape[-2:]
        check_sizes(parallel, self.generator.model.config.num_heads, height * width // 4)
        self.parallel = SequenceParallel(parallel, device) if parallel.world_size > 1 else None
        self.generator.model.parallel = self.parallel
        self.leads = parallel.rank == 0
        self.text_encoder = base.text_encoder() if self.leads else None
        self.vae = base.vae() if self.leads else None
        self.kv_cache_dtype = dtype
        self.enable_kv_offload = enable_kv_offload
        self.low_memory = False
        self.cache: KVCache | None = None

    def gpu_memory(self, low_memory: bool) -> dict[str, int]:
        """Bytes that a clip will take on the device, by part.

        Weights and cache are counted; for activations it is a rule of thumb, on the safe side.
        """
        model, item = self.generator.model.config, self.dtype.itemsize
        batch, clip, _, height, width = self.config.image_or_video_shape
        ranks = 1 if self.parallel is None else self.parallel.world_size
        tokens = height * width // 4 // ranks
        layer = 2 * batch * min(clip, self.config.rolling_frames()) * tokens * model.dim * item
        kept = 2 + -(-model.num_layers // OffloadedKVCache.RESIDENT)  # layers on the device when the cache is offloaded
        parts = {
            "transformer": num_bytes(self.generator.model, item),
            "key-value cache": layer * (kept if self.enable_kv_offload or low_memory else model.num_layers),
            "activations": 4
            * batch
            * self.config.num_frame_per_block
            * tokens
            * (model.ffn_dim + 8 * model.dim)
            * item,
        }
        if self.leads:
            encoder, vae = self.text_encoder.model, self.vae.model
            parts["text encoder"] = num_bytes(encoder.encoder.block[0] if low_memory else encoder, item)
            parts["VAE"] = num_bytes(vae, item) + num_bytes(self.vae.decoder, item)
            # In pixel frames of the widest layer: what its convolutions remember, and seven for each that goes through.
            widest = 23 + 7 * (1 if low_memory else 12)
            parts["VAE's activations"] = widest * batch * 64 * height * width * vae.config.base_dim * item
        return parts

    def set_kv_cache_dtype(self, name: str) -> None:
        """``fp8``: keys and values in 8 bits, half the cache, and attention in 8 bits where the GPU can.

        ``auto``: in the dtype of everything else; with low memory in 8 bits, where the GPU has a format for that.
        """
        cuda = self.device.type == "cuda"
        small = self.low_memory and not (cuda and torch.cuda.get_device_capability(self.device) < (8, 9))
        self.kv_cache_dtype = FP8 if name == "fp8" or small else self.dtype

    def to_device(self, low_memory: bool = False) -> None:
        """Move all parts to the device.

        With ``low_memory`` the text encoder's weights and the cache stay in host memory, from where each layer's come
        when it is their turn, and the VAE decodes frame by frame.
        """
        self.low_memory = low_memory
        self.enable_kv_offload |= low_memory
        self.set_kv_cache_dtype("auto")
        self.generator.model.to(self.device, self.dtype)
        if self.text_encoder is not None:
            self.text_encoder.to(self.device, self.dtype, block_by_block=low_memory)
        if self.vae is not None:
            self.vae.to(self.device, self.dtype)
            self.vae.frugal = low_memory
        if self.device.type == "cuda":
            self.generator.model.compile()

    def draw(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None) -> Tensor:
        """One draw, on the generator's own device, so that a seed means the same wherever the model runs."""
        source = generator.device if generator is not None else self.device
        return torch.randn(shape, generator=generator, device=source, dtype=self.dtype).to(self.device)

    def randn(self, shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None) -> Tensor:
        """``draw`` for all ranks, of whose generators the first one's counts."""
        drawn = self.draw(shape, generator)
        return drawn if self.parallel is None else self.parallel.share(drawn)

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
        num_frames: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the clip's clean latents block after block, the given ones first.

        Args:
            noise: [B, F, C, h, w], what the frames after the context start from.
            prompt_embeds: [B, L, text_dim].
            context: clean latents [B, F', C, h, w] that the clip starts with.
            generator: source of the re-noising draws.
            num_frames: frames after the context, where they are more than ``noise`` has: theirs is drawn when they come,
                so that memory does not grow with the length.
        """
        context = noise[:, :0] if context is None else context
        blocks = self.blocks(num_frames or noise.shape[1], context.shape[1])
        inputs = [tensor.to(self.device, self.dtype) for tensor in (noise, prompt_embeds, context)]
        if self.parallel is None:
            yield from self.work(blocks, *inputs, generator)
            return
        self.parallel.busy = True
        self.parallel.tell((blocks, [tensor.shape for tensor in inputs]))
        inputs = [self.parallel.share(tensor) for tensor in inputs]
        for number, block in enumerate(self.work(blocks, *inputs, generator), start=1):
            self.parallel.busy = False
            try:
                yield block
            except GeneratorExit:
                if number < len(blocks):
                    self.parallel.tell(False)
                raise
            self.parallel.busy = number < len(blocks)

    @torch.no_grad()
    def follow(self) -> None:
        """Of every rank but the first: take part in what that one denoises, until it ends."""
        while (clip := self.parallel.tell()) is not None:
            blocks, shapes = clip
            inputs = [torch.empty(shape, device=self.device, dtype=self.dtype) for shape in shapes]
            for _ in self.work(blocks, *(self.parallel.share(tensor) for tensor in inputs), None):
                pass

    def work(
        self,
        blocks: list[int],
        noise: Tensor,
        prompt_embeds: Tensor,
        context: Tensor,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        """``denoise`` on this rank; between two blocks it hears whether to go on."""
        given, total, (batch, _, *pixels) = context.shape[1], sum(blocks), noise.shape
        self.generator.prepare()
        model, cache = self.generator.model, self.empty_cache(batch, total, pixels[-2] * pixels[-1] // 4)
        cache.set_text(model.embed_text(prompt_embeds))
        start = 0
        for size in blocks:
            cache.place(start, size)
            rope = model.rope(torch.arange(start, start + size, device=self.device), *pixels[-2:])
            if start < given:
                block = context[:, start : start + size]
            else:
                drawn = noise[:, start - given : start - given + size]
                drawn = drawn if drawn.shape[1] else self.randn((batch, size, *pixels), generator)
                block = self.denoise_block(drawn, rope, cache, generator)
            yield block
            start += size
            if start == total or (self.parallel is not None and not self.parallel.tell(True)):
                return  # nothing will look back at the last block
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
        """A cache for the whole clip, or for the rolling window of a longer one; the last clip's if it fits."""
        shape = (batch, min(num_frames, self.config.rolling_frames()), tokens_per_frame)
        if self.cache is None or self.cache.shape != shape or self.cache.dtype != self.kv_cache_dtype:
            self.cache = None  # so that the old one's memory is free before the new one is made
            self.generator.forget_graphs()
            self.cache = (OffloadedKVCache if self.enable_kv_offload else KVCache)(
                self.generator.model.config,
                shape,
                self.device,
                self.kv_cache_dtype,
                self.dtype,
                self.config.sink_size,
                self.parallel,
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
