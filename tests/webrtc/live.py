"""The real scripts as processes, and viewers of what they stream.

python tests/live.py URL    # watch until killed
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import aioice.ice
from aiohttp import ClientSession
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

ROOT = Path(__file__).resolve().parents[1]


class Script:
    """A script under example/quantization that streams on a free port, as a context manager; ended when it is left."""

    def __init__(self, name: str, output_folder: Path, **variables: str):
        self.folder = output_folder
        self.log = output_folder.with_suffix(".log")
        defaults = {"ENABLE_WEBRTC": "1", "WEBRTC_PORT": "0", "OUTPUT_FOLDER": str(output_folder)}
        self.process = subprocess.Popen(
            [ROOT / f"example/quantization/{name}_quantized.sh"],
            env=os.environ | defaults | variables,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            # A job in the background ignores Ctrl-C and hands that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def url(self, seconds: float = 60) -> str:
        """Where it says that it streams."""
        deadline = time.monotonic() + seconds
        while not (said := re.search(r"watch it at (\S+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return said[1]

    def interrupt(self) -> float:
        """Press Ctrl-C; the seconds until it has left."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=10)
        return time.monotonic() - begun

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()


class Viewer:
    """One connection to a stream, which counts the frames it gets."""

    def __init__(self, session: ClientSession):
        self.session = session
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.frames = 0

    async def connect(self) -> None:
        # aioice leaves this address out, which may be the only one there is
        aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"]
        self.peer.addTransceiver("video", direction="recvonly")
        self.peer.on("track", lambda track: setattr(self, "counting", asyncio.create_task(self._count(track))))
        await self.peer.setLocalDescription(await self.peer.createOffer())
        async with self.session.post("/offer", json={"sdp": self.peer.localDescription.sdp}) as reply:
            assert reply.status == 200, await reply.text()
            await self.peer.setRemoteDescription(RTCSessionDescription(**await reply.json()))

    async def _count(self, track) -> None:
        try:
            while True:
                await track.recv()
                self.frames += 1
        except MediaStreamError:
            pass

    async def close(self) -> None:
        await self.peer.close()


async def state(session: ClientSession) -> dict:
    async with session.get("/state") as reply:
        return await reply.json()


async def until(session: ClientSession, condition, seconds: float) -> dict:
    """The first state that meets ``condition``."""
    deadline = time.monotonic() + seconds
    while not condition(now := await state(session)):
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.1)
    return now


async def watch(url: str) -> None:
    async with ClientSession(url) as session:
        await Viewer(session).connect()
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(watch(sys.argv[1]))
