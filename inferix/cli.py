"""What the runners under ``example/`` share: flags, where weights are, prompts, the closing report and exit codes."""

import argparse
import importlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.distributed import DistError

from inferix.config import ParallelConfig
from inferix.errors import InputError
from inferix.models.base_model import BaseModel
from inferix.pipelines.base import Pipeline
from inferix.video import count_frames, remove_partials, wait_for_writers

SECONDS_TO_END = 5
"""What a process gets to end in order when its job has failed."""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call ``main(argv)`` and return the exit code: 0 done, 2 bad input (one line on stderr), 130 Ctrl-C."""
    if argv is None:  # a process of its own: let `kill` clean up half-written files as Ctrl-C does
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if "RANK" in os.environ:
            end_with_the_job()
    try:
        try:
            main(argv)
        finally:  # also after Ctrl-C: the videos before the one that it stops are complete
            wait_for_writers()
        return 0
    except InputError as error:
        if rank() > 0:
            time.sleep(SECONDS_TO_END)  # mostly the first process says the same, and the job ends before this one does
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if argv is not None or "RANK" not in os.environ:
            raise
        if isinstance(error, DistError) or "gloo" in str(error):
            time.sleep(SECONDS_TO_END)  # another process has died: its error is the one to be shown
        traceback.print_exc()
        os._exit(1)  # at once: an orderly end waits for the others, which wait for this one
    except KeyboardInterrupt:
        if rank() == 0:
            print("stopped", file=sys.stderr)
        if argv is None:  # spare whoever waits that the interpreter takes torch apart
            remove_partials()
            sys.stdout.flush()
            os._exit(130)
        return 130


def rank() -> int:
    """This process's number in a ``torchrun`` job."""
    return int(os.environ.get("RANK", 0))


def end_with_the_job() -> None:
    """Make this process one of a ``torchrun`` job: only the first one prints, and none outlives another that died.

    torchrun then sends SIGTERM. Whoever waits for the dead process inside a GPU's or a network's library would notice
    never, or half a minute later when it is killed.
    """
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # a signal's number is written there whatever is going on

    def watch():
        while os.read(told, 1)[0] != signal.SIGTERM:
            pass
        time.sleep(SECONDS_TO_END)
        remove_partials()
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and has the flags that all programs with a model take."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)
        add = self.add_argument
        add("--config_path", type=Path, help="YAML config of the sampler")
        add("--default_config_path", type=Path, help="YAML config that --config_path is laid over")
        add("--wan_base_model_path", type=Path, help="folder of the base model")
        add("--prompt", help="what to show; several prompts are separated by ;")
        add("--output_folder", type=Path, help="where the files go (default: outputs/)")
        add("--seed", type=seed, default=0, help="the same seed gives the same video")

    def add_switch(self, flag: str, default: bool = False, **options) -> None:
        """A flag that stands alone (true) or takes true, false, 1 or 0."""
        self.add_argument(flag, type=boolean, nargs="?", const=True, default=default, metavar="true|false", **options)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The flags, and ``prompts``: the list that ``--prompt`` holds, None where it is not given."""
        args = super().parse_args(argv)
        args.prompts = None if args.prompt is None else split_prompts(args.prompt)
        return args

    def error(self, message: str):
        raise InputError(f"{message} (--help lists what there is)")


CONTRADICTIONS = {
    "no_quantize": ("load_quantized", "qconfig", "save_quantized"),
    "load_quantized": ("quant_type", "quant_granularity", "qconfig", "save_quantized")
    + ("checkpoint_path", "checkpoint_folder"),
    "qconfig": ("quant_type", "quant_granularity"),
}
"""Flags that leave others nothing to say."""


class RunnerParser(Parser):
    """``Parser`` with the flags that both runners take."""

    def __init__(self, description: str, offload: bool = False):
        super().__init__(description)
        add = self.add_argument
        add("--quant_type", choices=("fp8", "int8"), help="8-bit format of weights and activations (default: fp8)")
        add(
            "--quant_granularity",
            choices=("per_token", "per_tensor"),
            help="per_token: a scale for every token and every weight channel (default); per_tensor: one for each tensor",
        )
        add("--qconfig", type=Path, help="YAML file that says how each module is quantized, instead of these two")
        add("--save_quantized", type=Path, metavar="DIR", help="save the quantized transformer there")
        add("--load_quantized", type=Path, metavar="DIR", help="start from what --save_quantized wrote there")
        add(
            "--kv_cache_dtype",
            choices=("auto", "fp8"),
            default="auto",
            help="fp8: keys and values in 8 bits, half the cache; a Hopper GPU with nvidia-cudnn-frontend attends in 8 bits",
        )
        self.add_switch("--no_quantize", help="run in full precision, for comparison")
        add("--ulysses_size", type=int, help="processes that share the attention heads (default: as many as fit)")
        add("--ring_size", type=int, help="processes that share the keys and values (default: the rest)")
        self.add_switch("--enable_kv_offload", default=offload, help="keep the key-value cache in host memory")
        self.add_switch(
            "--low_memory",
            default=None,
            help="fit a small GPU: cache and text encoder in host memory, keys, values and text encoder in 8 bits "
            "(default: where the GPU has less free memory than the run needs)",
        )
        self.add_switch("--quantize_text_encoder", help="the text encoder in 8 bits too")
        self.add_switch("--enable_webrtc", help="show the video in a browser while it is made")
        add("--webrtc_host", default="127.0.0.1", help="address the page is served at")
        add("--webrtc_port", type=int, default=8000, help="port the page is served at")
        self.add_switch("--webrtc_exit", help="end after the last frame instead of going on serving the page")
        self.add_switch("--webrtc_wait", help="begin when the first viewer has come")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """As in ``Parser``. Raises InputError where two flags contradict each other."""
        args = super().parse_args(argv)
        for flag, others in CONTRADICTIONS.items():
            if getattr(args, flag) and (both := [other for other in others if getattr(args, other, None)]):
                raise InputError(f"--{flag} and --{both[0]} ({flag.upper()} and {both[0].upper()}): leave one out")
        if not args.load_quantized and not args.qconfig:
            args.quant_type, args.quant_granularity = args.quant_type or "fp8", args.quant_granularity or "per_token"
        return args


def boolean(text: str) -> bool:
    """The word a person or a shell script uses for yes or no."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def seed(text: str) -> int:
    """A number that a random generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 2**63 - 1")
    return int(text)


@dataclass(frozen=True)
class Weights:
    """Three paths that belong together: a checkpoint fits one base model, and a config the two."""

    config: Path | None
    base: Path | None
    checkpoint: Path | None


def find_weights(given: Weights, real: Weights, demo: Weights, saved: Path | None = None) -> Weights:
    """What the user gave, completed from ``real``; ``demo`` where nothing was given and ``real`` is not there.

    ``saved`` takes the place of the checkpoint in both. Raises InputError where a path does not exist.
    """
    if saved is not None:
        real, demo = replace(real, checkpoint=saved), replace(demo, checkpoint=saved)
    chosen = Weights(*(path or default for path, default in zip(astuple(given), astuple(real))))
    missing = [path for path in (*filter(None, astuple(given)), *astuple(chosen)) if not path.exists()]
    if not missing:
        return chosen
    if any(astuple(given)) or not all(path.exists() for path in astuple(demo)):
        raise InputError(
            f"{shown(missing[0])} not found: check the paths you set; weights/download.sh fetches the public weights"
        )
    print(f"{shown(missing[0])} not found (weights/download.sh fetches it): using the small demo model in weights/demo")
    return demo


def watched(args: argparse.Namespace) -> AbstractContextManager:
    """The page on which the generation is watched, served while entered; None takes its place where nobody asked.

    Of a ``torchrun`` job the first process serves it.
    """
    if not args.enable_webrtc or rank() > 0:
        return nullcontext()
    try:
        from inferix.webrtc import Live, WebRTCConfig
    except ImportError as error:
        raise InputError(f"streaming needs aiortc and aiohttp ({error}): run ./setup.sh") from None
    return Live(WebRTCConfig(args.webrtc_host, args.webrtc_port, args.webrtc_exit, args.webrtc_wait))


def split_prompts(text: str) -> list[str]:
    """``a; b`` to its prompts. Raises InputError where there is none."""
    text = text.encode(errors="replace").decode()  # arguments that are not UTF-8 come with lone surrogates
    prompts = [prompt.strip() for prompt in text.split(";") if prompt.strip()]
    if not prompts:
        raise InputError("the prompt is empty: say what the video shows, several prompts separated by ;")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one a line, or a YAML file's list ``prompts``. Raises InputError where there are none."""
    try:
        text = path.read_text()
        if path.suffix in (".yaml", ".yml"):
            prompts = [str(prompt).strip() for prompt in yaml.safe_load(text)["prompts"]]
        else:
            prompts = [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise InputError(f"prompt file {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        raise InputError(
            f"prompt file {path} is neither text, one prompt a line, nor YAML with a list 'prompts'"
        ) from None
    if not any(prompts):
        raise InputError(f"prompt file {path} holds no prompt: write one a line")
    return [prompt for prompt in prompts if prompt]


def typed_prompts() -> Iterator[str]:
    """A prompt from standard input whenever one is asked for; an empty line repeats the last, end of input ends it."""
    prompt = ""
    while True:
        if sys.stdin.isatty():
            print("\nnext prompt (Enter: the same again, Ctrl-D: the end): ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline().decode(errors="replace")
        if not line and not prompt:
            raise InputError("no prompt was typed: --is_interactive reads one a line from standard input")
        if not line:
            return
        prompt = line.strip() or prompt
        if prompt:
            yield prompt


def noted(prompts: list[str] | Iterator[str], pipeline: Pipeline) -> list[str] | Iterator[str]:
    """The prompts as they are, a line printed for each that the model was not made for (when an iterator gives it)."""

    def note(prompt: str) -> str:
        if line := pipeline.note_unknown(prompt):
            print(f"note: {line}")
        return prompt

    return [note(prompt) for prompt in prompts] if isinstance(prompts, list) else map(note, prompts)


def attention_heads(base_model: Path) -> int:
    """Of the base model in this folder. Raises InputError where there is none."""
    return BaseModel(base_model).config.num_heads


def parallel_config(ulysses_size: int | None, ring_size: int | None, num_heads: int) -> ParallelConfig:
    """How this process takes part in a ``torchrun`` job, from the variables that torchrun sets.

    A size that is None is chosen to fit: Ulysses over as many ranks as the attention heads allow, ring over the rest.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if ulysses_size is None:
        ulysses_size = math.gcd(world_size, num_heads) if ring_size is None else max(1, world_size // max(1, ring_size))
    if ring_size is None:
        ring_size = max(1, world_size // max(1, ulysses_size))
    return ParallelConfig(ulysses_size, ring_size, local_rank, rank, world_size)


def low_memory(args: argparse.Namespace, pipeline: Pipeline) -> bool:
    """Whether to do with little GPU memory: as asked for, else where more is needed than is free. Says so if it does."""
    if args.low_memory is not None or pipeline.device.type != "cuda":
        return bool(args.low_memory)
    free, _ = torch.cuda.mem_get_info(pipeline.device)
    needed, small = (sum(pipeline.pipeline.gpu_memory(low).values()) for low in (False, True))
    parallel, scarce = pipeline.pipeline.parallel, needed > free
    if not (parallel.any(scarce) if parallel else scarce):  # what one process does, all do
        return False
    print(
        f"{needed / 1e9:.1f} GB of GPU memory are needed and {free / 1e9:.1f} GB free: "
        f"low memory, which takes about {small / 1e9:.1f} GB (--low_memory false: try without)"
    )
    return True


def check_can_quantize(quant_type: str | None) -> None:
    """Raises InputError where ``dax`` is not installed, or the GPU has no such 8-bit arithmetic (None: not said yet)."""
    try:
        importlib.import_module("dax.quant.quantization")
    except ImportError as error:
        raise InputError(f"quantization needs DAX ({error}): pip install -e 3rd_party/DAX, or --no_quantize") from None
    if quant_type == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise InputError(
            f"{torch.cuda.get_device_name()} has no fp8 arithmetic: use QUANT_TYPE=int8 (--quant_type int8)"
        )


def quantization(args: argparse.Namespace) -> str:
    """How a person would name it."""
    if file := args.qconfig or args.load_quantized:
        return f"as in {file.name}"
    return "none" if args.no_quantize else f"{args.quant_type}, {args.quant_granularity.replace('_', ' ')}"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; of a tensor made of others, as torchao's are, those of what it is made of."""

    def size(tensor: Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.nbytes

    return sum(size(tensor) for tensor in (*model.parameters(), *model.buffers()))


def linear_names(model: nn.Module) -> list[str]:
    """Names of the plain, unquantized Linears."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def largest_covers(names: list[str], among: list[str]) -> list[str]:
    """The shortest dotted prefixes that cover all of ``names`` and nothing else of ``among``."""
    covers: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if all(other in names for other in among if f"{other}.".startswith(f"{prefix}.")):
                covers[prefix] = None
                break
    return list(covers)


class Report:
    """What quantization did to a transformer: made before it, printed after generation.

    Args:
        transformer: unquantized; it may be on the meta device.
        dtype: what it runs in.
    """

    def __init__(self, transformer: nn.Module, dtype: torch.dtype):
        self.transformer = transformer
        self.bytes = sum(tensor.numel() for tensor in transformer.state_dict().values()) * dtype.itemsize
        self.linears = linear_names(transformer)

    def print(self, files: list[Path], seconds: float) -> None:
        """One line for every file, for seconds, frames a second, weight memory and what stayed in high precision."""
        frames = sum(map(count_frames, files))
        before, after = (f"{size / 1e6:,.1f} MB" for size in (self.bytes, weight_bytes(self.transformer)))
        left = linear_names(self.transformer)
        kept = ", ".join(largest_covers(left, self.linears)) if left != self.linears else "everything"
        for path in files:
            print(f"file written       {shown(path)}")
        print(f"seconds            {seconds:.1f} for {frames} frames")
        print(f"frames per second  {frames / seconds:.1f}")
        print(f"weight memory      {before} before quantization, {after} after")
        print(f"high precision     {kept or 'nothing'}")


def shown(path: Path) -> str:
    """``path`` as a person in the current folder would write it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_stages(stage_seconds: dict[str, list[float]]) -> None:
    """A line for every stage that ``Pipeline.timed`` has recorded: calls, seconds in all, and each call's."""
    for stage, seconds in stage_seconds.items():
        each = " ".join(f"{second:.3f}" for second in seconds)
        print(f"{stage:<18} {sum(seconds):.3f} s in {len(seconds)}: {each}")
