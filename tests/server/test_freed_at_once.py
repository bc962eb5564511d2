"""Memory of captures whose calls failed: it is given back at once, and not with the next garbage collection."""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import EngineFailed
from steer_service.testing.fake_backend import FakeBackend, FakeOutput
from steer_service.wire.capture_pb2 import CAPTURE_DELIVERY_INLINE, CAPTURE_TIMING_LIVE
from tests.arena import Arena
from tests.server.capture_client import LONG, WIDE, Begin, asking, failure, rest_of, until, until_stuck
from tests.server.served import bounded


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def mapped(arena: Arena) -> list[str]:
    """Segments that this process still has, with or without a name."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [link for link in links if link.startswith(f"{arena.folder}/steerllm-")]


async def test_a_capture_that_was_released_while_it_was_fetched(begin: Begin, arena: Arena) -> None:
    alice = await begin(FakeBackend(WIDE, place=arena))
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    await until_stuck(lambda: alice.served.server.metrics.total("delivered"))
    assert mapped(arena)
    await alice.release(capture_id=held.capture_id)
    assert (await failure(rest_of(call))).code() == grpc.StatusCode.NOT_FOUND
    await until(lambda: not mapped(arena))


async def test_a_capture_that_expired_because_nobody_read_it(begin: Begin, arena: Arena) -> None:
    alice = await begin(FakeBackend(WIDE, place=arena), shm_ttl=1.0, send_timeout_s=0.0)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    await until(lambda: not mapped(arena))
    assert (await failure(rest_of(call))).code() == grpc.StatusCode.NOT_FOUND


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Rows that the backend sends inline."""
    made, read = list[Any](), FakeOutput.read

    def noted(output: FakeOutput, layer: int, site: CaptureSite, first: int, end: int) -> Any:
        rows = read(output, layer, site, first, end)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(FakeOutput, "read", noted)
    return made


async def test_rows_whose_reader_has_stopped(begin: Begin, made: list[weakref.ref[Any]]) -> None:
    alice = await begin(FakeBackend(WIDE), send_timeout_s=1.0)
    request = asking(CAPTURE_DELIVERY_INLINE, text=LONG, max_tokens=1, layers=[0, 1, 2, 3])
    call = alice.served.generation.Generate(request)
    await bounded(call.read())
    await until(lambda: made)
    await until(lambda: not alice.served.server.running)
    assert (await failure(rest_of(call))).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: not any(rows() is not None for rows in made))


async def test_live_rows_of_a_request_that_fails(begin: Begin, made: list[weakref.ref[Any]]) -> None:
    async def step(number: int) -> None:
        if number == 2:
            raise EngineFailed("an injected defect", reason="INJECTED")

    alice = await begin(FakeBackend(step=step))
    request = asking(CAPTURE_DELIVERY_INLINE, max_tokens=4, timing=CAPTURE_TIMING_LIVE)
    assert (await failure(rest_of(alice.served.generation.Generate(request)))).code() == grpc.StatusCode.INTERNAL
    assert made
    await until(lambda: not any(rows() is not None for rows in made))
