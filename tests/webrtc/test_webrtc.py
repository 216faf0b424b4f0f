"""Streaming: the real scripts on the embedded model, and real viewers; nothing is mocked."""

import asyncio
import http.client
import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psutil
import pytest
from aiohttp import ClientSession
from aiortc import RTCPeerConnection
from live import LIMIT, Viewer, state, until
from pictures import BLUE, RED, assert_goes_over, read_video
from PIL import Image
from streaming import ForkedScript, Script

from inferix.pipelines.storyboard import Entry, read_storyboard

pytestmark = pytest.mark.timeout(900)
SMALL = {"HEIGHT": "32", "WIDTH": "32"}
"""Variables of a video that is generated quickly, and shows nothing that can be told."""


async def control(session: ClientSession, action: str) -> dict:
    """Return the state after pause, resume, stop or close."""
    async with session.post("/control", json={"action": action}) as reply:
        assert reply.status == 200
        return await reply.json()


def test_a_typed_prompt_steers_the_next_block_of_causvid(tmp_path):
    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            await until(session, lambda now: now["block"] >= 1)
            assert (await control(session, "pause"))["status"] == "paused"
            async with session.post("/prompt", json={"prompt": BLUE.prompt}) as reply:
                now = await reply.json()
                assert now["next_prompt"] == BLUE.prompt and now["next_prompt_block"] - now["block"] in (1, 2)
                block = now["next_prompt_block"]
            assert (await control(session, "resume"))["status"] == "generating"
            now = await until(session, lambda now: now["prompt"] == BLUE.prompt)
            assert now["prompt_block"] == block
            await until(session, lambda now: now["block"] >= block + 2)
            await control(session, "stop")
            now = await until(session, lambda now: now["status"] == "idle")
            assert len(now["files"]) == 2
            for listed in now["files"]:
                async with session.get(f"/files/{listed['name']}") as reply:
                    assert await reply.read() == (script.folder / listed["name"]).read_bytes()
            return block

    with ForkedScript("causvid", tmp_path / "out", PROMPT=RED.prompt, QUANT_TYPE="int8", NUM_ROLLOUT="1000") as script:
        block = asyncio.run(body(script))
        assert script.interrupt() == 130
    storyboard, path = sorted(script.folder.glob("*.[my]*[4l]"), key=lambda path: path.suffix, reverse=True)
    assert read_storyboard(storyboard, 3).entries == (Entry(0, RED.prompt), Entry(block - 1, BLUE.prompt))
    assert_goes_over(read_video(path))


def test_sixteen_viewers_and_unwelcome_guests(tmp_path):
    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            viewers = [Viewer(session) for _ in range(16)]
            await asyncio.gather(*(viewer.connect() for viewer in viewers))
            await until(session, lambda now: now["viewers"] == 16 and now["block"])
            await asyncio.gather(*(viewer.until_frames(5) for viewer in viewers))
            await asyncio.gather(*(viewer.close() for viewer in viewers[1:]))
            await until(session, lambda now: now["viewers"] == 1)
            block = (await state(session))["block"]
            await refuses(session)
            await viewers[0].until_frames(1)
            await viewers[0].close()
            await until(session, lambda now: now["block"] > block)

    with ForkedScript("causvid", tmp_path / "out", NUM_ROLLOUT="1000", **SMALL) as script:
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
            for text in ("", "  ", "a\x00b", "\x1b[2J", "\ud800", "x" * 2001, "x" * 1_000_000, 7)
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


def test_an_image_that_is_sent_begins_a_video(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (300, 200), (30, 60, 200)).save(file, "PNG")

    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            await until(session, lambda now: now["block"] >= 1)
            headers = {"Content-Type": "image/png"}
            async with session.post("/image", data=file.getvalue(), headers=headers) as reply:
                assert (await reply.json())["has_image"]
            async with session.post("/prompt", json={"prompt": BLUE.prompt}) as reply:
                assert (await reply.json())["next_prompt_block"] is None
            now = await until(session, lambda now: now["prompt"] == BLUE.prompt and now["block"] >= 2)
            assert not now["has_image"] and now["prompt_block"] == 1
            await control(session, "close")

    with ForkedScript(
        "self_forcing", tmp_path / "out", PROMPT=RED.prompt, NUM_OUTPUT_FRAMES="21", VAE="full"
    ) as script:
        asyncio.run(body(script))
        assert script.wait(LIMIT).returncode == 0
    (path,) = script.folder.glob("A-blue*.mp4")
    red, green, blue = read_video(path)[0].mean(dim=(1, 2)).tolist()
    assert blue > 0.5 and red < 0.35 and green < 0.45


def test_it_leaves_after_the_last_frame_where_asked(tmp_path):
    with ForkedScript("self_forcing", tmp_path / "out", NUM_OUTPUT_FRAMES="3", WEBRTC_EXIT="1", **SMALL) as script:
        assert script.wait(LIMIT).returncode == 0
    (path,) = script.folder.glob("*.mp4")
    assert len(read_video(path)) == 9


@contextmanager
def stopped(script: Script) -> Iterator[None]:
    """Hold the process, that it does nothing between two things done here."""
    process = psutil.Process(script.popen.pid)
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    yield
    process.resume()


@pytest.mark.parametrize("replace", [False, True])
def test_an_output_folder_that_goes_away_ends_no_live_video(replace, tmp_path):
    """It is said once, the video goes on, in a new file where there can be one; the exit code tells of it in the end."""

    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            await until(session, lambda now: now["block"] >= 1)
            with stopped(script):
                shutil.rmtree(script.folder)
                if replace:
                    script.folder.touch()
            now = await until(session, lambda now: now["problem"])
            assert str(script.folder) in now["problem"] and "full" not in now["problem"]
            block = now["block"]
            await until(session, lambda now: now["block"] >= block + 2)
            await control(session, "close")

    with ForkedScript("self_forcing", tmp_path / "out", ENDLESS="1", **SMALL) as script:
        asyncio.run(body(script))
        result = script.wait(LIMIT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: a file is missing: " in result.stderr.splitlines()[-1]
    if replace:
        assert script.folder.read_bytes() == b""
    else:
        assert sum(len(read_video(path)) for path in script.folder.glob("*.mp4")) >= 12


def test_ctrl_c_completes_an_endless_video(tmp_path):
    async def body(script: Script):
        async with ClientSession(script.url()) as session:
            now = await until(session, lambda now: now["block"] >= 2)
            assert now["blocks"] is None

    with ForkedScript("self_forcing", tmp_path / "out", ENDLESS="1", **SMALL) as script:
        asyncio.run(body(script))
        assert script.interrupt() == 130 and "Traceback" not in script.stderr
    path, *others = sorted(script.folder.glob("*.mp4"))
    assert path.name.endswith("-endless-00000.mp4") and len(read_video(path)) >= 21
    assert all(path.name in script.stdout for path in (path, *others))


def test_ctrl_c_while_nobody_has_come(tmp_path):
    with ForkedScript("causvid", tmp_path / "out", WEBRTC_WAIT="1") as script:
        script.url()
        assert script.interrupt() == 130 and "Traceback" not in script.stderr
    assert not script.folder.exists() or list(script.folder.iterdir()) == []
