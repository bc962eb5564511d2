"""A loop thread strands nobody: neither callers when it stops nor the interpreter when it ends."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from steer_service.core.errors import EngineFailed
from steer_service.core.loop import LoopThread

BOUND_S = 10.0

LEFT_OPEN = """
from steer_service.core.loop import LoopThread

async def numbers():
    for number in range(10):
        yield number

iterator = LoopThread("left-open").iterate(numbers())
print(next(iterator))
"""


async def numbers(closed: threading.Event) -> AsyncGenerator[int, None]:
    try:
        for number in range(10):
            yield number
    finally:
        closed.set()


async def answer() -> int:
    return 42


def test_items_arrive_in_order_and_the_source_is_closed() -> None:
    thread, closed = LoopThread("test"), threading.Event()

    assert list(thread.iterate(numbers(closed))) == list(range(10))
    assert closed.is_set()
    thread.stop()


def test_leaving_an_iterator_closes_the_source() -> None:
    thread, closed = LoopThread("test"), threading.Event()
    iterator = thread.iterate(numbers(closed))
    next(iterator)

    iterator.close()

    assert closed.is_set()
    thread.stop()


def test_stopping_closes_what_is_open() -> None:
    thread, closed = LoopThread("test"), threading.Event()
    iterator = thread.iterate(numbers(closed))
    next(iterator)

    thread.stop()
    thread.stop()

    assert closed.is_set()
    assert thread.is_stopped
    iterator.close()


def test_stopping_releases_a_caller_that_waits() -> None:
    thread, waiting = LoopThread("test"), threading.Event()

    async def wait() -> None:
        waiting.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(lambda: thread.run(wait()))
        assert waiting.wait(BOUND_S)
        thread.stop()

        with pytest.raises(CancelledError):
            caller.result(BOUND_S)


def test_a_call_after_the_stop_is_refused() -> None:
    thread = LoopThread("test")
    thread.stop()

    with pytest.raises(EngineFailed) as raised:
        thread.run(answer())
    assert raised.value.reason == "CLOSED"


async def test_a_coroutine_of_another_loop_may_call_and_iterate() -> None:
    thread, closed = LoopThread("test"), threading.Event()

    assert await thread.call(answer()) == 42
    assert [number async for number in thread.relay(numbers(closed))] == list(range(10))
    assert closed.is_set()
    thread.stop()


def test_an_iterator_left_open_does_not_hold_the_interpreter() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=30, check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")
