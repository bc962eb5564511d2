"""Starts the engine, and starts it again when it dies, within a limit."""

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable

from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed
from steer_service.core.log_lines import log_event
from steer_service.server.app import SteerServer

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
"""Seconds before the second restart of a window; there is no pause before the first."""
LONGEST_PAUSE_S = 8.0
"""Seconds before a restart at most."""

StartBackend = Callable[[], Awaitable[Backend]]
"""Loads the model; called in the loop that will serve it."""


class Supervisor:
    """Keeps a server's engine running."""

    def __init__(self, server: SteerServer, start: StartBackend, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._server = server
        self._start = start
        self._first_pause_s = first_pause_s
        self._restarts: collections.deque[float] = collections.deque()  # times of the restarts within the window

    async def run(self, on_serving: Callable[[Backend], None]) -> None:
        """Starts the engine and restarts it each time that it dies; never returns.

        `on_serving` is called each time that the server has begun to serve. Raises the SteerError of the first start,
        EngineFailed once the engine died or failed to start more often than the settings allow.
        """
        on_serving(await self._open())
        while True:
            await self._server.engine_died.wait()
            await self._server.close_backend()
            on_serving(await self._reopen())

    async def _open(self) -> Backend:
        """Starts an engine and opens the server with it; an engine that cannot generate is closed."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        backend = await self._start()
        try:
            await self._server.open(backend)
        except EngineFailed:
            await self._server.close_backend()
            raise
        self._server.restart_s = loop.time() - began
        return backend

    async def _reopen(self) -> Backend:
        """Starts the engine again, more than once if it fails."""
        error = EngineFailed("the engine died", reason="ENGINE_DIED")
        while True:
            await asyncio.sleep(self._next_pause_s(error))
            try:
                return await self._open()
            except EngineFailed as failed:
                error = failed

    def _next_pause_s(self, error: EngineFailed) -> float:
        """Counts a restart and returns the pause before it; raises EngineFailed if there were too many."""
        config, now = self._server.config, asyncio.get_running_loop().time()
        while self._restarts and now - self._restarts[0] > config.restart_window_s:
            self._restarts.popleft()
        count = len(self._restarts)
        if count >= config.max_restarts:
            raise EngineFailed(
                f"{error.message}; it was restarted {count} times within {config.restart_window_s:g} s, at most "
                f"{config.max_restarts}",
                reason=error.reason,
            )
        self._restarts.append(now)
        self._server.metrics.restarts.inc()
        log_event(
            logger,
            logging.WARNING,
            "engine_restart",
            f"{error.message}; restart {count + 1} of at most {config.max_restarts}",
            {"reason": error.reason},
        )
        return pause_s(count, self._first_pause_s)


def pause_s(earlier: int, first_s: float) -> float:
    """Seconds before a restart that has `earlier` others in its window; each pause is twice as long as the last."""
    return min(first_s * 2 ** (earlier - 1), LONGEST_PAUSE_S) if earlier else 0.0
