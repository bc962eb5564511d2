"""HTTP/2 by hand: a server that ends calls in every way, and a proxy that ends them as Envoy does, by RST_STREAM."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress

from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.wire.generation_pb2 import GenerateResponse, Started

PREFACE_BYTES = 24
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
INTERNAL_ERROR, CANCEL = 2, 8
"""Error codes. Envoy sends INTERNAL_ERROR when its server is gone, or when its route or idle timeout has passed."""

ENDS = (asyncio.IncompleteReadError, ConnectionError)
"""How reading from a connection fails at its end."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def reset(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def go_away(code: int) -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", 0, code))


def header(name: bytes, value: bytes) -> bytes:
    """A literal header field of HPACK, not indexed."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, int, int, bytes]:
    """Type, flags, stream and payload of the next frame; raises IncompleteReadError at the end of the connection."""
    head = await reader.readexactly(9)
    payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
    return head[3], head[4], int.from_bytes(head[5:], "big"), payload


RESPONSE_HEADERS = header(b":status", b"200") + header(b"content-type", b"application/grpc")
STARTED = GenerateResponse(started=Started(request_id="mine")).SerializeToString()
MESSAGE = b"\0" + struct.pack(">I", len(STARTED)) + STARTED


@asynccontextmanager
async def server_that_ends_calls(
    ending: Callable[[int], Sequence[bytes | None]], *, begins: bool
) -> AsyncIterator[str]:
    """The address of a server that responds to a call with the frames of `ending(stream)`; None breaks the connection.

    `begins`: it sends the response's headers and Started before.
    """
    connections: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[writer] = asyncio.current_task()
        with suppress(*ENDS), closing(writer):
            await reader.readexactly(PREFACE_BYTES)
            writer.write(frame(SETTINGS, 0, 0))
            while True:
                kind, flags, stream, _ = await read_frame(reader)
                if kind == SETTINGS and not flags & ACK:
                    writer.write(frame(SETTINGS, ACK, 0))
                if kind == DATA and flags & END_STREAM:
                    if begins:
                        writer.write(frame(HEADERS, END_HEADERS, stream, RESPONSE_HEADERS))
                        writer.write(frame(DATA, 0, stream, MESSAGE))
                    for part in ending(stream):
                        if part is None:
                            writer.transport.abort()
                        else:
                            writer.write(part)

    server = await asyncio.start_server(join, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for writer in connections:
        writer.transport.abort()
    await asyncio.gather(*(task for task in connections.values() if task is not None))


class Http2Proxy:
    """Forwards frames between clients and one server, and resets the open calls of a connection."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._loop = EventLoopThread("test-proxy")
        self._connections: list[_Connection] = []
        self._pipes: set[asyncio.Task[None]] = set()
        self.address = self._loop.run(self._start())

    def reset(self, code: int = INTERNAL_ERROR) -> None:
        """Resets all open calls on both sides, as after a route timeout."""
        self._loop.run(self._reset_all(code))

    def close(self) -> None:
        """Ends all connections."""
        self._loop.run(self._close())
        self._loop.stop()

    async def _start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.client.transport.abort()
            connection.server.transport.abort()
        await asyncio.gather(*self._pipes)

    async def _join(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far_in, far_out = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            near_out.close()
            return
        connection = _Connection(near_out, far_out)
        self._connections.append(connection)
        for pipe in (connection.forward_requests(near_in), connection.forward_responses(far_in)):
            self._pipes.add(asyncio.ensure_future(pipe))

    async def _reset_all(self, code: int) -> None:
        for connection in self._connections:
            connection.reset(code)


class _Connection:
    """The connection of one client, with one of its own to the server."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self._open: set[int] = set()  # streams

    def reset(self, code: int) -> None:
        """Resets its open calls on both sides."""
        for stream in self._open:
            self.client.write(reset(stream, code))
            self.server.write(reset(stream, CANCEL))
        self._open.clear()

    async def forward_requests(self, reader: asyncio.StreamReader) -> None:
        with suppress(*ENDS), closing(self.server):
            self.server.write(await reader.readexactly(PREFACE_BYTES))
            while True:
                kind, flags, stream, payload = await read_frame(reader)
                if kind == HEADERS:
                    self._open.add(stream)
                self.server.write(frame(kind, flags, stream, payload))
                await self.server.drain()

    async def forward_responses(self, reader: asyncio.StreamReader) -> None:
        with closing(self.client):
            with suppress(*ENDS):
                while True:
                    kind, flags, stream, payload = await read_frame(reader)
                    if kind == DATA and stream not in self._open:  # the call was reset; others still need the window
                        self.server.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", max(len(payload), 1))))
                        continue
                    if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                        self._open.discard(stream)
                    self.client.write(frame(kind, flags, stream, payload))
                    await self.client.drain()
            self.reset(INTERNAL_ERROR)  # the server is gone
            self.client.write(go_away(0))
