"""One server for every test that needs no server of its own. It traces, and its log is JSON."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient
from tests.real_server.serving import Server, running_server
from tests.server.otlp_collector import Collector, collecting


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Takes the spans of the server and of its engine."""
    with collecting() as collector, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds
        yield collector


@pytest.fixture(scope="package")
def error_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server writes on standard error."""
    return tmp_path_factory.mktemp("server") / "stderr"


@pytest.fixture(scope="package")
def server(collector: Collector, error_log: Path) -> Iterator[Server]:
    flags = "--otlp-traces-endpoint", collector.endpoint, "--log-format", "json", "--log-level", "info"
    try:
        with error_log.open("w") as stderr, running_server(*flags, stderr=stderr) as server:
            yield server
            server.process.send_signal(signal.SIGTERM)  # does nothing if a test has ended it
            assert server.process.wait(timeout=90) == 0
    finally:
        print(error_log.read_text())  # pytest shows it where a test has failed


@pytest.fixture
async def client(server: Server):
    async with AsyncSteerClient(server.address, timeout_s=300) as client:
        yield client
