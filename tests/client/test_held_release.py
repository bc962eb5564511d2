"""When captures that stay on the server are released."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    EngineFailed,
    GenerateRequest,
    SamplingOptions,
    Started,
    SteerClient,
    TextPrompt,
)
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client.captures import HELD, LONG, PROMPT, WIDE, rows_of, same
from tests.client.conftest import Serve, Server


@pytest.fixture
def server(serve: Serve, arena: Arena) -> Server:
    return serve(FakeBackend(place=arena), shm_dir=str(arena.folder))


async def test_a_handle_that_is_never_closed_warns_and_is_released(client: AsyncSteerClient, server: Server) -> None:
    _, handles = await client.generate(PROMPT, max_tokens=4, capture=HELD)
    assert server.backend.holding == 1

    with pytest.warns(ResourceWarning, match="were never closed"):
        handles.clear()

    await asyncio.to_thread(server.wait_holding, 0)


async def test_what_is_lost_just_before_the_client_closes_is_released(server: Server) -> None:
    async with AsyncSteerClient(server.address) as client:
        _, handles = await client.generate([PROMPT] * 5, max_tokens=4, capture=HELD)
        with pytest.warns(ResourceWarning):
            handles.clear()

    assert server.backend.holding == 0


def test_a_blocking_handle_that_is_never_closed_warns_and_is_released(server: Server) -> None:
    with SteerClient(server.address) as client:
        _, handles = client.generate(PROMPT, max_tokens=4, capture=HELD)
        assert handles is not None

        with pytest.warns(ResourceWarning, match="were never closed"):
            handles.clear()

        server.wait_holding(0)


class LateFailure(FakeBackend):
    """Fails the prompt "bad" once another request has been answered."""

    async def submit(self, request: GenerateRequest) -> AsyncIterator[Any]:
        if request.prompt == TextPrompt(text="bad"):
            while not self.finished:
                await asyncio.sleep(0.001)
            raise EngineFailed("broken", reason="BROKEN")
        async with aclosing(super().submit(request)) as events:
            async for event in events:
                yield event


async def test_a_prompt_that_fails_lets_go_of_what_the_others_hold(serve: Serve, arena: Arena) -> None:
    server = serve(LateFailure(place=arena), shm_dir=str(arena.folder))
    async with AsyncSteerClient(server.address) as client:
        with pytest.raises(EngineFailed, match="broken"):
            await client.generate(["good", "bad", "good"], max_tokens=4, capture=HELD)

        await asyncio.to_thread(server.wait_holding, 0)

    assert arena.segments == []


@pytest.mark.parametrize("outputs", [1, 2])
async def test_what_was_sent_and_never_read_is_freed_when_its_stream_is_closed(
    client: AsyncSteerClient, server: Server, arena: Arena, outputs: int
) -> None:
    sampling = SamplingOptions(max_tokens=4, n=outputs)
    request = GenerateRequest(prompt=TextPrompt(text=PROMPT), sampling=sampling, capture=HELD)
    async with aclosing(client.submit(request)) as events:
        assert isinstance(await anext(events), Started)
        await asyncio.to_thread(server.wait_answered)
        assert server.backend.holding == outputs

    await asyncio.to_thread(server.wait_holding, 0)
    assert arena.segments == []


async def test_closing_a_stream_frees_nothing_of_another(client: AsyncSteerClient, server: Server) -> None:
    _, [kept] = await client.generate(PROMPT, max_tokens=4, capture=HELD)
    request = GenerateRequest(prompt=TextPrompt(text=PROMPT), sampling=SamplingOptions(max_tokens=4), capture=HELD)
    async with aclosing(client.submit(request)) as events:
        await anext(events)
        await asyncio.to_thread(server.wait_answered)

    await asyncio.to_thread(server.wait_holding, 1)
    assert await kept.fetch()
    await kept.close()


async def test_a_closed_client_says_so(server: Server) -> None:
    client = AsyncSteerClient(server.address)
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=HELD)
    await client.close()

    for call in (handle.fetch(), handle.fetch_rows(layers=[2])):
        with pytest.raises(EngineFailed) as raised:
            await call
        assert raised.value.reason == "CLOSED"
    await handle.close()  # nothing to say it to


async def test_closing_the_client_ends_a_fetch_with_its_reason(serve: Serve, arena: Arena) -> None:
    server = serve(FakeBackend(WIDE, place=arena), shm_dir=str(arena.folder))
    client = AsyncSteerClient(server.address)
    _, [handle] = await client.generate(LONG, max_tokens=1, capture=HELD)
    begun = asyncio.Event()
    fetching = asyncio.create_task(handle.fetch(progress=lambda *_: begun.set()))
    await begun.wait()

    await client.close()

    with pytest.raises(EngineFailed) as raised:
        await fetching
    assert raised.value.reason in ("CLOSED", "CONNECTION_LOST")
    await handle.close()


def test_what_one_event_loop_was_given_another_fetches_and_releases(server: Server) -> None:
    client = AsyncSteerClient(server.address)

    async def ask() -> Any:
        _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=HELD)
        return handle

    async def bring(handle: Any) -> Any:
        async with handle:
            return await handle.fetch()

    handle, inline = asyncio.run(ask()), asyncio.run(rows_of(client, replace(HELD, delivery=CaptureDelivery.INLINE)))

    assert same(asyncio.run(bring(handle)), inline)
    assert server.backend.holding == 0

    lost = [asyncio.run(ask())]
    with pytest.warns(ResourceWarning):
        lost.clear()  # no loop runs: the server frees it in time, and nothing breaks
    asyncio.run(client.close())
