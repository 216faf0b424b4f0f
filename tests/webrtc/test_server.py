"""The server in this process, without a model: viewers over HTTP, places for them, the token, images, what is refused."""

import asyncio
import io
from collections.abc import Callable, Coroutine

import pytest
import torch
from aiohttp import ClientSession, CookieJar, WSMsgType
from aioice import ice
from aiortc import RTCPeerConnection
from forks import FORKSERVER
from live import Viewer, state, until, watch
from PIL import Image

from inferix import InputError
from inferix.webrtc import viewers
from inferix.webrtc.server import MAX_IMAGE, serve
from inferix.webrtc.session import Session, WebRTCConfig
from inferix.webrtc.viewers import MAX_UNSEEN, MAX_VIEWERS

TOKEN = "a-secret/of+ours="
FRAMES = torch.stack([torch.full((3, 16, 32), value / 40) for value in range(40)])


def with_server(body: Callable[[Session, ClientSession], Coroutine], **options) -> None:
    """Await ``body`` with the session of a server, and a client of it."""

    async def main(session: Session) -> None:
        async with ClientSession(session.url) as http:
            await body(session, http)

    with serve(WebRTCConfig(port=0, **options)) as session:
        asyncio.run(main(session))


async def offer() -> str:
    """Return an offer of which no answer is ever used."""
    peer = RTCPeerConnection()
    peer.addTransceiver("video", direction="recvonly")
    return (await peer.createOffer()).sdp


# --- viewers


def test_a_viewer_over_http_sees_the_frames_and_is_counted():
    async def body(session, http):
        async with http.ws_connect("/video") as socket:
            await until(http, lambda now: now["viewers"] == 1)
            session.playout.push(FRAMES[20:21])
            image = Image.open(io.BytesIO(data := await socket.receive_bytes()))
            assert image.format == "JPEG" and image.size == (32, 16)
            assert abs(brightness(data) - 128) < 6
        await until(http, lambda now: now["viewers"] == 0)

    with_server(body)


def test_viewers_that_vanish_give_their_places_back(monkeypatch):
    """Half of 32, after a time in which the network may have been away, 30 s, here a tenth of it; the others go on."""
    monkeypatch.setattr(ice, "CONSENT_INTERVAL", ice.CONSENT_INTERVAL / 10)
    monkeypatch.setattr(viewers, "CONNECT_SECONDS", 60)  # all of them in one process, on a slow machine

    async def body(session, http):
        session.playout.push(FRAMES)
        vanishing = FORKSERVER.Process(target=watch, args=(session.url, 16))
        vanishing.start()
        staying = [Viewer(http) for _ in range(16)]
        try:
            await asyncio.gather(*(viewer.connect() for viewer in staying))
            await until(http, lambda now: now["viewers"] == 32)
        finally:
            vanishing.kill()
        await until(http, lambda now: now["viewers"] == 16)
        await asyncio.gather(*(viewer.until_frames(3) for viewer in staying))
        await asyncio.gather(*(viewer.close() for viewer in staying))

    with_server(body)


def brightness(jpeg: bytes) -> int:
    return Image.open(io.BytesIO(jpeg)).convert("L").getpixel((8, 8))


def test_a_viewer_that_shows_nothing_is_not_sent_more_and_gets_the_newest_frame_later():
    async def body(session, http):
        async with http.ws_connect("/video") as slow, http.ws_connect("/video") as quick:
            await until(http, lambda now: now["viewers"] == 2)
            session.playout.push(FRAMES)
            while brightness(await quick.receive_bytes()) < 243:  # the last one
                await quick.send_str("")
            received = [await slow.receive_bytes() for _ in range(MAX_UNSEEN)]
            assert max(map(brightness, received)) < 243
            with pytest.raises(TimeoutError):
                await slow.receive_bytes(timeout=0.5)
            await slow.send_str("")
            assert brightness(await slow.receive_bytes()) >= 243

    with_server(body)


def test_a_viewer_over_http_starts_a_server_that_waits():
    async def body(session, http):
        ready = asyncio.create_task(asyncio.to_thread(session.ready, "fp8", 1000))
        await until(http, lambda now: now["status"] == "waiting")
        async with http.ws_connect("/video"):
            await ready

    with_server(body, wait_for_viewer=True)


def test_a_full_server_says_so():
    async def body(session, http):
        sockets = [await http.ws_connect("/video") for _ in range(MAX_VIEWERS)]
        await until(http, lambda now: now["viewers"] == MAX_VIEWERS)
        async with http.ws_connect("/video") as socket:
            message = await socket.receive()
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1013) and "64 viewers" in message.extra
        async with http.post("/offer", json={"sdp": await offer()}) as reply:
            assert reply.status == 503 and "64 viewers" in await reply.text()
        for socket in sockets[::2]:  # half of them vanish without a word
            socket._response.connection.transport.abort()
        await until(http, lambda now: now["viewers"] == MAX_VIEWERS // 2)
        session.playout.push(FRAMES[:1])
        assert await sockets[1].receive_bytes()
        await asyncio.gather(*(socket.close() for socket in sockets[1::2]))

    with_server(body)


def test_offers_that_never_connect_keep_nobody_out():
    async def body(session, http):
        for _ in range(MAX_VIEWERS + 6):
            async with http.post("/offer", json={"sdp": await offer()}) as reply:
                assert reply.status == 200, await reply.text()
        viewer = Viewer(http)
        await viewer.connect()
        await until(http, lambda now: now["viewers"] == 1)
        await viewer.close()

    with_server(body)


# --- access


def test_the_token():
    async def body(session, http):
        async def status(path: str = "/state", **options) -> int:
            async with http.get(path, allow_redirects=False, **options) as reply:
                assert TOKEN not in await reply.text()
                return reply.status

        assert await status() == await status("/") == await status("/page.js") == await status("/video") == 401
        for wrong in ("x", TOKEN[:-1], TOKEN + "x", "ä", "\udcff".encode(errors="replace").decode()):
            assert await status(params={"token": wrong}) == 401
        assert await status(headers={"Authorization": f"Basic {TOKEN}"}) == 401
        async with http.post("/control", json={"action": "close"}) as reply:
            assert reply.status == 401
        assert await status(headers={"Authorization": f"Bearer {TOKEN}"}) == 200
        assert await status(params={"token": TOKEN}) == 200
        assert await status(headers={"Authorization": f"Bearer {TOKEN}", "Origin": "http://elsewhere.example"}) == 403
        async with http.get("/", headers={"Accept": "text/html"}) as reply:
            assert reply.status == 401 and 'name="token"' in await reply.text()

    with_server(body, token=TOKEN)


def test_a_browser_keeps_the_token_as_a_cookie():
    async def body(session, http):
        async with ClientSession(session.url, cookie_jar=CookieJar(unsafe=True)) as browser:
            async with browser.get("/", params={"token": TOKEN}) as reply:
                assert reply.status == 200 and "token" not in str(reply.url) and "<video" in await reply.text()
            assert (await state(browser))["status"] == "loading"
            async with browser.ws_connect("/video"):
                await until(browser, lambda now: now["viewers"] == 1)

    with_server(body, token=TOKEN)


@pytest.mark.parametrize("token", ["short", "with space in it", "ümlaute-überall", "a;b;c;d;e;f"])
def test_a_token_that_no_header_can_hold(token):
    with pytest.raises(InputError, match="WEBRTC_TOKEN must be"):
        WebRTCConfig(token=token)


@pytest.mark.parametrize(
    ("host", "token", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", TOKEN, False), ("127.0.0.1", None, False)]
)
def test_an_open_server_warns(host, token, warns, capsys):
    with serve(WebRTCConfig(host, 0, token=token)):
        assert ("WEBRTC_TOKEN" in capsys.readouterr().err) == warns


# --- what is sent


def image_file(kind: str = "PNG", size: tuple[int, int] = (32, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


async def endless(size: int):
    for _ in range(size // 2**20):
        yield bytes(2**20)


def read_image(file: io.BytesIO) -> torch.Tensor:
    """Do as the pipeline's."""
    try:
        return torch.zeros(3, *Image.open(file).size)
    except OSError:
        raise InputError("the image cannot be read") from None


def test_images_and_what_is_none():
    async def body(session, http):
        async def status(data, kind: str = "image/png", **headers) -> int:
            async with http.post("/image", data=data, headers={"Content-Type": kind} | headers) as reply:
                return reply.status

        session.ready("fp8", 1000)
        assert await status(image_file()) == 409  # this model cannot
        session.ready("fp8", 1000, read_image)
        assert await status(b"no image") == 400
        assert await status(image_file()[:40]) in (200, 400)  # the pipeline decodes it
        assert await status(image_file(), "text/plain") == 415
        assert await status(image_file(), **{"Content-Encoding": "gzip"}) == 400
        assert not (await state(http))["has_image"]
        assert await status(image_file("JPEG"), "image/jpeg") == 200 and (await state(http))["has_image"]
        assert await status(b"") == 200 and not (await state(http))["has_image"]
        try:
            assert await status(endless(100 * 2**20)) == 413
        except ConnectionError:
            pass  # the server does not wait for the rest
        assert await status(bytes(MAX_IMAGE + 1)) == 413
        assert (await state(http))["status"] == "loading"

    with_server(body)


def test_a_prompt_with_line_breaks_and_blending():
    async def body(session, http):
        async with http.post("/prompt", json={"prompt": " a red\ncircle\r\n moves ", "blend": 4}) as reply:
            assert (await reply.json())["next_prompt"] == "a red circle moves"
        assert session.next_prompt.blend == 4
        for blend in (-1, 1001, 1.5, True, "2", [], {}):
            async with http.post("/prompt", json={"prompt": "a", "blend": blend}) as reply:
                assert reply.status == 400
        assert session.next_prompt == "a red circle moves"

    with_server(body)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "nonsense"])
@pytest.mark.parametrize("path", ["/prompt", "/control", "/offer"])
def test_a_broken_content_encoding(path, encoding):
    async def body(session, http):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding, "Connection": "close"}
        async with http.post(path, data='{"prompt": 7, "action": 7, "sdp": 7}', headers=headers) as reply:
            assert reply.status in (400, 415)

    with_server(body)
