"""Fetches over connections that break."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, EngineFailed
from steer_client.capture_handles import FETCH_ATTEMPTS
from steer_service.testing.fake_backend import FakeBackend, decode_row
from tests.arena import Arena
from tests.client.captures import HELD, LONG, WIDE, same
from tests.client.conftest import Relay, Serve

IN_FLIGHT, SHARE = 6 << 20, 0.75
"""Bytes that gRPC may have received and not yet handed on when a connection breaks: they are lost, and come again.

At most so many, or so much of what came: more are under way where the client is slow, and a fetch that begins anew gets
all of it again.
"""


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
        lambda total: (total // 8,) * 7,
    ],
    ids=["at once", "in the first chunk", "half-way", "near the end", "twice", "three times", "seven times"],
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
        assert total <= came < total * 1.02 + sum(min(amount, max(IN_FLIGHT, SHARE * amount)) for amount in amounts)
        await handle.close()
        _, [inline] = await client.generate(LONG, max_tokens=1, capture=replace(HELD, delivery=CaptureDelivery.INLINE))
        assert same(captures, await inline.fetch())


async def test_a_fetch_whose_connection_always_breaks_says_so_and_may_be_tried_again(relay: Relay) -> None:
    async with AsyncSteerClient(relay.address) as client:
        _, [handle] = await client.generate(LONG, max_tokens=1, capture=HELD)
        relay.cut_after(*[1] * FETCH_ATTEMPTS)

        with pytest.raises(EngineFailed) as raised:
            await handle.fetch()

        assert raised.value.reason == "CONNECTION_LOST"
        async with handle:
            rows = (await handle.fetch())[0][0]["after"]
    assert [decode_row(row)[:2] for row in rows] == [(0, position) for position in range(40)]
    assert np.count_nonzero(rows[:, 6:]) == 0
