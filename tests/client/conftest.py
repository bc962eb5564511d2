"""Real gRPC servers around fake models, each in a loop thread of its own, so that a test may block."""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from steer_client import AsyncSteerClient
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.server.metrics import ServerMetrics
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena

BOUND_S = 10.0
"""Seconds that anything in these tests may take."""

Serve = Callable[..., "Server"]
"""`serve(backend=FakeBackend(), address="127.0.0.1:0", **config)` starts a server that ends with the test."""


class Gate:
    """Holds every request before one token, until it is aborted."""

    def __init__(self, number: int) -> None:
        self.is_reached = False
        """Whether it holds a request."""
        self._number = number
        self._never = asyncio.Event()

    async def __call__(self, number: int) -> None:
        if number == self._number:
            self.is_reached = True
            await self._never.wait()


class Server:
    """A running server around `backend`, which has seen no request yet."""

    def __init__(self, backend: FakeBackend, address: str, **config: Any) -> None:
        self.backend = backend
        self._loop = EventLoopThread("test-server")
        self.address = self._loop.run(self._start(address, config))

    @property
    def metrics(self) -> ServerMetrics:
        """What it has counted."""
        return self._server.metrics

    async def _start(self, address: str, config: dict[str, Any]) -> str:
        self._server = SteerServer(ServerConfig(address=address, grace_s=0.0, **config))
        await self._server.listen()
        with undisturbed(self.backend):
            await self._server.open(self.backend)
        return self._server.address

    def wait_answered(self) -> None:
        """Returns when every answer has been sent, whether or not it was read."""
        self.wait_until(lambda: self._server.running == 0)

    def wait_idle(self) -> None:
        """Returns when the backend runs nothing."""
        self._loop.run(asyncio.wait_for(self.backend.wait_idle(), BOUND_S))

    def wait_running(self, count: int) -> None:
        """Returns when the backend runs `count` requests."""
        self.wait_until(lambda: self.backend.running >= count)

    def wait_until(self, reached: Callable[[], bool], bound_s: float = BOUND_S) -> None:
        """Returns when `reached` says so, which it is asked in the server's loop."""
        self._loop.run(asyncio.wait_for(_until(reached), bound_s))

    def wait_holding(self, count: int) -> None:
        """Returns when the backend holds the captures of `count` outputs."""
        self.wait_until(lambda: self.backend.holding == count)

    def stop(self) -> None:
        """Stops what runs and ends the server."""
        if not self._loop.is_stopped:
            self._server.stop_now()
            self._loop.run(self._server.drain())
            self._loop.stop()


async def _until(reached: Callable[[], bool]) -> None:
    while not reached():
        await asyncio.sleep(0.001)


@contextmanager
def undisturbed(backend: FakeBackend) -> Iterator[None]:
    """What `backend` does inside leaves no trace, and nothing holds it up."""
    step, failure = backend.step, backend.failure
    backend.step, backend.failure = None, None
    try:
        yield
    finally:
        backend.step, backend.failure = step, failure
        backend.requests.clear()
        backend.finished = 0


class Cable:
    """A connection to a server that a test can cut."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._loop = EventLoopThread("test-cable")
        self._writers: list[asyncio.StreamWriter] = []
        self._pipes: set[asyncio.Task[None]] = set()
        self.address = self._loop.run(self._start())

    async def _start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _join(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        far_in, far_out = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [near_out, far_out]
        self._pipes |= {asyncio.create_task(_pipe(near_in, far_out)), asyncio.create_task(_pipe(far_in, near_out))}

    def cut(self) -> None:
        """Ends the connection on both sides at once; nobody can connect again."""
        self._loop.run(self._cut())
        self._loop.stop()

    async def _cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()


class Relay:
    """A way to a server on which a test lets connections break after so many bytes towards the client."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._loop = EventLoopThread("test-relay")
        self._cuts: list[int] = []
        self._pipes: set[asyncio.Task[None]] = set()
        self.relayed = 0
        """Bytes that went to the client."""
        self.taken = 0
        """Bytes that came from the client."""
        self.connections = 0
        """Connections so far."""
        self._passes = asyncio.Event()
        self._passes.set()
        self.address = self._loop.run(self._start())

    def hold(self) -> None:
        """Keeps what the server sends, as if it were silent."""
        self._loop.loop.call_soon_threadsafe(self._passes.clear)

    def let_go(self) -> None:
        """Passes it on."""
        self._loop.loop.call_soon_threadsafe(self._passes.set)

    def cut_after(self, *amounts: int) -> None:
        """Lets the connection break after so many further bytes, the next one after the next amount, and so on."""
        self._loop.run(self._cut_after(amounts))

    async def _cut_after(self, amounts: Sequence[int]) -> None:
        self._cuts = list(amounts)

    def close(self) -> None:
        """Ends what is connected."""
        if not self._loop.is_stopped:
            self._loop.loop.call_soon_threadsafe(self._server.close)
            self._loop.stop()

    async def _start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _join(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_in, far_out = await asyncio.open_connection(self._host, int(self._port))
        forth, back = self._forth(near_in, far_out), self._back(far_in, near_out)
        self._pipes |= {asyncio.create_task(forth), asyncio.create_task(back)}

    async def _forth(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(1 << 16):
                self.taken += len(data)
                writer.write(data)
                await writer.drain()

    def _passing(self, data: bytes) -> tuple[bytes, bool]:
        """What of `data` goes on to the client, and whether the connection breaks behind it."""
        part = data[: self._cuts[0]] if self._cuts else data
        self.relayed += len(part)
        if not self._cuts:
            return part, False
        self._cuts[0] -= len(part)
        if self._cuts[0]:
            return part, False
        self._cuts.pop(0)
        return part, True

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(1 << 14):
                await self._passes.wait()
                part, is_cut = self._passing(data)
                writer.write(part)
                await writer.drain()
                if is_cut:
                    break


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with closing(writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(backend: FakeBackend | None = None, address: str = "127.0.0.1:0", **config: Any) -> Server:
        servers.append(Server(backend or FakeBackend(), address, **config))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve()


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncSteerClient]:
    async with AsyncSteerClient(server.address) as client:
        yield client


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address that is taken, but on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder whose name leaves room for a socket's: a Unix address has 108 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="steer-") as folder:
        yield folder
