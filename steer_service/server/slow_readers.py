"""Ends response streams whose client has stopped reading, so that unsent responses do not stay in memory."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

CHECKS_PER_LIMIT = 5
"""How many times per limit the response streams are checked."""


class SendTimeout:
    """Cancels handlers that have waited for `limit_s` seconds to send one response; 0: cancels none.

    A slow client still reads from time to time. If a client has stopped, or its machine is gone, gRPC's window fills
    and nothing moves; no status can reach it either.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._senders: set[Sender] = set()

    @contextmanager
    def sender(self) -> Iterator["Sender"]:
        """Watches the current task for the duration of the block; put the Sender around each `yield` of a response."""
        task = asyncio.current_task()
        assert task is not None
        sender = Sender(task)
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
                    sender.task.cancel()


class Sender:
    """A task that sends responses; a class, since a generator-based context manager per chunk would cost too much."""

    def __init__(self, task: "asyncio.Task[object]") -> None:
        self.task = task
        self.since = math.inf
        """When it began to send, on the monotonic clock in seconds; infinite while it does not."""

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = math.inf
