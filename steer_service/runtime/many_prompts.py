"""Many requests of one call: a bounded number in flight, retries of refused ones, progress, and partial results."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.core.field_checks import check_timeout, is_integer
from steer_service.runtime.deadline import CallLimit, limited
from steer_service.runtime.places import Places
from steer_service.runtime.prompt_progress import PromptProgress, Shown
from steer_service.runtime.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, NOTHING_RAN, RetryPolicy
from steer_service.runtime.together import together

T = TypeVar("T")

RETRY_TIMEOUT_S = 60.0
"""Seconds for which a call with a list of prompts goes on while every one of them is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyOptions:
    """How the requests of one call are run."""

    max_concurrency: int | None = None
    """Requests in flight at most; None: all."""
    retry_timeout_s: float = 0.0
    """Seconds for which refused requests are sent again while none of the call succeeds; 0: never."""
    progress: PromptProgress = False
    """Whether to show a bar, or a function that is called with the requests that ended and their total."""
    return_exceptions: bool = False
    """True to return the errors of failed requests in place of raising the first."""
    limit: CallLimit
    """The time of the whole call."""
    each_timeout_s: float | None = None
    """Seconds of each request, with its retries and without its wait for a place, if the call has no limit."""

    @classmethod
    def of(
        cls,
        call: str,
        keywords: Mapping[str, Any],
        *,
        is_single: bool,
        max_concurrency: int | None,
        each_timeout_s: float | None,
        return_exceptions: bool,
    ) -> "ManyOptions":
        """The options in the keywords of a call; the others are the backend's defaults. Raises InvalidRequest."""
        timeout_s, given = keywords.get("timeout_s"), keywords.get("retry_timeout_s")
        if timeout_s is not None:
            check_timeout(timeout_s, "timeout_s")
        if given is not None and given != 0:
            check_timeout(given, "retry_timeout_s")
        if "max_concurrency" in keywords:
            max_concurrency = keywords["max_concurrency"]
        check_concurrency(max_concurrency)
        progress = keywords.get("progress") or False
        if not (isinstance(progress, bool) or callable(progress)):
            raise InvalidRequest("it is True, False or a function of (done, total)", field="progress")
        return cls(
            max_concurrency=max_concurrency,
            retry_timeout_s=(0.0 if is_single else RETRY_TIMEOUT_S) if given is None else given,
            progress=progress,
            return_exceptions=return_exceptions,
            limit=CallLimit.of(call, timeout_s),
            each_timeout_s=each_timeout_s,
        )


def check_concurrency(value: object) -> None:
    """Raises InvalidRequest (`max_concurrency`) for what is no number of requests in flight."""
    if value is not None and not (is_integer(value) and isinstance(value, int) and value >= 1):
        raise InvalidRequest(f"{value!r} is not a number of at least 1; None sets no limit", field="max_concurrency")


async def run_many(
    count: int,
    attempt: Callable[[int], Awaitable[T]],
    options: ManyOptions,
    *,
    discard: Callable[[T], None] = lambda _: None,
    noun: str = "prompts",
    numbers: Sequence[int] | None = None,
) -> list[T | SteerError]:
    """The result of `attempt(index)` for each index below `count`, in order.

    `numbers`: the caller's number of each, for errors; None: the index, which is also the number.

    Raises the first error, which names its number as `noun[number]`, once the other attempts have been cancelled; the
    results so far are given to `discard`. With `return_exceptions`, an entry is the SteerError of its request instead.
    """
    with Shown(options.progress, count) as shown:
        run = _Run(count, attempt, options, shown, noun, range(count) if numbers is None else numbers)
        try:
            await run.all()
        except BaseException:
            for result in run.results:
                if result is not None and not isinstance(result, SteerError):
                    discard(result)
            raise
    return [result for result in run.results if result is not None]


class _Run(Generic[T]):
    """The requests of one call while they run."""

    def __init__(
        self,
        count: int,
        attempt: Callable[[int], Awaitable[T]],
        options: ManyOptions,
        shown: Shown,
        noun: str,
        numbers: Sequence[int],
    ) -> None:
        self.results: list[T | SteerError | None] = [None] * count
        self._attempt = attempt
        self._options = options
        self._shown = shown
        self._noun = noun
        self._numbers = numbers
        self._left = deque(range(count))
        self._limits: dict[int, CallLimit] = {}
        self._succeeded = 0
        self._retries = RetryPolicy(
            options.retry_timeout_s, lost=NOTHING_RAN, overloaded_timeout_s=options.retry_timeout_s
        )

    async def all(self) -> None:
        """Runs all; see `run_many`."""
        options = self._options
        self._places = Places(options.max_concurrency)
        workers = min(len(self.results), options.max_concurrency or len(self.results))
        limit = options.limit
        try:
            with limited(limit):
                async with asyncio.timeout(None if limit.seconds is None else limit.left_s) as timer:
                    await together(self._worker() for _ in range(workers))
        except TimeoutError as error:
            if isinstance(error, SteerError) or not timer.expired():
                raise
            if not options.return_exceptions:
                raise limit.exceeded() from None
            for index, result in enumerate(self.results):
                if result is None:
                    self._exceed(index)
        finally:
            self._places.close()

    async def _worker(self) -> None:
        """Runs one request after the other while there is one left."""
        while self._left:
            await self._places.take()
            if not self._left:
                self._places.give_back()
                return
            index = self._left.popleft()
            try:
                result = await self._once(index)
            except SteerError as error:
                if self._is_sent_again(error, index):
                    continue
                self._fail(index, error)
            except BaseException:
                self._places.give_back()
                raise
            else:
                self._retries.note_success(time.monotonic())
                self._places.note_success()
                self._succeeded += 1
                self.results[index] = result
                self._shown.count()

    async def _once(self, index: int) -> T:
        options = self._options
        if options.limit.seconds is not None or options.each_timeout_s is None:
            return await self._attempt(index)
        own = self._limits.get(index)
        if own is None:  # its time begins with its first attempt
            own = CallLimit.of(options.limit.call, options.each_timeout_s, "timeout_s of the client")
            self._limits[index] = own
        if not own.left_s:
            raise own.exceeded()
        with limited(own):
            return await self._attempt(index)

    def _is_sent_again(self, error: SteerError, index: int) -> bool:
        """True if the request was refused and waits for its next attempt."""
        if error.reason == "UNREACHABLE" and not self._succeeded:  # a wrong address is said at once
            return False
        pause_s = min(FIRST_PAUSE_S * 2**self._places.refusals, LONGEST_PAUSE_S)
        wait_s = self._retries.wait_s(error, pause_s)
        if wait_s is None:
            if self._options.retry_timeout_s and self._retries.is_retryable(error):
                error.add_note(f"it was sent again for {self._options.retry_timeout_s:g} s (retry_timeout_s)")
            return False
        self._left.appendleft(index)
        self._places.note_refusal(wait_s)
        return True

    def _exceed(self, index: int) -> None:
        """Ends a prompt at the end of the call's time."""
        error = self._options.limit.exceeded()
        error.prompt_index = self._numbers[index]
        self.results[index] = error
        self._shown.count()

    def _fail(self, index: int, error: SteerError) -> None:
        self._places.give_back()
        error.prompt_index = self._numbers[index]
        if self._options.return_exceptions:
            self.results[index] = error
            self._shown.count()
            return
        total = len(self.results)
        if total > 1:
            error.add_note(
                f"{self._noun}[{error.prompt_index}] failed first, after {self._succeeded} of {total} had succeeded; "
                "the others were cancelled and their results are lost. return_exceptions=True keeps them"
            )
        raise error
