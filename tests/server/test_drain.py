"""A stopping server finishes what it has begun: requests, fetches and segments on their way to a client."""

import asyncio

import grpc
import pytest

from steer_service.server.app import SteerServer
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.capture_pb2 import ReleaseCaptureRequest
from steer_service.wire.status_codes import error_from_rpc
from tests.arena import Arena
from tests.server.capture_client import LONG, WIDE, Begin, asking, regions, required, rest_of, until
from tests.server.served import Gate, Serve, bounded, text_request


async def draining(server: SteerServer) -> "asyncio.Task[None]":
    task = asyncio.ensure_future(server.drain())
    await until(lambda: server._admission._is_draining)
    return task


async def test_a_fetch_that_fits_the_grace_comes_to_its_end(begin: Begin) -> None:
    alice = await begin(FakeBackend(WIDE))
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    first = await bounded(call.read())
    stopping = await draining(alice.served.server)

    rest = await bounded(rest_of(call))

    assert sum(len(one.capture_chunk.data) for one in [first, *rest]) == held.total_bytes
    await alice.release(capture_id=held.capture_id)
    await bounded(stopping)


async def test_a_capture_that_was_just_finished_can_still_be_fetched(begin: Begin) -> None:
    alice = await begin()
    alice.served.backend.step = gate = Gate()
    running = asyncio.ensure_future(alice.held())
    await bounded(gate.reached.wait())
    stopping = await draining(alice.served.server)
    gate.opened.set()
    held = await bounded(running)

    assert await alice.fetch(held.capture_id)

    await alice.release(capture_id=held.capture_id)
    await bounded(stopping)


async def test_a_segment_handed_out_while_stopping_is_there_until_its_client_releases_it(
    begin: Begin, arena: Arena
) -> None:
    alice = await begin()
    session, _ = await alice.session(arena.folder)
    alice.served.backend.step = gate = Gate()
    running = asyncio.ensure_future(alice.generate(required(session)))
    await bounded(gate.reached.wait())
    stopping = await draining(alice.served.server)
    gate.opened.set()
    [region, *_] = regions(await bounded(running))
    for _ in range(20):
        await asyncio.sleep(0)

    assert (arena.folder / region.segment_name).exists()

    await alice.served.capture.ReleaseCapture(
        ReleaseCaptureRequest(lease_token=region.lease_token), metadata=alice.metadata
    )
    await bounded(stopping)


async def test_captures_that_nobody_comes_for_do_not_keep_a_server(begin: Begin, monkeypatch) -> None:
    monkeypatch.setattr("steer_service.server.capture_store.HANDOVER_S", 0.2)
    alice = await begin(grace_s=1000)
    await alice.held()
    await bounded(alice.served.server.drain())


async def test_a_fetch_that_outlasts_the_grace_is_cut_with_the_server(begin: Begin) -> None:
    alice = await begin(FakeBackend(WIDE), grace_s=0.1)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    await bounded(alice.served.server.drain())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(rest_of(call))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_lame_duck_still_serves_while_its_health_says_no(serve: Serve) -> None:
    served = await serve(lame_duck_s=1000)
    stopping = asyncio.ensure_future(served.server.drain())
    while set((await bounded(served.statuses())).values()) != {"NOT_SERVING"}:
        await asyncio.sleep(0)
    assert (await served.generate(text_request()))[-1].HasField("completed")
    served.server.stop_now()
    await bounded(stopping)


async def test_requests_that_wait_for_a_place_run_within_the_grace(serve: Serve) -> None:
    served = await serve(max_running_requests=1)
    served.backend.step = gate = Gate()
    calls = [asyncio.ensure_future(served.generate(text_request())) for _ in range(3)]
    await bounded(gate.reached.wait())
    await until(lambda: served.server._admission._queue.waiting == 2)
    stopping = await draining(served.server)
    assert error_from_rpc(await served.failure(text_request())).reason == "DRAINING"
    gate.opened.set()
    assert all(answer[-1].HasField("completed") for answer in await bounded(asyncio.gather(*calls)))
    await bounded(stopping)
