"""The page, its video and its controls over HTTP. Nothing that comes in from the network is trusted."""

import asyncio
import ipaddress
import json
import logging
import sys
import threading
import unicodedata
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from yarl import URL

from inferix.errors import InputError
from inferix.pipelines.storyboard import MAX_BLEND, Prompt
from inferix.webrtc.access import Access
from inferix.webrtc.address import ADDRESS_ERRORS, address_error
from inferix.webrtc.playout import Playout
from inferix.webrtc.session import Session, WebRTCConfig
from inferix.webrtc.viewers import Viewers, media_addresses

log = logging.getLogger(__name__)
for library in ("aiohttp", "aioice", "aiortc"):  # what is wrong with a request goes to its sender
    logging.getLogger(library).addHandler(logging.NullHandler())

MAX_BODY = 64 * 1024
MAX_IMAGE = 20 * 2**20
"""Bytes of an image file to start from."""
MAX_PROMPT = 2000
"""Characters."""
PAGE_TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; media-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@contextmanager
def serve(config: WebRTCConfig) -> Iterator[Session]:
    """Serve the page and give its session while entered. Raises InputError where host or port cannot be had."""
    session = Session(config, Playout())
    server = Server(session)
    server.open()
    try:
        yield session
    finally:
        server.close()


class Server:
    """HTTP and WebRTC on an event loop in a thread of its own."""

    def __init__(self, session: Session):
        self.session = session
        self.host, self.port = session.config.host, session.config.port
        self.viewers = Viewers(session)
        self.access = Access(session.config.token, self.host)
        self.page = {name: Path(__file__).with_name(name).read_text() for name in PAGE_TYPES}
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: log.debug("%s", context))
        self.thread = threading.Thread(target=self.loop.run_forever, name="webrtc", daemon=True)

    def open(self) -> None:
        """Serve, and print where. Raises InputError where the address cannot be had."""
        self.thread.start()
        try:
            self.session.url = self._call(self._open())
        except ADDRESS_ERRORS as error:
            self.close()
            raise address_error(self.host, self.port, error) from None
        if self.session.config.token is None and not all(map(is_loopback, self.addresses)):
            print(
                "warning: everybody who reaches this address can watch and steer; set WEBRTC_TOKEN to a secret",
                file=sys.stderr,
            )
        print(f"watch it at {self.session.url}", flush=True)

    def close(self) -> None:
        """Close every connection and stop serving, in about a second at most."""
        self._call(self._close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _call(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    # --- on the loop

    async def _open(self) -> str:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/", self._get_page),
                web.get("/{name:page\\.(?:css|js)}", self._get_page),
                web.get("/state", self._get_state),
                web.get("/storyboard", self._get_storyboard),
                web.get("/files/{name}", self._get_file),
                web.get("/video", self._get_video, allow_head=False),
                web.post("/offer", self._post_offer),
                web.post("/prompt", self._post_prompt),
                web.post("/image", self._post_image),
                web.post("/control", self._post_control),
            ]
        )
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.host, self.port).start()
        self.clock = asyncio.create_task(self.session.playout.run())
        address, port = self.runner.addresses[0][:2]
        self.addresses = {address for address, *_ in self.runner.addresses}
        self.viewers.addresses = media_addresses(self.addresses)
        if ipaddress.ip_address(address).is_unspecified:
            address = self.viewers.addresses[0]
        return str(URL.build(scheme="http", host=address, port=port))

    async def _close(self) -> None:
        await self.viewers.close()
        await self.runner.cleanup()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse who may not use the page."""
        self.access.check(request)
        response = await handler(request)
        if not response.prepared:
            response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    async def _get_page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"}
        name = request.match_info.get("name", "page.html")
        page = web.Response(text=self.page[name], content_type=PAGE_TYPES[name], headers=headers)
        return self.access.sign_in(request) or page

    async def _get_state(self, request: web.Request) -> web.Response:
        return web.json_response(self.session.snapshot(), headers={"Cache-Control": "no-store"})

    async def _get_storyboard(self, request: web.Request) -> web.Response:
        """The prompts of the clip so far, as a file for ``STORYBOARD``."""
        storyboard = self.session.storyboard()
        if storyboard is None:
            raise web.HTTPNotFound(text="nothing was generated yet")
        headers = {"Content-Disposition": 'attachment; filename="storyboard.yaml"', "Cache-Control": "no-store"}
        return web.Response(text=storyboard.to_yaml(), content_type="application/yaml", headers=headers)

    async def _get_file(self, request: web.Request) -> web.StreamResponse:
        """A file of this run, looked up by its name: no path is ever made from the request."""
        path = self.session.files.get(request.match_info["name"])
        if path is None or not path.is_file():
            raise web.HTTPNotFound(text="no such file")
        return web.FileResponse(path)

    async def _get_video(self, request: web.Request) -> web.StreamResponse:
        """The video over a WebSocket, for browsers that WebRTC does not reach."""
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise web.HTTPUpgradeRequired(text="connect with a WebSocket", headers={"Upgrade": "websocket"})
        return await self.viewers.serve_socket(request)

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body = await read_json(request)
        prompt = " ".join(text_of(body, "prompt").split())  # also without the line breaks of a text field
        if not prompt or len(prompt) > MAX_PROMPT:
            raise web.HTTPBadRequest(text=f"a prompt has 1 to {MAX_PROMPT} characters")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
            raise web.HTTPBadRequest(text="a prompt has no control characters")
        blend = body.get("blend")
        if blend is not None and (type(blend) is not int or not 0 <= blend <= MAX_BLEND):
            raise web.HTTPBadRequest(text=f"'blend' is a number of blocks from 0 to {MAX_BLEND}")
        self.session.submit_prompt(Prompt(prompt, blend))
        return await self._get_state(request)

    async def _post_image(self, request: web.Request) -> web.Response:
        """Keep an image file that the next clip starts from; an empty body takes it back."""
        if self.session.read_image is None:
            raise web.HTTPConflict(text="this model cannot start from an image")
        if request.content_type not in ("image/png", "image/jpeg", "image/webp"):
            raise web.HTTPUnsupportedMediaType(text="send image/png, image/jpeg or image/webp")
        content = bytearray()
        try:
            async for chunk in request.content.iter_chunked(MAX_BODY):
                content += chunk
                if len(content) > MAX_IMAGE:
                    raise web.HTTPRequestEntityTooLarge(MAX_IMAGE, text=f"an image has {MAX_IMAGE // 2**20} MB at most")
        except web.RequestPayloadError:
            raise web.HTTPBadRequest(text="the image's encoding is broken") from None
        try:
            await asyncio.to_thread(self.session.submit_image, bytes(content))
        except InputError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        return await self._get_state(request)

    async def _post_control(self, request: web.Request) -> web.Response:
        action = text_of(await read_json(request), "action")
        if action not in ("pause", "resume", "stop", "close"):
            raise web.HTTPBadRequest(text="the actions are pause, resume, stop and close")
        if not self.session.control(action):
            raise web.HTTPConflict(text=f"nothing to {action} now")
        return await self._get_state(request)

    async def _post_offer(self, request: web.Request) -> web.Response:
        """Answer a viewer's offer to receive one video."""
        sdp = text_of(await read_json(request), "sdp")
        try:
            answer = await self.viewers.answer(sdp, request.remote or "")
        except OverflowError as error:
            raise web.HTTPServiceUnavailable(text=str(error)) from None
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        return web.json_response({"type": answer.type, "sdp": answer.sdp})


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


async def read_json(request: web.Request) -> dict[str, Any]:
    """Return the JSON object in a body. Raises a client error for anything else."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError, web.RequestPayloadError):  # the last: broken compression
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="send a JSON object")
    return body


def text_of(body: dict[str, Any], key: str) -> str:
    """Return the text under ``key``. Raises a client error where there is none."""
    value = body.get(key)
    if not isinstance(value, str):
        raise web.HTTPBadRequest(text=f"send a JSON object with the text '{key}'")
    return value
