"""Which errors a call may be repeated after, when, and for how long."""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from steer_service.core.errors import Overloaded, SteerError

T = TypeVar("T")

STARTING = frozenset({"LOADING", "DRAINING", "ENGINE_RESTARTING"})
"""Reasons of errors of a server that will be ready soon; it has refused the request and computed nothing."""

NOTHING_RAN = STARTING | {"UNREACHABLE"}
"""Reasons of errors after which nothing has run: a repeated request computes and samples nothing twice."""

LOST = NOTHING_RAN | {
    "CONNECTION_LOST",
    "ROUTE_TIMEOUT",
    "SERVER_SILENT",
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

JITTER = 0.5
"""A pause is longer by up to this share, so that clients that were refused together do not come back together."""


class RetryPolicy:
    """Retries calls that fail because the server is overloaded or lost. Concurrent calls may share one."""

    def __init__(
        self,
        retry_timeout_s: float,
        note: Callable[[str], None] = lambda _: None,
        lost: frozenset[str] = LOST,
        *,
        overloaded_timeout_s: float = math.inf,
    ) -> None:
        """A server may be `lost` for `retry_timeout_s`; `note` is called each time that it gets lost.

        It may refuse everything with Overloaded for `overloaded_timeout_s`.
        """
        self._retry_timeout_s = retry_timeout_s
        self._overloaded_timeout_s = overloaded_timeout_s
        self._note = note
        self._lost = lost
        self._lost_at: float | None = None
        self._refused_at: float | None = None
        self._has_worked = False

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of the first attempt that succeeds; raises a SteerError that retrying does not help."""
        pause_s = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            try:
                result = await attempt()
            except SteerError as error:
                wait_s = self.wait_s(error, pause_s)
                if wait_s is None:
                    raise
                await asyncio.sleep(wait_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self.note_success(began)
                return result

    def is_lost(self, error: SteerError) -> bool:
        """True if `error` means that the server is lost."""
        return error.reason in self._lost or (self._has_worked and error.reason in LOST_AGAIN)

    def is_retryable(self, error: SteerError) -> bool:
        """True if a later attempt may succeed."""
        return self.is_lost(error) or (isinstance(error, Overloaded) and error.retry_after_s is not None)

    def note_success(self, began: float) -> None:
        """Records that an attempt succeeded that began at `began` on the monotonic clock."""
        self._has_worked = True
        self._refused_at = None
        if self._lost_at is not None and began > self._lost_at:
            self._lost_at = None

    def wait_s(self, error: SteerError, pause_s: float) -> float | None:
        """Seconds to wait before the next attempt, `pause_s` if `error` names none; None for no further attempt."""
        if not self.is_retryable(error):
            return None
        now = time.monotonic()
        if not self.is_lost(error):
            self._refused_at = now if self._refused_at is None else self._refused_at
            left_s = self._refused_at + self._overloaded_timeout_s - now
            return _with_jitter(pause_s if error.retry_after_s is None else error.retry_after_s, left_s)
        if self._lost_at is None:
            self._lost_at = now
            self._note(f"{error.message}; trying again for {self._retry_timeout_s:g} s")
        return _with_jitter(error.retry_after_s or pause_s, self._lost_at + self._retry_timeout_s - now)


def _with_jitter(pause_s: float, left_s: float) -> float | None:
    """The pause with jitter, at most `left_s`; None if no time is left."""
    if left_s <= 0:
        return None
    return max(SHORTEST_PAUSE_S, min(pause_s * random.uniform(1, 1 + JITTER), left_s))
