"""Streaming to a browser: the real scripts on the embedded model, a real Chromium, real viewers; nothing is mocked."""

import asyncio
import http.client
import json
import sys
from base64 import b64decode
from urllib.parse import urlsplit

import imageio.v3 as iio
import pytest
import torch
from aiohttp import ClientSession
from aiortc import RTCPeerConnection
from chromium import Page, chromium
from conftest import ROOT
from live import Script, Viewer, state, until
from processes import Process

from inferix.pipelines.storyboard import Entry, read_storyboard
from inferix.webrtc.server import serve
from inferix.webrtc.session import WebRTCConfig

sys.path.insert(0, str(ROOT / "example/demo_model"))
from score import segment  # noqa: E402
from world import BACKGROUNDS, COLORS, Scene  # noqa: E402

RED = Scene("red", "square", "from left to right", "white")
BLUE = Scene("blue", "circle", "from right to left", "black")
RECORD_TIMESTAMPS = """
    window.timestamps = [];
    (function next() { video.requestVideoFrameCallback((_, meta) => { timestamps.push(meta.rtpTimestamp); next(); }); })();
"""
READ_PIXELS = """(() => {
    const canvas = new OffscreenCanvas(128, 128).getContext("2d");
    canvas.drawImage(video, 0, 0);
    const pixels = canvas.getImageData(0, 0, 128, 128).data;
    return btoa(Array.from(pixels, value => String.fromCharCode(value)).join(""));
})()"""


async def shows(page: Page) -> tuple[str, str]:
    """The object's colour and the background in the page's video, read back through a canvas."""
    pixels = torch.frombuffer(bytearray(b64decode(await page.run(READ_PIXELS))), dtype=torch.uint8)
    frame = pixels.view(128, 128, 4)[..., :3].permute(2, 0, 1) / 255
    color, background, mask = segment(frame[None])
    seen = list(COLORS)[color.item()] if 300 < mask.sum() < 4000 else "nothing"
    return seen, list(BACKGROUNDS)[background.item()]


async def until_shown(page: Page, scene: Scene, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while await shows(page) != (scene.color, scene.background):
            await asyncio.sleep(0.2)


async def focus(page: Page, element: str) -> None:
    """Go there with the Tab key."""
    for _ in range(10):
        if await page.run(f"document.activeElement.id === '{element}'"):
            return
        await page.press("Tab")
    raise AssertionError(f"Tab does not reach {element}")


def video(path) -> torch.Tensor:
    """The frames of a file, [T, 3, H, W] in [0, 1]."""
    assert iio.immeta(path)["fps"] == 16
    return torch.from_numpy(iio.imread(path)).permute(0, 3, 1, 2) / 255


@pytest.mark.timeout(300)
def test_a_browser_watches_and_steers_self_forcing_by_keyboard(tmp_path):
    async def body(script: Script):
        async with chromium() as page:
            url = script.url()
            await page.open(url)
            await page.until("document.readyState === 'complete' && performance.getEntriesByName('first-frame').length")
            await page.run(RECORD_TIMESTAMPS)
            await page.until("timestamps.length > 32")
            timestamps = await page.run("timestamps")
            gaps = [later - earlier for earlier, later in zip(timestamps, timestamps[1:])]
            assert 90000 // 16 - 1 <= min(gaps) < 90000 // 8  # played at 16 a second, never faster
            await until_shown(page, RED)
            assert await page.run("state.quantization") == "fp8, per token"

            await focus(page, "typed")
            await page.type(BLUE.prompt)
            await page.press("Enter")
            await page.until(f"state.next_prompt === {BLUE.prompt!r} || state.prompt === {BLUE.prompt!r}")
            await page.until(f"document.getElementById('prompt').textContent === {BLUE.prompt!r}")
            await until_shown(page, BLUE)

            await focus(page, "pause")
            await page.press(" ")
            await page.until("state.status === 'paused'")
            await asyncio.sleep(0.5)
            still = await page.run(READ_PIXELS), await page.run("state.block")
            await asyncio.sleep(1)
            assert (await shows(page))[0] == BLUE.color and await page.run("state.block") - still[1] <= 1
            await page.press(" ")

            await page.until("state.status === 'generating'")
            await focus(page, "stop")
            await page.press("Enter")
            await page.until("state.status === 'idle' && document.querySelectorAll('#files a').length === 2")
            await page.open(await page.run("document.querySelector('#files a').href"))
            await page.until("location.pathname.endsWith('.mp4') && document.querySelector('video').duration > 1")
            await page.open(url)
            await page.until("document.body?.dataset.status === 'idle'")
            await focus(page, "stop")
            await page.press("Enter")
            assert (await asyncio.to_thread(script.wait)).returncode == 0

    variables = {"PROMPT": RED.prompt, "WEBRTC_WAIT": "1", "NUM_OUTPUT_FRAMES": "63"}
    with Script("self_forcing", tmp_path / "out", **variables) as script:
        asyncio.run(body(script))
    storyboard, path = sorted(script.folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert [entry.prompt for entry in read_storyboard(storyboard, 3).entries] == [RED.prompt, BLUE.prompt]
    assert_goes_over(video(path))


def assert_goes_over(frames: torch.Tensor) -> None:
    """From what one prompt says to what the other one does."""
    colors, backgrounds, _ = segment(frames)
    for part, scene in ((slice(0, 9), RED), (slice(-4, None), BLUE)):
        assert (colors[part] == list(COLORS).index(scene.color)).all()
        assert (backgrounds[part] == list(BACKGROUNDS).index(scene.background)).all()


@pytest.mark.timeout(300)
def test_a_typed_prompt_steers_the_next_block_of_causvid(tmp_path):
    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            await until(session, lambda now: now["block"] >= 1)
            async with session.post("/control", json={"action": "pause"}) as reply:
                assert (await reply.json())["status"] == "paused"
            async with session.post("/prompt", json={"prompt": BLUE.prompt}) as reply:
                now = await reply.json()
                assert now["next_prompt"] == BLUE.prompt and now["next_prompt_block"] - now["block"] in (1, 2)
                block = now["next_prompt_block"]
            async with session.post("/control", json={"action": "resume"}) as reply:
                assert (await reply.json())["status"] == "generating"
            now = await until(session, lambda now: now["prompt"] == BLUE.prompt)
            assert now["prompt_block"] == block
            await until(session, lambda now: now["block"] >= block + 2)
            async with session.post("/control", json={"action": "stop"}) as reply:
                assert reply.status == 200
            now = await until(session, lambda now: now["status"] == "idle")
            assert len(now["files"]) == 2
            for listed in now["files"]:
                async with session.get(f"/files/{listed['name']}") as reply:
                    assert await reply.read() == (script.folder / listed["name"]).read_bytes()
            return block

    with Script("causvid", tmp_path / "out", PROMPT=RED.prompt, QUANT_TYPE="int8", NUM_ROLLOUT="1000") as script:
        block = asyncio.run(body(script))
        assert script.interrupt() == 130
    storyboard, path = sorted(script.folder.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert read_storyboard(storyboard, 3).entries == (Entry(0, RED.prompt), Entry(block, BLUE.prompt))
    assert_goes_over(video(path))


@pytest.mark.timeout(300)
def test_sixteen_viewers_one_that_vanishes_and_unwelcome_guests(tmp_path):
    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            with Process([sys.executable, ROOT / "tests/webrtc/live.py", script.url()]):
                await until(session, lambda now: now["viewers"] == 1)
            viewers = [Viewer(session) for _ in range(16)]
            await asyncio.gather(*(viewer.connect() for viewer in viewers))
            await until(session, lambda now: now["viewers"] == 17 and now["block"])
            await asyncio.gather(*(viewer.until_frames(15) for viewer in viewers))
            await refuses(session)
            await asyncio.gather(*(viewer.close() for viewer in viewers[1:]))
            await until(session, lambda now: now["viewers"] <= 2)
            await until(session, lambda now: now["viewers"] == 1)  # after 30 s in which the network may have been away
            await viewers[0].until_frames(1)
            await viewers[0].close()

    with Script("causvid", tmp_path / "out", PROMPT=RED.prompt, NUM_ROLLOUT="1000") as script:
        asyncio.run(body(script))
        assert script.interrupt() == 130 and "Traceback" not in script.stderr
    assert list(script.folder.iterdir()) == []  # what was being written is gone


async def refuses(session: ClientSession) -> None:
    """Send what no page sends: each is a client error, and nothing changes."""
    kept = ("status", "prompt", "next_prompt", "viewers", "files")
    before = await state(session)
    audio, data = RTCPeerConnection(), RTCPeerConnection()
    audio.addTransceiver("audio", direction="recvonly")
    data.createDataChannel("data")
    offers = [(await peer.createOffer()).sdp for peer in (audio, data)]
    statuses = {}
    for path, body in (
        *(("/offer", {"sdp": sdp}) for sdp in ("", "v=0", "\0", "m=video 9 UDP/TLS/RTP/SAVPF 96\r\n" * 99, 7, *offers)),
        *(("/offer", body) for body in ([], None, {}, {"sdp": None}, {"sdp": "x" * 1_000_000})),
        *(
            ("/prompt", {"prompt": text})
            for text in ("", "  ", "a\x00b", "a\nb", "\x1b[2J", "\ud800", "x" * 2001, "x" * 1_000_000, 7)
        ),
        *(("/control", {"action": action}) for action in ("", "explode", "resume", None, ["stop"])),
    ):
        async with session.post(path, json=body) as reply:
            statuses[path, str(body)[:60]] = reply.status
    for path in ("/offer", "/prompt", "/control"):
        good = json.dumps({"sdp": offers[0], "prompt": "a", "action": "stop"})
        own = str(session._base_url).rstrip("/")
        for body, headers in (
            (good, {"Content-Type": "text/plain"}),
            (good, {"Content-Type": "application/x-www-form-urlencoded"}),
            (good, {"Content-Type": "application/json", "Origin": "http://elsewhere.example"}),
            (good, {"Content-Type": "application/json", "Origin": "null"}),
            (good, {"Content-Type": "application/json", "Origin": own.rpartition(":")[0] + ":1"}),
            (good, {"Content-Type": "application/json", "Host": "elsewhere.example"}),
            ("{", {"Content-Type": "application/json"}),
            ("[" * 50_000, {"Content-Type": "application/json"}),
            (b"\xff\xfe", {"Content-Type": "application/json"}),
            (good, {"Content-Type": "application/json", "Content-Encoding": "gzip", "Connection": "close"}),
            (good, {"Content-Type": "application/json", "Content-Encoding": "deflate", "Connection": "close"}),
        ):
            async with session.post(path, data=body, headers=headers) as reply:
                statuses[path, str(body)[:60], str(headers)] = reply.status
        async with session.get(path) as reply:
            statuses["GET", path] = reply.status
    address = urlsplit(own).netloc
    for path in (
        "/nothing", "/files/", "/files/none.mp4", "/files/../setup.sh", "/files/..%2f..%2fsetup.sh", "/files/%2fetc%2fpasswd",
        "//etc/passwd", "/../../etc/passwd", "/files/" + "x" * 9000,
    ):  # fmt: skip
        connection = http.client.HTTPConnection(address)
        connection.request("GET", path)  # as it is: other clients tidy a path up first
        statuses[path[:40]] = connection.getresponse().status
        connection.close()
    assert {key: status for key, status in statuses.items() if not 400 <= status < 500} == {}
    after = await state(session)
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}


def test_it_leaves_after_the_last_frame_where_asked(tmp_path):
    with Script("self_forcing", tmp_path / "out", NUM_OUTPUT_FRAMES="3", WEBRTC_EXIT="1") as script:
        assert script.wait().returncode == 0
    (path,) = script.folder.iterdir()
    assert len(video(path)) == 9


def test_ctrl_c_completes_an_endless_video(tmp_path):
    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            now = await until(session, lambda now: now["block"] >= 2, 90)
            assert now["blocks"] is None

    with Script("self_forcing", tmp_path / "out", ENDLESS="1") as script:
        asyncio.run(body(script))
        assert script.interrupt() == 130 and "Traceback" not in script.stderr
    (path,) = script.folder.iterdir()
    assert path.name.endswith("-endless-00000.mp4") and path.name in script.stdout and len(video(path)) >= 21


def test_ctrl_c_while_nobody_has_come(tmp_path):
    with Script("causvid", tmp_path / "out", WEBRTC_WAIT="1") as script:
        script.url()
        assert script.interrupt() == 130 and "Traceback" not in script.stderr
    assert not script.folder.exists() or list(script.folder.iterdir()) == []


def test_a_taken_port_is_said_in_one_line(tmp_path, capsys):
    with serve(WebRTCConfig(port=0)):
        port = urlsplit(capsys.readouterr().out.split()[-1]).port
        with Script("self_forcing", tmp_path / "out", WEBRTC_PORT=str(port)) as script:
            result = script.wait()
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert "taken" in result.stderr and "--webrtc_port" in result.stderr
