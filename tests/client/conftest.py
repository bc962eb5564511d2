"""Real gRPC servers around fake models, each in a loop thread of its own, so that a test may block."""

import asyncio
import socket
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing

import grpc
import pytest

from steer_client import AsyncSteerClient
from steer_service.core.errors import SteerError
from steer_service.core.fake import FakeBackend
from steer_service.core.loop import LoopThread
from steer_service.wire.errors import status_from_error
from steer_service.wire.events import EventWriter
from steer_service.wire.generation_pb2 import GenerateRequest, GenerateResponse
from steer_service.wire.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from steer_service.wire.info import model_info_to_proto
from steer_service.wire.info_pb2 import GetModelRequest, GetModelResponse
from steer_service.wire.info_pb2_grpc import InfoServiceServicer, add_InfoServiceServicer_to_server
from steer_service.wire.request import request_from_proto

BOUND_S = 10.0
"""Seconds that anything in these tests may take."""

Serve = Callable[..., "Server"]
"""`serve(backend=FakeBackend(), address="127.0.0.1:0")` starts a server that ends with the test."""


class Gate:
    """Holds every request before one token, until it is aborted."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._never = asyncio.Event()

    async def __call__(self, number: int) -> None:
        if number == self._number:
            await self._never.wait()


class FakeGeneration(GenerationServiceServicer):
    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend

    async def Generate(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[GenerateResponse, None]:
        try:
            writer = EventWriter()
            async with aclosing(self._backend.submit(request_from_proto(request))) as events:
                async for event in events:
                    for response in writer.responses(event):
                        yield response
        except SteerError as error:
            await context.abort_with_status(status_from_error(error))


class FakeInfo(InfoServiceServicer):
    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend

    async def GetModel(self, request: GetModelRequest, context: grpc.aio.ServicerContext) -> GetModelResponse:
        return GetModelResponse(model=model_info_to_proto(self._backend.info))


class Server:
    """A running server around `backend`."""

    def __init__(self, backend: FakeBackend, address: str) -> None:
        self.backend = backend
        self._loop = LoopThread("test-server")
        self.address = self._loop.run(self._start(address))

    async def _start(self, address: str) -> str:
        self._server = grpc.aio.server()
        add_GenerationServiceServicer_to_server(FakeGeneration(self.backend), self._server)
        add_InfoServiceServicer_to_server(FakeInfo(self.backend), self._server)
        port = self._server.add_insecure_port(address)
        await self._server.start()
        return address if address.startswith("unix:") else f"127.0.0.1:{port}"

    def wait_idle(self) -> None:
        """Returns when the backend runs nothing."""
        self._loop.run(asyncio.wait_for(self.backend.wait_idle(), BOUND_S))

    def wait_running(self, count: int) -> None:
        """Returns when the backend runs `count` requests."""
        self._loop.run(asyncio.wait_for(self._running(count), BOUND_S))

    async def _running(self, count: int) -> None:
        while self.backend.running < count:
            await asyncio.sleep(0.001)

    def stop(self) -> None:
        """Ends the server and what it runs, without grace."""
        if not self._loop.is_stopped:
            self._loop.run(self._server.stop(None))
            self._loop.stop()


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(backend: FakeBackend | None = None, address: str = "127.0.0.1:0") -> Server:
        servers.append(Server(backend or FakeBackend(), address))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve()


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
