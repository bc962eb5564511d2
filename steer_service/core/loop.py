"""An event loop in a thread of its own, for callers that are not asynchronous or live in another loop."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines in one background event loop until `stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        """The loop; its thread ends in `stop`."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` there and waits for its result; must not be called from the loop itself."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # a KeyboardInterrupt must not leave the work running
            raise

    async def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` there from a coroutine of any other loop; cancelling the caller cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    async def relay(self, source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The items of `source`, which lives in this thread's loop, to a coroutine of any other loop."""
        try:
            while True:
                try:
                    yield await self.call(_step(source))
                except StopAsyncIteration:
                    return
        finally:
            await self.call(_finish(source))

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of `source` to a caller that is not asynchronous."""
        try:
            while True:
                try:
                    item = self.run(_step(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.run(_finish(source))

    def stop(self) -> None:
        """Ends the loop and its thread; calling it again does nothing."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _step(source: AsyncGenerator[T, None]) -> T:
    return await source.__anext__()


async def _finish(source: AsyncGenerator[T, None]) -> None:
    while source.ag_running:  # a cancelled step is still unwinding; closing now would raise
        await asyncio.sleep(0.001)
    await source.aclose()
