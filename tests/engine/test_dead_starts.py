"""An engine that dies while it exchanges its first messages with the server fails its start; vLLM never answers."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.engine.worker_faults import unless_dead
from tests.server.served import bounded


async def test_a_start_whose_engine_dies_fails_and_gives_up_the_exchange() -> None:
    llm: Any = SimpleNamespace(errored=False)
    asked, given_up = asyncio.Event(), asyncio.Event()

    async def exchange() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    starting = asyncio.ensure_future(unless_dead(llm, exchange()))
    await bounded(asked.wait())
    assert not starting.done()
    llm.errored = True
    with pytest.raises(EngineFailed, match="died at the end of its start") as raised:
        await bounded(starting)
    assert raised.value.reason == "START_FAILED"
    await bounded(given_up.wait())


async def test_an_exchange_that_ends_has_its_result_or_its_error() -> None:
    llm: Any = SimpleNamespace(errored=False)

    async def refuses() -> None:
        raise Unsupported("no")

    assert await bounded(unless_dead(llm, asyncio.sleep(0, "yes"))) == "yes"
    with pytest.raises(Unsupported):
        await bounded(unless_dead(llm, refuses()))
