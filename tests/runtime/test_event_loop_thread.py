"""The loop thread: what runs in it comes back, what is given up is closed, and stopping strands nobody."""

import asyncio
import threading
import traceback
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, closing

import pytest

from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.runtime.event_loop_thread import EventLoopThread

LIMIT_S = 10


@pytest.fixture
def thread() -> Iterator[EventLoopThread]:
    thread = EventLoopThread("test-loop")
    yield thread
    thread.stop()


class Counting:
    """A source of numbers that tells in which thread it ran, when it waits, and when it was closed."""

    def __init__(self, count: int, *, then_hang: bool = False, failure: Exception | None = None) -> None:
        self.count = count
        self.then_hang = then_hang
        self.failure = failure
        self.threads: set[str] = set()
        self.hanging = threading.Event()
        self.closed = threading.Event()

    async def numbers(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.count):
                self.threads.add(threading.current_thread().name)
                yield number
            if self.failure is not None:
                raise self.failure
            if self.then_hang:
                self.hanging.set()
                await asyncio.Event().wait()
        finally:
            for _ in range(500):  # closing takes turns of the loop, as it does over a network
                await asyncio.sleep(0)
            self.closed.set()


async def name_of_thread() -> str:
    return threading.current_thread().name


async def fail() -> None:
    raise InvalidRequest("is wrong")


def test_a_coroutine_runs_there_and_its_result_comes_back(thread: EventLoopThread) -> None:
    assert thread.run(name_of_thread()) == "test-loop"


def test_two_runs_share_one_loop(thread: EventLoopThread) -> None:
    async def loop_of() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert thread.run(loop_of()) is thread.run(loop_of()) is thread.loop


def test_an_error_comes_back_and_the_loop_goes_on(thread: EventLoopThread) -> None:
    with pytest.raises(InvalidRequest, match="is wrong"):
        thread.run(fail())

    assert thread.run(name_of_thread()) == "test-loop"


def test_an_error_that_explains_itself_shows_the_line_of_the_caller_and_its_cause(thread: EventLoopThread) -> None:
    cause = ValueError("the cause")

    async def fails() -> None:
        raise EngineFailed("no server answers") from cause

    with pytest.raises(EngineFailed) as raised:
        thread.run(fails())
    assert [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)][1:] == ["run"]
    assert raised.value.__cause__ is cause


async def test_a_call_from_another_loop_runs_there(thread: EventLoopThread) -> None:
    assert await asyncio.wait_for(thread.call(name_of_thread()), LIMIT_S) == "test-loop"
    with pytest.raises(InvalidRequest, match="is wrong"):
        await asyncio.wait_for(thread.call(fail()), LIMIT_S)


async def test_cancelling_a_call_cancels_what_it_runs(thread: EventLoopThread) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def hang() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = asyncio.create_task(thread.call(hang()))
    assert await asyncio.to_thread(begun.wait, LIMIT_S)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(cancelled.wait, LIMIT_S)


def test_running_from_the_loop_itself_is_refused(thread: EventLoopThread) -> None:
    async def inside() -> None:
        thread.run(name_of_thread())

    with pytest.raises(RuntimeError, match="wait for itself"):
        thread.run(inside())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_ending_the_program_from_the_loop_ends_the_caller_and_not_the_loop(
    thread: EventLoopThread, kind: type[BaseException]
) -> None:
    async def end() -> None:
        raise kind(3)

    async def inside() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(end())

    with pytest.raises(kind, match="3"):
        thread.run(inside())

    assert thread.run(name_of_thread()) == "test-loop"


def test_an_iteration_that_is_collected_in_a_loop_closes_the_source_without_waiting(thread: EventLoopThread) -> None:
    source = Counting(3)
    iterations = [thread.iterate(source.numbers())]
    assert next(iterations[0]) == 0

    async def collect() -> None:
        iterations.clear()

    thread.run(collect())

    assert source.closed.wait(LIMIT_S)


def test_an_iteration_that_is_collected_while_a_call_starts_closes_the_source(thread: EventLoopThread) -> None:
    source = Counting(3)
    iterations = [thread.iterate(source.numbers())]
    assert next(iterations[0]) == 0

    with thread._lock:  # the garbage collector may run there
        iterations.clear()

    assert source.closed.is_set()


async def test_a_relay_yields_every_item_and_closes_its_source(thread: EventLoopThread) -> None:
    source = Counting(3)

    assert [number async for number in thread.relay(source.numbers())] == [0, 1, 2]
    assert source.threads == {"test-loop"}
    assert source.closed.is_set()


async def test_closing_a_relay_closes_its_source(thread: EventLoopThread) -> None:
    source = Counting(3)

    async with aclosing(thread.relay(source.numbers())) as numbers:
        assert await anext(numbers) == 0

    assert source.closed.is_set()


async def test_an_error_of_the_source_comes_through_a_relay(thread: EventLoopThread) -> None:
    source = Counting(1, failure=InvalidRequest("is wrong"))
    numbers = thread.relay(source.numbers())

    assert await anext(numbers) == 0
    with pytest.raises(InvalidRequest, match="is wrong"):
        await anext(numbers)
    assert source.closed.is_set()


async def test_cancelling_a_relay_while_it_waits_closes_its_source(thread: EventLoopThread) -> None:
    source = Counting(1, then_hang=True)

    async def read() -> None:
        async with aclosing(thread.relay(source.numbers())) as numbers:
            async for _ in numbers:
                pass

    reader = asyncio.create_task(read())
    assert await asyncio.to_thread(source.hanging.wait, LIMIT_S)

    reader.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reader, LIMIT_S)
    assert source.closed.is_set()


async def test_cancelling_while_a_relay_closes_does_not_cut_the_closing_short(thread: EventLoopThread) -> None:
    gate, closing_began, closed = threading.Event(), threading.Event(), threading.Event()

    async def numbers() -> AsyncGenerator[int, None]:
        try:
            yield 0
        finally:
            closing_began.set()
            await asyncio.get_running_loop().run_in_executor(None, gate.wait, LIMIT_S)
            closed.set()

    async def read() -> None:
        async with aclosing(thread.relay(numbers())) as relayed:
            await anext(relayed)

    reader = asyncio.create_task(read())
    assert await asyncio.to_thread(closing_began.wait, LIMIT_S)

    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reader, LIMIT_S)
    gate.set()

    assert await asyncio.to_thread(closed.wait, LIMIT_S)
    if left := asyncio.all_tasks() - {asyncio.current_task()}:  # the closing, which nobody waits for
        await asyncio.wait(left, timeout=LIMIT_S)


def test_iterating_yields_every_item_and_closes_the_source(thread: EventLoopThread) -> None:
    source = Counting(3)

    assert list(thread.iterate(source.numbers())) == [0, 1, 2]
    assert source.threads == {"test-loop"}
    assert source.closed.is_set()


def test_leaving_an_iteration_early_closes_the_source(thread: EventLoopThread) -> None:
    source = Counting(3)

    with closing(thread.iterate(source.numbers())) as numbers:
        assert next(numbers) == 0

    assert source.closed.is_set()


def test_an_error_of_the_source_ends_an_iteration(thread: EventLoopThread) -> None:
    source = Counting(0, failure=InvalidRequest("is wrong"))

    with pytest.raises(InvalidRequest, match="is wrong"):
        list(thread.iterate(source.numbers()))
    assert source.closed.is_set()


def test_stopping_twice_is_stopping() -> None:
    thread = EventLoopThread("test-loop")

    thread.stop()
    thread.stop()

    assert thread.is_stopped
    assert "test-loop" not in {other.name for other in threading.enumerate()}


async def test_what_comes_after_stopping_is_refused() -> None:
    thread = EventLoopThread("test-loop")
    thread.stop()

    with pytest.raises(EngineFailed, match="closed") as raised:
        thread.run(name_of_thread())
    assert raised.value.reason == "CLOSED"
    with pytest.raises(EngineFailed):
        await thread.call(name_of_thread())
    with pytest.raises(EngineFailed):
        list(thread.iterate(Counting(1).numbers()))
    with pytest.raises(EngineFailed):
        await anext(thread.relay(Counting(1).numbers()))


async def test_stopping_strands_no_caller() -> None:
    thread = EventLoopThread("test-loop")
    source = Counting(0, then_hang=True)
    waiting = asyncio.create_task(asyncio.to_thread(list, thread.iterate(source.numbers())))
    assert await asyncio.to_thread(source.hanging.wait, LIMIT_S)

    await asyncio.to_thread(thread.stop)

    with pytest.raises(EngineFailed, match="closed"):
        await asyncio.wait_for(waiting, LIMIT_S)
    assert source.closed.is_set()


async def test_stopping_wakes_readers_in_other_loops() -> None:
    thread = EventLoopThread("test-loop")
    source = Counting(1, then_hang=True)
    numbers = thread.relay(source.numbers())
    assert await anext(numbers) == 0
    waiting = asyncio.create_task(anext(numbers))
    assert await asyncio.to_thread(source.hanging.wait, LIMIT_S)

    await asyncio.to_thread(thread.stop)

    with pytest.raises(EngineFailed, match="closed"):
        await asyncio.wait_for(waiting, LIMIT_S)
    assert source.closed.is_set()


def test_stopping_closes_a_source_between_two_items() -> None:
    thread = EventLoopThread("test-loop")
    source = Counting(3)
    numbers = thread.iterate(source.numbers())
    assert next(numbers) == 0

    thread.stop()

    assert source.closed.is_set()
    with pytest.raises(EngineFailed, match="closed"):
        next(numbers)


def test_stopping_closes_a_source_before_what_it_reads(caplog: pytest.LogCaptureFixture) -> None:
    """Closed at the same time, neither would end in order, and asyncio would log an error for each."""
    thread = EventLoopThread("test-loop")
    source, ended = Counting(3), []

    async def outer() -> AsyncGenerator[int, None]:
        async with aclosing(source.numbers()) as numbers:
            async for number in numbers:
                yield number
        ended.append("to its end")

    numbers = thread.iterate(outer())
    assert next(numbers) == 0

    thread.stop()

    assert source.closed.is_set()
    assert ended == []
    assert caplog.records == []


def test_a_source_that_fails_when_it_is_closed_by_stopping_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    thread = EventLoopThread("test-loop")
    other = Counting(3)

    async def failing() -> AsyncGenerator[int, None]:
        try:
            yield 0
        finally:
            raise ValueError("cannot be closed")

    open_ones = [thread.iterate(failing()), thread.iterate(other.numbers())]
    assert [next(numbers) for numbers in open_ones] == [0, 0]

    thread.stop()

    assert other.closed.is_set()
    assert [record.getMessage().splitlines()[0] for record in caplog.records] == [
        "an iterator failed while it was closed"
    ]


def test_callers_that_meet_a_stopping_loop_never_wait_for_ever() -> None:
    outcomes: list[str] = []

    def keep_calling(thread: EventLoopThread) -> None:
        try:
            while True:
                thread.run(name_of_thread())
        except EngineFailed as error:
            outcomes.append(error.reason)

    for _ in range(20):
        thread = EventLoopThread("test-loop")
        callers = [threading.Thread(target=keep_calling, args=(thread,), daemon=True) for _ in range(3)]
        for caller in callers:
            caller.start()
        thread.stop()
        for caller in callers:
            caller.join(LIMIT_S)

    assert outcomes == ["CLOSED"] * 60
