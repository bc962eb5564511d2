"""Ends streams whose reader takes nothing any more, so that what is being sent does not stay in memory for it."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

CHECKS_PER_LIMIT = 5
"""How often streams are looked at, in parts of the limit."""


class SendTimeout:
    """Knows which handlers wait for their reader, and cancels one that has waited for `limit_s`; 0: none.

    A reader that is slow takes something now and then. One that is stopped, or whose machine is gone, fills gRPC's
    window and then nothing moves; no status can reach it.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._senders: set[Sender] = set()

    @contextmanager
    def sender(self) -> Iterator["Sender"]:
        """Around a stream of the task that runs; what it yields is to be put around the `yield` of each message."""
        task = asyncio.current_task()
        assert task is not None
        sender = Sender(task)
        self._senders.add(sender)
        try:
            yield sender
        finally:
            self._senders.remove(sender)

    async def run(self) -> None:
        """Watches until it is cancelled."""
        while self._limit_s:
            await asyncio.sleep(self._limit_s / CHECKS_PER_LIMIT)
            since = time.monotonic() - self._limit_s
            for sender in self._senders:
                if sender.since < since:
                    sender.task.cancel()


class Sender:
    """A task that sends; a class with two short methods because a generator for every chunk would be felt."""

    def __init__(self, task: "asyncio.Task[object]") -> None:
        self.task = task
        self.since = math.inf
        """When it began to wait for its reader; never, if it does not."""

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.since = math.inf
