"""Prompts that change over time."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from inferix.config import FPS, PROMPT_SWITCHES
from inferix.errors import InputError

T = TypeVar("T")

POSITIONS = ("at", "at_frame", "at_block")
"""Keys that say where an entry of a storyboard file begins: seconds of the video, latent frames, blocks."""
MAX_BLEND = 1000


class Prompt(str):
    """A prompt, and how the video goes over to it.

    Attributes:
        blend: blocks within which the embeddings go over to those of this prompt; None: the config's ``blend_blocks``.
        switch: ``recache`` or ``cross_attention``; None: the config's ``prompt_switch``.
    """

    blend: int | None
    switch: str | None

    def __new__(cls, text: str, blend: int | None = None, switch: str | None = None) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.blend, prompt.switch = blend, switch
        return prompt

    @classmethod
    def of(cls, text: str) -> "Prompt":
        """Return ``text`` itself where it is a ``Prompt``, else one of this text."""
        return text if isinstance(text, cls) else cls(text)


@dataclass(frozen=True)
class Entry:
    """A prompt, and the block of the video, counted from 0, from which on it is shown."""

    block: int
    prompt: str

    def to_dict(self) -> dict[str, str | int]:
        """Return the entry as a storyboard file has it."""
        prompt = Prompt.of(self.prompt)
        options = {"blend": prompt.blend, "switch": prompt.switch}
        return {
            "at_block": self.block,
            "prompt": str(prompt),
            **{key: value for key, value in options.items() if value is not None},
        }


@dataclass(frozen=True)
class Storyboard:
    """The prompts of one video. The first entry begins at block 0, each other one at a later block than the last."""

    entries: tuple[Entry, ...]

    def prompts(self, blocks: Iterable[int]) -> Iterator[str]:
        """Yield the prompt of each of ``blocks``, which do not descend."""
        current = 0
        for block in blocks:
            while current + 1 < len(self.entries) and self.entries[current + 1].block <= block:
                current += 1
            yield self.entries[current].prompt

    def to_yaml(self) -> str:
        """Return the content of a file that ``read_storyboard`` reads."""
        content = [entry.to_dict() for entry in self.entries]
        return yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=math.inf)

    def write(self, path: Path) -> Path:  # type: ignore[return]
        """Write a file that ``read_storyboard`` reads, and return its name: a numbered one where ``path`` is taken."""
        text = self.to_yaml()
        for number in itertools.count(1):
            candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
            try:
                with candidate.open("x", encoding="utf-8") as file:
                    file.write(text)
                return candidate
            except FileExistsError:
                if candidate.is_file() and candidate.read_bytes() == text.encode():
                    return candidate
            except OSError as error:
                raise InputError(f"storyboard {candidate} cannot be written: {error.strerror}") from None


def read_storyboard(
    path: Path,
    block_size: int,
    num_given: int = 0,
    num_blocks: int | None = None,
    switch_frame_indices: Sequence[int] | None = None,
) -> Storyboard:
    """Return the storyboard in a file.

    In a YAML file it is a list of entries with ``prompt``, one of ``POSITIONS``, and if wanted ``blend`` and ``switch`` as in
    ``Prompt``. In a ``.jsonl`` file, LongLive's format, it is one line ``{"prompts": [...]}``, with the list
    ``switch_frame_indices`` there or in the config: the latent frames at which the second prompt begins, the third, and so on.
    An entry takes effect with the first block that does not begin before its position.

    Args:
        path: of the file.
        block_size: latent frames of a block.
        num_given: latent frames that come before those that are generated, a block of their own (an image: 1).
        num_blocks: blocks of the video; None: without end.
        switch_frame_indices: the config's.

    Raises:
        InputError: where it cannot be read, an entry is malformed, or the entries do not ascend from 0 to the video's end.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            items = _read_jsonl(text, switch_frame_indices)
        else:
            items = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"storyboard {path} cannot be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"storyboard {path}: {error}") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        kind = "JSON, one object a line" if path.suffix == ".jsonl" else "YAML"
        raise InputError(f"storyboard {path} is not {kind}: see docs/variables.md") from None
    if not isinstance(items, list) or not items:
        raise InputError(f"storyboard {path} must be a list of entries, each with prompt and at, at_frame or at_block")
    entries: list[Entry] = []
    for number, item in enumerate(items, start=1):
        try:
            entry = _read_entry(item, block_size, num_given)
            _check_order(entry, entries, num_blocks)
        except ValueError as error:
            raise InputError(f"storyboard {path}, entry {number}: {error}") from None
        entries.append(entry)
    return Storyboard(tuple(entries))


def _read_jsonl(text: str, switch_frame_indices: Sequence[int] | None) -> list[dict]:
    """Return the entries of a file in LongLive's format. Raises InputError, or ValueError where it is no JSON."""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if len(lines) != 1 or not isinstance(lines[0], dict) or not isinstance(prompts := lines[0].get("prompts"), list):
        raise InputError('a .jsonl file has one line for its one video: {"prompts": ["...", "..."]}')
    if unknown := [key for key in lines[0] if key not in ("prompts", "switch_frame_indices")]:
        raise InputError(f"there is no key {unknown[0]}; the keys are prompts and switch_frame_indices")
    frames = lines[0].get("switch_frame_indices", switch_frame_indices or [])
    if not isinstance(frames, list | tuple) or len(frames) != len(prompts) - 1:
        raise InputError(
            f"{len(prompts)} prompts need a list of {len(prompts) - 1} switch_frame_indices, in the file or in the config"
        )
    return [{"at_frame": frame, "prompt": prompt} for frame, prompt in zip([0, *frames], prompts)]


def _read_entry(item: object, block_size: int, num_given: int) -> Entry:
    """Return an entry of a file. Raises ValueError where it is malformed."""
    if not isinstance(item, dict):
        raise ValueError("it must have prompt and at, at_frame or at_block")
    if unknown := [str(key) for key in item if key not in ("prompt", "blend", "switch", *POSITIONS)]:
        raise ValueError(f"there is no key {unknown[0]}; the keys are prompt, {', '.join(POSITIONS)}, blend, switch")
    text, blend, switch = item.get("prompt"), item.get("blend"), item.get("switch")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("prompt must be a text that is not empty")
    if blend is not None and (type(blend) is not int or not 0 <= blend <= MAX_BLEND):
        raise ValueError(f"blend must be a whole number of blocks from 0 to {MAX_BLEND}")
    if switch not in (None, *PROMPT_SWITCHES):
        raise ValueError(f"switch must be {' or '.join(PROMPT_SWITCHES)}")
    given = [key for key in POSITIONS if key in item]
    if len(given) != 1:
        raise ValueError("give exactly one of at, at_frame and at_block")
    (key,), number = given, item[given[0]]
    kind = (int, float) if key == "at" else int
    if not isinstance(number, kind) or isinstance(number, bool) or not 0 <= number < 2**53:
        raise ValueError(f"{key} must be a {'number' if key == 'at' else 'whole number'} from 0")
    return Entry(_first_block(key, number, block_size, num_given), Prompt(text.strip(), blend, switch))


def _first_block(key: str, number: float, block_size: int, num_given: int) -> int:
    """Return the first block, counted from 0, that does not begin before a position.

    Latent frame n > 0 begins with pixel frame 4n - 3, the video with latent frame 0.
    """
    if key == "at_block":
        return int(number)
    frame = math.ceil((number * FPS + 3) / 4) if key == "at" and number > 0 else number
    if frame <= 0:
        return 0
    given_blocks = 1 if num_given else 0
    return given_blocks + max(0, -(-(int(frame) - num_given) // block_size))


def first_frame(block: int, block_size: int, num_given: int = 0) -> int:
    """Return the pixel frame that a block begins with, both counted from 0; ``num_given`` as in ``read_storyboard``."""
    latent = block * block_size if not num_given else max(0, (block - 1) * block_size + num_given)
    return max(0, 4 * latent - 3) if block else 0


def _check_order(entry: Entry, earlier: list[Entry], num_blocks: int | None) -> None:
    """Raises ValueError where an entry does not come after the earlier ones or begins after the video's end."""
    if not earlier and entry.block:
        raise ValueError("the first one must begin at 0")
    if earlier and entry.block < earlier[-1].block:
        raise ValueError("it begins before the one above it: sort them by time")
    if earlier and entry.block == earlier[-1].block:
        raise ValueError(f"it begins at the same block as the one above it, {entry.block}: leave one of them out")
    if num_blocks is not None and entry.block >= num_blocks:
        raise ValueError(
            f"it begins at block {entry.block}, the video ends with block {num_blocks - 1}: make it longer"
        )


def switch_at_frames(
    prompts: Sequence[T], switch_frames: Sequence[int], blocks: Iterable[tuple[int, int]]
) -> Iterator[T]:
    """Yield the prompt of every block, of which first frame and number of frames are given.

    The next prompt takes over at the first block whose first frame is not below its switch frame, one prompt a block.

    Raises InputError where there is not one switch less than prompts, or the switches do not ascend.
    """
    if len(switch_frames) != len(prompts) - 1:
        raise InputError(
            f"{len(prompts)} prompts need {len(prompts) - 1} switch_frame_indices, not {len(switch_frames)}"
        )
    if list(switch_frames) != sorted(switch_frames) or min(switch_frames, default=0) < 0:
        raise InputError(f"switch_frame_indices must ascend from 0: {list(switch_frames)}")
    return _switch_at_frames(prompts, switch_frames, blocks)


def _switch_at_frames(
    prompts: Sequence[T], switch_frames: Sequence[int], blocks: Iterable[tuple[int, int]]
) -> Iterator[T]:
    current = 0
    for start, _ in blocks:
        if current < len(switch_frames) and start >= switch_frames[current]:
            current += 1
        yield prompts[current]
