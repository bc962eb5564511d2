"""Which errors a long run retries after, and for how long."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from steer_service.core.errors import Overloaded, SteerError

T = TypeVar("T")

STARTING = frozenset({"LOADING", "DRAINING", "ENGINE_RESTARTING"})
"""Reasons of errors of a server that will be ready soon."""

LOST = STARTING | {
    "UNREACHABLE",
    "CONNECTION_LOST",
    "SLOW_READER",
    "CANCELLED",
    "CLOSED",
    "ENGINE_DIED",
    "CAPTURE_LOST",
    "SESSION_ENDED",
    "OTHER_INSTANCE",  # the balancer does not reach the server that had the captures
}
"""Reasons of errors after which the server is lost, or was lost for a while."""

LOST_AGAIN = frozenset({"NO_SHARED_MEMORY"})
"""The same, if the server has responded before."""

SHORTEST_PAUSE_S = 0.01
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0


class RetryPolicy:
    """Retries calls that fail because the server is overloaded or lost. Concurrent calls may share one."""

    def __init__(self, retry_timeout_s: float, note: Callable[[str], None], lost: frozenset[str] = LOST) -> None:
        """A server may be `lost` for `retry_timeout_s`; `note` is called each time that it gets lost."""
        self._retry_timeout_s = retry_timeout_s
        self._note = note
        self._lost = lost
        self._lost_at: float | None = None
        self._has_worked = False

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of the first attempt that succeeds; raises a SteerError that retrying does not help."""
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                result = await attempt()
            except SteerError as error:
                wait_s = self._wait_s(error, pause_s)
                if wait_s is None:
                    raise
                await asyncio.sleep(max(wait_s, SHORTEST_PAUSE_S))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._has_worked = True
                if self._lost_at is not None and began > self._lost_at:
                    self._lost_at = None
                return result

    def is_lost(self, error: SteerError) -> bool:
        """True if `error` means that the server is lost."""
        return error.reason in self._lost or (self._has_worked and error.reason in LOST_AGAIN)

    def _wait_s(self, error: SteerError, pause_s: float) -> float | None:
        """Seconds to wait before the next attempt; None for no further attempt."""
        if not self.is_lost(error):
            return error.retry_after_s if isinstance(error, Overloaded) else None
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
            self._note(f"{error.message}; trying again for {self._retry_timeout_s:g} s")
        left_s = self._lost_at + self._retry_timeout_s - now
        return min(error.retry_after_s or pause_s, left_s) if left_s > 0 else None
