"""Calls and iterators that end with DeadlineExceeded when their caller's time is over."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from steer_service.core.errors import DeadlineExceeded

T = TypeVar("T")


@asynccontextmanager
async def deadline(timeout_s: float | None) -> AsyncIterator[None]:
    """A block that raises DeadlineExceeded when it takes longer; nothing may be yielded within it. None: no limit."""
    try:
        async with asyncio.timeout(timeout_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise _exceeded(timeout_s) from None


async def until_deadline(source: AsyncGenerator[T, None], timeout_s: float | None) -> AsyncGenerator[T, None]:
    """The items of `source`; raises DeadlineExceeded `timeout_s` seconds after the first item was asked for.

    `source` is closed in every case. Items that are there already are yielded even then: only a wait is ended.
    """
    ends_at = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    async with aclosing(source):
        while True:
            try:
                async with asyncio.timeout_at(ends_at) as limit:
                    item = await anext(source)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not limit.expired():
                    raise
                raise _exceeded(timeout_s) from None
            yield item


def _exceeded(timeout_s: float | None) -> DeadlineExceeded:
    return DeadlineExceeded(f"the call took longer than its timeout of {timeout_s:g} s")
