"""An event loop in a thread of its own, for synchronous callers and for callers in another loop."""

import asyncio
import atexit
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from steer_service.core.errors import closed_error

T = TypeVar("T")

UNWIND_S = 5.0
"""Seconds that cancelled tasks, and then open iterators, have to end in `stop`; what takes longer is abandoned."""


class EventLoopThread:
    """Runs coroutines in one background event loop until `stop`; after it every call raises EngineFailed."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        """The loop; its thread ends in `stop`."""
        self._in_flight: set[Future[Any]] = set()
        """The results that callers wait for; `stop` cancels those that are left, so that the callers wake."""
        self._sources: set[AsyncGenerator[Any, None]] = set()
        """The iterators that callers read; `stop` closes those that are left."""
        self._stopping = False
        self._lock = threading.Lock()
        """Held to start a call and to start stopping: no call can start in a loop that is about to end."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # an open iterator would wait at exit for a thread that no longer runs

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    @property
    def is_stopped(self) -> bool:
        """True once `stop` was called: no call can start any more."""
        return self._stopping

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` in the loop and waits for its result; must not be called from the loop itself.

        Raises EngineFailed if `stop` cancels it.
        """
        assert threading.current_thread() is not self._thread, "the loop would wait for itself"
        future = self._start(coroutine)
        try:
            return future.result()
        except CancelledError:
            if self._stopping:
                raise closed_error("this") from None
            raise
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
                raise closed_error("this") from None
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
                await asyncio.shield(self.call(_finish(source)))  # cancelling must not interrupt it

    def iterate(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yields the items of `source` to a synchronous caller."""
        self._sources.add(source)
        try:
            while True:
                try:
                    item = self.run(_step(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._sources.discard(source)
            if not self.is_stopped:  # `stop` has closed every open iterator
                self.run(_finish(source))

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._stopping:
                coroutine.close()
                raise closed_error("this")
            future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
            self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        return future

    def stop(self) -> None:
        """Cancels running calls and ends the loop and its thread; calling it again does nothing."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        atexit.unregister(self.stop)
        with suppress(TimeoutError):  # a blocked loop ends with the process: its thread is a daemon
            asyncio.run_coroutine_threadsafe(_unwind(tuple(self._sources)), self.loop).result(2 * UNWIND_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(UNWIND_S)
        if not self._thread.is_alive():
            self.loop.close()
        for future in tuple(self._in_flight):
            future.cancel()


async def _step(source: AsyncGenerator[T, None]) -> T:
    return await source.__anext__()


async def _finish(source: AsyncGenerator[T, None]) -> None:
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
        await _finish(source)
    except Exception as error:
        context = {"message": "an iterator failed while it was closed", "exception": error, "asyncgen": source}
        asyncio.get_running_loop().call_exception_handler(context)
