"""Coroutines that run at the same time, and what becomes of them when one fails or their caller is cancelled."""

import asyncio
from collections.abc import Callable

import pytest

from steer_service.runtime.together import together


class Worker:
    """Waits until it is cancelled, and then cleans up for as long as the test wants."""

    def __init__(self) -> None:
        self.is_ready = asyncio.Event()
        self.may_end = asyncio.Event()
        self.has_cleaned_up = False

    async def work(self) -> None:
        self.is_ready.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_end.wait()
            self.has_cleaned_up = True


async def fails(after: asyncio.Event) -> None:
    await after.wait()
    raise ValueError("first")


def cancels() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_results_keep_the_order_of_their_coroutines() -> None:
    async def one(number: int) -> int:
        for _ in range(3 - number):
            await asyncio.sleep(0)
        return number

    assert await together(one(number) for number in range(3)) == [0, 1, 2]
    assert await together(()) == []


async def test_the_first_error_is_raised_once_the_others_have_ended() -> None:
    worker = Worker()
    worker.may_end.set()
    with pytest.raises(ValueError, match="first"):
        await together([worker.work(), fails(worker.is_ready)])
    assert worker.has_cleaned_up


async def test_a_failure_leaves_no_cancel_of_its_caller() -> None:
    go = asyncio.Event()
    go.set()
    with pytest.raises(ValueError, match="first"):
        await together([fails(go), asyncio.Event().wait()])
    assert cancels() == 0


@pytest.mark.parametrize("cancel", [lambda task: task.cancel(), lambda task: (task.cancel(), task.cancel())])
async def test_a_cancelled_caller_waits_until_all_have_cleaned_up(
    cancel: Callable[["asyncio.Task[None]"], object],
) -> None:
    worker = Worker()

    async def call() -> None:
        await together([worker.work()])

    task = asyncio.ensure_future(call())
    await worker.is_ready.wait()
    cancel(task)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    worker.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.has_cleaned_up
