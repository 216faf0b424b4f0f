"""Prompts that change over time."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from inferix.config import FPS
from inferix.errors import InputError

T = TypeVar("T")

POSITIONS = ("at", "at_frame", "at_block")
"""Keys that say where an entry of a storyboard file begins: seconds of the video, latent frames, blocks."""


@dataclass(frozen=True)
class Entry:
    """A prompt, and the block of the video, counted from 0, from which on it is shown."""

    block: int
    prompt: str


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

    def write(self, path: Path) -> Path:  # type: ignore[return]
        """Write a file that ``read_storyboard`` reads, and return its name: a numbered one where ``path`` is taken."""
        content = [{"at_block": entry.block, "prompt": entry.prompt} for entry in self.entries]
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=math.inf)
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


def read_storyboard(path: Path, block_size: int, num_given: int = 0, num_blocks: int | None = None) -> Storyboard:
    """Return the storyboard in a YAML file: a list of entries with ``prompt`` and one of ``POSITIONS``.

    An entry takes effect with the first block that does not begin before its position.

    Args:
        path: of the file.
        block_size: latent frames of a block.
        num_given: latent frames that come before those that are generated, a block of their own (an image: 1).
        num_blocks: blocks of the video; None: without end.

    Raises:
        InputError: where it cannot be read, an entry is malformed, or the entries do not ascend from 0 to the video's end.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"storyboard {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise InputError(f"storyboard {path} is not YAML: see docs/variables.md") from None
    if not isinstance(content, list) or not content:
        raise InputError(f"storyboard {path} must be a list of entries, each with prompt and at, at_frame or at_block")
    entries: list[Entry] = []
    for number, item in enumerate(content, start=1):
        try:
            entry = _read_entry(item, block_size, num_given)
            _check_order(entry, entries, num_blocks)
        except ValueError as error:
            raise InputError(f"storyboard {path}, entry {number}: {error}") from None
        entries.append(entry)
    return Storyboard(tuple(entries))


def _read_entry(item: object, block_size: int, num_given: int) -> Entry:
    """Return an entry of a file. Raises ValueError where it is malformed."""
    if not isinstance(item, dict):
        raise ValueError("it must have prompt and at, at_frame or at_block")
    if unknown := [str(key) for key in item if key not in ("prompt", *POSITIONS)]:
        raise ValueError(f"there is no key {unknown[0]}; the keys are prompt, {', '.join(POSITIONS)}")
    prompt = item.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt must be a text that is not empty")
    given = [key for key in POSITIONS if key in item]
    if len(given) != 1:
        raise ValueError("give exactly one of at, at_frame and at_block")
    (key,), number = given, item[given[0]]
    kind = (int, float) if key == "at" else int
    if not isinstance(number, kind) or isinstance(number, bool) or not 0 <= number < 2**53:
        raise ValueError(f"{key} must be a {'number' if key == 'at' else 'whole number'} from 0")
    return Entry(_first_block(key, number, block_size, num_given), prompt.strip())


def _first_block(key: str, number: float, block_size: int, num_given: int) -> int:
    """Return the first block, counted from 0, that does not begin before a position.

    Latent frame n > 0 begins with pixel frame 4n - 3, the video with latent frame 0.
    """
    if key == "at_block":
        return int(number)
    frame = math.ceil((number * FPS + 3) / 4) if key == "at" and number > 0 else number
    if frame <= 0:
        return 0
    own = 1 if num_given else 0
    return own + max(0, -(-(int(frame) - num_given) // block_size))


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
