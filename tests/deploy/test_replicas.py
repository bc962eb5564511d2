"""Replicas behind Envoy that die, drain, load or start late: what their clients notice."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from steer_client import AsyncSteerClient, EngineFailed, GenerateRequest, SamplingOptions, TokenDelta, TokenPrompt
from steer_service.testing.fake_backend import FakeBackend, token_at
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_HELD,
    CaptureSpec,
    FetchCaptureRequest,
    ReleaseCaptureRequest,
)
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.status_codes import error_from_rpc
from tests.deploy.fleet import Envoy, Replica, envoy, own_addresses, replicas, starting, until
from tests.server.capture_client import rest_of
from tests.server.conftest import serve
from tests.server.served import Serve, bounded, text_request

__all__ = ["serve"]  # a fixture

CLIENTS, TOKENS = 12, 20
MANY = 40
"""Clients of which some reach each of two replicas, wherever these are on the ring."""

PROMPTS = [[7, number] for number in range(CLIENTS)]
RETRYABLE = {"CONNECTION_LOST", "UNREACHABLE"}
"""Reasons after which a client may send its request again."""


@contextmanager
def fleet(folder: Path, **settings: Any) -> Iterator[tuple[Replica, Replica, Envoy]]:
    addresses = own_addresses(2)
    with replicas(*addresses, **settings) as (first, second), envoy(folder, addresses) as proxy:
        until(lambda: proxy.healthy() == set(addresses))
        yield first, second, proxy


@asynccontextmanager
async def plain_channel(proxy: Envoy) -> AsyncIterator[grpc.aio.Channel]:
    """A channel that repeats nothing itself."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(proxy.address, options=options) as channel:
        yield channel


async def generate(channel: grpc.aio.Channel, *metadata: tuple[str, str], **fields: Any) -> list[Any]:
    call = GenerationServiceStub(channel).Generate(text_request(**fields), metadata=metadata)
    return await bounded(all_of(call))


async def all_of(call: Any) -> list[Any]:
    return [response async for response in call]


async def tokens_of(proxy: Envoy, number: int, started: asyncio.Event | None = None, pin: str = "") -> list[int]:
    """The tokens of a client's request; `started` is set when it has received the first event."""
    metadata = (("steer-instance", pin),) if pin else ()
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=PROMPTS[number]), sampling=SamplingOptions(max_tokens=TOKENS)
    )
    tokens = list[int]()
    async with AsyncSteerClient(proxy.address, client_id=f"client-{number}", metadata=metadata) as client:
        async for event in client.submit(request):
            if started is not None:
                started.set()
            if isinstance(event, TokenDelta):
                tokens += event.token_ids
    return tokens


async def running_requests(proxy: Envoy, pins: Sequence[str]) -> "list[asyncio.Task[list[int]]]":
    """One of each client, all begun."""
    started = [asyncio.Event() for _ in pins]
    tasks = [asyncio.create_task(tokens_of(proxy, number, started[number], pin)) for number, pin in enumerate(pins)]
    await bounded(asyncio.gather(*[one.wait() for one in started]))
    return tasks


def expected(number: int) -> list[int]:
    return [token_at(PROMPTS[number], 0, index, 32_000) for index in range(TOKENS)]


async def test_requests_on_a_killed_replica_end_with_an_error_and_succeed_when_they_are_repeated(
    tmp_path: Path,
) -> None:
    with fleet(tmp_path, token_s=0.02) as (first, second, proxy):
        pins = [(first, second)[number % 2].instance for number in range(CLIENTS)]
        running = await running_requests(proxy, pins)
        first.kill()
        results = await bounded(asyncio.gather(*running, return_exceptions=True))

        lost = [number for number, result in enumerate(results) if isinstance(result, BaseException)]
        assert lost == list(range(0, CLIENTS, 2))
        for number in lost:
            assert isinstance(results[number], EngineFailed)
            assert results[number].reason in RETRYABLE
        again = await bounded(asyncio.gather(*[tokens_of(proxy, number, pin=pins[number]) for number in lost]))
        for number, tokens in zip(lost, again, strict=True):
            results[number] = tokens
        assert results == [expected(number) for number in range(CLIENTS)]

        async with plain_channel(proxy) as channel:  # also calls that ask for the dead replica
            ids = [("steer-client-id", f"other-{number}") for number in range(CLIENTS)]
            pin = ("steer-instance", first.instance)
            calls = [(one, pin) if number % 2 else (one,) for number, one in enumerate(ids)]
            await asyncio.gather(*[generate(channel, *metadata, max_tokens=1) for metadata in calls])


async def test_a_draining_replica_loses_nothing(tmp_path: Path) -> None:
    with fleet(tmp_path, token_s=0.02) as (first, second, proxy):
        running = await running_requests(proxy, [(first, second)[number % 2].instance for number in range(CLIENTS)])
        async with plain_channel(proxy) as channel:
            pin = ("steer-instance", first.instance)
            # While this runs, the replica drains. gRPC cancels what reaches a server as it closes its socket.
            long = GenerationServiceStub(channel).Generate(text_request(max_tokens=10_000), metadata=(pin,))
            await bounded(long.read())
            first.begin_drain()
            # It refuses all of these, and Envoy finds the other one whatever places their clients have on its ring.
            ids = [("steer-client-id", f"other-{number}") for number in range(200)]
            await asyncio.gather(*[generate(channel, one, pin, max_tokens=1) for one in ids])
            long.cancel()
        assert await bounded(asyncio.gather(*running)) == [expected(number) for number in range(CLIENTS)]
        assert await asyncio.to_thread(first.process.wait, 30) == 0


async def test_a_draining_replica_still_hands_out_its_captures(tmp_path: Path) -> None:
    with fleet(tmp_path, grace_s=20) as (first, second, proxy):
        async with plain_channel(proxy) as channel:
            me, pin = ("steer-client-id", "alice"), ("steer-instance", first.instance)
            capture = CaptureSpec(layers=[1], delivery=CAPTURE_DELIVERY_HELD)
            responses = await generate(channel, me, pin, capture=capture)
            [held] = [one.capture_held for one in responses if one.HasField("capture_held")]
            first.begin_drain()
            await asyncio.to_thread(until, lambda: proxy.healthy() == {second.address})

            stub, request = CaptureServiceStub(channel), FetchCaptureRequest(capture_id=held.capture_id)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bounded(all_of(stub.FetchCapture(request, metadata=(me,))))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            chunks = await bounded(all_of(stub.FetchCapture(request, metadata=(me, pin))))
            assert sum(len(one.capture_chunk.data) for one in chunks) > 0

            release = ReleaseCaptureRequest(capture_id=held.capture_id)
            await bounded(stub.ReleaseCapture(release, metadata=(me, pin)))
        assert await asyncio.to_thread(first.process.wait, 30) == 0


async def test_replicas_that_start_after_their_envoy_are_noticed(tmp_path: Path) -> None:
    """Well before the 60 s after which Envoy's default would look."""
    addresses = own_addresses(1)
    with envoy(tmp_path, addresses) as proxy:
        async with plain_channel(proxy) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            with starting(addresses[0]) as late:
                await asyncio.to_thread(late.wait_serving)
                await asyncio.to_thread(until, lambda: proxy.healthy() == {addresses[0]})
                await generate(channel)


async def test_a_replica_that_is_not_serving_gets_no_call(tmp_path: Path, serve: Serve) -> None:
    addresses = own_addresses(2)
    loading = await serve(opened=False, address=addresses[0])
    ready = await serve(opened=False, address=addresses[1])
    backends = [loading.backend, ready.backend]
    with ExitStack() as stack:
        proxy = await asyncio.to_thread(stack.enter_context, envoy(tmp_path, addresses))
        async with plain_channel(proxy) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="no healthy upstream"):
                await generate(channel)
            await ready.server.open(ready.backend)
            await asyncio.to_thread(until, lambda: proxy.healthy() == {ready.server.address})
            for number in range(MANY):
                await generate(channel, ("steer-client-id", f"client-{number}"))
            assert [count_of(backend) for backend in backends] == [0, MANY]

            await loading.server.open(loading.backend)
            await asyncio.to_thread(until, lambda: len(proxy.healthy()) == 2)
            for number in range(MANY):
                await generate(channel, ("steer-client-id", f"client-{number}"))
            assert sum(map(count_of, backends)) == 2 * MANY
            assert count_of(loading.backend) > 0


def count_of(backend: FakeBackend) -> int:
    return sum(request.request_id != "warm-up" for request in backend.requests)


async def test_a_draining_envoy_finishes_the_responses_that_run_and_heartbeats_pass(tmp_path: Path) -> None:
    with fleet(tmp_path, token_s=0.05, heartbeat_s=0.01) as (first, second, proxy):
        async with plain_channel(proxy) as channel:
            running = asyncio.ensure_future(generate(channel, max_tokens=10))
            await asyncio.to_thread(until, lambda: first.numbers()["running"] + second.numbers()["running"] == 1)
            proxy.get("/drain_listeners?graceful&skip_exit", method="POST")
            responses = await bounded(running)
        assert responses[-1].HasField("completed")
        assert any(response.HasField("heartbeat") for response in responses)


async def test_a_client_that_does_not_read_is_ended_and_stops_no_other(tmp_path: Path) -> None:
    with fleet(tmp_path, hidden_size=4096, send_timeout_s=0.5) as (first, _, proxy):
        async with plain_channel(proxy) as channel:
            pin = (("steer-instance", first.instance),)
            request = text_request("w " * 1500, max_tokens=1, capture=CaptureSpec(layers=[0, 1, 2, 3]))  # 94 MiB
            slow = GenerationServiceStub(channel).Generate(request, metadata=pin)
            await bounded(slow.read())
            await asyncio.to_thread(until, lambda: first.numbers()["stalled"] == 1)
            async with plain_channel(proxy) as other:
                assert (await generate(other, *pin))[-1].HasField("completed")
            await asyncio.to_thread(until, lambda: first.numbers()["running"] == 0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bounded(rest_of(slow))
        assert error_from_rpc(caught.value).reason == "SLOW_READER"


@pytest.mark.extended
@pytest.mark.slow
async def test_a_response_that_is_silent_for_longer_than_envoys_default_is_not_cut(tmp_path: Path) -> None:
    with fleet(tmp_path, token_s=16, heartbeat_s=0) as (_, _, proxy):
        async with plain_channel(proxy) as channel:
            call = GenerationServiceStub(channel).Generate(text_request(max_tokens=1))
            responses: Sequence[Any] = await asyncio.wait_for(all_of(call), 60)
            assert responses[-1].HasField("completed")
