"""Headless Chromium over its DevTools protocol: as much of it as the tests need."""

import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import ClientSession
from live import LIMIT
from processes import Process

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which Chromium lacks as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--allow-loopback-in-peer-connection",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Page:
    """One tab."""

    def __init__(self, socket):
        self.socket = socket
        self.calls = 0

    async def call(self, method: str, **params) -> dict:
        self.calls += 1
        await self.socket.send_json({"id": self.calls, "method": method, "params": params})
        while (reply := await self.socket.receive_json(timeout=LIMIT)).get("id") != self.calls:
            pass  # an event
        assert "error" not in reply, reply
        return reply["result"]

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def run(self, script: str):
        """Return the value of a JavaScript expression, awaited where it is a promise."""
        reply = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    async def until(self, script: str, seconds: float = LIMIT):
        """Return the first true value of an expression."""
        async with asyncio.timeout(seconds):
            while not (value := await self.run(script)):
                await asyncio.sleep(0.1)
        return value

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, shift: bool = False) -> None:
        """A key such as Tab or Enter."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def screenshot(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=theme)
        await asyncio.sleep(0.5)
        reply = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(reply["data"]))


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """Open a tab of a fresh browser."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        Process(["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]),
    ):
        async with asyncio.timeout(LIMIT), ClientSession() as session:
            port_file = Path(profile, "DevToolsActivePort")
            while not (port_file.exists() and port_file.read_text()):
                await asyncio.sleep(0.05)
            port = port_file.read_text().split()[0]
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                (tab,) = [tab for tab in json.loads(await reply.text()) if tab["type"] == "page"]
        async with (
            ClientSession() as session,
            session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            yield Page(socket)
