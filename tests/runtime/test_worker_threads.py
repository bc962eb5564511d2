"""Threads with a bounded queue: in order, limited, and free of what was cancelled."""

import asyncio
import threading
from functools import partial

import pytest

from steer_service.core.errors import Overloaded
from steer_service.runtime.worker_threads import WorkerThreads


class Held:
    """A function that holds its thread until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.let_go.wait(60)
        return threading.current_thread().name


async def begun(held: Held) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, held.begun.wait, 60)


async def test_results_and_errors_come_back() -> None:
    threads = WorkerThreads("tests", 1, 1)

    assert await threads.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    assert (await threads.run(lambda: threading.current_thread().name)) == "steerllm-tests"


async def test_a_full_queue_refuses_at_once() -> None:
    threads, held = WorkerThreads("tests", 1, 2), Held()
    running = asyncio.ensure_future(threads.run(held))
    await begun(held)
    waiting = [asyncio.ensure_future(threads.run(lambda: 1)) for _ in range(2)]
    await asyncio.sleep(0)

    with pytest.raises(Overloaded, match="2 tests wait for a thread already, at most 2") as raised:
        await threads.run(lambda: 1)

    assert (raised.value.reason, raised.value.retry_after_s) == ("QUEUE_FULL", 1.0)
    held.let_go.set()
    assert await asyncio.gather(running, *waiting) == ["steerllm-tests", 1, 1]


async def test_clients_are_served_in_turn() -> None:
    threads, held, order = WorkerThreads("tests", 1, 10), Held(), []
    running = asyncio.ensure_future(threads.run(held))
    await begun(held)
    asked = ["many", "many", "many", "few", "one", "few"]
    waiting = [asyncio.ensure_future(threads.run(partial(order.append, client), client)) for client in asked]
    await asyncio.sleep(0)

    held.let_go.set()
    await asyncio.gather(running, *waiting)

    assert order == ["many", "few", "one", "many", "few", "many"]


async def test_a_full_queue_refuses_the_last_call_of_the_client_that_has_most() -> None:
    threads, held = WorkerThreads("tests", 1, 3), Held()
    running = asyncio.ensure_future(threads.run(held))
    await begun(held)
    many = [asyncio.ensure_future(threads.run(partial(int, number), "many")) for number in range(3)]
    await asyncio.sleep(0)
    other = asyncio.ensure_future(threads.run(lambda: 7, "other"))
    with pytest.raises(Overloaded) as refused:
        await many[2]
    assert refused.value.reason == "QUEUE_FULL"
    with pytest.raises(Overloaded):
        await threads.run(lambda: 1, "many")
    with pytest.raises(Overloaded):
        await threads.run(lambda: 1, "other")

    held.let_go.set()
    await running
    assert await asyncio.gather(*many[:2], other) == [0, 1, 7]


async def test_a_cancelled_call_leaves_the_queue_and_never_begins() -> None:
    threads, held, ran = WorkerThreads("tests", 1, 2), Held(), []
    running = asyncio.ensure_future(threads.run(held))
    await begun(held)
    waiting = asyncio.ensure_future(threads.run(lambda: ran.append(1)))
    await asyncio.sleep(0)
    assert threads.waiting == 1

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert threads.waiting == 0
    held.let_go.set()
    await running
    await threads.run(lambda: 1)
    assert ran == []


async def test_a_cancelled_call_that_runs_keeps_its_thread_until_it_ends() -> None:
    threads, held = WorkerThreads("tests", 1, 1), Held()
    running = asyncio.ensure_future(threads.run(held))
    await begun(held)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    after = asyncio.ensure_future(threads.run(lambda: 1))
    await asyncio.sleep(0)

    assert threads.waiting == 1
    held.let_go.set()
    assert await after == 1


def test_threads_serve_one_event_loop_after_another_and_end() -> None:
    threads = WorkerThreads("one-after-another", 2, 1)

    assert [asyncio.run(threads.run(lambda: 1)) for _ in range(3)] == [1, 1, 1]
    for thread in threading.enumerate():
        if thread.name == "steerllm-one-after-another":
            thread.join(60)
            assert not thread.is_alive()
