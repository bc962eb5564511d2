"""Shared memory that cannot be used: it is not shared, is gone, or there is no room for it."""

import asyncio
import sys
from contextlib import ExitStack
from typing import Any

import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    CapturedRows,
    EngineFailed,
    GenerateRequest,
    Overloaded,
    SamplingOptions,
    SharedMemoryFallback,
    Started,
    TextPrompt,
    Unsupported,
)
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client.captures import INLINE, PREFERRED, PROMPT, SHARED, captured, same
from tests.client.conftest import Serve, Server
from tests.shm.folders import no_more_files


@pytest.fixture
def server(serve: Serve, arena: Arena) -> Server:
    return serve(FakeBackend(place=arena), shm_dir=str(arena.folder))


@pytest.fixture
async def client(server: Server, arena: Arena):
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        yield client


async def test_a_client_that_sees_other_memory_falls_back_or_is_refused(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    async with AsyncSteerClient(server.address, shm_dir=str(elsewhere)) as client:
        with pytest.raises(Unsupported) as raised:
            await captured(client)
        assert (raised.value.reason, raised.value.field) == ("NO_SHARED_MEMORY", "capture.delivery")

        [generation], [handle] = await client.generate(PROMPT, max_tokens=4, capture=PREFERRED, raw_output=True)

        assert generation.capture_delivery is CaptureDelivery.INLINE
        assert generation.shared_memory_fallback is SharedMemoryFallback.NO_SESSION
        async with handle, await captured(client, INLINE) as inline:
            assert same(await handle.fetch(), await inline.fetch())
    assert server.backend.holding == 0


async def test_a_server_that_shares_nothing_says_so(serve: Serve, arena: Arena) -> None:
    server = serve(FakeBackend(place=arena), shm_dir=str(arena.folder), shared_memory=0)
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        with pytest.raises(Unsupported, match="this server hands out no shared memory"):
            await captured(client)
        [generation], _ = await client.generate(PROMPT, max_tokens=4, capture=PREFERRED, raw_output=True)
    assert generation.shared_memory_fallback is SharedMemoryFallback.SWITCHED_OFF


async def test_a_server_that_could_not_be_reached_is_asked_again(serve: Serve, arena: Arena, dead_address: str) -> None:
    client = AsyncSteerClient(dead_address, shm_dir=str(arena.folder))
    with pytest.raises(EngineFailed, match="no server answers"):
        await captured(client)
    [session] = client._sessions.values()
    assert session._refused_until == 0.0
    await client.close()


async def test_without_room_for_the_proof_required_is_told_to_wait_and_preferred_is_inline(
    client: AsyncSteerClient, server: Server
) -> None:
    await client.generate(PROMPT, max_tokens=1)  # the connection is made
    with no_more_files():
        with pytest.raises(Overloaded) as raised:
            await captured(client)
        [generation], [handle] = await client.generate(PROMPT, max_tokens=4, capture=PREFERRED, raw_output=True)

    assert raised.value.reason == "SHM_SPACE"
    assert raised.value.retry_after_s is not None
    assert len(server.backend.requests) == 2  # what is refused is not generated first
    assert generation.shared_memory_fallback is SharedMemoryFallback.NO_SESSION
    assert len((await handle.fetch())[2][0]["hidden"]) == 6
    async with await captured(client) as handle:
        assert len((await handle.fetch())[2][0]["hidden"]) == 6


async def test_a_segment_that_is_gone_before_it_is_mapped_is_an_error_and_leaves_nothing(
    serve: Serve, arena: Arena
) -> None:
    server = serve(FakeBackend(place=arena), shm_dir=str(arena.folder), shm_ttl=0.0)
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        with pytest.raises(EngineFailed) as raised:
            await captured(client)
        assert raised.value.reason == "CAPTURE_LOST"
    assert server.backend.holding == 0


@pytest.mark.parametrize("but", [0, 1], ids=["to open it", "to map it"])
async def test_a_capture_for_which_no_file_can_be_opened_says_what_to_do_and_is_released_at_once(
    client: AsyncSteerClient, server: Server, arena: Arena, but: int
) -> None:
    if but and sys.version_info >= (3, 13):
        pytest.skip("mapping a file does not open another")
    await (await captured(client)).close()  # the session is there

    with ExitStack() as full:

        def placed(rows: CapturedRows) -> Any:
            place = arena(rows)
            full.enter_context(no_more_files(but))
            return place

        server.backend.place = placed
        with pytest.raises(Overloaded, match="ulimit -n") as raised:
            await captured(client)

    assert raised.value.reason == "TOO_MANY_MAPPED"
    await asyncio.to_thread(server.wait_holding, 0)
    assert arena.segments == []


async def test_outputs_that_cannot_be_mapped_are_released_together(
    client: AsyncSteerClient, server: Server, arena: Arena
) -> None:
    sampling = SamplingOptions(max_tokens=4, n=3)
    events = client.submit(GenerateRequest(prompt=TextPrompt(text=PROMPT), sampling=sampling, capture=SHARED))
    assert isinstance(await anext(events), Started)
    await asyncio.to_thread(server.wait_until, lambda: server._server.running == 0)  # all is on its way
    assert server.backend.holding == 3
    for segment in arena.segments:
        segment.unlink()

    with pytest.raises(EngineFailed) as raised:
        async for _ in events:
            pass

    assert raised.value.reason == "CAPTURE_LOST"
    await asyncio.to_thread(server.wait_holding, 0)


async def test_a_proof_for_which_no_file_can_be_opened_is_tried_again(client: AsyncSteerClient, server: Server) -> None:
    await client.generate(PROMPT, max_tokens=1)  # the connection is made
    sessions = server._server._sessions
    challenge = sessions.challenge

    with ExitStack() as full:

        def then_full(client_id: str) -> Any:
            made = challenge(client_id)
            full.enter_context(no_more_files())
            return made

        sessions.challenge = then_full
        with pytest.raises(Overloaded, match="ulimit -n"):
            await captured(client)

    sessions.challenge = challenge
    await (await captured(client)).close()
