"""A call that a proxy or a dead server ends is CONNECTION_LOST, which may be retried; it is no defect of the engine."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, EngineFailed, SteerError
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client.captures import HELD, LONG, PREFERRED, WIDE, same
from tests.client.conftest import Gate, Serve
from tests.client.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Http2Proxy,
    frame,
    go_away,
    header,
    reset,
    server_that_ends_calls,
)
from tests.processes import loaded_server

Proxy = Callable[[str], Http2Proxy]


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxies: list[Http2Proxy] = []

    def start(address: str) -> Http2Proxy:
        proxies.append(Http2Proxy(address))
        return proxies[-1]

    yield start
    for one in proxies:
        one.close()


def reset_with(code: int) -> Callable[[int], Sequence[bytes]]:
    return lambda stream: [reset(stream, code)]


LOST = {
    **{f"reset with code {code}": reset_with(code) for code in (0, 1, 2, 3, 5, 7, 8, 9, 13, 99)},
    "the connection is told to go away": lambda _: [go_away(2), None],
    "the connection breaks": lambda _: [None],
    "the response ends without a status": lambda stream: [frame(DATA, END_STREAM, stream)],
    "the trailers have no status": lambda stream: [
        frame(HEADERS, END_HEADERS | END_STREAM, stream, header(b"x", b"y"))
    ],
}


@pytest.mark.parametrize("name", LOST)
async def test_a_call_that_ends_without_a_status_of_the_server_is_a_lost_connection(name: str) -> None:
    async with server_that_ends_calls(LOST[name], begins=True) as address, AsyncSteerClient(address) as client:
        error = await failure(client)

    assert type(error) is EngineFailed
    assert error.reason == "CONNECTION_LOST"
    assert error.retry_after_s
    assert address in error.message


async def test_so_is_a_call_that_is_reset_before_its_first_response() -> None:
    async with server_that_ends_calls(reset_with(2), begins=False) as address, AsyncSteerClient(address) as client:
        assert (await failure(client)).reason == "CONNECTION_LOST"


async def test_shared_memory_is_not_given_up_because_a_connection_was_lost() -> None:
    calls: list[int] = []

    def count_and_reset(stream: int) -> Sequence[bytes]:
        calls.append(stream)
        return [reset(stream, 2)]

    async with server_that_ends_calls(count_and_reset, begins=False) as address, AsyncSteerClient(address) as client:
        with pytest.raises(EngineFailed) as raised:
            await client.generate("hello", max_tokens=2, capture=PREFERRED)

    assert raised.value.reason == "CONNECTION_LOST"
    assert len(calls) == 1  # the proof of shared memory; the request itself was not sent


async def failure(client: AsyncSteerClient) -> SteerError:
    with pytest.raises(SteerError) as raised:
        await client.generate("hello", max_tokens=2)
    return raised.value


@pytest.mark.parametrize("is_behind_proxy", [False, True], ids=["direct", "behind a proxy"])
async def test_a_server_that_is_killed_is_a_lost_connection(
    tmp_path: Path, proxy: Proxy, *, is_behind_proxy: bool
) -> None:
    async with loaded_server(tmp_path, together=2) as server:  # holds a lone request before its second token
        address = await server.ask()
        async with AsyncSteerClient(proxy(address).address if is_behind_proxy else address) as client:
            stream = client.stream("hello", max_tokens=3)
            await anext(stream)
            await server.kill()
            with pytest.raises(EngineFailed) as raised:
                await anext(stream)

    assert (raised.value.reason, bool(raised.value.retry_after_s)) == ("CONNECTION_LOST", True)


async def test_a_proxy_s_timeout_is_a_lost_connection_and_the_server_frees_the_request(
    serve: Serve, proxy: Proxy
) -> None:
    server = serve(FakeBackend(step=Gate(1)))
    between = proxy(server.address)
    async with AsyncSteerClient(between.address) as client:
        stream = client.stream("hello", max_tokens=3)
        await anext(stream)
        between.reset()
        with pytest.raises(EngineFailed) as raised:
            await anext(stream)

    assert raised.value.reason == "CONNECTION_LOST"
    server.wait_idle()


async def test_an_internal_error_of_the_server_stays_one_behind_a_proxy(serve: Serve, proxy: Proxy) -> None:
    server = serve(FakeBackend(failure=EngineFailed("a row is missing", reason="CAPTURE_INCOMPLETE"), fail_at=1))
    async with AsyncSteerClient(proxy(server.address).address) as client:
        error = await failure(client)

    assert (error.reason, error.retry_after_s) == ("CAPTURE_INCOMPLETE", None)


async def test_a_fetch_that_a_proxy_resets_is_resumed(serve: Serve, arena: Arena, proxy: Proxy) -> None:
    server = serve(FakeBackend(WIDE, place=arena), shm_dir=str(arena.folder))
    between = proxy(server.address)
    async with AsyncSteerClient(between.address) as client:
        _, [handle] = await client.generate(LONG, max_tokens=1, capture=HELD)
        resets: list[int] = []

        def reset_once(received: int, _: int) -> None:
            if not resets:
                resets.append(received)
                between.reset()

        captures = await handle.fetch(progress=reset_once)

        assert 0 < resets[0] < handle.total_bytes
        await handle.close()
        _, [inline] = await client.generate(LONG, max_tokens=1, capture=replace(HELD, delivery=CaptureDelivery.INLINE))
        assert same(captures, await inline.fetch())
