"""Whether the server's event loop still runs, for those who answer health checks in other threads."""

import asyncio
import time

CONFIRM_S = 0.5
"""How often the event loop confirms that it runs, in seconds."""

STALE_S = 10.0
"""Seconds without a confirmation after which it is taken to hang."""


class Pulse:
    """Belongs to one event loop; may be read from any thread."""

    def __init__(self) -> None:
        self._confirmed_at = time.monotonic()
        self._confirming: asyncio.Task[None] | None = None

    @property
    def is_stale(self) -> bool:
        """True if the event loop has stood still for STALE_S, or was never started or has been stopped."""
        return time.monotonic() > self._confirmed_at + STALE_S

    @property
    def age_s(self) -> float:
        """Seconds since the last confirmation."""
        return time.monotonic() - self._confirmed_at

    def start(self) -> None:
        """Confirms from now on; a second call does nothing."""
        if self._confirming is None:
            self._confirm()
            self._confirming = asyncio.ensure_future(self._keep_confirming())

    async def stop(self) -> None:
        """Confirms no longer."""
        if self._confirming is not None:
            self._confirming.cancel()
            await asyncio.wait([self._confirming])

    def _confirm(self) -> None:
        self._confirmed_at = time.monotonic()

    async def _keep_confirming(self) -> None:
        while True:
            self._confirm()
            await asyncio.sleep(CONFIRM_S)
