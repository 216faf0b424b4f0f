"""The viewers of a page, by WebRTC or, where that does not get through, by a WebSocket over the page's own port."""

import asyncio
import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web
from aioice.ice import get_host_addresses
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

from inferix.webrtc.playout import ViewerTrack
from inferix.webrtc.session import Session

MAX_VIEWERS = 64
"""Also WebRTC connections that are not established yet: one more of these closes the oldest, so that they keep nobody out."""
CONNECT_SECONDS = 5
"""A WebRTC connection that is not established by then is closed. The page has given up before."""
MAX_UNSEEN = 8
"""JPEG frames that may be on their way to a viewer: half a second, whatever the network between would hold."""
PING_SECONDS = 10
"""Interval in which viewers by WebSocket are asked whether they are still there."""
TOO_MANY = f"there are {MAX_VIEWERS} viewers, and no place for more: try again later"


class Viewers:
    """Everybody who watches. All methods run on the server's event loop."""

    def __init__(self, session: Session):
        self.session = session
        self.addresses: list[str] = []
        """Where WebRTC's video is offered from."""
        self.connecting: dict[RTCPeerConnection, None] = {}
        self.connected: set[RTCPeerConnection | web.WebSocketResponse] = set()

    async def answer(self, sdp: str, remote: str) -> RTCSessionDescription:
        """Return the answer to a viewer's offer to receive one video.

        Raises OverflowError where there are ``MAX_VIEWERS``, ValueError where ``sdp`` is not such an offer.

        Args:
            sdp: the offer.
            remote: the viewer's address. Browsers hide it behind a name that takes a second to look up.
        """
        if len(self.connected) >= MAX_VIEWERS:
            raise OverflowError(TOO_MANY)
        while len(self.connecting) >= MAX_VIEWERS:
            await self._drop(next(iter(self.connecting)))
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))  # by default it would ask a public server
        self.connecting[peer] = None
        try:
            return await self._answer(peer, re.sub(r"[\w-]{1,63}\.local\b", remote, sdp))
        except Exception:  # whatever the parsers make of bad input
            await self._drop(peer)
            raise ValueError("not an offer to receive one video") from None

    async def _answer(self, peer: RTCPeerConnection, sdp: str) -> RTCSessionDescription:
        await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        (video,) = peer.getTransceivers()
        if video.kind != "video" or peer.sctp is not None:
            raise ValueError("something else than one video")
        peer.addTrack(ViewerTrack(self.session.playout))
        video.direction = "sendonly"
        gather_from(peer, self.addresses)
        peer.on("connectionstatechange", lambda: self._state_changed(peer))
        await peer.setLocalDescription(await peer.createAnswer())
        asyncio.get_running_loop().call_later(CONNECT_SECONDS, self._drop_connecting, peer)
        return peer.localDescription

    async def _state_changed(self, peer: RTCPeerConnection) -> None:
        if peer.connectionState == "connected" and peer in self.connecting and len(self.connected) < MAX_VIEWERS:
            del self.connecting[peer]
            self._add(peer)
        elif peer.connectionState in ("connected", "failed", "closed") and peer not in self.connected:
            await self._drop(peer)
        elif peer.connectionState in ("failed", "closed"):
            await self._drop(peer)

    def _drop_connecting(self, peer: RTCPeerConnection) -> None:
        if peer in self.connecting:
            asyncio.ensure_future(self._drop(peer))

    async def _drop(self, peer: RTCPeerConnection) -> None:
        self.connecting.pop(peer, None)
        self._remove(peer)
        await peer.close()

    def _add(self, viewer: RTCPeerConnection | web.WebSocketResponse) -> None:
        self.connected.add(viewer)
        self.session.set_viewers(len(self.connected))

    def _remove(self, viewer: RTCPeerConnection | web.WebSocketResponse) -> None:
        self.connected.discard(viewer)
        self.session.set_viewers(len(self.connected))

    async def serve_socket(self, request: web.Request) -> web.WebSocketResponse:
        """Send what is played as JPEG files, one a message, until the viewer leaves.

        The viewer sends a message for every frame that it has shown, so that no more than ``MAX_UNSEEN`` are under way.
        """
        socket = web.WebSocketResponse(heartbeat=PING_SECONDS, max_msg_size=64)
        await socket.prepare(request)
        if len(self.connected) >= MAX_VIEWERS:
            await socket.close(code=1013, message=TOO_MANY.encode())
            return socket
        slots = asyncio.BoundedSemaphore(MAX_UNSEEN)
        sending = asyncio.create_task(self._send_frames(socket, slots))
        self._add(socket)
        try:
            async for _ in socket:
                with suppress(ValueError):  # more than were sent
                    slots.release()
        finally:
            sending.cancel()
            self._remove(socket)
        return socket

    async def _send_frames(self, socket: web.WebSocketResponse, slots: asyncio.Semaphore) -> None:
        last = None
        with suppress(ConnectionError):
            while True:
                await slots.acquire()
                while (planes := (await self.session.playout.next_frame())[0]) is last:
                    pass  # nothing new
                await socket.send_bytes(await self.session.playout.jpeg(planes))
                last = planes

    async def close(self) -> None:
        """Close all connections, in about a second at most."""
        closing = [asyncio.create_task(viewer.close()) for viewer in (*self.connecting, *self.connected)]
        if closing:
            await asyncio.wait(closing, timeout=1)


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
