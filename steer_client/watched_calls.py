"""Calls with a response stream that end when their server is silent, and the deadline that a call gives to gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from steer_client.channel import ClientConfig
from steer_service.core.errors import DeadlineExceeded
from steer_service.runtime.deadline import CallLimit, current_limit

CLIENT_OPTION = "timeout_s of the client"

MIN_TIMEOUT_S = 0.001
"""Seconds of a call whose time is over: gRPC takes 0 for no limit."""


def stream_limit(config: ClientConfig, call: str, timeout_s: float | None = None) -> CallLimit:
    """The limit of a call with a response stream: its own, that of the call around it, or else the client's."""
    current = current_limit()
    if timeout_s is not None:
        return CallLimit.of(call, timeout_s)
    if current is not None and current.seconds is not None:
        return current
    return CallLimit.of(current.call if current is not None else call, config.timeout_s, CLIENT_OPTION)


def timeout_of(limit: CallLimit) -> float | None:
    """The timeout for gRPC of a call that begins now."""
    return None if limit.seconds is None else max(MIN_TIMEOUT_S, limit.left_s)


class WatchedCall:
    """The responses of a call; raises DeadlineExceeded (SERVER_SILENT) if none comes for the client's limit of silence.

    Heartbeats are responses too. The time that the reader takes between two responses does not count, nor does
    that in which the caller's work holds up the event loop.
    """

    def __init__(self, call: "grpc.aio.UnaryStreamCall[Any, Any]", config: ClientConfig, name: str) -> None:
        self._call = call
        self._config = config
        self._name = name
        self._began = time.monotonic()
        self._responses: AsyncIterator[Any] | None = None
        self._asked_at: float | None = None
        self._is_silent = False
        self._cancels = cancel_count()
        self._timer: asyncio.TimerHandle | None = None
        if config.silence_timeout_s is not None:
            self._limit_s = config.silence_timeout_s
            self._loop = asyncio.get_running_loop()
            self._check_in(self._limit_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._began

    def __aiter__(self) -> "WatchedCall":
        return self

    async def __anext__(self) -> Any:
        if self._responses is None:
            self._responses = aiter(self._call)
        self._asked_at = time.monotonic()
        try:
            return await self._responses.__anext__()
        except asyncio.CancelledError:
            if self._is_silent and cancel_count() <= self._cancels:
                raise self._silent() from None
            raise
        finally:
            self._asked_at = None

    def cancel(self) -> None:
        """Ends the call; again: does nothing."""
        if self._timer is not None:
            self._timer.cancel()
        self._call.cancel()

    def _check(self) -> None:
        """Ends a call that was silent for too long; else looks again when it may have been.

        One timer for a call costs less than a timeout around each response.
        """
        now = time.monotonic()
        if self._asked_at is not None:
            # What came while the caller's own work held up the event loop has not been read yet.
            self._asked_at = min(now, self._asked_at + max(0.0, now - self._check_at))
        silent_s = 0.0 if self._asked_at is None else now - self._asked_at
        if silent_s >= self._limit_s:
            self._is_silent = True
            self._call.cancel()
        else:
            self._check_in(self._limit_s - silent_s)

    def _check_in(self, seconds: float) -> None:
        self._check_at = time.monotonic() + seconds
        self._timer = self._loop.call_later(seconds, self._check)

    def _silent(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self._name}: the server at {self._config.address} sent neither a response nor a heartbeat for "
            f"{self._limit_s:g} s, the silence_timeout_s of the client",
            reason="SERVER_SILENT",
        )


def cancel_count() -> int:
    """How often somebody has cancelled the running task; before Python 3.13, a TaskGroup that failed there counts."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
