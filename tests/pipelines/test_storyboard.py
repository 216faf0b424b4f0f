"""Prompts that change within one video: the files, when an entry takes effect, and the videos."""

from collections.abc import Callable
from itertools import count, repeat
from pathlib import Path

import pytest
import torch

from inferix import CausVidPipeline, InputError, SelfForcingPipeline
from inferix.cli.planner import each_rollout, rollout_blocks
from inferix.pipelines.storyboard import Entry, Storyboard, read_storyboard
from inferix.webrtc.playout import Playout
from inferix.webrtc.session import Session, WebRTCConfig

STORY = """
- at: 0
  prompt: a red circle
- at_frame: 4
  prompt: a blue circle
- at_block: 5
  prompt: a green circle
"""


@pytest.fixture
def read(tmp_path) -> Callable[..., Storyboard]:
    """Read a storyboard of blocks of 3, from its text."""

    def read(text: str, **options) -> Storyboard:
        (tmp_path / "story.yaml").write_text(text)
        return read_storyboard(tmp_path / "story.yaml", 3, **options)

    return read


def test_an_entry_takes_effect_with_the_first_block_that_does_not_begin_before(read):
    story = read(STORY)
    assert [entry.block for entry in story.entries] == [0, 2, 5]
    assert [prompt.split()[1] for prompt in story.prompts(range(7))] == ["red"] * 2 + ["blue"] * 3 + ["green"] * 2


@pytest.mark.parametrize(
    "position, given, block",
    [
        ("at: 0.5625", 0, 1),  # latent frame 3 begins with pixel frame 9
        ("at: 0.57", 0, 2),
        ("at: 0.01", 1, 1),  # an image is a block of its own, which ends with pixel frame 0
        ("at: 5", 0, 7),
        ("at_frame: 3", 0, 1),
        ("at_frame: 4", 1, 2),
        ("at_frame: 1", 1, 1),
        ("at_block: 1", 1, 1),
    ],
)
def test_positions(read, position, given, block):
    story = read(f"- {{at: 0, prompt: a}}\n- {{{position}, prompt: b}}", num_given=given)
    assert story.entries[1].block == block


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a list of entries"),
        ("prompt: a", "a list of entries"),
        ("[", "not YAML"),
        ("- at: 2026-99-99", "not YAML"),
        ("[" * 2000, "not YAML"),
        ("- a", "entry 1: it must have prompt"),
        ("- {at: 0, prompt: ' '}", "entry 1: prompt must be a text"),
        ("- {at: 0, prompt: 7}", "entry 1: prompt must be a text"),
        ("- {at: 0, prompt: a, speed: 2}", "no key speed"),
        ("- {prompt: a}", "exactly one of"),
        ("- {at: 0, at_frame: 0, prompt: a}", "exactly one of"),
        ("- {at: -1, prompt: a}", "at must be a number from 0"),
        ("- {at: .nan, prompt: a}", "at must be a number from 0"),
        ("- {at: .inf, prompt: a}", "at must be a number from 0"),
        ("- {at_block: 0.5, prompt: a}", "at_block must be a whole number"),
        ("- {at_frame: true, prompt: a}", "at_frame must be a whole number"),
        ("- {at_frame: 3, prompt: a}", "the first one must begin at 0"),
        ("- {at: 0, prompt: a}\n- {at: 3, prompt: b}\n- {at: 1, prompt: c}", "entry 3: it begins before"),
        ("- {at: 0, prompt: a}\n- {at_frame: 1, prompt: b}\n- {at_frame: 3, prompt: c}", "entry 3: .*same block"),
        ("- {at: 0, prompt: a}\n- {at_frame: 19, prompt: b}", "entry 2: .*ends with block 6"),
    ],
)
def test_malformed_files_are_refused(read, text, message):
    with pytest.raises(InputError, match=message):
        read(text, num_blocks=7)


def test_a_storyboard_is_read_as_it_was_written(tmp_path):
    story = Storyboard((Entry(0, "Eine Katze: 'grün', #1 — " + "sehr " * 50 + "lang"), Entry(7, "- {at: 0}\nyes")))
    path = story.write(tmp_path / "story.yaml")
    assert read_storyboard(path, 3) == story and story.write(path) == path
    other = Storyboard((Entry(0, "a"),)).write(path)
    assert other.name == "story-2.yaml" and read_storyboard(path, 3) == story  # nothing is overwritten


def live_session(typed: dict[int, str], given: str) -> tuple[Session, Callable]:
    """Return a session, and a function that plays a stream and types prompts after so many of its pieces."""
    session = Session(WebRTCConfig(), Playout())
    session.begin_clip(None)

    def play(pieces) -> torch.Tensor:
        shown = []
        for number, piece in enumerate(pieces, start=1):
            shown.append(piece)
            session.show(piece[0])
            if number in typed:
                session.submit_prompt(typed[number])
        return torch.cat(shown, dim=1)

    return session, play


def test_what_was_typed_is_generated_again_with_self_forcing(self_forcing: SelfForcingPipeline, tmp_path: Path):
    session, play = live_session({2: "A dog", 4: "A bird"}, "A cat")

    def stream(prompts):
        return self_forcing.stream(([prompt] for prompt in prompts), 18, self_forcing.seeded(1))

    live = play(stream(session.prompts(zip(count(), repeat("A cat")))))
    story = read_storyboard(session.end_clip().write(tmp_path / "story.yaml"), 3)
    assert [entry.block for entry in story.entries] == [0, 2, 4]
    assert torch.equal(torch.cat(list(stream(story.prompts(count()))), dim=1), live)
    assert not torch.equal(torch.cat(list(stream(repeat("A cat"))), dim=1)[:, 21:], live[:, 21:])


def test_what_was_typed_is_generated_again_with_causvid(causvid: CausVidPipeline):
    """Rollouts of three blocks, of which one is taken over: one prompt in the middle of one, one at the next one's begin."""
    session, play = live_session({1: "A dog", 2: "A bird", 5: "A fish"}, "A cat")

    def stream(prompts):
        return causvid.stream(each_rollout(prompts, 3), 3, 3, 9, causvid.seeded(1))

    live = play(stream(session.prompts(zip(rollout_blocks(3, 1), repeat("A cat")))))
    story = session.end_clip()
    assert [entry.block for entry in story.entries] == [0, 2, 3, 6]
    assert torch.equal(torch.cat(list(stream(story.prompts(rollout_blocks(3, 1)))), dim=1), live)
