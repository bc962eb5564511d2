"""Captures that stay on the server: fetched whole or in part, together, or by the blocking client."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureSite, InvalidRequest, NotFound, SteerClient
from steer_service.runtime.handle import fetch_all
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from tests.arena import Arena
from tests.client.captures import HELD, PROMPT, rows_of, same
from tests.client.conftest import Serve, Server


@pytest.fixture
def server(serve: Serve, arena: Arena) -> Server:
    return serve(FakeBackend(place=arena), shm_dir=str(arena.folder))


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
