"""The page in real browsers, also where only its TCP port is forwarded, as through an SSH tunnel."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chromium import Page, chromium
from firefox import EXECUTABLE, firefox
from forward import join
from live import LIMIT, ROOT
from pictures import BLUE, READ_PIXELS, RECORD_TIMESTAMPS, RED, assert_goes_over, read_video, shows, until_shown
from streaming import ForkedScript, Script

from inferix.pipelines.storyboard import read_storyboard
from world import Scene

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
needs_firefox = pytest.mark.skipif(not EXECUTABLE, reason="Firefox is not installed")
pytestmark = pytest.mark.timeout(900)
FIRST_FRAME = "document.readyState === 'complete' && performance.getEntriesByName('first-frame').length"
SHOWN_SINCE = "/Shown since block \\d+, \\d+\\.\\d s after Send/.test(document.getElementById('next').textContent)"
QUICK = {"PROMPT": RED.prompt, "VAE": "tiny", "WEBRTC_WAIT": "1"}
"""Variables of a script that generates as fast as the page plays, and nothing before somebody watches."""
NAMESPACE = ("unshare", "--net", "--map-root-user")
has_namespaces = subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


async def focus(page: Page, element: str) -> None:
    """Go there with the Tab key."""
    for _ in range(10):
        if await page.run(f"document.activeElement.id === '{element}'"):
            return
        await page.press("Tab")
    raise AssertionError(f"Tab does not reach {element}")


@needs_chromium
def test_a_browser_watches_and_steers_self_forcing_by_keyboard(tmp_path):
    async def body(script: Script):
        async with chromium() as page:
            url = script.url()
            await page.open(url)
            await page.until(FIRST_FRAME)
            await page.run(RECORD_TIMESTAMPS)
            await page.until("timestamps.length > 32")
            timestamps = await page.run("timestamps")
            gaps = [later - earlier for earlier, later in zip(timestamps, timestamps[1:])]
            assert 90000 // 16 - 1 <= min(gaps) < 90000 // 8  # played at 16 a second, never faster
            await until_shown(page, RED)
            assert await page.run("state.viewers") == 1
            assert await page.run("state.quantization") == "fp8, per token"

            await focus(page, "typed")
            await page.type(BLUE.prompt)
            await page.press("Enter")
            await page.until(f"state.next_prompt === {BLUE.prompt!r} || state.prompt === {BLUE.prompt!r}")
            await page.until(f"document.getElementById('prompt').textContent === {BLUE.prompt!r}")
            await until_shown(page, BLUE)
            await page.until(SHOWN_SINCE)

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
            await focus(page, "end")
            await page.press("Enter")
            await page.until("document.getElementById('sure').open")
            await page.press("Tab")  # from the first button, which goes on
            await page.press("Enter")
            assert (await asyncio.to_thread(script.wait, LIMIT)).returncode == 0

    variables = QUICK | {"NUM_OUTPUT_FRAMES": "600"}  # far more than the page waits for
    with ForkedScript("self_forcing", tmp_path / "out", **variables) as script:
        asyncio.run(body(script))
    storyboard, path = sorted(script.folder.glob("*.[my]*[4l]"), key=lambda path: path.suffix, reverse=True)
    assert [entry.prompt for entry in read_storyboard(storyboard, 3).entries] == [RED.prompt, BLUE.prompt]
    assert_goes_over(read_video(path))


async def steer(page: Page, shown: Scene, typed: Scene) -> None:
    """See what is shown, type another prompt, and see that."""
    await until_shown(page, shown)
    await page.run("document.getElementById('typed').focus()")
    await page.type(typed.prompt)
    await page.press("Enter")
    await until_shown(page, typed)
    await page.until(SHOWN_SINCE)
    await page.until("state.viewers === 1")


@needs_firefox
def test_firefox_watches_and_steers(tmp_path):
    """At the loopback address too, of which it offers no candidate."""

    async def body(script: Script):
        async with firefox() as page:
            await page.open(script.url())
            await page.until(FIRST_FRAME)
            await steer(page, RED, BLUE)

    with ForkedScript("self_forcing", tmp_path / "out", **QUICK, ENDLESS="1") as script:
        asyncio.run(body(script))


@asynccontextmanager
async def tunnel(socket: Path) -> AsyncIterator[str]:
    """Give the address of a TCP port whose connections go to ``socket``."""
    server = await asyncio.start_server(
        lambda reader, writer: join(reader, writer, asyncio.open_unix_connection(str(socket))), "127.0.0.1", 0
    )
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def far_socket(tmp_path_factory) -> Iterator[Path]:
    """A socket whose connections go to a script in a network namespace of its own, which waits for a viewer."""
    folder = tmp_path_factory.mktemp("far")
    socket = folder / "socket"
    forward = f"{sys.executable} {ROOT}/tests/webrtc/forward.py {socket} 8000"
    prefix = (*NAMESPACE, "sh", "-c", f'ip link set lo up; {forward} & exec "$0"')
    variables = QUICK | {"ENDLESS": "1", "WEBRTC_PORT": "8000"}
    with Script("self_forcing", folder / "out", prefix, **variables) as script:
        script.wait_until(lambda: socket.exists() and "watch it at" in script.stdout, LIMIT)
        yield socket


@pytest.mark.skipif(not has_namespaces, reason="network namespaces are not permitted here")
@pytest.mark.parametrize(
    "browser", [pytest.param(chromium, marks=needs_chromium), pytest.param(firefox, marks=needs_firefox)]
)
def test_without_udp_the_video_comes_over_http(browser, far_socket):
    """Each browser finds the video paused where the one before has left it."""

    async def body():
        async with tunnel(far_socket) as url, browser() as page:
            await page.open(url)
            await page.until(FIRST_FRAME)
            assert "over HTTP" in await page.until("document.getElementById('transport').textContent")
            await page.until("['generating', 'paused'].includes(state.status)")
            if await page.run("state.status") == "paused":
                await page.run("document.getElementById('pause').click()")
            await page.until("state.playing_prompt")
            first = await page.run("state.playing_prompt") == RED.prompt
            await steer(page, *((RED, BLUE) if first else (BLUE, RED)))
            await page.run("document.getElementById('pause').click()")
            await page.until("state.status === 'paused'")

    asyncio.run(body())
