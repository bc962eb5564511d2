"""How many requests of one client the engine has beside another client."""

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import pytest

from steer_service.server.admission import Admission
from steer_service.server.call_end import CallEnd
from steer_service.server.callers import Caller
from steer_service.server.config import ServerConfig
from steer_service.server.fair_queue import Load
from steer_service.testing.fake_backend import FakeBackend
from tests.server.served import bounded


class Backend(FakeBackend):
    def __init__(self, at_once: int) -> None:
        super().__init__()
        self._at_once = at_once

    @property
    def requests_at_once(self) -> int:
        return self._at_once


class Clients:
    """Clients that ask for places and keep them."""

    def __init__(self, at_once: int, **settings: Any) -> None:
        self.places = AsyncExitStack()
        self._admission = Admission(ServerConfig(**settings))
        self._admission.open(Backend(at_once))

    async def take(self, name: str) -> None:
        await bounded(self.places.enter_async_context(self._place(name)))

    async def come_and_go(self, name: str) -> None:
        async with self._place(name):
            pass

    async def must_wait(self, name: str) -> bool:
        """Whether one more request would get no place now."""
        one = asyncio.ensure_future(self.come_and_go(name))
        for _ in range(5):
            await asyncio.sleep(0)
        waits = one.cancel()
        await asyncio.wait([one])
        return waits

    def _place(self, name: str) -> AbstractAsyncContextManager[None]:
        end = CallEnd(None)  # type: ignore[arg-type]  # no call is ended here
        return self._admission.place(Caller(owner=name, share=name, connection=""), Load(), end)


@pytest.mark.parametrize(
    ("at_once", "settings", "most", "are_kept"),
    [
        (20, {}, 19, True),
        (256, {}, 252, True),
        (8, {}, 10, False),  # the eight and two that wait in the engine: a place would be too much of eight
        (0, {"max_running_requests": 30}, 30, False),  # it is not known how many it computes
        (256, {"max_running_requests": 20}, 19, True),
        (256, {"max_running_requests": 2}, 2, False),
    ],
)
async def test_a_few_places_are_kept_for_another_client(
    at_once: int, settings: dict[str, int], most: int, are_kept: bool
) -> None:
    clients = Clients(at_once, **settings)
    async with clients.places:
        await clients.come_and_go("quiet")
        for _ in range(most):
            await clients.take("loud")
        assert await clients.must_wait("loud")
        assert await clients.must_wait("quiet") != are_kept
