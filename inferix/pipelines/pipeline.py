"""The base class of the pipelines: builds the parts, loads weights, encodes prompts, saves files."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from inferix.checkpoints.containers import (
    QuantizedWeight,
    dequantize,
    infer_sizes,
    load_checkpoint,
    quantized_weights,
)
from inferix.checkpoints.files import load_strict
from inferix.checkpoints.lora import merge_lora
from inferix.config import ParallelConfig, load_config, with_size
from inferix.errors import InputError
from inferix.file_name import safe_file_name
from inferix.models.base_model import WanCheckpoint, empty_transformer
from inferix.models.config import TransformerConfig
from inferix.models.transformer import CausalWanTransformer
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.pipelines.noise import SampleGenerator
from inferix.pipelines.storyboard import Prompt
from inferix.pipelines.workers import PromptEmbeds
from inferix.runtime.startup import STARTUP
from inferix.video import VideoWriter


class Pipeline:
    """Builds the parts, loads a distilled checkpoint, generates and saves.

    Args:
        config_path: YAML with the reference projects' keys.
        default_config_path: YAML that ``config_path`` is laid over.
        wan_base_model_path: folder of the base model, Wan's layout or diffusers'.
        enable_kv_offload: keep the key-value cache in host memory: the same video, less GPU memory. Default: False for
            Self-Forcing, True for CausVid.
        parallel_config: how the ranks of a ``torchrun`` job share each video. Only the main process generates; the others
            call ``worker_loop``.
        device: default: the GPU if there is one.
        dtype: default: bfloat16 on a GPU, float32 on a CPU.
        transformer_weights: False leaves ``transformer`` on the meta device, for ``load_checkpoint``, or for ``dax``'s
            ``load_quantized``, with which no float weight is loaded. So does a base model without a transformer's file.
        vae: ``full``, or ``tiny`` for TAEHV, a small decoder in its place.
        tiny_vae_path: TAEHV's file; default: ``taew2_1.pth`` in the base model's folder, or in the folder of that.
        height: of the video in pixels, a multiple of 16; default: the config's.
        width: of the video, the same.

    Raises:
        InputError: if a file is missing, damaged or does not fit.
    """

    default_base_model_path = "weights/Wan2.1-T2V-1.3B"
    default_kv_offload = False

    def __init__(
        self,
        config_path: str | Path,
        default_config_path: str | Path | None = None,
        wan_base_model_path: str | Path | None = None,
        enable_kv_offload: bool | None = None,
        parallel_config: ParallelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transformer_weights: bool = True,
        vae: str = "full",
        tiny_vae_path: str | Path | None = None,
        height: int | None = None,
        width: int | None = None,
    ):
        self.config = with_size(load_config(config_path, default_config_path), height, width)
        self.parallel = parallel_config or ParallelConfig()
        cuda = torch.cuda.is_available()
        self.device = torch.device(device or (f"cuda:{self.parallel.local_rank}" if cuda else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        base = WanCheckpoint(
            wan_base_model_path or self.default_base_model_path, transformer_weights, vae, tiny_vae_path
        )
        if not base.has_config and self.parallel.world_size > 1:
            raise InputError(f"{base.folder} has no config.json, which several processes need; see weights/README.md")
        self.base = base
        offload = self.default_kv_offload if enable_kv_offload is None else enable_kv_offload
        self.pipeline = CausalInferencePipeline(self.config, base, self.device, self.dtype, self.parallel, offload)
        self.quantized_weights: dict[str, QuantizedWeight] = {}
        """The 8-bit weights of the loaded checkpoint, by module, for quantized layers of the same format."""
        self.loras: list[tuple[Path, float, int]] = []
        """The LoRAs that were merged: file, strength, number of modules that changed."""
        self.is_main_process = self.parallel.rank == 0
        """Whether this process generates: the only one, or the first one of a job."""
        self._prompt_cache: tuple[tuple[str | int, ...], Tensor] | None = None
        self.stage_seconds: dict[str, list[float]] | None = None
        """Set it to {} to record the seconds of every stage, call by call; the GPU is then synchronized after each."""
        STARTUP.mark("base model")

    @property
    def transformer(self) -> CausalWanTransformer:
        """The transformer: what ``dax.quant.quantization.quantize_dynamic`` takes."""
        return self.pipeline.generator.model

    def load_checkpoint(self, path: str | Path, use_ema: bool = False) -> None:
        """Load the transformer's weights from a file or a folder, of any container in docs/checkpoints.md.

        Weights in 8 bits are dequantized; ``quantized_weights`` has them as they are in the file. Where the base model's
        folder has no ``config.json``, the transformer's sizes are read off the checkpoint.

        Args:
            path: a file, or a folder that holds one checkpoint.
            use_ema: take the averaged weights, ``generator_ema``, where the file has both.

        Raises:
            InputError: if it is missing, damaged or does not fit the base model.
        """
        checkpoint = load_checkpoint(path, use_ema)
        if not self.base.has_config:
            self.pipeline.set_transformer(empty_transformer(TransformerConfig(**infer_sizes(checkpoint.state))))
        load_strict(self.transformer, dequantize(checkpoint, self.dtype), checkpoint.path)
        self.transformer.requires_grad_(False)
        self.quantized_weights, self.loras = quantized_weights(checkpoint), []
        STARTUP.mark("checkpoint")

    def load_lora(self, path: str | Path, strength: float = 1.0) -> int:
        """Merge a LoRA into the transformer's weights: after ``load_checkpoint``, before quantization.

        Return the number of modules that changed. Raises InputError, and changes nothing, where the file is damaged or is
        for another model.
        """
        changed = merge_lora(self.transformer, path, strength, self.config.adapter)
        for name in changed:
            self.quantized_weights.pop(name, None)
        self.loras.append((Path(path), strength, len(changed)))
        STARTUP.mark("LoRA")
        return len(changed)

    def setup_devices(self, low_memory: bool = False) -> None:
        """Move every part to the device in the dtype it runs in; ``low_memory``: offload what is idle.

        Raises InputError where the transformer has no weights yet.
        """
        if any(tensor.is_meta for tensor in self.transformer.state_dict().values()):
            raise InputError(f"{self.base.folder} has no transformer's weights: load a checkpoint (load_checkpoint)")
        self._prompt_cache = None
        self.pipeline.to_device(low_memory)
        STARTUP.mark("to the device")

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that share every video's tokens; None for a single one."""
        return None if self.pipeline.context_parallel is None else self.pipeline.context_parallel.group

    def worker_loop(self) -> None:
        """On every rank but the main process: take part in what that one generates, until it ends."""
        self.pipeline.worker_loop()

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Return the embeddings [B, L, text_dim] of ``prompts``; the same tensor while the prompts stay the same.

        Raises InputError where a prompt is empty.
        """
        key = tuple(prompts)
        if not key or not all(prompt.strip() for prompt in key):
            raise InputError("the prompt is empty; give it some words, several prompts separated by ;")
        encoder = self.pipeline.text_encoder
        if self._prompt_cache is None or self._prompt_cache[0] != (*key, encoder.version):
            self._prompt_cache = ((*key, encoder.version), encoder(list(key)))
        return self._prompt_cache[1]

    def timed(self, stage: str, function: Callable, *args: Any) -> Any:
        """Return ``function(*args)``, its seconds recorded under ``stage`` where ``stage_seconds`` is set."""
        if self.stage_seconds is None:
            return function(*args)
        start = time.perf_counter()
        result = function(*args)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if result is not None:  # None: the iterator that ``next`` was called on has ended
            self.stage_seconds.setdefault(stage, []).append(time.perf_counter() - start)
            STARTUP.finish(stage) if stage == "decode" else STARTUP.mark(stage)
        return result

    def seeded(self, seed: int, samples: Sequence[int] | None = None, num_samples: int = 1) -> torch.Generator:
        """Return a generator on the pipeline's device.

        Args:
            seed: the same seed gives the same draws.
            samples: generate only these of a batch of ``num_samples`` videos, each with the draws that it has in the batch.
            num_samples: videos in the whole batch.
        """
        if samples is None or list(samples) == list(range(num_samples)):
            return torch.Generator(self.device).manual_seed(seed)
        generator = SampleGenerator(self.device)
        generator.samples, generator.num_samples = samples, num_samples
        return generator.manual_seed(seed)

    def _embeddings(self, prompts: Iterable[list[str]], blending: "Blending | None" = None) -> Iterator[PromptEmbeds]:
        """Yield the embeddings of the prompts of block after block, which go over into each other as a ``Prompt`` says.

        Args:
            prompts: one batch a block.
            blending: that of the clip before, where a prompt may be going over still.
        """
        blending = blending or Blending(self.config.blend_blocks)
        for batch in prompts:
            prompt = Prompt.of(next(iter(batch), ""))
            yield blending.step(self.timed("encode prompt", self.encode_prompts, batch), prompt.blend, prompt.switch)


class Blending:
    """Go over linearly from the embeddings of one prompt to those of the next.

    Args:
        blend_blocks: blocks within which, where the prompt does not say it.
    """

    def __init__(self, blend_blocks: int):
        self.blend_blocks = blend_blocks
        self.current: PromptEmbeds | None = None
        self.start: Tensor | None = None
        """The embeddings at the begin of the change."""
        self.target: Tensor | None = None
        self.done = self.length = 0
        """Blocks of the change so far, and how many it takes."""

    def step(self, embeds: Tensor, blend: int | None, switch: str | None) -> PromptEmbeds:
        """Return the next block's embeddings, where its prompt has ``embeds`` [B, L, text_dim]."""
        if embeds is not self.target:
            self.start = None if self.current is None else self.current.embeds
            self.target, self.done = embeds, 0
            self.length = 1 if self.start is None else max(1, self.blend_blocks if blend is None else blend)
        if self.done < self.length:
            self.done += 1
            if self.start is not None and self.done < self.length:
                embeds = torch.lerp(self.start, embeds, self.done / self.length)
            self.current = PromptEmbeds(embeds, switch)
        assert self.current is not None
        return self.current


def write_videos(pieces: Iterable[Tensor], paths: list[Path], num_blocks: int | None, description: str) -> list[Path]:
    """Write pieces [B, t, 3, H, W] to B files while they are generated, with a progress bar; return the complete files."""
    with ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(path)) for path in paths]
        for piece in tqdm(pieces, total=num_blocks, desc=description, unit="block"):
            for writer, video in zip(writers, piece):
                writer.write(video)
    return [writer.result() for writer in writers if writer.frames]


def file_stems(prompts: list[str], with_index: bool) -> list[str]:
    """Return a file name for every prompt: its number or its words, and both where the words of two are the same."""
    names = [safe_file_name(prompt) for prompt in prompts]
    if with_index:
        return [str(index) for index in range(len(prompts))]
    return [f"{name}-{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]
