"""Fetches whose client reads slowly or not at all."""

import asyncio
from typing import Any

import grpc

from steer_service.testing.fake_backend import FakeBackend
from tests.server.capture_client import (
    BUFFERED,
    LONG,
    WIDE,
    Begin,
    Client,
    asking,
    failure,
    rest_of,
    until,
    until_stuck,
)
from tests.server.served import bounded


async def stuck_fetch(alice: Client) -> tuple[Any, str, int]:
    """A fetch whose first message was read, and whose others fill every buffer on their way."""
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    await until_stuck(lambda: alice.served.server.metrics.total("delivered"))
    return call, held.capture_id, held.total_bytes


async def test_a_slow_fetch_reads_ahead_of_its_reader_by_little(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call, _, total = await stuck_fetch(alice)
    assert total > 90 << 20
    assert alice.served.server.metrics.total("delivered") < BUFFERED
    call.cancel()


async def test_memory_that_is_being_sent_is_freed_when_its_reader_has_gone(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call, capture_id, total = await stuck_fetch(alice)
    await alice.release(capture_id=capture_id)
    assert alice.served.backend.holding == 1
    assert (await failure(alice.fetch(capture_id))).code() == grpc.StatusCode.NOT_FOUND

    rest = asyncio.ensure_future(failure(rest_of(call)))

    assert (await bounded(rest)).code() == grpc.StatusCode.NOT_FOUND
    await until(lambda: alice.served.backend.holding == 0)
    assert alice.served.server.metrics.total("delivered") < total


async def test_a_fetch_that_is_cancelled_frees_what_was_released_meanwhile(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call, capture_id, _ = await stuck_fetch(alice)
    await alice.release(capture_id=capture_id)
    call.cancel()
    await until(lambda: alice.served.backend.holding == 0)


async def test_a_reader_that_reads_nothing_for_too_long_loses_the_capture(begin: Begin):
    alice = await begin(FakeBackend(WIDE), shm_ttl=2.0, send_timeout_s=0.0)
    call, _, total = await stuck_fetch(alice)
    assert alice.served.backend.holding == 1

    await until(lambda: alice.served.backend.holding == 0)  # freed although nobody reads

    assert alice.served.server.metrics.total("expired") == total
    assert (await failure(rest_of(call))).code() == grpc.StatusCode.NOT_FOUND


async def test_a_fetch_that_lasts_longer_than_captures_are_kept_comes_to_its_end(begin: Begin):
    ttl_s, clock = 0.5, asyncio.get_running_loop().time
    alice = await begin(FakeBackend(WIDE), shm_ttl=ttl_s)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0]))
    [stored] = alice.served.server._store._captures.values()
    began, received = clock(), 0

    async def freed() -> float:
        while alice.served.backend.holding:
            await asyncio.sleep(0.001)
        return clock()

    freeing = asyncio.ensure_future(freed())
    async for response in alice.fetching(held.capture_id):
        received += len(response.capture_chunk.data)
        await asyncio.sleep(ttl_s / 10)  # nothing leaves while 4 MiB wait in gRPC's window, which takes him 0.8 s

    assert received == held.total_bytes
    assert stored.used_at - began > 2 * ttl_s
    assert await bounded(freeing) - stored.used_at > ttl_s * 0.99  # which counts from the end of the fetch


async def test_using_a_capture_postpones_its_expiry(begin: Begin):
    alice = await begin(shm_ttl=100.0)
    held = await alice.held()
    [stored] = alice.served.server._store._captures.values()
    stored.expires_at = 0.0
    await alice.fetch(held.capture_id)
    assert stored.expires_at > held.expires_at.ToMilliseconds() / 1000 - 1
