"""A few threads for work that would block an event loop, with a bounded queue."""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from steer_service.core.errors import Overloaded

Result = TypeVar("Result")

_Waiting = tuple[Future[Any], Callable[[], Any]]

RETRY_AFTER_S = 1.0


class WorkerThreads:
    """Runs functions in at most `threads` threads, those of several clients in turn; a thread ends when nothing waits.

    It can be used from several event loops.
    """

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._name = name
        self._threads = threads
        self._max_waiting = max_waiting
        self._running = 0
        self._waiting: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # by client; the first is served next
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Functions that have not begun."""
        return sum(map(len, self._waiting.values()))

    async def run(self, function: Callable[[], Result], client_id: str = "") -> Result:
        """What `function` returns or raises. If cancelled before it begins, it never does.

        Raises Overloaded if `max_waiting` others wait, and no client has more than `client_id`; else the last of the
        client that has most is refused.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._running == self._threads and self.waiting >= self._max_waiting:
                self._make_room(client_id)
            self._waiting.setdefault(client_id, deque()).append((future, function))
            if self._running < self._threads:
                self._running += 1
                threading.Thread(target=self._work, name=f"steerllm-{self._name}", daemon=True).start()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self._lock:
                self._remove(client_id, future)
            raise

    def _make_room(self, client_id: str) -> None:
        mine = len(self._waiting.get(client_id, ()))
        most = max(self._waiting, key=lambda client: len(self._waiting[client]), default=client_id)
        if most == client_id or len(self._waiting[most]) <= mine + 1:
            raise self._full()
        last = self._waiting[most][-1][0]
        self._remove(most, last)
        if last.set_running_or_notify_cancel():
            last.set_exception(self._full())

    def _remove(self, client_id: str, future: "Future[Any]") -> None:
        left = deque(entry for entry in self._waiting.get(client_id, ()) if entry[0] is not future)
        if left:
            self._waiting[client_id] = left
        else:
            self._waiting.pop(client_id, None)

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{self._max_waiting} {self._name} wait for a thread already, at most {self._max_waiting} may",
            reason="QUEUE_FULL",
            retry_after_s=RETRY_AFTER_S,
        )

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                client_id, waiting = self._waiting.popitem(last=False)
                future, function = waiting.popleft()
                if waiting:
                    self._waiting[client_id] = waiting  # behind the other clients
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
