"""A few threads for work that would block an event loop, with a bounded queue."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from steer_service.core.errors import Overloaded

Result = TypeVar("Result")

RETRY_AFTER_S = 1.0


class WorkerThreads:
    """Runs functions in at most `threads` threads, oldest first; a thread ends when nothing waits.

    It can be used from several event loops.
    """

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._name = name
        self._threads = threads
        self._max_waiting = max_waiting
        self._running = 0
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Functions that have not begun."""
        return len(self._waiting)

    async def run(self, function: Callable[[], Result]) -> Result:
        """What `function` returns or raises. If cancelled before it begins, it never does.

        Raises Overloaded if `max_waiting` others wait.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._running == self._threads and len(self._waiting) >= self._max_waiting:
                raise Overloaded(
                    f"{len(self._waiting)} {self._name} wait for a thread already, at most {self._max_waiting} may",
                    reason="QUEUE_FULL",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._waiting.append((future, function))
            if self._running < self._threads:
                self._running += 1
                threading.Thread(target=self._work, name=f"steerllm-{self._name}", daemon=True).start()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self._lock:
                self._waiting = deque(entry for entry in self._waiting if entry[0] is not future)
            raise

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, function = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                _run(future, function)
            del future, function  # they hold a prompt


def _run(future: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
