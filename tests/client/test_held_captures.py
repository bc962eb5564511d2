"""Captures that stay on the server: fetched whole or in part, over connections that break, and let go."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    EngineFailed,
    GenerateRequest,
    InvalidRequest,
    NotFound,
    SamplingOptions,
    Started,
    SteerClient,
    TextPrompt,
)
from steer_client.capture_handles import FETCH_ATTEMPTS
from steer_service.runtime.handle import fetch_all
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from tests.arena import Arena
from tests.client.conftest import Relay, Serve, Server

HELD = CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, delivery=CaptureDelivery.HELD)
PROMPT = "a b c"


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path)


@pytest.fixture
def server(serve: Serve, arena: Arena) -> Server:
    return serve(FakeBackend(place=arena), shm_dir=str(arena.folder))


async def rows_of(client: AsyncSteerClient, capture: CaptureSpec, **options: Any) -> Any:
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=capture, **options)
    async with handle:
        return await handle.fetch()


def same(left: Any, right: Any) -> bool:
    """Are the captures equal, bit by bit?"""
    return left.keys() == right.keys() and all(
        mine.keys() == theirs.keys()
        and mine["meta"] == theirs["meta"]
        and all(
            (mine[name].dtype, mine[name].shape, mine[name].tobytes())
            == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes())
            for name in mine.keys() - {"meta"}
        )
        for layer in left
        for mine, theirs in zip(left[layer], right[layer], strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("site", CaptureSite)
async def test_held_rows_are_those_that_come_inline(serve: Serve, arena: Arena, dtype: str, site: CaptureSite) -> None:
    server = serve(FakeBackend(replace(FAKE_MODEL, dtype=dtype), place=arena), shm_dir=str(arena.folder))
    async with AsyncSteerClient(server.address) as client:
        held = await rows_of(client, replace(HELD, site=site))
        inline = await rows_of(client, replace(HELD, site=site, delivery=CaptureDelivery.INLINE))

    assert list(held) == list(inline) == [2, 0]
    assert same(held, inline)
    assert server.backend.holding == 0


async def test_rows_stay_on_the_server_until_they_are_asked_for(client: AsyncSteerClient, server: Server) -> None:
    [generation], [handle] = await client.generate(PROMPT, max_tokens=4, capture=HELD, raw_output=True)

    assert generation.capture_delivery is CaptureDelivery.HELD
    assert server.metrics.total("delivered") == 0
    assert handle.total_bytes == generation.outputs[0].receipt.bytes_captured == 2 * 2 * 6 * 32
    async with handle:
        await handle.fetch()
        assert server.metrics.total("delivered") == handle.total_bytes
        assert server.backend.holding == 1
    assert server.backend.holding == 0


async def test_only_what_is_chosen_travels(client: AsyncSteerClient, server: Server) -> None:
    said: list[tuple[int, int]] = []
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=HELD)
    async with handle:
        rows = await handle.fetch_rows(
            layers=[0], positions=["generated", 0], progress=lambda *numbers: said.append(numbers)
        )
        nothing = await handle.fetch_rows(layers=[])

    assert [decode_row(row)[:2] for row in rows.after[0]] == [(0, 0), (0, 3), (0, 4), (0, 5)]
    assert (list(rows.before), list(rows.after), rows.spans) == ([0], [0], ((0, 1), (3, 6)))
    assert rows.labels is not None
    assert rows.labels.positions.tolist() == [0, 3, 4, 5]
    assert server.metrics.total("delivered") == 2 * 4 * 32
    assert said[-1] == (256, 256)
    assert (dict(nothing.after), nothing.spans) == ({}, ((0, 6),))


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"layers": [2, 1]}, "layers[1]"),
        ({"layers": [-1]}, "layers[0]"),
        ({"positions": 6}, "positions.ranges[0]"),
        ({"positions": "prompt"}, "positions"),
    ],
    ids=str,
)
async def test_what_was_not_captured_is_refused_as_it_is_for_rows_that_are_here(
    client: AsyncSteerClient, asked: dict[str, Any], field: str
) -> None:
    told = []
    for delivery in (CaptureDelivery.HELD, CaptureDelivery.INLINE):
        spec = replace(HELD, delivery=delivery, positions=[0, "generated"])
        _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=spec)
        async with handle:
            with pytest.raises(InvalidRequest) as raised:
                await handle.fetch_rows(**asked)
        told.append((raised.value.field, raised.value.message))
    assert told[0] == told[1]
    assert told[0][0] == field


@pytest.fixture
async def sharing(server: Server, arena: Arena) -> AsyncIterator[AsyncSteerClient]:
    """A client that any delivery reaches."""
    async with AsyncSteerClient(server.address, shm_dir=str(arena.folder)) as client:
        yield client


@pytest.mark.parametrize("delivery", CaptureDelivery)
async def test_generated_rows_of_an_output_that_stopped_at_its_first_token_are_none_however_they_are_asked_for(
    sharing: AsyncSteerClient, delivery: CaptureDelivery
) -> None:
    probe, _ = await sharing.generate(PROMPT, max_tokens=1, raw_output=True)
    options = {"max_tokens": 4, "stop_token_ids": [probe[0].outputs[0].token_ids[0]]}
    inline = replace(HELD, delivery=CaptureDelivery.INLINE, positions="generated")

    _, [everything] = await sharing.generate(PROMPT, capture=replace(HELD, delivery=delivery), **options)
    _, [generated] = await sharing.generate(PROMPT, capture=inline, **options)

    async with everything, generated:
        part = await everything.fetch_rows(positions="generated")
        assert part == await generated.fetch_rows()
        assert [array.shape for array in (*part.before.values(), *part.after.values())] == [(0, 8)] * 4
        assert len((await everything.fetch_rows()).after[2]) == 3


@pytest.mark.parametrize("delivery", CaptureDelivery)
async def test_generated_rows_that_were_not_captured_are_not_taken_for_none(
    sharing: AsyncSteerClient, delivery: CaptureDelivery
) -> None:
    spec = replace(HELD, delivery=delivery, positions="prompt")
    _, [handle] = await sharing.generate(PROMPT, max_tokens=4, capture=spec)
    async with handle:
        with pytest.raises(InvalidRequest, match="position 3 was not captured") as raised:
            await handle.fetch_rows(positions="generated")
    assert (raised.value.field, raised.value.reason) == ("positions", "NOT_CAPTURED")


async def test_what_was_released_is_not_found(client: AsyncSteerClient) -> None:
    _, [handle] = await client.generate(PROMPT, max_tokens=4, capture=HELD)
    await handle.close()
    await handle.close()
    with pytest.raises(NotFound) as raised:
        await handle.fetch()
    assert raised.value.reason == "UNKNOWN_CAPTURE"


async def test_another_client_sees_nothing_unless_it_says_the_same_secret(server: Server) -> None:
    async with (
        AsyncSteerClient(server.address, client_id="secret") as one,
        AsyncSteerClient(server.address, client_id="secret") as same_secret,
        AsyncSteerClient(server.address) as other,
    ):
        [generation], [handle] = await one.generate(PROMPT, max_tokens=4, capture=HELD, raw_output=True)
        held: Any = generation.outputs[0].held
        for client, is_found in ((other, False), (same_secret, True)):
            [_], [own] = await client.generate(PROMPT, max_tokens=4, capture=HELD, raw_output=True)
            async with own:
                own._held._id = held._id
                if is_found:
                    assert same(await own.fetch(), await handle.fetch())
                else:
                    with pytest.raises(NotFound):
                        await own.fetch()
        await handle.close()


async def test_many_are_fetched_together(client: AsyncSteerClient, server: Server) -> None:
    said: list[tuple[int, int]] = []
    prompts = [f"prompt number {number}" for number in range(9)]
    _, handles = await client.generate(prompts, max_tokens=4, capture=HELD)
    together = await fetch_all(handles, progress=lambda *numbers: said.append(numbers))
    for handle in handles:
        await handle.close()
    _, inline = await client.generate(prompts, max_tokens=4, capture=replace(HELD, delivery=CaptureDelivery.INLINE))

    assert all(same(*pair) for pair in zip(together, [await handle.fetch() for handle in inline], strict=True))
    assert said[-1] == (9 * 768, 9 * 768)
    assert server.backend.holding == 0


# -- letting go ------------------------------------------------------------------------------------------------------


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


def test_the_blocking_client_does_the_same(server: Server) -> None:
    said: list[tuple[int, int]] = []
    with SteerClient(server.address) as client:
        _, handles = client.generate(["a b", "c"], max_tokens=4, capture=HELD)
        _, inline = client.generate(["a b", "c"], max_tokens=4, capture=replace(HELD, delivery=CaptureDelivery.INLINE))
        assert handles is not None
        assert inline is not None
        with handles[0], handles[1]:
            together = client.fetch_all(handles, progress=lambda *numbers: said.append(numbers))
            part = handles[0].fetch_rows(layers=[2], positions=-1)
            assert handles[0].captures is together[0]
            assert said[-1] == (sum(handle.total_bytes for handle in handles),) * 2
        assert server.backend.holding == 0
        assert all(same(*pair) for pair in zip(together, client.fetch_all(inline), strict=True))
    assert [decode_row(row)[:2] for row in part.after[2]] == [(2, 1)]


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


# -- connections that break ------------------------------------------------------------------------------------------

WIDE = replace(FAKE_MODEL, hidden_size=1 << 16)
LONG = "w " * 40
"""Forty rows of 256 KiB at two layers and both sites: 40 MiB."""

IN_FLIGHT = 6 << 20
"""Bytes that gRPC may have received and not yet handed on when a connection breaks: they are lost, and come again."""


@pytest.fixture
def relay(serve: Serve, arena: Arena) -> Iterator[Relay]:
    relay = Relay(serve(FakeBackend(WIDE, place=arena), shm_dir=str(arena.folder)).address)
    yield relay
    relay.close()


Cuts = Callable[[int], tuple[int, ...]]


@pytest.mark.parametrize(
    "cuts",
    [
        lambda total: (1,),
        lambda total: (100_000,),
        lambda total: (total // 2,),
        lambda total: (total - 1000,),
        lambda total: (total // 3, total // 3),
        lambda total: (10_000, 10_000, 10_000),
    ],
    ids=["at once", "in the first chunk", "half-way", "near the end", "twice", "three times"],
)
async def test_a_fetch_goes_on_where_its_connection_broke(relay: Relay, cuts: Cuts) -> None:
    async with AsyncSteerClient(relay.address) as client:
        _, [handle] = await client.generate(LONG, max_tokens=1, capture=HELD)
        total, amounts = handle.total_bytes, cuts(handle.total_bytes)
        said: list[int] = []
        before = relay.relayed
        relay.cut_after(*amounts)

        captures = await handle.fetch(progress=lambda here, _: said.append(here))

        came = relay.relayed - before
        assert relay.connections == 1 + len(amounts)
        assert said == sorted(said)
        assert said[-1] == total
        assert total <= came < total * 1.02 + sum(min(amount, IN_FLIGHT) for amount in amounts)
        await handle.close()
        _, [inline] = await client.generate(LONG, max_tokens=1, capture=replace(HELD, delivery=CaptureDelivery.INLINE))
        assert same(captures, await inline.fetch())


async def test_a_fetch_whose_connection_always_breaks_says_so_and_may_be_tried_again(relay: Relay) -> None:
    async with AsyncSteerClient(relay.address) as client:
        _, [handle] = await client.generate(LONG, max_tokens=1, capture=HELD)
        relay.cut_after(*[300_000] * FETCH_ATTEMPTS)

        with pytest.raises(EngineFailed) as raised:
            await handle.fetch()

        assert raised.value.reason == "CONNECTION_LOST"
        async with handle:
            rows = (await handle.fetch())[0][0]["after"]
    assert [decode_row(row)[:2] for row in rows] == [(0, position) for position in range(40)]
    assert np.count_nonzero(rows[:, 6:]) == 0
