"""Loop threads that nobody refers to any more."""

import asyncio
import threading
from collections.abc import AsyncGenerator

from steer_service.runtime import event_loop_thread
from steer_service.runtime.event_loop_thread import EventLoopThread, wait_for_dropped
from tests.runtime.test_event_loop_thread import LIMIT_S, name_of_thread


def test_one_can_wait_for_loops_that_nobody_refers_to_any_more() -> None:
    released, closed = threading.Event(), threading.Event()

    async def finish() -> None:
        await asyncio.to_thread(released.wait, LIMIT_S)
        closed.set()

    thread = EventLoopThread("dropped-loop", finish)
    thread.run(name_of_thread())
    del thread
    wait_for_dropped(0.0)
    assert not closed.is_set()
    released.set()
    wait_for_dropped(LIMIT_S)
    assert closed.is_set()


def test_an_iterator_that_is_collected_while_its_loop_stops_is_closed_there() -> None:
    closed = threading.Event()

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            closed.set()

    async def first() -> AsyncGenerator[int, None]:
        source = numbers()
        await anext(source)
        return source

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=event_loop_thread._run, args=(loop,))
    thread.start()
    source = asyncio.run_coroutine_threadsafe(first(), loop).result(LIMIT_S)

    def stop_and_drop() -> None:
        nonlocal source
        loop.stop()
        del source

    loop.call_soon_threadsafe(stop_and_drop)
    thread.join(LIMIT_S)
    assert closed.is_set()
