"""Leases over a real channel: what ends them, and what a server needs to give any."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, token_at
from steer_service.testing.fake_prompts import words_to_token_ids
from steer_service.wire import capture_pb2
from steer_service.wire.position_pb2 import PositionScope
from tests.arena import Arena
from tests.server.served import Serve, Served, bounded, text_request
from tests.shm.folders import no_more_files, segments_in

ME = (("steer-client-id", "me"),)
Sharing = Callable[[], Awaitable[Served]]


@pytest.fixture
def sharing(serve: Serve, tmp_path: Path) -> Sharing:
    """Starts a server that shares the memory in `tmp_path`."""
    arena = Arena(tmp_path, 1 << 20)
    return lambda: serve(FakeBackend(place=arena), shm_dir=str(tmp_path))


async def session_of(served: Served, folder: Path) -> tuple[bytes, grpc.aio.UnaryStreamCall]:
    challenge = await bounded(served.capture.OpenSharedMemory(capture_pb2.OpenSharedMemoryRequest(), metadata=ME))
    answer = capture_pb2.ConfirmSharedMemoryRequest(
        challenge_token=challenge.challenge_token, nonce=(folder / challenge.segment_name).read_bytes()
    )
    call = served.capture.ConfirmSharedMemory(answer, metadata=ME)
    return (await bounded(call.read())).session_token, call


async def shared(served: Served, session: bytes, **fields: object) -> list[capture_pb2.SharedMemoryRegion]:
    """The regions of a request for two layers."""
    request = text_request("a b")
    request.capture.layers.extend([1, 2])
    request.capture.delivery = capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED
    request.capture.shared_memory_session = session
    if "positions" in fields:
        request.capture.positions.CopyFrom(fields["positions"])
        request.sampling.stop_token_ids.append(fields["stop"])

    async def drain() -> list[capture_pb2.SharedMemoryRegion]:
        call = served.generation.Generate(request, metadata=ME)
        return [one.capture_shm async for one in call if one.WhichOneof("event") == "capture_shm"]

    regions: list[capture_pb2.SharedMemoryRegion] = await bounded(drain())
    return regions


async def none_in(folder: Path) -> None:
    while segments_in(folder):
        await asyncio.sleep(0.001)


async def test_one_lease_of_all_regions_ends_when_it_is_released(sharing: Sharing, tmp_path: Path) -> None:
    served = await sharing()
    session, _ = await session_of(served, tmp_path)

    regions = await shared(served, session)

    assert len(regions) == 2
    assert segments_in(tmp_path) == [regions[0].segment_name] == [regions[1].segment_name]
    [token] = {region.lease_token for region in regions}
    await bounded(served.capture.ReleaseCapture(capture_pb2.ReleaseCaptureRequest(lease_token=token), metadata=ME))
    assert segments_in(tmp_path) == []
    assert served.backend.holding == 0


async def test_leases_end_with_the_stream_of_their_session(sharing: Sharing, tmp_path: Path) -> None:
    served = await sharing()
    session, call = await session_of(served, tmp_path)
    for _ in range(3):
        await shared(served, session)
    assert len(segments_in(tmp_path)) == 3

    call.cancel()

    await bounded(none_in(tmp_path))
    assert served.backend.holding == 0
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await shared(served, session)
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_lease_without_rows_ends_at_once(sharing: Sharing, tmp_path: Path) -> None:
    served = await sharing()
    session, _ = await session_of(served, tmp_path)
    first = token_at(words_to_token_ids("a b", FAKE_MODEL.vocab_size), 0, 0, FAKE_MODEL.vocab_size)
    generated = PositionScope(generated=True)

    regions = await shared(served, session, positions=generated, stop=first)

    assert {(region.lease_token, region.segment_name) for region in regions} == {(b"", "")}
    assert segments_in(tmp_path) == []
    assert served.backend.holding == 0


async def test_a_challenge_for_which_there_is_no_room_is_refused_for_now(sharing: Sharing, tmp_path: Path) -> None:
    served = await sharing()
    await session_of(served, tmp_path)  # the connection is made

    with no_more_files(), pytest.raises(grpc.aio.AioRpcError) as raised:
        await bounded(served.capture.OpenSharedMemory(capture_pb2.OpenSharedMemoryRequest(), metadata=ME))

    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await session_of(served, tmp_path)


async def test_a_server_without_a_place_for_captures_does_not_listen() -> None:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", shm_dir="/proc/self"))

    with pytest.raises(InvalidRequest) as raised:
        await server.listen()

    assert raised.value.field == "shm_dir"
