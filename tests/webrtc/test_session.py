"""The session and the server in this process: what the generating thread sees, and which addresses are offered."""

import asyncio
import threading
from itertools import count, repeat
from urllib.parse import urlsplit

import aioice.ice
import pytest
import torch
from aiohttp import ClientSession
from live import Viewer, state, until

from inferix import InputError
from inferix.webrtc.playout import Playout
from inferix.webrtc.server import serve
from inferix.webrtc.session import Session, WebRTCConfig
from inferix.webrtc.viewers import media_addresses

FRAMES = torch.zeros(12, 3, 16, 16)


def make_session(**options) -> Session:
    session = Session(WebRTCConfig(**options), Playout())
    session.ready("fp8", 1000)
    return session


def upper(prompt: str, image: torch.Tensor | None) -> str:
    """Make a clip of a typed prompt."""
    return prompt.upper()


def generate(session: Session, clip: str, num_blocks: int = 3) -> int:
    """Do as the runners do; return the number of blocks made."""
    session.begin_clip(num_blocks)
    done = 0
    for _ in session.prompts(zip(range(num_blocks), repeat(clip))):
        session.show(FRAMES)
        done += 1
    return done


def test_a_typed_prompt_comes_before_the_rest():
    session = make_session(exit_when_done=True)
    clips = session.clips(["one", "two"], upper)
    assert next(clips) == "one"
    session.submit_prompt("first")
    session.submit_prompt("typed")  # instead of the one before
    assert list(clips) == ["TYPED", "two"]


def test_stop_ends_the_clip_and_no_other():
    session = make_session(exit_when_done=True)
    clips = session.clips(["one", "two", "three"], upper)
    assert not session.control("stop")  # nothing is generated yet
    assert generate(session, next(clips)) == 3
    next(clips)
    session.begin_clip(3)
    session.submit_prompt("typed")
    assert session.control("stop")
    assert list(session.prompts(zip(range(3), repeat("two")))) == []
    assert [generate(session, clip) for clip in clips] == [3, 3]


def test_close_ends_everything():
    session = make_session()
    clips = session.clips(["one", "two"], upper)
    next(clips)
    assert session.control("close") and list(clips) == [] and session.snapshot()["status"] == "closing"


def test_pause_holds_the_generating_thread_after_its_block():
    session = make_session()
    session.begin_clip(3)
    assert session.control("pause") and session.playout.paused
    thread = threading.Thread(target=session.show, args=(FRAMES,))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and session.snapshot()["block"] == 1
    assert session.control("resume")
    thread.join(60)
    assert not thread.is_alive() and session.snapshot()["status"] == "generating"


def test_a_pause_between_two_clips_lasts():
    session = make_session()
    session.begin_clip(3)
    session.control("pause")
    session.begin_clip(3)
    assert session.snapshot()["status"] == "paused"


def test_a_typed_prompt_takes_effect_at_the_next_block():
    session = make_session()
    session.begin_clip(5)
    prompts = session.prompts(zip(count(), repeat("given")))
    session.show(FRAMES * len(next(prompts)))
    assert next(prompts) == "given"
    session.submit_prompt("typed")
    now = session.snapshot()
    assert (now["prompt"], now["next_prompt"], now["next_prompt_block"]) == ("given", "typed", 3)
    session.show(FRAMES)
    assert next(prompts) == "typed"
    now = session.snapshot()
    assert (now["prompt"], now["prompt_block"], now["next_prompt"]) == ("typed", 3, None)
    session.show(FRAMES)
    assert next(prompts) == "typed"  # from now on
    storyboard = session.end_clip()
    assert [(entry.block, entry.prompt) for entry in storyboard.entries] == [(0, "given"), (2, "typed")]


def test_a_prompt_typed_in_the_last_block_is_the_next_clips():
    session = make_session(exit_when_done=True)
    clips = session.clips(["one"], upper)
    session.begin_clip(1)
    prompts = session.prompts(zip(range(1), repeat(next(clips))))
    next(prompts)
    session.submit_prompt("typed")
    assert session.snapshot()["next_prompt_block"] is None
    session.show(FRAMES)
    assert list(clips) == ["TYPED"] and session.end_clip() is None


def test_a_block_that_is_taken_over_keeps_its_prompt():
    session = make_session()
    session.begin_clip(None)
    prompts = session.prompts(zip([1, 1, 2], "aaa"))
    assert next(prompts) == "a"
    session.submit_prompt("typed")
    assert list(prompts) == ["a", "typed"]


def test_stop_keeps_what_was_still_to_come():
    session = make_session()
    session.begin_clip(None)
    given = zip(count(), "abcd")
    prompts = session.prompts(given)
    next(prompts)
    session.submit_prompt("typed")
    session.control("stop")
    assert list(prompts) == [] and session.next_prompt == "typed"
    assert [prompt for _, prompt in given] == ["b", "c", "d"]


def test_with_a_viewer_generation_stays_one_block_ahead():
    """What is queued is played by hand here. Nobody watches: it does not wait."""
    session = make_session()
    session.begin_clip(None)
    prompts = session.prompts(zip(count(), repeat("a")))
    for _ in range(3):
        next(prompts)
        session.show(FRAMES)
    session.set_viewers(1)
    thread = threading.Thread(target=next, args=(prompts,))
    thread.start()
    while len(session.playout.queue) > len(FRAMES) + 1:
        session.playout.queue.popleft()
    thread.join(0.3)
    assert thread.is_alive()
    session.playout.queue.clear()
    thread.join(60)
    assert not thread.is_alive()


def test_a_typed_prompt_ends_the_wait():
    session = make_session()
    session.begin_clip(None)
    prompts = session.prompts(zip(count(), repeat("a")))
    next(prompts)
    session.set_viewers(1)
    session.show(FRAMES.repeat(3, 1, 1, 1))
    taken = []
    thread = threading.Thread(target=lambda: taken.append(next(prompts)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    session.submit_prompt("typed")
    thread.join(60)
    assert taken == ["typed"]


def test_an_image_begins_a_clip_of_its_own():
    """The prompt that comes with it does not change the running clip, which ends as by Stop."""
    session = make_session(exit_when_done=True)
    session.read_image = lambda file: torch.tensor(list(file.read()))
    made = []
    clips = session.clips(["one", "two"], lambda prompt, image: made.append(image) or prompt.upper())
    session.begin_clip(None)
    prompts = session.prompts(zip(count(), repeat(next(clips))))
    assert next(prompts) == "one"
    session.submit_image(b"\7")
    assert next(prompts) == "one"  # an image alone changes nothing
    session.submit_prompt("typed")
    assert session.snapshot()["next_prompt_block"] is None
    assert list(prompts) == [] and session.stop_requested
    assert next(clips) == "TYPED" and made[0].tolist() == [7]
    assert not session.snapshot()["has_image"] and next(clips) == "two"


def test_the_seconds_from_sending_a_prompt_to_the_first_frame_that_it_changes():
    session = make_session()
    session.begin_clip(None, lambda block: max(0, 12 * block - 9))  # of which pieces of 12 frames have parts of two
    prompts = session.prompts(zip(count(), repeat("given")))
    next(prompts)
    next(prompts)
    session.show(FRAMES)
    session.submit_prompt("typed")
    sent = session.sent_time
    assert next(prompts) == "typed"
    session.show(FRAMES)
    labels = [(frame.prompt, frame.sent) for frame in session.playout.queue]
    assert labels[:3] == [("given", None)] * 3  # those of the pieces before are not waited for
    assert labels[3:] == [("typed", sent)] + [("typed", None)] * 8
    for _ in labels:
        assert session.playout.response_seconds is None or len(session.playout.queue) < 9
        session.playout._take()
    now = session.snapshot()
    assert now["playing_prompt"] == "typed" and now["response_seconds"] > 0 and now["history"] == ["given", "typed"]


def test_the_model_waits_for_a_viewer():
    session = Session(WebRTCConfig(wait_for_viewer=True), Playout())
    thread = threading.Thread(target=session.ready, args=("fp8", 1000))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and session.snapshot()["status"] == "waiting"
    session.set_viewers(1)
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("frames, dropped", [(160, 0), (161, 1), (400, 240)])
def test_frames_beyond_ten_seconds_push_out_the_oldest(frames, dropped):
    playout = Playout()
    playout.push(torch.arange(frames).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) / frames)
    assert (len(playout.queue), playout.dropped) == (160 if dropped else frames, dropped)
    luma = playout.queue[0].planes[:16].mean()
    assert luma == pytest.approx(16 + 219 * dropped / frames, abs=2)


# --- addresses


OTHERS = aioice.ice.get_host_addresses(True, True)


@pytest.mark.parametrize(
    "loopback", [True, pytest.param(False, marks=pytest.mark.skipif(not OTHERS, reason="no network"))]
)
def test_a_page_at_the_loopback_address_is_reached(loopback):
    """From that address, and from another that the browser hides, as Firefox does."""

    async def body(session):
        async with ClientSession(session.url) as http:
            viewer = Viewer(http)
            await viewer.connect(loopback)
            await until(http, lambda now: now["viewers"] == 1)
            session.playout.push(FRAMES)
            await viewer.until_frames(1)
            await viewer.close()
            await until(http, lambda now: now["viewers"] == 0)

    found = aioice.ice.get_host_addresses
    with serve(WebRTCConfig(port=0)) as session:
        assert urlsplit(session.url).hostname == "127.0.0.1"
        asyncio.run(body(session))
        assert aioice.ice.get_host_addresses is found  # nothing is replaced for the whole process


def test_video_is_offered_where_the_page_is():
    assert media_addresses({"127.0.0.1"}) == ["127.0.0.1", *OTHERS]
    assert media_addresses({"0.0.0.0"}) == [*OTHERS, "127.0.0.1"]
    assert media_addresses({"192.0.2.7"}) == ["192.0.2.7"]


@pytest.mark.parametrize("host", ["nowhere.invalid", "x..y", "x" * 64, "192.0.2.200", "-"])
def test_an_address_that_cannot_be_had(host):
    with pytest.raises(InputError, match="no such address or port here"), serve(WebRTCConfig(host, 0)):
        pass


def test_two_servers_in_one_process():
    async def prompt(session):
        async with ClientSession(session.url) as http:
            return (await state(http))["prompt"]

    with serve(WebRTCConfig(port=0)) as one, serve(WebRTCConfig(port=0)) as other:
        one.announce("a", None)
        other.announce("b", None)
        assert [asyncio.run(prompt(session)) for session in (one, other)] == ["a", "b"]
