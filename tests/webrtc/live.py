"""The real scripts as processes, and viewers of what they stream.

python tests/webrtc/live.py URL    # watch until killed
"""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))  # where processes.py is, when this is started as a program

from aiohttp import ClientSession
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from processes import Process

from inferix.webrtc.viewers import gather_from

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240
"""Seconds that anything may take: on a busy machine a start alone takes a minute."""


class Script(Process):
    """A script under example/quantization that streams on a free port, as a context manager.

    Args:
        name: self_forcing or causvid.
        output_folder: of the files.
        prefix: command that starts the script.
        variables: of the script.
    """

    def __init__(self, name: str, output_folder: Path, prefix: tuple = (), **variables: str):
        self.folder = output_folder
        defaults = {"ENABLE_WEBRTC": "1", "WEBRTC_PORT": "0", "OUTPUT_FOLDER": str(output_folder)}
        command = [*prefix, ROOT / f"example/quantization/{name}_quantized.sh"]
        super().__init__(command, env=os.environ | defaults | variables)

    def url(self) -> str:
        """Return where it says that it streams."""
        self.wait_until(lambda: "watch it at" in self.stdout, LIMIT)
        return re.search(r"watch it at (\S+)", self.stdout)[1]

    def interrupt(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.popen.send_signal(signal.SIGINT)
        return self.wait(LIMIT).returncode


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


async def watch(url: str) -> None:
    async with ClientSession(url) as session:
        await Viewer(session).connect()
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(watch(sys.argv[1]))
