"""Coroutines that run at the same time: the first error of one ends the others.

`asyncio.TaskGroup` does the same, but up to Python 3.12 it cancels the task around a group that fails and does not take
that back: `Task.cancelling()` then says for ever that somebody cancels the task.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


async def together(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all; raises the first error of any, once the others have been cancelled and have ended.

    Each has a task of its own, which is cancelled once, so none is interrupted while it cleans up.
    """
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(coroutine) for coroutine in coroutines]
    if not tasks:
        return []
    is_over, failed, left = loop.create_future(), list[asyncio.Task[Result]](), len(tasks)

    def note_end(task: asyncio.Task[Result]) -> None:
        nonlocal left
        left -= 1
        if not task.cancelled() and task.exception() is not None:
            failed.append(task)
        if (failed or not left) and not is_over.done():
            is_over.set_result(None)

    for task in tasks:
        task.add_done_callback(note_end)
    try:
        await is_over
        if not failed:
            return [task.result() for task in tasks]
    finally:
        if left:
            await _cancelled(tasks)
    first = failed[0].exception()
    assert first is not None
    try:
        raise first from first.__cause__  # the others failed because of it, or after it
    finally:
        tasks.clear()  # a traceback must not keep itself
        failed.clear()
        del first


async def _cancelled(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancels tasks and returns when all have ended, even if the caller is cancelled meanwhile."""
    for task in tasks:
        task.cancel()
    while left := [task for task in tasks if not task.done()]:
        with suppress(asyncio.CancelledError):
            await asyncio.wait(left)
