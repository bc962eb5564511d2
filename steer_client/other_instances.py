"""Calls that need one server of several: repeated while the balancer sends them to another."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from steer_service.core.errors import OtherInstance
from steer_service.core.events import Event

R = TypeVar("R")

ATTEMPTS = 8
"""Calls in a row that may reach another server. A balancer that takes few servers in turn reaches the right one."""


async def reaching(call: Callable[[], Awaitable[R]]) -> R:
    """The result of `call`, which is repeated at once while it reaches another server.

    Raises OtherInstance if that happens `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await call()
        except OtherInstance:
            if attempt == ATTEMPTS:
                raise
    raise AssertionError


async def events_reaching(call: Callable[[], AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """The events of `call`, likewise: a call that reaches another server is refused before its first event."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with aclosing(call()) as events:
                async for event in events:
                    yield event
            return
        except OtherInstance:
            if attempt == ATTEMPTS:
                raise
