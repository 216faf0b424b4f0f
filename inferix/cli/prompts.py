"""Prompts: from a flag, a file or the keyboard, and what a model with a ``prompt_template`` understands."""

import itertools
import random
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from inferix.errors import InputError
from inferix.pipelines.storyboard import Storyboard, read_storyboard

if TYPE_CHECKING:
    from inferix.config import PipelineConfig
    from inferix.pipelines.pipeline import Pipeline


def split_prompts(text: str) -> list[str]:
    """Return the prompts in ``a; b``. Raises InputError where there is none."""
    text = text.encode(errors="replace").decode()  # arguments that are not UTF-8 come with lone surrogates
    prompts = [prompt.strip() for prompt in text.split(";") if prompt.strip()]
    if not prompts:
        raise InputError("the prompt is empty: say what the video shows, several prompts separated by ;")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file: one a line, or a YAML file's list ``prompts``. Raises InputError where it has none."""
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


def storyboard_of(args: Namespace, config: "PipelineConfig") -> Storyboard:
    """Return the storyboard that the flags name. Raises InputError where it is malformed or longer than the video."""
    size, clip, given = config.num_frame_per_block, config.image_or_video_shape[1], 0
    if args.model == "self_forcing":
        given = int(args.i2v)
        num_blocks = None if args.num_output_frames is None else given + (args.num_output_frames - given) // size
    else:
        num_blocks = ((args.num_rollout or 3) * (clip - args.num_overlap_frames) + args.num_overlap_frames) // size
    return read_storyboard(args.storyboard, size, given, num_blocks, config.switch_frame_indices)


def typed_prompts() -> Iterator[str]:
    """Yield prompts from standard input, each asked for on stderr when it is needed.

    An empty line repeats the last prompt, the end of the input ends the iterator. Raises InputError where the input ends
    before the first prompt.
    """
    prompt = ""
    while True:
        print("\nnext prompt (Enter: the same again, Ctrl-D: the end): ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline().decode(errors="replace") if sys.stdin else ""  # None: it was closed
        if not line and not prompt:
            raise InputError("no prompt was typed: --is_interactive reads one a line from standard input")
        if not line:
            return
        prompt = line.strip() or prompt
        if prompt:
            yield prompt


def example_prompts(config: "PipelineConfig", count: int) -> list[str]:
    """Return at most ``count`` different prompts that the model was made for, for the same ``count`` always the same."""
    if config.prompt_template is None:
        return ["A cat in a space suit walks across the moon, the blue Earth rising behind it"][:count]
    choices = [part.split("|") for part in re.split(r"[{}]", config.prompt_template)]
    prompts = ["".join(words) for words in itertools.product(*choices)]
    return random.Random(0).sample(prompts, min(count, len(prompts)))


def example_prompt(config: "PipelineConfig") -> str:
    """Return a prompt that the model was made for: the first choice of each ``{a|b}`` in its ``prompt_template``."""
    if config.prompt_template is None:
        return example_prompts(config, 1)[0]
    return re.sub(r"\{([^|}]*)[^}]*\}", r"\1", config.prompt_template)


def prompt_note(pipeline: "Pipeline", prompt: str) -> str | None:
    """Return one line about a prompt that the loaded model was not made for, None for any other prompt."""
    template = pipeline.config.prompt_template
    if template is None:
        unknown = pipeline.pipeline.text_encoder.unknown_words(prompt)
        return f"the tokenizer does not know: {', '.join(unknown)}" if unknown else None
    if pipeline.loras:
        return None  # what it was taught is in no template
    parts = re.split(r"\{([^}]*)\}", template)  # text, choices, text, choices, …
    pattern = "".join(f"({part})" if number % 2 else re.escape(part) for number, part in enumerate(parts))
    if re.fullmatch(pattern, prompt.strip().rstrip("."), re.IGNORECASE):
        return None
    return f"this small model knows only prompts of the form '{template}'; for '{prompt}' expect something else"


def warn_unknown(pipeline: "Pipeline", prompt: str) -> None:
    """Print ``prompt_note``, if there is one."""
    if note := prompt_note(pipeline, prompt):
        print(f"note: {note}")
