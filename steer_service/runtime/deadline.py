"""Calls and iterators that end with DeadlineExceeded when their caller's time is over."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Self, TypeVar

from steer_service.core.errors import DeadlineExceeded
from steer_service.core.field_checks import check_timeout

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimit:
    """How long one call may take, and who said so."""

    call: str
    """The call, as its caller knows it: `generate`."""
    seconds: float | None
    """Seconds from its start; None: no limit."""
    option: str
    """The option with the seconds: `timeout_s of the call`."""
    ends_at: float
    """On the monotonic clock, in seconds; infinite without a limit."""

    @classmethod
    def of(cls, call: str, seconds: float | None, option: str = "timeout_s of the call") -> Self:
        """A limit of so many seconds from now."""
        ends_at = math.inf if seconds is None else time.monotonic() + seconds
        return cls(call=call, seconds=seconds, option=option, ends_at=ends_at)

    @property
    def left_s(self) -> float:
        """Seconds until its end, at least 0; infinite without a limit."""
        return max(0.0, self.ends_at - time.monotonic())

    def exceeded(self) -> DeadlineExceeded:
        """The error of a call that took longer."""
        return DeadlineExceeded(f"{self.call} took longer than {self.seconds:g} s, the {self.option}")


_current: ContextVar[CallLimit | None] = ContextVar("steer_call_limit", default=None)
"""The limit of the call that runs in this context. What it calls, such as an RPC, need not be told."""


def current_limit() -> CallLimit | None:
    """The limit of the `call_deadline` block around this code; None outside of one."""
    return _current.get()


@contextmanager
def limited(limit: CallLimit) -> Iterator[None]:
    """A block in which `limit` is the current one; it does not end the block."""
    before = _current.set(limit)
    try:
        yield
    finally:
        _current.reset(before)


@asynccontextmanager
async def call_deadline(timeout_s: float | None, call: str) -> AsyncIterator[None]:
    """A block that raises DeadlineExceeded when it takes longer; nothing may be yielded within it. None: no limit.

    `call`: its name, for the error. A call within another, without a timeout of its own, has that of the other. Raises
    InvalidRequest (`timeout_s`) for what is no number of seconds above 0.
    """
    if timeout_s is not None:
        check_timeout(timeout_s, "timeout_s")
    if timeout_s is None and _current.get() is not None:
        yield
        return
    mine = CallLimit.of(call, timeout_s)
    try:
        with limited(mine):
            async with asyncio.timeout(timeout_s) as limit:
                yield
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded) or not limit.expired():
            raise
        raise mine.exceeded() from None


async def until_deadline(
    source: AsyncGenerator[T, None], timeout_s: float | None, call: str
) -> AsyncGenerator[T, None]:
    """The items of `source`; raises DeadlineExceeded `timeout_s` seconds after the first item was asked for.

    `source` is closed in every case. Items that are there already are yielded even then: only a wait is ended.
    """
    mine = CallLimit.of(call, timeout_s)
    ends_at = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
    async with aclosing(source):
        while True:
            try:
                async with asyncio.timeout_at(ends_at) as limit:
                    item = await anext(source)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if isinstance(error, DeadlineExceeded) or not limit.expired():
                    raise
                raise mine.exceeded() from None
            yield item
