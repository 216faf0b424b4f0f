"""Prompts that change within one video: the files, when an entry takes effect, and the videos."""

from collections.abc import Callable
from itertools import count, repeat
from pathlib import Path

import pytest
import torch
from conftest import small_config

from inferix import CausVidPipeline, InputError, SelfForcingPipeline
from inferix.cli.planner import each_rollout, rollout_blocks
from inferix.config import load_config
from inferix.pipelines.pipeline import Blending
from inferix.pipelines.storyboard import Entry, Prompt, Storyboard, first_frame, read_storyboard
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


@pytest.mark.parametrize("given", [0, 1])
def test_the_first_frame_of_a_block_is_where_an_entry_at_that_time_takes_effect(read, given):
    for block in range(1, 9):
        time = first_frame(block, 3, given) / 16
        assert read(f"- {{at: 0, prompt: a}}\n- {{at: {time}, prompt: b}}", num_given=given).entries[1].block == block


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
        ("- {at: 0, prompt: a, blend: -1}", "blend must be a whole number"),
        ("- {at: 0, prompt: a, blend: 1.5}", "blend must be a whole number"),
        ("- {at: 0, prompt: a, blend: true}", "blend must be a whole number"),
        ("- {at: 0, prompt: a, switch: fade}", "switch must be recache or cross_attention"),
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


LONGLIVE = '{"prompts": ["a", "b", "c"]}'


@pytest.mark.parametrize(
    ("text", "indices"),
    [(LONGLIVE, (6, 16)), (LONGLIVE[:-1] + ', "switch_frame_indices": [6, 16]}\n\n', None)],
)
def test_longlives_files(tmp_path, text, indices):
    (tmp_path / "story.jsonl").write_text(text)
    story = read_storyboard(tmp_path / "story.jsonl", 3, switch_frame_indices=indices)
    assert story.entries == (Entry(0, "a"), Entry(2, "b"), Entry(6, "c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one line"),
        (LONGLIVE + "\n" + LONGLIVE, "one line"),
        ("[]", "one line"),
        ('{"prompts": "a"}', "one line"),
        ("{", "not JSON"),
        ('{"prompts": ["a"], "seed": 1}', "no key seed"),
        ('{"prompts": ["a", "b"]}', "2 prompts need a list of 1 switch_frame_indices"),
        ('{"prompts": ["a", ""]}'[:-1] + ', "switch_frame_indices": [3]}', "entry 2: prompt must be a text"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": ["x"]}', "entry 2: at_frame must be a whole number"),
        ('{"prompts": ["a", "b", "c"], "switch_frame_indices": [6, 3]}', "entry 3: it begins before"),
    ],
)
def test_malformed_longlive_files_are_refused(tmp_path, text, message):
    (tmp_path / "story.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_storyboard(tmp_path / "story.jsonl", 3)


@pytest.mark.parametrize(("written", "indices"), [("6, 16", (6, 16)), ("[6, 16]", (6, 16)), ("6", (6,))])
def test_switch_frame_indices_of_a_config(tmp_path, written, indices):
    path = small_config("self_forcing/configs/self_forcing_dmd", tmp_path, switch_frame_indices=written)
    assert load_config(path).switch_frame_indices == indices


def test_a_storyboard_is_read_as_it_was_written(tmp_path):
    faded = Prompt("a", blend=3, switch="cross_attention")
    read = read_storyboard(Storyboard((Entry(0, faded),)).write(tmp_path / "faded.yaml"), 3).entries[0].prompt
    assert (read, read.blend, read.switch) == ("a", 3, "cross_attention")
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
    """Rollouts of three blocks, of which one is taken over; a prompt that comes when a rollout has begun waits for its next block."""
    session, play = live_session({2: "A dog", 3: "A bird", 6: "A fish"}, "A cat")

    def stream(prompts):
        return causvid.stream(each_rollout(prompts, 3), 3, 3, 9, causvid.seeded(1))

    live = play(stream(session.prompts(zip(rollout_blocks(3, 1), repeat("A cat")))))
    story = session.end_clip()
    assert [entry.block for entry in story.entries] == [0, 2, 4, 6]
    assert torch.equal(torch.cat(list(stream(story.prompts(rollout_blocks(3, 1)))), dim=1), live)


def test_blending_goes_over_linearly():
    """And from where it has come to, where another prompt is typed meanwhile."""
    old, new, third = (torch.full((1, 2, 3), value) for value in (0.0, 4.0, 1.0))
    blending = Blending(0)
    steps = [blending.step(old, 4, None)]  # the first prompt comes from nowhere
    steps += [blending.step(new, 4, "cross_attention") for _ in range(6)]
    assert [step.embeds.mean().item() for step in steps] == [0, 1, 2, 3, 4, 4, 4]
    assert steps[4] is steps[5] is steps[6] and steps[1].switch == "cross_attention"
    blending.step(old, 2, None)
    steps = [blending.step(third, 2, None), blending.step(third, 2, None)]
    assert [step.embeds.mean().item() for step in steps] == [1.5, 1] and steps[1].embeds is third
    assert Blending(3).step(old, None, None).embeds is old


def test_a_storyboard_with_blending_and_switches(self_forcing: SelfForcingPipeline):
    """Each changes the video from the switch on, and nothing before it."""

    def video(**options) -> torch.Tensor:
        story = Storyboard((Entry(0, "A cat"), Entry(2, Prompt("A dog", **options))))
        prompts = ([prompt] for prompt in story.prompts(count()))
        return torch.cat(list(self_forcing.stream(prompts, 12, self_forcing.seeded(1))), dim=1)

    plain = video()
    assert torch.equal(video(blend=1, switch="recache"), plain)
    for options in ({"blend": 2}, {"switch": "cross_attention"}):
        changed = video(**options)
        assert torch.equal(changed[:, :21], plain[:, :21]) and not torch.equal(changed[:, 21:], plain[:, 21:])
