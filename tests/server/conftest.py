"""Fixtures: a real gRPC server on a free port around the fake backend, and clients of it."""

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from steer_service.core.backend import Backend
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.server.capture_client import Begin, Client
from tests.server.served import Serve, Served, bounded, channel_to


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve(backend, **config)` listens and, unless `opened=False`, opens; it ends with the test.

    `client_id`: sent with every call that has no metadata of its own.
    """
    async with AsyncExitStack() as stack:

        async def start(
            backend: Backend | None = None,
            *,
            opened: bool = True,
            address: str = "127.0.0.1:0",
            client_id: str = "",
            **config: Any,
        ) -> Served:
            server = SteerServer(ServerConfig(address=address, **config))
            await server.listen()
            stack.push_async_callback(bounded_drain, server)
            channel = await stack.enter_async_context(channel_to(server.address, client_id))
            served = Served(server, backend or FakeBackend(), channel)
            if opened:
                await server.open(served.backend)
            return served

        async def bounded_drain(server: SteerServer) -> None:
            server.stop_now()
            await bounded(server.drain())

        yield start


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path)


@pytest.fixture
def begin(serve: Serve, arena: Arena) -> Begin:
    """`await begin(backend)` serves a backend whose held rows lie in segments; returns a client of it."""

    async def start(backend: FakeBackend | None = None, **config: Any) -> Client:
        backend = backend or FakeBackend()
        backend.place = arena
        return Client(await serve(backend, shm_dir=str(arena.folder), **config), "alice")

    return start
