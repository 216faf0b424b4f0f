"""Forward connections to a Unix socket to a TCP port of this machine, or of the network namespace that this runs in.

python tests/webrtc/forward.py SOCKET PORT
"""

import asyncio
import sys
from contextlib import suppress


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target) -> None:
    """Pass on everything between one connection and the one that ``target`` opens, both ways, to the end."""
    try:
        target_reader, target_writer = await target
    except OSError:
        writer.close()
        return
    with suppress(asyncio.CancelledError):  # asyncio would print it at the program's end
        await asyncio.gather(pump(reader, target_writer), pump(target_reader, writer))


async def main(socket: str, port: int) -> None:
    server = await asyncio.start_unix_server(
        lambda reader, writer: join(reader, writer, asyncio.open_connection("127.0.0.1", port)), socket
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
