"""An event loop in a thread of its own, for synchronous callers and for callers in another loop."""

import asyncio
import atexit
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet, finalize

from steer_service.core.errors import SteerError, closed_error
from steer_service.runtime.forks import forked_error, keep_for_ever, tell_after_fork

T = TypeVar("T")

UNWIND_S = 5.0
"""Seconds that cancelled tasks, and then open iterators, have to end in `stop`; what takes longer is abandoned."""

Finish = Callable[[], Coroutine[Any, Any, None]]
"""Closes what was used in a loop; it must not refer to the loop's EventLoopThread."""


class EventLoopThread:
    """Runs coroutines in one background event loop until `stop`; after it every call raises EngineFailed.

    The thread starts with the first call. It also ends when nothing refers to this object any more, after `finish` has
    run in the loop. In a forked process the object has a new loop; iterators of the parent raise EngineFailed (FORKED).
    """

    def __init__(self, name: str, finish: Finish | None = None, *, owner: str = "this") -> None:
        """`owner`: what is closed after `stop`, for the error of a call: "the client"."""
        self._name = name
        self._owner = owner
        self._finish = finish
        self._stopping = False
        self._begin_anew()
        _present.add(self)
        tell_after_fork(self)

    def _begin_anew(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._finalizer: finalize[Any, Any] | None = None
        self._in_flight: set[Future[Any]] = set()
        """The results that callers wait for; `stop` cancels those that are left, so that the callers wake."""
        self._sources: set[AsyncGenerator[Any, None]] = set()
        """The iterators that callers read; `stop` closes those that are left."""
        self._lock = threading.RLock()
        """Held to start a call and to start stopping: no call can start in a loop that is about to end.

        The garbage collector may close an iterator in the thread that holds it."""

    def after_fork(self) -> None:
        """Leaves the parent's loop alone: to close it would change what the parent's selector waits for."""
        for one in (self._loop, *self._sources):
            keep_for_ever(one)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._begin_anew()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; its thread ends in `stop`. Raises EngineFailed if that was called before any call."""
        with self._lock:
            return self._started_loop()

    def _started_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            if self._stopping:
                raise closed_error(self._owner)
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True)
            self._finalizer = finalize(self, _end_later, self._loop, self._thread, self._finish)
            self._finalizer.atexit = False  # `stop` runs at exit
            self._thread.start()
        return self._loop

    @property
    def is_stopped(self) -> bool:
        """True once `stop` was called: no call can start any more."""
        return self._stopping

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` in the loop and waits for its result.

        Raises EngineFailed if `stop` cancels it, and RuntimeError in the loop's own thread, where it would never end.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "this call was made while another call of the same object runs in its thread, as in a `progress` "
                "function: it would wait for itself"
            )
        future = self._start(coroutine)
        try:
            return future.result()
        except CancelledError:
            if self._stopping:
                raise closed_error(self._owner) from None
            raise
        except SteerError as error:
            # its own words say what failed: sixty lines of tasks would hide them
            raise error.with_traceback(None) from error.__cause__
        except BaseException:
            future.cancel()  # a KeyboardInterrupt must not leave the coroutine running
            raise

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` in the loop, for a coroutine of any other loop; cancelling the caller cancels it.

        Raises EngineFailed if `stop` cancels it.
        """
        task = asyncio.current_task()
        try:
            return await asyncio.wrap_future(self._start(coroutine))
        except asyncio.CancelledError:
            if self._stopping and not (task and task.cancelling()):
                raise closed_error(self._owner) from None
            raise

    async def relay(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yields the items of `source`, which runs in this thread's loop, to a coroutine of any other loop."""
        self._sources.add(source)
        try:
            while True:
                try:
                    yield await self.call(_step(source))
                except StopAsyncIteration:
                    return
        finally:
            self._sources.discard(source)
            if not self.is_stopped:  # `stop` has closed every open iterator
                await asyncio.shield(self.call(_close(source)))  # cancelling must not interrupt it

    def iterate(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yields the items of `source` to a synchronous caller."""
        process = os.getpid()
        self._sources.add(source)
        try:
            while True:
                if os.getpid() != process:
                    raise forked_error()
                try:
                    item = self.run(_step(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._sources.discard(source)
            if not self.is_stopped and os.getpid() == process:  # `stop` has closed every open iterator
                if threading.current_thread() in _threads:  # the garbage collector closes it, and a loop must not wait
                    self._start(_close(source))
                else:
                    self.run(_close(source))

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._stopping:
                coroutine.close()
                raise closed_error(self._owner)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._started_loop())
            self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    def stop(self) -> None:
        """Cancels running calls and ends the loop and its thread; calling it again does nothing."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        with suppress(TimeoutError):  # a blocked loop ends with the process: its thread is a daemon
            asyncio.run_coroutine_threadsafe(_unwind(tuple(self._sources)), loop).result(2 * UNWIND_S)
        with suppress(RuntimeError):  # the thread has ended
            loop.call_soon_threadsafe(loop.stop)
        thread.join(UNWIND_S)
        for future in tuple(self._in_flight):
            future.cancel()


_present: WeakSet[EventLoopThread] = WeakSet()
_threads: WeakSet[threading.Thread] = WeakSet()
"""Threads of loops."""
_ending: dict[threading.Thread, asyncio.Task[None] | None] = {}
"""Threads that end because nobody refers to their EventLoopThread, and what ends them."""


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    _threads.add(threading.current_thread())
    try:
        _run_until_stopped(loop)
        loop.run_until_complete(_end_late())
    finally:
        loop.close()
        _ending.pop(threading.current_thread(), None)


async def _end_late() -> None:
    """Ends what began while the loop was stopped, such as the closing of an iterator that was collected then."""
    await asyncio.sleep(0)  # it is scheduled, and becomes a task
    await _unwind(())


def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except (KeyboardInterrupt, SystemExit):
            # A function of the caller, such as `progress`, raised it: its task has it too, and gives it to the caller.
            continue
        return


def _end_later(loop: asyncio.AbstractEventLoop, thread: threading.Thread, finish: Finish | None) -> None:
    """Ends a loop and its thread without waiting: the garbage collector may call it in any thread, also in this one."""
    _ending[thread] = None

    def begin() -> None:
        _ending[thread] = loop.create_task(_end(finish))

    loop.call_soon_threadsafe(begin)


async def _end(finish: Finish | None) -> None:
    try:
        if finish is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(UNWIND_S):
                    await finish()
        await _unwind(())
    finally:
        asyncio.get_running_loop().stop()


def wait_for_dropped(timeout_s: float) -> None:
    """Waits until the loops that nobody refers to any more have ended, for at most `timeout_s` seconds."""
    until_s = time.monotonic() + timeout_s
    for thread in list(_ending):
        if thread is not threading.current_thread() and thread.is_alive():
            thread.join(max(0.0, until_s - time.monotonic()))


def _stop_all() -> None:
    """Ends every loop at exit: an open iterator would wait for a thread that no longer runs."""
    for one in list(_present):
        one.stop()
    for thread in list(_ending):
        if thread.is_alive():  # not in a forked process
            thread.join(UNWIND_S)


atexit.register(_stop_all)


async def _step(source: AsyncGenerator[T, None]) -> T:
    return await source.__anext__()


async def _close(source: AsyncGenerator[T, None]) -> None:
    while getattr(source, "ag_running", False):  # a cancelled step is still unwinding; closing now would raise
        await asyncio.sleep(0.001)
    await source.aclose()


async def _unwind(sources: Sequence[AsyncGenerator[Any, None]]) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=UNWIND_S)
    # Closing an iterator closes those that it reads, in their order; shutdown_asyncgens would close all at once.
    with suppress(TimeoutError):
        async with asyncio.timeout(UNWIND_S):
            await asyncio.gather(*map(_close_at_stop, sources))
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _close_at_stop(source: AsyncGenerator[Any, None]) -> None:
    """Closes an iterator whose caller waits no more; its failure is logged and does not keep others open."""
    try:
        await _close(source)
    except Exception as error:
        context = {"message": "an iterator failed while it was closed", "exception": error, "asyncgen": source}
        asyncio.get_running_loop().call_exception_handler(context)
