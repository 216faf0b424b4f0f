"""Viewers of what a script streams."""

import asyncio
import re
from pathlib import Path

from aiohttp import ClientSession
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from inferix.webrtc.viewers import gather_from

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240
"""Seconds that anything may take: on a busy machine a start alone takes a minute."""


class Viewer:
    """One connection to a stream, which counts the frames it gets."""

    def __init__(self, session: ClientSession):
        self.session = session
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.frames = 0

    async def connect(self, loopback: bool = True) -> None:
        """Connect from the loopback address; without it as Firefox does, from the others, which are hidden."""
        self.peer.addTransceiver("video", direction="recvonly")
        self.peer.on("track", lambda track: setattr(self, "counting", asyncio.create_task(self._count(track))))
        offer = await self.peer.createOffer()
        if loopback:
            gather_from(self.peer, ["127.0.0.1"])
        await self.peer.setLocalDescription(offer)
        sdp = self.peer.localDescription.sdp
        if not loopback:
            sdp = re.sub(r"(a=candidate:\S+ \d+ udp \d+) \S+", r"\1 6d1f5c6a-hidden.local", sdp)
        async with self.session.post("/offer", json={"sdp": sdp}) as reply:
            assert reply.status == 200, await reply.text()
            await self.peer.setRemoteDescription(RTCSessionDescription(**await reply.json()))

    async def _count(self, track) -> None:
        try:
            while True:
                await track.recv()
                self.frames += 1
        except MediaStreamError:
            pass

    async def until_frames(self, count: int, seconds: float = LIMIT) -> None:
        """Return when this viewer has got ``count`` frames more."""
        wanted = self.frames + count
        async with asyncio.timeout(seconds):
            while self.frames < wanted:
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self.peer.close()


async def state(session: ClientSession) -> dict:
    async with session.get("/state") as reply:
        return await reply.json()


async def until(session: ClientSession, condition, seconds: float = LIMIT) -> dict:
    """Return the first state that meets ``condition``."""
    now = await state(session)
    try:
        async with asyncio.timeout(seconds):
            while not condition(now):
                await asyncio.sleep(0.1)
                now = await state(session)
    except TimeoutError:
        raise AssertionError(f"{seconds} s are over: {now}") from None
    return now


def watch(url: str, count: int) -> None:
    """Be ``count`` viewers until killed, at most for ``LIMIT`` seconds."""

    async def body() -> None:
        async with ClientSession(url) as session:
            viewers = [Viewer(session) for _ in range(count)]
            await asyncio.gather(*(viewer.connect() for viewer in viewers))
            await asyncio.sleep(LIMIT)

    asyncio.run(body())
