"""The page, its video connections and its controls. Nothing that comes in from the network is trusted."""

import asyncio
import errno
import ipaddress
import json
import logging
import re
import socket
import threading
import unicodedata
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from aioice.ice import get_host_addresses
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from yarl import URL

from inferix.errors import InputError
from inferix.webrtc.playout import Playout, ViewerTrack
from inferix.webrtc.session import Session, WebRTCConfig

log = logging.getLogger(__name__)
for library in ("aiohttp", "aioice", "aiortc"):  # what is wrong with a request goes to its sender
    logging.getLogger(library).addHandler(logging.NullHandler())

MAX_BODY = 64 * 1024
MAX_PROMPT = 2000
"""Characters."""
MAX_VIEWERS = 64
CONNECT_SECONDS = 15
"""A connection that is not established by then is dropped."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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
        self.peers: set[RTCPeerConnection] = set()
        self.connected: set[RTCPeerConnection] = set()
        self.media_addresses: list[str] = []
        self.page = Path(__file__).with_name("page.html").read_text()
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: log.debug("%s", context))
        self.thread = threading.Thread(target=self.loop.run_forever, name="webrtc", daemon=True)

    def open(self) -> None:
        """Serve, and print where. Raises InputError where the address cannot be had."""
        self.thread.start()
        try:
            self.session.url = self._call(self._open())
        except (OSError, OverflowError, UnicodeError) as error:
            self.close()
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "the port is taken" if taken else "no such address or port here"
            raise InputError(
                f"cannot serve the page at {self.host}:{self.port}, {reason}: choose others with --webrtc_host and "
                "--webrtc_port (WEBRTC_PORT=...)"
            ) from None
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
                web.get("/state", self._get_state),
                web.get("/files/{name}", self._get_file),
                web.post("/offer", self._post_offer),
                web.post("/prompt", self._post_prompt),
                web.post("/control", self._post_control),
            ]
        )
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.host, self.port).start()
        self.clock = asyncio.create_task(self.session.playout.run())
        address, port = self.runner.addresses[0][:2]
        self.media_addresses = media_addresses({address for address, *_ in self.runner.addresses})
        if ipaddress.ip_address(address).is_unspecified:
            address = self.media_addresses[0]
        return str(URL.build(scheme="http", host=address, port=port))

    async def _close(self) -> None:
        if self.peers:
            await asyncio.wait([asyncio.create_task(peer.close()) for peer in self.peers], timeout=1)
        await self.runner.cleanup()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse pages of other origins, and names that somebody else's DNS may have pointed at this machine."""
        origin = request.headers.get("Origin")
        if not self._is_own_name(request.host) or (origin is not None and origin.partition("://")[2] != request.host):
            raise web.HTTPForbidden(text="this server takes requests from its own page only")
        response = await handler(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    def _is_own_name(self, host: str) -> bool:
        try:
            name = URL(f"http://{host}").host or ""
            if name in ("localhost", self.host, socket.gethostname()):
                return True
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return False

    async def _get_page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"}
        return web.Response(text=self.page, content_type="text/html", headers=headers)

    async def _get_state(self, request: web.Request) -> web.Response:
        return web.json_response(self.session.snapshot(), headers={"Cache-Control": "no-store"})

    async def _get_file(self, request: web.Request) -> web.StreamResponse:
        """A file of this run, looked up by its name: no path is ever made from the request."""
        path = self.session.files.get(request.match_info["name"])
        if path is None or not path.is_file():
            raise web.HTTPNotFound(text="no such file")
        return web.FileResponse(path)

    async def _post_prompt(self, request: web.Request) -> web.Response:
        prompt = (await read_text(request, "prompt")).strip()
        if not prompt or len(prompt) > MAX_PROMPT:
            raise web.HTTPBadRequest(text=f"a prompt has 1 to {MAX_PROMPT} characters")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in prompt):
            raise web.HTTPBadRequest(text="a prompt has no control characters")
        self.session.submit_prompt(prompt)
        return await self._get_state(request)

    async def _post_control(self, request: web.Request) -> web.Response:
        action = await read_text(request, "action")
        if action not in ("pause", "resume", "stop", "close"):
            raise web.HTTPBadRequest(text="the actions are pause, resume, stop and close")
        if not self.session.control(action):
            raise web.HTTPConflict(text=f"nothing to {action} now")
        return await self._get_state(request)

    async def _post_offer(self, request: web.Request) -> web.Response:
        """Answer a viewer's offer to receive one video."""
        sdp = await read_text(request, "sdp")
        # Browsers hide their addresses behind names that take a second to look up; we know where this one is.
        sdp = re.sub(r"[\w-]{1,63}\.local\b", request.remote or "", sdp)
        if len(self.peers) >= MAX_VIEWERS:
            raise web.HTTPServiceUnavailable(text="too many viewers")
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))  # by default it would ask a public server
        self.peers.add(peer)
        try:
            answer = await self._answer(peer, sdp)
        except Exception:  # whatever the parsers make of bad input
            await self._drop(peer)
            raise web.HTTPBadRequest(text="not an offer to receive one video") from None
        return web.json_response({"type": answer.type, "sdp": answer.sdp})

    async def _answer(self, peer: RTCPeerConnection, sdp: str) -> RTCSessionDescription:
        await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        (video,) = peer.getTransceivers()
        if video.kind != "video" or peer.sctp is not None:
            raise ValueError("something else than one video")
        peer.addTrack(ViewerTrack(self.session.playout))
        video.direction = "sendonly"
        gather_from(peer, self.media_addresses)
        peer.on("connectionstatechange", lambda: self._state_changed(peer))
        await peer.setLocalDescription(await peer.createAnswer())
        self.loop.call_later(CONNECT_SECONDS, self._drop_unconnected, peer)
        return peer.localDescription

    async def _state_changed(self, peer: RTCPeerConnection) -> None:
        if peer.connectionState == "connected":
            self.connected.add(peer)
            self.session.set_viewers(len(self.connected))
        elif peer.connectionState in ("failed", "closed"):
            await self._drop(peer)

    def _drop_unconnected(self, peer: RTCPeerConnection) -> None:
        if peer in self.peers - self.connected:
            asyncio.ensure_future(self._drop(peer))

    async def _drop(self, peer: RTCPeerConnection) -> None:
        self.peers.discard(peer)
        self.connected.discard(peer)
        self.session.set_viewers(len(self.connected))
        await peer.close()


def media_addresses(bound: set[str]) -> list[str]:
    """Return the addresses to offer video from, given those that the page is bound to.

    A page on the loopback address is offered this machine's other addresses too: Firefox has no loopback candidates, and
    reaches 127.0.0.1 from none of its own.
    """
    addresses, others = {ipaddress.ip_address(address) for address in bound}, get_host_addresses(True, True)
    if any(address.is_unspecified for address in addresses):
        return [*others, "127.0.0.1"]
    return [*sorted(bound), *(others if any(address.is_loopback for address in addresses) else [])]


def gather_from(peer: RTCPeerConnection, addresses: list[str]) -> None:
    """Let ``peer`` gather its ICE candidates from ``addresses`` and no others.

    aioice decides for itself, and leaves the loopback address out. The method is replaced on this connection alone, which
    aiortc gives no public access to.
    """
    for transceiver in peer.getTransceivers():
        connection: Any = transceiver.sender.transport.transport.iceGatherer._connection

        def gather_own(gather: Callable = connection.get_component_candidates, **arguments: Any) -> Any:
            return gather(**arguments | {"addresses": addresses})

        connection.get_component_candidates = gather_own


async def read_text(request: web.Request, key: str) -> str:
    """Return the text under ``key`` in a JSON body. Raises a client error for anything else."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    try:
        value = json.loads(await request.read())[key]
    except (ValueError, KeyError, TypeError, RecursionError, web.RequestPayloadError):  # the last: broken compression
        raise web.HTTPBadRequest(text=f"send a JSON object with '{key}'") from None
    if not isinstance(value, str):
        raise web.HTTPBadRequest(text=f"'{key}' is a text")
    return value
