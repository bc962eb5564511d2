"""Heartbeats on response streams that are silent: proxies close a stream on which nothing is sent for a while."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Generic, TypeVar

import grpc

T = TypeVar("T")


def with_heartbeats(
    responses: AsyncGenerator[T, None], send: Callable[[T], Awaitable[Any]], make: Callable[[], T], interval_s: float
) -> AsyncGenerator[T, None]:
    """Yields `responses`, and sends what `make` returns whenever `interval_s` seconds pass without one; 0: never.

    The first response comes before the first heartbeat. `send` is gRPC's `context.write`: this generator cannot yield
    a heartbeat, since it waits for `responses` then.
    """
    return _with_heartbeats(responses, _Heartbeats(send, make, interval_s)) if interval_s else responses


async def _with_heartbeats(responses: AsyncGenerator[T, None], heartbeats: "_Heartbeats[T]") -> AsyncGenerator[T, None]:
    async with aclosing(responses):
        try:
            async for response in responses:
                if heartbeats.sending is not None:
                    await asyncio.wait((heartbeats.sending,))  # gRPC sends one message at a time
                heartbeats.pause()
                yield response
                heartbeats.resume()
        finally:
            heartbeats.stop()


class _Heartbeats(Generic[T]):
    """The heartbeats of one response stream; one timer, which is set again when it fires and not with each response."""

    def __init__(self, send: Callable[[T], Awaitable[Any]], make: Callable[[], T], interval_s: float) -> None:
        self.sending: asyncio.Task[None] | None = None
        """The task that sends a heartbeat; None while none is sent."""
        self._send = send
        self._make = make
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._is_paused = True
        self._silent_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def pause(self) -> None:
        """A response is being sent: no heartbeat until `resume`."""
        self._is_paused = True

    def resume(self) -> None:
        """The response was sent."""
        self._is_paused = False
        self._silent_since = self._loop.time()
        if self._timer is None:
            self._set_timer(self._silent_since)

    def stop(self) -> None:
        """Sends no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self.sending is not None:
            self.sending.cancel()

    def _set_timer(self, since: float) -> None:
        self._timer = self._loop.call_at(since + self._interval_s, self._fire)

    def _fire(self) -> None:
        now = self._loop.time()
        is_silent = not self._is_paused and self.sending is None
        if is_silent and now >= self._silent_since + self._interval_s:
            # Made here and not in the task: a response that is made meanwhile has the next number, and waits.
            self.sending = self._loop.create_task(self._send_one(self._make()))
        self._set_timer(self._silent_since if is_silent and self.sending is None else now)

    async def _send_one(self, heartbeat: T) -> None:
        try:
            with suppress(grpc.aio.BaseError):  # the client is gone: gRPC ends the handler
                await self._send(heartbeat)
        finally:
            self.sending = None
            self._silent_since = self._loop.time()
