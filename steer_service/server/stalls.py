"""Ends streams whose reader takes nothing any more, so that what is being sent does not stay in memory for it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

CHECKS_PER_LIMIT = 5
"""How often streams are looked at, in parts of the limit."""


class StallWatch:
    """Knows which handlers wait for their reader, and cancels one that has waited for `limit_s`; 0: none.

    A reader that is slow takes something now and then. One that is stopped, or whose machine is gone, fills gRPC's
    window and then nothing moves; no status can reach it.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waiting: dict[asyncio.Task[object], float] = {}

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Around the `yield` of a message."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._waiting.pop(task, None)

    async def run(self) -> None:
        """Watches until it is cancelled."""
        while self._limit_s:
            await asyncio.sleep(self._limit_s / CHECKS_PER_LIMIT)
            since = asyncio.get_running_loop().time() - self._limit_s
            for task in [task for task, began in self._waiting.items() if began < since]:
                task.cancel()
