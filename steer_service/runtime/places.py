"""How many requests of one call are in flight: at most so many, and fewer while the server has no room for them."""

import asyncio
import math
from collections import deque

GROWTH = 0.25
"""Places that each success adds above the number at which the server last refused a request.

Each attempt beyond that number costs a refusal: one for four successes, while a server is full.
"""

LONGEST_PAUSE_S = 10.0


class Places:
    """Places for requests in flight; in one event loop.

    After a refusal no request starts until a pause has passed, or until one of the call's own has ended, since that one
    has left its place on the server. Each further refusal without a success doubles the pause.
    """

    def __init__(self, most: int | None) -> None:
        self._most = math.inf if most is None else float(most)
        self._allowed = self._most
        self._known = self._most
        """Requests in flight at which the server last refused one."""
        self._running = 0
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.refusals = 0
        """Pauses since the last success."""

    async def take(self) -> None:
        """Waits for a place and takes it."""
        if not self._waiting and self._has_room():
            self._running += 1
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        """Leaves a place, whatever became of its request."""
        self._running -= 1
        self._fill()

    def note_success(self) -> None:
        """Leaves the place of a request that succeeded."""
        self.refusals = 0
        self._allowed = min(self._most, self._allowed + (1 if self._allowed < self._known else GROWTH))
        self._resume()
        self.give_back()

    def note_refusal(self, pause_s: float) -> None:
        """Leaves the place of a request that the server refused; it may be sent again after `pause_s`."""
        self._running -= 1
        if self._running:
            self._known = self._running
        self._allowed = max(1.0, float(self._running))
        if not self._is_paused:  # requests that were refused together count once
            self._is_paused = True
            doubled = min(pause_s * 2**self.refusals, max(pause_s, LONGEST_PAUSE_S))
            self._timer = asyncio.get_running_loop().call_later(doubled, self._end_pause)
            self.refusals += 1

    def close(self) -> None:
        """Ends the pause: nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_pause(self) -> None:
        self._resume()
        self._fill()

    def _resume(self) -> None:
        self._is_paused = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _has_room(self) -> bool:
        return not self._is_paused and self._running + 1 <= self._allowed

    def _fill(self) -> None:
        while self._waiting and self._has_room():
            first = self._waiting.popleft()
            if not first.done():
                self._running += 1
                first.set_result(None)
