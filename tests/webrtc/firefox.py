"""Headless Firefox with its default preferences, over WebDriver BiDi: as much of it as the tests need."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import ClientSession
from chromium import Page
from live import LIMIT
from processes import Process

EXECUTABLE = shutil.which("firefox-esr") or shutil.which("firefox")


class FirefoxPage(Page):
    """One tab."""

    async def call(self, method: str, **params) -> dict:
        self.calls += 1
        await self.socket.send_json({"id": self.calls, "method": method, "params": params})
        while (reply := await self.socket.receive_json(timeout=LIMIT)).get("id") != self.calls:
            pass  # an event
        assert reply["type"] == "success", reply
        return reply["result"]

    async def open(self, url: str) -> None:
        (tab,) = (await self.call("browsingContext.getTree"))["contexts"]
        self.tab = tab["context"]
        await self.call("browsingContext.navigate", context=self.tab, url=url, wait="complete")

    async def run(self, script: str):
        expression = f"Promise.resolve({script}).then(value => JSON.stringify(value ?? null))"
        target = {"context": self.tab}
        reply = await self.call("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert reply["type"] == "success", reply
        return json.loads(reply["result"]["value"])

    async def type(self, text: str) -> None:
        await self._keys(text)

    async def press(self, key: str, shift: bool = False) -> None:
        await self._keys({"Tab": "\ue004", "Enter": "\ue007"}.get(key, key), shift)

    async def _keys(self, keys: str, shift: bool = False) -> None:
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        if shift:
            strokes = [{"type": "keyDown", "value": "\ue008"}, *strokes, {"type": "keyUp", "value": "\ue008"}]
        await self.call(
            "input.performActions", context=self.tab, actions=[{"type": "key", "id": "keyboard", "actions": strokes}]
        )


@asynccontextmanager
async def firefox() -> AsyncIterator[FirefoxPage]:
    """Open a tab of a fresh browser."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        Process([EXECUTABLE, "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"]),
    ):
        async with asyncio.timeout(LIMIT):
            port_file = Path(profile, "WebDriverBiDiServer.json")
            while not (port_file.exists() and port_file.read_text()):
                await asyncio.sleep(0.05)
        address = json.loads(port_file.read_text())
        url = f"ws://{address['ws_host']}:{address['ws_port']}/session"
        async with ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            page = FirefoxPage(socket)
            await page.call("session.new", capabilities={})
            yield page
