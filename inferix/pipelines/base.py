"""What both pipelines do the same way."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from inferix.config import ParallelConfig, load_config
from inferix.errors import InputError
from inferix.models.base_model import BaseModel
from inferix.models.checkpoints import assign, read_distilled
from inferix.pipelines.inference import CausalInferencePipeline
from inferix.video import VideoWriter, safe_file_name


class Pipeline:
    """Builds the parts, loads a distilled checkpoint, and saves what is generated.

    Args:
        config_path: YAML with the reference projects' keys.
        default_config_path: YAML that ``config_path`` is laid over.
        wan_base_model_path: folder of the base model, Wan's layout or diffusers'.
        enable_kv_offload: keep the key-value cache in host memory; the same video, from less of the GPU's.
        parallel_config: how the ranks of a ``torchrun`` job share the work. Only the first one's pipeline is called to
            generate; the others' ``pipeline.follow()`` takes part until it ends.
        device: default: the GPU if there is one.
        dtype: default: bfloat16 on a GPU, float32 on a CPU.
        transformer_weights: False leaves ``pipeline.generator.model`` on the meta device, for ``dax``'s
            ``load_quantized`` instead of ``load_checkpoint``: no float weight is ever loaded.

    Raises InputError where a file is missing, damaged or does not fit.
    """

    default_base_model_path = "weights/Wan2.1-T2V-1.3B"

    def __init__(
        self,
        config_path: str | Path,
        default_config_path: str | Path | None = None,
        wan_base_model_path: str | Path | None = None,
        enable_kv_offload: bool = False,
        parallel_config: ParallelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transformer_weights: bool = True,
    ):
        self.config = load_config(config_path, default_config_path)
        self.parallel = parallel_config or ParallelConfig()
        cuda = torch.cuda.is_available()
        self.device = torch.device(device or (f"cuda:{self.parallel.local_rank}" if cuda else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        base = BaseModel(wan_base_model_path or self.default_base_model_path, transformer_weights)
        self.pipeline = CausalInferencePipeline(
            self.config, base, self.device, self.dtype, self.parallel, enable_kv_offload
        )
        self.leads = self.parallel.rank == 0
        """This is the only process or the first one of a job, whose pipeline generates."""
        self.encoded: tuple[list[str], Tensor] | None = None
        """The last prompts and their embeddings."""
        self.stage_seconds: dict[str, list[float]] | None = None
        """Set it to {} to have every stage's seconds recorded, call by call; the GPU is then waited for after each."""

    def _load(self, path: Path, key: str) -> None:
        assign(self.pipeline.generator.model, read_distilled(path, key), path)
        self.pipeline.generator.model.requires_grad_(False)

    def setup_devices(self, low_memory: bool = False) -> None:
        """Move every part to the device, in the dtype it runs in; ``low_memory``: no more of it there than must be."""
        self.pipeline.to_device(low_memory)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that share every video's tokens; None where this one is alone."""
        return None if self.pipeline.parallel is None else self.pipeline.parallel.group

    def example_prompt(self) -> str:
        """A prompt that the loaded model understands."""
        if self.config.prompt_template is None:
            return "A cat in a space suit walks across the moon, the blue Earth rising behind it"
        return re.sub(r"\{([^|}]*)[^}]*\}", r"\1", self.config.prompt_template)

    def note_unknown(self, prompt: str) -> str | None:
        """One line about a prompt that the loaded model was not made for; None where there is nothing to say."""
        template = self.config.prompt_template
        if template is None:
            unknown = self.pipeline.text_encoder.unknown_words(prompt)
            return f"the tokenizer does not know: {', '.join(unknown)}" if unknown else None
        if re.fullmatch(template_pattern(template), prompt.strip().rstrip("."), re.IGNORECASE):
            return None
        return f"this small model knows only prompts of the form '{template}'; for '{prompt}' expect something else"

    def _encode(self, prompts: list[str]) -> Tensor:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise InputError("the prompt is empty; give it some words, several prompts separated by ;")
        if self.encoded is None or self.encoded[0] != prompts:  # often the next clip or rollout shows the same
            self.encoded = (prompts, self.pipeline.text_encoder(prompts))
        return self.encoded[1]

    def _noise(self, batch: int, num_frames: int, generator: torch.Generator | None) -> Tensor:
        """Of a clip: all of it, as the reference draws it. Of a longer video: its beginning; ``denoise`` draws the rest."""
        clip, size = self.config.image_or_video_shape[1], self.config.num_frame_per_block
        num_frames = min(num_frames, max(clip // size, 1) * size)
        return self.pipeline.draw((batch, num_frames, *self.config.image_or_video_shape[2:]), generator)

    def timed(self, stage: str, function: Callable, *args):
        """``function(*args)``, its seconds recorded under ``stage`` where ``stage_seconds`` is set (and a result came)."""
        if self.stage_seconds is None:
            return function(*args)
        start = time.perf_counter()
        result = function(*args)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if result is not None:  # None: the iterator that ``next`` was called on has ended
            self.stage_seconds.setdefault(stage, []).append(time.perf_counter() - start)
        return result

    def seeded(self, seed: int) -> torch.Generator:
        """A generator on the pipeline's device."""
        return torch.Generator(self.device).manual_seed(seed)


def template_pattern(template: str) -> str:
    """The regular expression of ``A {red|blue} dot``-like templates."""
    parts = re.split(r"\{([^}]*)\}", template)
    return "".join(re.escape(part) if i % 2 == 0 else f"({part})" for i, part in enumerate(parts))


Sink = Callable[[Iterator[Tensor], list[Path], int | None, str], list[Path]]
"""Takes the frames of one clip: ``save``, or what also shows them."""


def save(frames: Iterable[Tensor], paths: list[Path], total_blocks: int | None, description: str) -> list[Path]:
    """Write the pieces [B, t, 3, H, W] to B files, with a progress bar over the blocks; return the complete files."""
    with ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(path)) for path in paths]
        for piece in tqdm(frames, total=total_blocks, desc=description, unit="block"):
            for writer, video in zip(writers, piece):
                writer.write(video)
    return [writer.result() for writer in writers if writer.frames]


def file_stems(prompts: list[str], with_index: bool) -> list[str]:
    """A file name for every prompt: its number or its words, and both where the words of two prompts come out alike."""
    names = [safe_file_name(prompt) for prompt in prompts]
    if with_index:
        return [str(index) for index in range(len(prompts))]
    return [f"{name}-{index}" if names.count(name) > 1 else name for index, name in enumerate(names)]


def joined(pieces: Iterator[Tensor]) -> Tensor:
    """The pieces [B, t, 3, H, W] of a stream as one video [B, T, 3, H, W]."""
    return torch.cat(list(pieces), dim=1)
