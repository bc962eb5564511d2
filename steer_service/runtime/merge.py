"""Several iterators merged into one, and an iterator that starts before it is read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all `sources` as they arrive; the next item of a source is requested when its last was consumed.

    The first error of a source is raised here; all sources are closed in every case.
    """
    steps = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while steps:
            done, _ = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            for step in sorted(done, key=lambda one: sources.index(steps[one])):
                source = steps.pop(step)
                try:
                    item = step.result()
                except StopAsyncIteration:
                    continue
                yield item
                steps[asyncio.ensure_future(anext(source))] = source
    finally:
        for step in steps:
            step.cancel()
        await asyncio.gather(*steps, return_exceptions=True)
        async with AsyncExitStack() as stack:  # closes all of them, even if closing one raises
            for source in reversed(sources):
                stack.push_async_callback(source.aclose)


@asynccontextmanager
async def started_early(source: AsyncGenerator[T, None]) -> AsyncIterator[AsyncIterator[T]]:
    """The items of `source`, which starts on its first item at once; `source` is closed in every case."""
    first = asyncio.ensure_future(anext(source))
    async with aclosing(source):
        try:
            yield _Started(first, source)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)


def after_first(sources: Sequence[AsyncGenerator[T, None]]) -> list[AsyncGenerator[T, None]]:
    """The `sources` as they are to be merged so that the first item of the first one comes before those of the others.

    The others start when they are first asked for an item, and keep what they have until then.
    """
    is_first_consumed = asyncio.Event()
    first, *others = sources
    return [_setting(is_first_consumed, first), *(_waiting(is_first_consumed, source) for source in others)]


async def _setting(is_first_consumed: asyncio.Event, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(source):
        try:
            async for item in source:
                yield item
                is_first_consumed.set()
        finally:
            is_first_consumed.set()  # also if there was no item


async def _waiting(is_first_consumed: asyncio.Event, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with started_early(source) as items:
        await is_first_consumed.wait()
        async for item in items:
            yield item


class _Started(AsyncIterator[T]):
    """The items of a source whose first one is on its way; the others are awaited from the source itself."""

    def __init__(self, first: "asyncio.Future[T]", source: AsyncGenerator[T, None]) -> None:
        self._first: asyncio.Future[T] | None = first
        self._source = source

    def __anext__(self) -> Awaitable[T]:
        """The next item."""
        first, self._first = self._first, None
        return anext(self._source) if first is None else first
