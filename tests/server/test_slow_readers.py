"""Response streams whose client has stopped reading: they end in time, with a status, and hold nothing afterwards."""

import asyncio
import time

import grpc
import pytest

from steer_service.core.errors import DeadlineExceeded, Overloaded, SteerError
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.info_pb2 import GetServerInfoRequest
from steer_service.wire.status_codes import error_from_rpc
from tests.server.capture_client import BUFFERED, LONG, WIDE, Begin, asking, rest_of, until
from tests.server.served import Gate, Serve, bounded, text_request

LIMIT_S = 0.5


def unread(alice, **fields):
    """A Generate call whose captures fill every buffer on their way."""
    request = asking(delivery=0, text=LONG, max_tokens=1, layers=[0, 1, 2, 3], **fields)
    return alice.served.generation.Generate(request, metadata=alice.metadata)


async def test_a_generation_that_nobody_reads_ends_with_a_status_and_frees_everything(begin: Begin) -> None:
    alice = await begin(FakeBackend(WIDE), send_timeout_s=LIMIT_S)
    call = unread(alice)
    await bounded(call.read())
    server = alice.served.server

    await until(lambda: server.running == 0)  # nobody reads meanwhile

    await bounded(alice.served.backend.wait_idle())
    await bounded(server._admission.wait_idle())
    assert not server._send_timeout._senders
    before, error = await sent_before(call)
    assert (type(error), error.reason) == (Overloaded, "SLOW_READER")
    assert 0 < before < BUFFERED


async def sent_before(call) -> tuple[int, SteerError]:
    """The bytes of captures that the call still receives, and the error with which it ends then."""
    count = 0
    try:
        while (response := await bounded(call.read())) is not grpc.aio.EOF:
            count += len(response.capture_chunk.data)
    except grpc.aio.AioRpcError as error:
        return count, error_from_rpc(error)
    raise AssertionError("the call ended well")


async def test_a_fetch_that_nobody_reads_can_be_continued(begin: Begin) -> None:
    alice = await begin(FakeBackend(WIDE), send_timeout_s=LIMIT_S)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    [stored] = alice.served.server._store._captures.values()

    await until(lambda: not stored.readers)

    _, error = await sent_before(call)
    assert error.reason == "SLOW_READER"
    again = await alice.fetch(held.capture_id, skip_bytes=held.total_bytes - 1024)
    assert sum(len(one.capture_chunk.data) for one in again) == 1024


async def test_a_reader_that_pauses_for_less_than_the_limit_loses_nothing(begin: Begin) -> None:
    alice = await begin(FakeBackend(WIDE), send_timeout_s=30.0)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    first = await bounded(call.read())
    metrics, sent = alice.served.server.metrics, -1
    while (now := metrics.total("delivered")) != sent:  # until it waits for the reader
        sent = now
        await asyncio.sleep(0.05)
    rest = await bounded(rest_of(call))
    assert sum(len(one.capture_chunk.data) for one in [first, *rest]) == held.total_bytes


async def test_the_server_ends_a_request_at_its_own_deadline(serve: Serve) -> None:
    served = await serve(max_deadline_s=0.2)
    served.backend.step = Gate()
    failed = await served.failure(text_request())
    assert isinstance(error_from_rpc(failed), DeadlineExceeded)
    await bounded(served.backend.wait_idle())


async def test_the_deadline_counts_while_a_request_waits_for_its_place(serve: Serve) -> None:
    served = await serve(max_deadline_s=0.3, max_running_requests=1)
    served.backend.step = Gate()
    calls = [asyncio.ensure_future(served.failure(text_request())) for _ in range(3)]
    failures = await bounded(asyncio.gather(*calls))
    assert {failed.code() for failed in failures} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    await bounded(served.server._admission.wait_idle())


async def test_a_client_opens_only_so_many_streams_of_a_kind(begin: Begin) -> None:
    alice = await begin(FakeBackend(WIDE), max_client_fetches=2)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    calls = [alice.fetching(held.capture_id) for _ in range(2)]
    for call in calls:
        await bounded(call.read())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await alice.fetch(held.capture_id)
    assert error_from_rpc(caught.value).reason == "CLIENT_QUOTA"
    for call in calls:
        call.cancel()


async def test_calls_on_a_connection_full_of_requests_are_still_served(serve: Serve) -> None:
    """More streams than requests fit on a connection: neither health checks nor cancels wait for a generation."""
    served = await serve(max_concurrent_requests=1024)
    served.backend.step = gate = Gate()
    calls = [served.generation.Generate(text_request()) for _ in range(1024)]
    tokens = [(await bounded(call.read())).started.cancel_token for call in calls]
    began = time.monotonic()
    assert set((await bounded(served.statuses())).values()) == {"SERVING"}
    await bounded(served.info.GetServerInfo(GetServerInfoRequest()))
    refused = await served.failure(text_request())
    assert error_from_rpc(refused).reason == "QUEUE_FULL"
    assert time.monotonic() - began < 10
    assert len(set(tokens)) == 1024
    gate.opened.set()
    for call in calls:
        call.cancel()
