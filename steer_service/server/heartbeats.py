"""Heartbeats on response streams that are silent: proxies close a stream on which nothing is sent for a while."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc


class Heartbeats:
    """The heartbeats of one response stream, for the duration of a block; the stream is silent when the block begins.

    Each response goes between `pause` and `resume`. There is one timer, which is set again when it fires and not with
    each response.
    """

    def __init__(self, send: Callable[[int], Awaitable[Any]], interval_s: float) -> None:
        """`send` sends the heartbeat of a number; it is called when nothing was sent for `interval_s`; 0: never.

        `send` writes to gRPC's context: the handler cannot yield a heartbeat while it waits for a response.
        """
        self.numbers = itertools.count()
        """The numbers of all messages of the stream."""
        self._send = send
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._sending: asyncio.Task[None] | None = None
        self._is_paused = False
        self._silent_since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        if self._interval_s:
            self._set_timer(self._silent_since)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.stop()
        if self._sending is not None:
            self._sending.cancel()

    def stop(self) -> None:
        """Begins to send no further one; the response stream is about to end."""
        if self._timer is not None:
            self._timer.cancel()

    def pause(self) -> bool:
        """Sends no heartbeat until `resume`; True if one is being sent, for which `wait_sent` waits."""
        self._is_paused = True
        return self._sending is not None

    async def wait_sent(self) -> None:
        """Waits for the heartbeat that is being sent: gRPC sends one message at a time."""
        if self._sending is not None:
            await asyncio.wait((self._sending,))

    def resume(self) -> None:
        """The response was sent."""
        self._is_paused = False
        self._silent_since = self._loop.time()

    def _set_timer(self, since: float) -> None:
        self._timer = self._loop.call_at(since + self._interval_s, self._fire)

    def _fire(self) -> None:
        now = self._loop.time()
        is_silent = not self._is_paused and self._sending is None
        if is_silent and now >= self._silent_since + self._interval_s:
            # Numbered here and not in the task: a response that is made meanwhile has the next number, and waits.
            self._sending = self._loop.create_task(self._send_one(next(self.numbers)))
        self._set_timer(self._silent_since if is_silent and self._sending is None else now)

    async def _send_one(self, number: int) -> None:
        try:
            with suppress(grpc.aio.BaseError):  # the client is gone: gRPC ends the handler
                await self._send(number)
        finally:
            self._sending = None
            self._silent_since = self._loop.time()
