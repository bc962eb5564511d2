"""Health checks, beside all calls and on an address of their own."""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steer_service.core.errors import EngineFailed
from steer_service.server import pulse
from steer_service.server.app import SERVICES
from steer_service.wire.status_codes import error_from_rpc
from tests.server.served import BOUND_S, Serve, Served, bounded, channel_to

ANY = "127.0.0.1:0"
CHECK = "/grpc.health.v1.Health/Check"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def watching(served: Served, service: str = "") -> Any:
    return served.health.Watch(health_pb2.HealthCheckRequest(service=service))


def until_health(address: str, wanted: int) -> None:
    """Checks from a thread, with gRPC's synchronous client, until health is so."""
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while check(health_pb2.HealthCheckRequest(), timeout=BOUND_S).status != wanted:
            pass


def with_the_event_loop_blocked(act: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `act` in a thread; nothing else runs in the event loop meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act, *arguments).result(BOUND_S)


async def test_a_watcher_hears_of_changes_after_another_one_has_ended(serve: Serve) -> None:
    served = await serve(opened=False)
    first, second = watching(served), watching(served)
    assert [(await bounded(watch.read())).status for watch in (first, second)] == [NOT_SERVING] * 2
    first.cancel()
    async with channel_to(served.server.address) as other:  # a later call, so the server has seen the end of the first
        await health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest())

    await served.server.open(served.backend)

    assert (await bounded(second.read())).status == SERVING
    second.cancel()


async def test_a_service_that_does_not_exist_is_unknown(serve: Serve) -> None:
    served = await serve()
    watch = watching(served, "no.such.Service")
    assert (await bounded(watch.read())).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("service", ["", SERVICES[0]])
async def test_the_own_address_answers_while_the_event_loop_does_not(serve: Serve, service: str) -> None:
    served = await serve(health_address=ANY)

    def check() -> int:
        with grpc.insecure_channel(served.server.health_address) as channel:
            asked = health_pb2.HealthCheckRequest(service=service)
            return int(health_pb2_grpc.HealthStub(channel).Check(asked, timeout=BOUND_S).status)

    assert with_the_event_loop_blocked(check) == SERVING


async def test_the_own_address_follows_the_server(serve: Serve) -> None:
    served = await serve(opened=False, health_address=ANY, lame_duck_s=BOUND_S)
    address = served.server.health_address
    await asyncio.to_thread(until_health, address, NOT_SERVING)
    await served.server.open(served.backend)
    await asyncio.to_thread(until_health, address, SERVING)

    draining = asyncio.ensure_future(served.server.drain())
    await asyncio.to_thread(until_health, address, NOT_SERVING)
    served.server.stop_now()
    await bounded(draining)


async def test_an_event_loop_that_stands_still_is_not_healthy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "STALE_S", 0.2)
    monkeypatch.setattr(pulse, "CONFIRM_S", 0.01)
    served = await serve(health_address=ANY)

    with_the_event_loop_blocked(until_health, served.server.health_address, NOT_SERVING)

    await asyncio.to_thread(until_health, served.server.health_address, SERVING)


@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        (CHECK, b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (CHECK, health_pb2.HealthCheckRequest(service="other").SerializeToString(), grpc.StatusCode.NOT_FOUND),
        (CHECK, bytes(1 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("/steer.v1.GenerationService/Generate", b"", grpc.StatusCode.UNIMPLEMENTED),
    ],
    ids=["damaged", "unknown service", "too long", "another service"],
)
async def test_bad_calls_of_the_own_address_get_a_status(
    serve: Serve, method: str, data: bytes, code: grpc.StatusCode
) -> None:
    served = await serve(health_address=ANY)
    async with channel_to(served.server.health_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bounded(channel.unary_unary(method)(data))
        assert caught.value.code() is code
        status = await channel.unary_unary(CHECK)(b"")
    assert health_pb2.HealthCheckResponse.FromString(status).status == SERVING


async def test_an_own_address_that_is_taken_is_refused(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineFailed, match="cannot listen") as caught:
            await serve(health_address=address)
    assert caught.value.reason == "ADDRESS_UNAVAILABLE"


async def test_a_health_check_whose_message_does_not_come_is_ended(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer_service.server.services.MESSAGE_S", 0.1)
    served = await serve()
    call = served.channel.stream_stream("/grpc.health.v1.Health/Check")(metadata=())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call.read())
    assert error_from_rpc(caught.value).reason == "MALFORMED"


async def test_only_so_many_may_watch(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer_service.server.health.MAX_WATCHERS", 2)
    served = await serve()
    first, second = watching(served), watching(served)
    assert [(await bounded(call.read())).status for call in (first, second)] == [SERVING] * 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(watching(served).read())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in (first, second):
        call.cancel()
