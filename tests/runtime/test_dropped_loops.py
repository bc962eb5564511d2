"""Loop threads that nobody refers to any more."""

import asyncio
import threading

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
