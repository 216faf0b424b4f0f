"""Prompts that change over time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from inferix.errors import InputError

T = TypeVar("T")


def switch_at_frames(prompts: Sequence[T], switch_frames: Sequence[int], blocks: Iterable[tuple[int, int]]) -> Iterator[T]:
    """Yield the prompt of every block, of which first frame and number of frames are given.

    The next prompt takes over at the first block whose first frame is not below its switch frame, one prompt a block.

    Raises InputError where there is not one switch less than prompts, or the switches do not ascend.
    """
    if len(switch_frames) != len(prompts) - 1:
        raise InputError(f"{len(prompts)} prompts need {len(prompts) - 1} switch_frame_indices, not {len(switch_frames)}")
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
