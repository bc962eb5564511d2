"""Captures in memory that client and server share: the same rows, without a copy, while they are leased."""

import asyncio
import gc
import mmap
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureHandle, CaptureSite, NotFound, SteerClient
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from tests.arena import Arena
from tests.client.captures import (
    INLINE,
    PREFERRED,
    PROMPT,
    SHARED,
    captured,
    mapped_segments,
    memory_of,
    open_segments,
    same,
)
from tests.client.conftest import Serve, Server


@pytest.fixture
def server(serve: Serve, arena: Arena) -> Server:
    return serve(FakeBackend(place=arena), shm_dir=str(arena.folder))


@pytest.fixture
async def client(server: Server, arena: Arena):
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        yield client


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("site", CaptureSite)
async def test_shared_rows_are_those_that_come_inline(
    serve: Serve, arena: Arena, dtype: str, site: CaptureSite
) -> None:
    server = serve(FakeBackend(replace(FAKE_MODEL, dtype=dtype), place=arena), shm_dir=str(arena.folder))
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        async with await captured(client, replace(SHARED, site=site)) as handle:
            shared = await handle.fetch()
        async with await captured(client, replace(INLINE, site=site)) as handle:
            assert same(shared, await handle.fetch())
    assert server.backend.holding == 0


async def test_the_answer_says_that_memory_is_shared(client: AsyncSteerClient) -> None:
    [generation], [handle] = await client.generate(PROMPT, max_tokens=4, capture=PREFERRED, raw_output=True)
    assert generation.capture_delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED
    assert generation.shared_memory_fallback is None
    await handle.close()


async def test_arrays_are_the_shared_memory_itself(client: AsyncSteerClient, arena: Arena) -> None:
    async with await captured(client) as handle:
        captures = await handle.fetch()
        part = await handle.fetch_rows(layers=[0], positions="prompt")

        assert isinstance(memory_of(captures[2][0]["after"]), mmap.mmap)
        assert len({id(memory_of(captures[layer][0][site])) for layer in (2, 0) for site in ("before", "after")}) == 1
        assert np.shares_memory(part.after[0], captures[0][0]["after"])
        assert captures[2][0]["before"][0, 6:].tolist() == [0.0, 0.0]
        [segment] = arena.segments
        with segment.open("r+b") as file:  # a page that was not copied shows what its segment holds
            file.seek(64 + 6 * 4)
            file.write(np.array([7.0, 8.0], np.float32).tobytes())
        assert captures[2][0]["before"][0, 6:].tolist() == [7.0, 8.0]


async def test_writing_to_an_array_changes_it_for_its_reader_alone(client: AsyncSteerClient, arena: Arena) -> None:
    async with await captured(client) as handle:
        [segment] = arena.segments
        before = segment.read_bytes()
        hidden = (await handle.fetch())[2][0]["hidden"]

        hidden[:] = 99.0

        assert segment.read_bytes() == before
        assert (await handle.fetch())[2][0]["hidden"][0, 0] == 99.0


async def test_nothing_stays_open_or_mapped_when_the_last_array_is_gone(client: AsyncSteerClient) -> None:
    gc.collect()  # what earlier tests left
    before = open_segments(), mapped_segments()
    for _ in range(5):
        async with await captured(client) as handle:
            captures = await handle.fetch()
            assert mapped_segments() > before[1]
        del captures, handle
    gc.collect()
    assert (open_segments(), mapped_segments()) == before


async def test_a_capture_keeps_no_more_files_open_than_its_python_needs(client: AsyncSteerClient) -> None:
    gc.collect()
    before = open_segments()

    handles = [await captured(client) for _ in range(5)]

    sides = 2  # of each segment: the client's mapping and, in this process too, the server's
    assert open_segments() - before == (0 if sys.version_info >= (3, 13) else sides * len(handles))
    for handle in handles:
        await handle.close()


async def test_tensors_lie_in_the_shared_memory(serve: Serve, arena: Arena) -> None:
    torch = pytest.importorskip("torch")
    server = serve(FakeBackend(replace(FAKE_MODEL, dtype="bfloat16"), place=arena), shm_dir=str(arena.folder))
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        async with await captured(client) as handle:
            array = (await handle.fetch(framework="native"))[2][0]["hidden"]
            tensor = (await handle.fetch(framework="torch"))[2][0]["hidden"]
            assert (tensor.dtype, tensor.data_ptr()) == (torch.bfloat16, array.ctypes.data)


async def test_closing_ends_the_lease_and_keeps_what_was_read(
    client: AsyncSteerClient, server: Server, arena: Arena
) -> None:
    handle = await captured(client)
    async with handle:
        hidden = (await handle.fetch())[0][0]["after"]
        assert len(arena.segments) == 1

    assert (server.backend.holding, arena.segments) == (0, [])
    assert [decode_row(row)[:2] for row in hidden] == [(0, position) for position in range(6)]
    with pytest.raises(NotFound):
        await handle.fetch_rows(layers=[2])


async def test_arrays_outlive_their_handle_and_their_client(server: Server, arena: Arena) -> None:
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        async with await captured(client) as handle:
            hidden = (await handle.fetch())[2][0]["hidden"]
    del client, handle
    gc.collect()
    assert [decode_row(row)[:2] for row in hidden] == [(2, position) for position in range(6)]


async def test_one_session_serves_many_requests(client: AsyncSteerClient, server: Server) -> None:
    _, handles = await client.generate([f"prompt {number}" for number in range(5)], max_tokens=2, capture=SHARED)
    later = await captured(client)

    sessions = {request.capture.shared_memory_session for request in server.backend.requests if request.capture}
    assert len(sessions) == 1
    for handle in (*handles, later):
        await handle.close()


async def test_closing_the_client_ends_its_leases(server: Server, arena: Arena) -> None:
    client = AsyncSteerClient(server.address, shm_dir=str(arena.folder))
    handle = await captured(client)
    captures = await handle.fetch()
    assert server.backend.holding == 1

    await client.close()

    await asyncio.to_thread(server.wait_holding, 0)
    assert arena.segments == []
    assert [decode_row(row)[:2] for row in captures[0][0]["hidden"]] == [(0, position) for position in range(6)]
    await handle.close()


async def test_closing_one_client_leaves_the_leases_of_others(
    client: AsyncSteerClient, server: Server, arena: Arena
) -> None:
    other = AsyncSteerClient(server.address, shm_dir=str(arena.folder))
    theirs = await captured(other)
    async with await captured(client) as handle:
        await other.close()
        await asyncio.to_thread(server.wait_holding, 1)
        await handle.fetch()
    await theirs.close()


async def test_a_handle_that_is_never_closed_warns_and_is_released(
    client: AsyncSteerClient, server: Server, arena: Arena
) -> None:
    handles = [await captured(client)]
    with pytest.warns(ResourceWarning, match="were never closed"):
        handles.clear()

    await asyncio.to_thread(server.wait_holding, 0)
    assert arena.segments == []


async def test_an_output_without_rows_is_shared_and_empty(client: AsyncSteerClient, server: Server) -> None:
    probe, _ = await client.generate("a b", max_tokens=1, raw_output=True)
    stop = probe[0].outputs[0].token_ids[0]

    _, [handle] = await client.generate(
        "a b", max_tokens=4, stop_token_ids=[stop], capture=replace(SHARED, positions="generated")
    )

    async with handle:
        assert (await handle.fetch())[2][0]["hidden"].shape == (0, 8)
    assert server.backend.holding == 0


@pytest.mark.leaves("tasks")  # its event loops end before its client
def test_each_event_loop_proves_for_itself_that_memory_is_shared(server: Server, arena: Arena) -> None:
    client = AsyncSteerClient(server.address, shm_dir=str(arena.folder))

    async def ask() -> tuple[CaptureHandle, Any]:
        handle = await captured(client)
        return handle, await handle.fetch()

    first, captures = asyncio.run(ask())
    server.wait_holding(0)  # the session ended with its loop
    second, again = asyncio.run(ask())

    assert same(captures, again)
    sessions = {request.capture.shared_memory_session for request in server.backend.requests if request.capture}
    assert len(sessions) == 2
    for handle in (first, second):
        asyncio.run(handle.close())
    asyncio.run(client.close())


def test_the_blocking_client_shares_memory_too(server: Server, arena: Arena) -> None:
    with SteerClient(server.address, shm_dir=str(arena.folder)) as client:
        _, handles = client.generate(["a b", "c"], max_tokens=4, capture=SHARED)
        _, inline = client.generate(["a b", "c"], max_tokens=4, capture=INLINE)
        assert handles is not None
        assert inline is not None
        with handles[0], handles[1]:
            shared = client.fetch_all(handles)
            assert isinstance(memory_of(shared[0][2][0]["hidden"]), mmap.mmap)
            assert len(arena.segments) == 2
        assert arena.segments == []
        assert all(same(*pair) for pair in zip(shared, client.fetch_all(inline), strict=True))

        _, [kept] = client.generate("a b", max_tokens=4, capture=SHARED)
        assert server.backend.holding == 1
    server.wait_holding(0)
    kept.close()


def test_a_blocking_handle_that_is_never_closed_warns_and_is_released(server: Server, arena: Arena) -> None:
    with SteerClient(server.address, shm_dir=str(arena.folder)) as client:
        _, handles = client.generate("a b", max_tokens=4, capture=SHARED)
        assert handles is not None
        with pytest.warns(ResourceWarning, match="were never closed"):
            handles.clear()
        server.wait_holding(0)
