"""Prompts read in a thread, so that requests go on while the next prompt is slow to come."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from steer_service.cli.capture.prompts import PromptLine, PromptSource

READ_AHEAD = 64
"""Lines that wait to be taken, at most."""


class LinesAhead:
    """Lines whose iterator may block, some of them read ahead in a thread. Use it in `async with`."""

    def __init__(self, lines: Iterator[PromptLine], source: PromptSource) -> None:
        """`lines`: those of `source`, or what is left of them. Afterwards the source has no more."""
        self._lines = lines
        self._source = source
        self._room = threading.Semaphore(READ_AHEAD)
        self._is_over = False
        self._queue: asyncio.Queue[PromptLine | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._read, name="steer-prompts", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self._room.release()
        self._source.end()
        self._thread.join()

    async def next(self) -> PromptLine | None:
        """The next line; None after the last. Raises what the iterator raised."""
        item = await self._queue.get()
        self._room.release()
        if isinstance(item, Exception):
            raise item
        return item

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._hand_over(line)
                if self._is_over:
                    return
            self._hand_over(None)
        except Exception as error:
            self._hand_over(error)

    def _hand_over(self, item: PromptLine | Exception | None) -> None:
        self._room.acquire()
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
