"""The metrics count the bytes of captures that were reserved, written, delivered and freed."""

import pytest

from steer_service.core.errors import EngineFailed, OverBudget
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_INLINE,
    CAPTURE_TIMING_LIVE,
)
from tests.arena import Arena
from tests.server.capture_client import ROW_BYTES, ROWS, Begin, Client, Interrupted, asking, error, required, until

BYTES = 3 * ROWS * ROW_BYTES


def totals(client: Client) -> dict[str, int]:
    events = ("reserved", "written", "delivered", "released", "expired", "refused")
    return {
        event: client.served.server.metrics.total(event)
        for event in events
        if client.served.server.metrics.total(event)
    }


@pytest.mark.parametrize("timing", [0, CAPTURE_TIMING_LIVE])
async def test_inline_bytes_are_reserved_written_and_delivered(begin: Begin, timing: int):
    alice = await begin()
    responses = await alice.generate(asking(CAPTURE_DELIVERY_INLINE, timing=timing))
    assert responses[0].started.capture_bytes_limit == BYTES
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES}


async def test_held_bytes_are_delivered_as_often_as_they_are_fetched_and_released_once(begin: Begin):
    alice = await begin()
    held = await alice.held()
    assert totals(alice) == {"reserved": BYTES, "written": BYTES}
    await alice.fetch(held.capture_id)
    await alice.fetch(held.capture_id, skip_bytes=BYTES - 10)
    await alice.release(capture_id=held.capture_id)
    await alice.release(capture_id=held.capture_id)
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES + 10, "released": BYTES}


async def test_expired_bytes_are_not_released_ones(begin: Begin):
    alice = await begin(shm_ttl=0.0)
    await alice.held()
    await until(lambda: alice.served.backend.holding == 0)
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "expired": BYTES}


async def test_shared_bytes_are_delivered_when_they_are_handed_out(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    await alice.generate(required(session))
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES}
    stream.cancel()
    await until(lambda: alice.served.backend.holding == 0)
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES, "released": BYTES}


async def test_bytes_of_a_request_that_failed_are_released(begin: Begin):
    backend = Interrupted(EngineFailed("broken"))
    alice = await begin(backend)
    backend.go_on.set()
    await error(alice.generate(asking()))
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "released": BYTES}


async def test_bytes_that_are_over_a_budget_are_refused(begin: Begin):
    full = OverBudget("full", asked_bytes=1000, allowed_bytes=10, reason="SHM_SPACE", retry_after_s=1.0)
    alice = await begin()
    alice.served.backend.failure = full
    told = await error(alice.generate(asking()))
    assert (type(told), told.asked_bytes, told.allowed_bytes) == (OverBudget, 1000, 10)
    assert totals(alice)["refused"] == 1000
