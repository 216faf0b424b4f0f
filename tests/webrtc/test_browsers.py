"""The page in real browsers, also where only its TCP port is forwarded, as through an SSH tunnel."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from chromium import Page, chromium
from firefox import EXECUTABLE, firefox
from forward import join
from live import LIMIT, ROOT, Script
from pictures import BLUE, RED, until_shown

BROWSERS = [
    pytest.param(chromium, marks=pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")),
    pytest.param(firefox, marks=pytest.mark.skipif(not EXECUTABLE, reason="Firefox is not installed")),
]
pytestmark = [pytest.mark.timeout(900), pytest.mark.parametrize("browser", BROWSERS)]
FIRST_FRAME = "document.readyState === 'complete' && performance.getEntriesByName('first-frame').length"
NAMESPACE = ("unshare", "--net", "--map-root-user")
has_namespaces = subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


async def steer(page: Page, script: Script) -> None:
    """See the given prompt, type another one, and see that."""
    await until_shown(page, RED)
    await page.run("document.getElementById('typed').focus()")
    await page.type(BLUE.prompt)
    await page.press("Enter")
    await until_shown(page, BLUE)
    await page.until(
        "/Shown since block \\d+, \\d+\\.\\d s after Send/.test(document.getElementById('next').textContent)"
    )
    assert await page.run("state.viewers") == 1


def test_a_browser_watches_and_steers(browser, tmp_path):
    """With Firefox at the loopback address too, of which it offers no candidate."""

    async def body(script: Script):
        async with browser() as page:
            await page.open(script.url())
            await page.until(FIRST_FRAME)
            await steer(page, script)

    with Script("self_forcing", tmp_path / "out", PROMPT=RED.prompt, ENDLESS="1", WEBRTC_WAIT="1") as script:
        asyncio.run(body(script))


@asynccontextmanager
async def tunnel(socket: Path) -> AsyncIterator[str]:
    """Give the address of a TCP port whose connections go to ``socket``."""
    server = await asyncio.start_server(
        lambda reader, writer: join(reader, writer, asyncio.open_unix_connection(str(socket))), "127.0.0.1", 0
    )
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.skipif(not has_namespaces, reason="network namespaces are not permitted here")
def test_without_udp_the_video_comes_over_http(browser, tmp_path):
    socket = tmp_path / "socket"
    forward = f"{sys.executable} {ROOT}/tests/webrtc/forward.py {socket} 8000"
    prefix = (*NAMESPACE, "sh", "-c", f'ip link set lo up; {forward} & exec "$0"')

    async def body(script: Script):
        await asyncio.to_thread(script.wait_until, lambda: socket.exists() and "watch it at" in script.stdout, LIMIT)
        async with tunnel(socket) as url, browser() as page:
            await page.open(url)
            await page.until(FIRST_FRAME)
            assert "over HTTP" in await page.until("document.getElementById('transport').textContent")
            await steer(page, script)

    variables = {"PROMPT": RED.prompt, "ENDLESS": "1", "WEBRTC_WAIT": "1", "WEBRTC_PORT": "8000"}
    with Script("self_forcing", tmp_path / "out", prefix, **variables) as script:
        asyncio.run(body(script))
