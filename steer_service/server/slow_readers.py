"""Ends response streams whose client has stopped reading, so that unsent responses do not stay in memory."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from steer_service.core.errors import Overloaded
from steer_service.server.call_end import CallEnd

CHECKS_PER_LIMIT = 20
"""How many times per limit the response streams are checked: so much too late, at most, is one ended."""


class SendTimeout:
    """Ends calls that have waited for `limit_s` seconds to send one response, with SLOW_READER; 0: ends none.

    A slow client still reads from time to time. If a client has stopped, or its machine is gone, gRPC's window fills
    and nothing moves. A client that reads again later receives what was sent before and then the status.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._senders: set[Sender] = set()

    @contextmanager
    def sender(self, end: CallEnd) -> Iterator["Sender"]:
        """Watches the call of `end` for the duration of the block; put the Sender around each `yield` of a response."""
        sender = Sender(end)
        self._senders.add(sender)
        try:
            yield sender
        finally:
            self._senders.remove(sender)

    async def run(self) -> None:
        """Checks all senders until it is cancelled."""
        while self._limit_s:
            await asyncio.sleep(self._limit_s / CHECKS_PER_LIMIT)
            since = time.monotonic() - self._limit_s
            for sender in self._senders:
                if sender.since < since:
                    sender.end(_slow_reader(self._limit_s))


def _slow_reader(limit_s: float) -> Overloaded:
    return Overloaded(f"the client has read nothing for {limit_s:g} s", reason="SLOW_READER", retry_after_s=0.0)


class Sender:
    """A call that sends responses; a class, since a generator-based context manager per chunk would cost too much."""

    def __init__(self, end: CallEnd) -> None:
        self.end = end
        """Ends the call."""
        self.since = math.inf
        """When it began to send, on the monotonic clock in seconds; infinite while it does not."""

    def __enter__(self) -> None:
        self.end.check_not_ended()
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = math.inf
