"""The page of metrics of a server that has everything but vLLM."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.server.complete import Complete, certificate_in
from tests.server.scraped import get


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    server = SteerServer(ServerConfig(address="127.0.0.1:0", metrics_port=port, **certificate_in(tmp_path)))
    await server.listen()
    try:
        await server.open(Complete())
        yield (await get(port, "/metrics"))[1]
    finally:
        server.stop_now()
        await server.drain()
