"""Several iterators merged into one, and an iterator that starts before it is read."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
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
async def started_early(source: AsyncGenerator[T, None]) -> AsyncIterator[AsyncGenerator[T, None]]:
    """The items of `source`, which starts on its first item at once; `source` is closed in every case."""
    first = asyncio.ensure_future(anext(source))
    async with aclosing(source), aclosing(_after(first, source)) as items:
        try:
            yield items
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)


async def _after(first: "asyncio.Future[T]", source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    try:
        item = await first
    except StopAsyncIteration:
        return
    yield item
    async for item in source:
        yield item
