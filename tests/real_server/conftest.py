"""One server for every test that needs no server of its own."""

import signal
from collections.abc import Iterator

import pytest

from steer_client import AsyncSteerClient
from tests.real_server.serving import Server, running_server


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server
        server.process.send_signal(signal.SIGTERM)  # does nothing if a test has ended it
        assert server.process.wait(timeout=90) == 0


@pytest.fixture
async def client(server: Server):
    async with AsyncSteerClient(server.address, timeout_s=300) as client:
        yield client
