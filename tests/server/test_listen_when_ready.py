"""With `listen_when_ready`, a TCP probe fails while the model loads and succeeds afterwards."""

import asyncio
import os
import socket
import tempfile
import urllib.request
from contextlib import closing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steer_client import tls_credentials
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.server.app import SteerServer
from steer_service.server.bind import host_and_port
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.server.served import BOUND_S, Gate, Serve, bounded, text_request
from tests.server.test_certificates import Authority, local, ours, reaches, settings  # noqa: F401  (fixtures)

ANY = "127.0.0.1:0"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def accepts(address: str) -> bool:
    """What a TCP probe finds."""
    try:
        _, writer = await bounded(asyncio.open_connection(*host_and_port(address)))
    except ConnectionRefusedError:
        return False
    writer.close()
    await bounded(writer.wait_closed())
    return True


@pytest.fixture
def free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("address", [ANY, "localhost:0", "[::1]:0", "0.0.0.0:0"])
async def test_no_connection_is_accepted_before_the_first_generation(serve: Serve, address: str) -> None:
    gate = Gate(at=0)
    served = await serve(
        FakeBackend(step=gate), opened=False, address=address, listen_when_ready=1, insecure=1, client_id="alice"
    )
    reserved = served.server.address
    assert not reserved.endswith(":0")
    assert not await accepts(reserved)
    opening = asyncio.ensure_future(served.server.open(served.backend))
    await bounded(gate.reached.wait())
    assert not await accepts(reserved)

    gate.opened.set()
    await bounded(opening)

    assert served.server.address == reserved
    assert await accepts(reserved)
    assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_the_address_of_health_and_the_metrics_port_answer_while_the_model_loads(
    serve: Serve, free_port: int
) -> None:
    served = await serve(opened=False, listen_when_ready=1, health_address=ANY, metrics_port=free_port)

    def probe() -> tuple[int, int]:
        with grpc.insecure_channel(served.server.health_address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            health = check(health_pb2.HealthCheckRequest(), timeout=BOUND_S).status
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/health", timeout=BOUND_S) as answer:
            return health, answer.status

    assert await asyncio.to_thread(probe) == (NOT_SERVING, 200)
    assert not await accepts(served.server.address)


async def test_a_taken_address_fails_before_the_model_loads(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(EngineFailed, match="Address already in use") as caught:
            await serve(opened=False, listen_when_ready=1, address=f"127.0.0.1:{taken.getsockname()[1]}")
    assert caught.value.reason == "ADDRESS_UNAVAILABLE"


@pytest.mark.parametrize("waits", [0, 1])
async def test_no_other_server_takes_the_address_while_the_model_loads(serve: Serve, waits: int) -> None:
    served = await serve(opened=False, listen_when_ready=1)
    with pytest.raises(EngineFailed, match="Address already in use"):
        await serve(opened=False, listen_when_ready=waits, address=served.server.address)
    await served.server.open(served.backend)
    assert await accepts(served.server.address)


async def test_the_port_of_a_server_that_has_just_ended_is_taken_again(serve: Serve) -> None:
    first = await serve(listen_when_ready=1)
    await first.generate(text_request())
    first.server.stop_now()
    await bounded(first.server.drain())  # the server closes the connection, whose port is then in TIME_WAIT

    second = await serve(listen_when_ready=1, address=first.server.address)

    assert await accepts(second.server.address)


async def test_the_port_stays_open_when_the_engine_dies_and_starts_again(serve: Serve) -> None:
    served = await serve(listen_when_ready=1)
    served.backend.failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    await served.failure(text_request())
    await bounded(served.server.engine_died.wait())
    assert set((await served.statuses()).values()) == {"NOT_SERVING"}
    assert await accepts(served.server.address)

    await served.server.close_backend()
    await served.server.open(FakeBackend())

    assert set((await served.statuses()).values()) == {"SERVING"}


async def test_a_first_generation_that_fails_opens_no_port(serve: Serve) -> None:
    served = await serve(FakeBackend(failure=EngineFailed("broken")), opened=False, listen_when_ready=1)
    with pytest.raises(EngineFailed, match="broken"):
        await served.server.open(served.backend)
    assert not await accepts(served.server.address)


async def test_a_server_that_ends_while_it_loads_gives_its_address_back() -> None:
    server = SteerServer(ServerConfig(address=ANY, listen_when_ready=1))
    address = await server.listen()
    server.stop_now()
    await bounded(server.drain())
    with socket.create_server(host_and_port(address)):
        pass


async def test_a_unix_socket_appears_with_the_first_generation(serve: Serve) -> None:
    with tempfile.TemporaryDirectory(prefix="steer-") as folder:
        served = await serve(opened=False, listen_when_ready=1, address=f"unix:{folder}/s")
        assert os.listdir(folder) == []
        await served.server.open(served.backend)
        assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_a_server_with_tls_listens_when_ready_too(
    serve: Serve,
    settings: dict[str, str],  # noqa: F811
    ours: Authority,  # noqa: F811
) -> None:
    served = await serve(opened=False, listen_when_ready=1, **settings)
    assert not await accepts(served.server.address)
    await served.server.open(served.backend)
    assert await reaches(local(served.server), credentials=tls_credentials(ca=ours.cert))


async def test_a_certificate_that_is_not_valid_is_refused_before_the_model_loads(
    serve: Serve,
    settings: dict[str, str],  # noqa: F811
) -> None:
    with pytest.raises(InvalidRequest, match="tls_key"):
        await serve(opened=False, listen_when_ready=1, **{**settings, "tls_key": settings["tls_cert"]})
