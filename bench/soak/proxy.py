"""A TCP proxy that does to its connections what networks do: delays, silence and resets, also in the middle."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PIECE_BYTES = 16_384
"""Bytes that are forwarded at once."""


class Proxy:
    """Forwards connections to one address; its attributes can be changed at any time, for all connections."""

    def __init__(self, target: str) -> None:
        self.target = target
        """The address that new connections are forwarded to."""
        self.address = ""
        """The address that it listens on."""
        self.delay_s = 0.0
        """Seconds for which each piece is held back."""
        self.cut_after_bytes = -1
        """Bytes from the target after which all connections are reset; negative for never."""
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop_forwarding(self) -> None:
        """Keeps all bytes back; no connection ends."""
        self._flowing.clear()

    def forward_again(self) -> None:
        """Forwards also what was kept back."""
        self._flowing.set()

    def reset(self) -> None:
        """Resets all connections, on both sides."""
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            if connection is not None and not writer.transport.is_closing():
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, port = self.target.rsplit(":", 1)
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection(host, int(port))
            self._writers.add(back)
            try:
                await asyncio.gather(self._pump(reader, back, False), self._pump(there, writer, True))
            finally:
                self._writers.discard(back)
                back.transport.abort()
        except (OSError, asyncio.CancelledError):  # either side has gone, or the proxy is closed
            return
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_response: bool) -> None:
        """Forwards until the connection ends; raises ConnectionError then, which ends the other direction too."""
        while data := await reader.read(PIECE_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flowing.wait()
            if is_response and self.cut_after_bytes >= 0:
                self.cut_after_bytes -= len(data)
                if self.cut_after_bytes < 0:
                    self.reset()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@asynccontextmanager
async def proxy_to(target: str) -> AsyncIterator[Proxy]:
    """A proxy of its own; afterwards all its connections are reset."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy._connected, "127.0.0.1", 0)
    proxy.address = "127.0.0.1:" + str(server.sockets[0].getsockname()[1])
    try:
        yield proxy
    finally:
        server.close()
        proxy.reset()
        for task in list(proxy._tasks):
            task.cancel()
        await asyncio.gather(*proxy._tasks, return_exceptions=True)
