"""Pooled captures through a server: however they are delivered, they are the pooled rows of the same capture."""

from dataclasses import replace

import grpc
import numpy as np
import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    EngineFailed,
    InvalidRequest,
    Pooling,
    SteerClient,
    Unsupported,
)
from steer_service.runtime.pooling import pooled
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire import capture_pb2
from steer_service.wire.capture import capture_from_proto
from steer_service.wire.positions import scope_to_proto
from tests.arena import Arena
from tests.client.captures import PROMPT
from tests.client.conftest import Serve, Server

CAPTURE = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, positions=[0, -1, "generated"])
POOLINGS = [Pooling.MEAN, Pooling.LAST, Pooling.MAX]
DELIVERIES = [CaptureDelivery.INLINE, CaptureDelivery.HELD, CaptureDelivery.SHARED_MEMORY_REQUIRED]


@pytest.fixture
def server(serve: Serve, arena: Arena) -> Server:
    return serve(FakeBackend(replace(FAKE_MODEL, dtype="bfloat16"), place=arena), shm_dir=str(arena.folder))


@pytest.fixture
async def client(server: Server, arena: Arena):
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        yield client


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("pooling", POOLINGS)
async def test_one_row_comes_for_each_layer_and_site(
    client: AsyncSteerClient, server: Server, delivery: CaptureDelivery, pooling: Pooling
) -> None:
    [generation], [whole] = await client.generate(PROMPT, max_tokens=4, capture=CAPTURE, raw_output=True)
    rows = await whole.fetch(framework="native")

    [other], [handle] = await client.generate(
        PROMPT, max_tokens=4, capture=replace(CAPTURE, pooling=pooling, delivery=delivery), raw_output=True
    )

    async with handle:
        got = await handle.fetch(framework="native")
        for layer in (2, 0):
            for site in ("before", "after"):
                want = pooled(rows[layer][0][site], pooling)
                assert np.array_equal(got[layer][0][site].astype(np.float32), want.astype(np.float32))
                assert got[layer][0][site].dtype == want.dtype
            assert "meta" not in got[layer][0]
        part = await handle.fetch_rows(layers=[0])
        assert (part.spans, part.pooling, list(part.after)) == ((await whole.fetch_rows()).spans, pooling, [0])
        assert handle.pooling is pooling
        with pytest.raises(InvalidRequest, match="the rows were pooled") as refused:
            await handle.fetch_rows(positions=0)
        assert (refused.value.field, refused.value.reason) == ("positions", "NOT_CAPTURED")
        with pytest.raises(ValueError, match="the rows were pooled"):
            handle.get_message_activations(0, 0)
    received = 2 * 2 * FAKE_MODEL.hidden_size * got[0][0]["after"].itemsize
    assert handle.total_bytes == other.outputs[0].receipt.bytes_captured == received
    assert other.outputs[0].receipt.rows_captured == generation.outputs[0].receipt.rows_captured == 5
    assert server.backend.holding == 0


async def test_a_keyword_beside_the_layers_pools(client: AsyncSteerClient, server: Server) -> None:
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture_layers=[1], capture_pooling="mean")
    await handle.fetch()
    assert handle.matrix(1).shape == (1, FAKE_MODEL.hidden_size)

    with SteerClient(server.address) as blocking:
        _, [same] = blocking.generate(PROMPT, max_tokens=4, capture_layers=[1], capture_pooling=Pooling.MEAN)
        same.fetch()
        assert np.array_equal(same.matrix(1), handle.matrix(1))
        assert same.pooling is Pooling.MEAN
    with pytest.raises(InvalidRequest, match="it goes with capture_layers"):
        await client.generate(PROMPT, capture_pooling="mean")


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_no_captured_position_is_no_row(client: AsyncSteerClient, delivery: CaptureDelivery) -> None:
    capture = CaptureSpec(layers=(1,), positions="generated[2:3]", pooling="mean", delivery=delivery)

    [generation], _ = await client.generate(PROMPT, max_tokens=9, raw_output=True)
    stop = generation.outputs[0].token_ids[:1]
    _, [handle] = await client.generate(PROMPT, max_tokens=9, capture=capture, stop_token_ids=stop)

    async with handle:
        entry = (await handle.fetch(framework="native"))[1][0]
        assert (entry["hidden"].shape, entry["hidden"].dtype) == ((0, FAKE_MODEL.hidden_size), np.float32)


async def test_a_wide_row_comes_in_several_chunks(serve: Serve) -> None:
    info = replace(FAKE_MODEL, hidden_size=3000)
    async with AsyncSteerClient(serve(FakeBackend(info)).address) as client:
        for delivery in ("inline", "held"):
            capture = CaptureSpec(layers=(1,), pooling="mean", max_chunk_bytes=4096, delivery=delivery)
            _, [handle] = await client.generate(PROMPT, max_tokens=2, capture=capture)
            async with handle:
                assert (await handle.fetch())[1][0]["hidden"].shape == (1, 3000)


async def test_the_server_refuses_positions_of_a_pooled_capture(client: AsyncSteerClient) -> None:
    capture = replace(CAPTURE, pooling=Pooling.MAX, delivery=CaptureDelivery.HELD)
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=capture)
    request = capture_pb2.FetchCaptureRequest(capture_id=handle._held._id, positions=scope_to_proto(CAPTURE.positions))

    calls = handle._held._calls
    call = calls.fetch(request, "", calls.limit())
    with pytest.raises(grpc.RpcError) as refused:
        await anext(aiter(call))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the rows were pooled" in refused.value.details()
    await handle.close()


async def test_a_backend_that_does_not_pool_is_noticed() -> None:
    class Forgetful(FakeBackend):
        async def submit(self, request):
            async for event in super().submit(replace(request, capture=replace(request.capture, pooling="none"))):
                yield event

    with pytest.raises(EngineFailed, match="have pooling none, mean was requested"):
        await Forgetful().generate(PROMPT, max_tokens=2, capture_layers=1, capture_pooling="mean")


def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        CaptureSpec(layers=(1,), pooling="median")
    assert (refused.value.field, refused.value.reason) == ("pooling", "BAD_POOLING")
    with pytest.raises(InvalidRequest, match="a live capture sends rows before") as refused:
        CaptureSpec(layers=(1,), pooling="mean", is_live=True)
    assert (refused.value.field, refused.value.reason) == ("pooling", "BAD_POOLING")


def test_a_pooling_of_a_later_contract_is_refused() -> None:
    with pytest.raises(Unsupported) as refused:
        capture_from_proto(capture_pb2.CaptureSpec(layers=[1], pooling=9))
    assert (refused.value.field, refused.value.reason) == ("pooling", "UNKNOWN_POOLING")
