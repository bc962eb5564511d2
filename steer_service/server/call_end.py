"""Ends a call with a status at any time, also while gRPC waits for a client that does not read."""

import asyncio
from contextlib import suppress

import grpc

from steer_service.core.errors import SteerError
from steer_service.server.call_record import current_call

_endings: set["asyncio.Task[None]"] = set()
"""Calls that are being ended; the loop itself holds tasks only weakly."""


def _note_error(opening: "asyncio.Task[None]") -> None:
    """Marks an error as read: the client has gone, and the handler that waited for this was cancelled."""
    if not opening.cancelled():
        opening.exception()


class CallEnd:
    """Ends the call of the current task from another task.

    Cancelling the task alone would also cancel gRPC's own write, and the client would wait for a status for ever. To
    await the status in the task itself would block it behind the data that nobody reads.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._context = context
        self._task = task
        self._call = current_call()
        self._opening: asyncio.Task[None] | None = None

    @property
    def error(self) -> SteerError | None:
        """The error that the call was ended with; None if it was not."""
        return self._call.error

    @property
    def is_open(self) -> bool:
        """True once `open` was called."""
        return self._opening is not None

    def __call__(self, error: SteerError) -> None:
        """Sends the status of `error` after what was sent before, and cancels the task; a second call does nothing."""
        if self.error is None:
            self._call.error = error
            ending = asyncio.ensure_future(self._end(error))
            _endings.add(ending)
            ending.add_done_callback(_endings.discard)

    def claim(self, error: SteerError) -> None:
        """The handler itself ends the call with `error`: a later call of this object does nothing."""
        if self.error is None:
            self._call.error = error

    async def open(self) -> None:
        """Sends the headers of the response stream, once; await it before the first message, and no earlier.

        gRPC's clients retry only calls that ended without headers.
        The first response would send them too. A status that is sent at that very moment would send them a second
        time, which gRPC refuses, and the client would have no status.
        """
        self.check_not_ended()
        if self._opening is None:
            self._call.is_open = True
            self._opening = asyncio.ensure_future(self._context.send_initial_metadata(self._call.metadata))
            self._opening.add_done_callback(_note_error)
        await asyncio.shield(self._opening)

    async def wait_opened(self) -> None:
        """Returns once headers that are being sent were sent; await it before any other status."""
        if self._opening is not None and not self._opening.done():
            await asyncio.wait([self._opening])

    def check_not_ended(self) -> None:
        """Raises CancelledError once the call was ended: nothing may be sent after a status."""
        if self.error is not None:
            raise asyncio.CancelledError

    async def _end(self, error: SteerError) -> None:
        await self.wait_opened()
        status = asyncio.ensure_future(self._context.abort_with_status(self._call.status(error)))
        await asyncio.sleep(0)  # lets it put the status behind the data
        if not (status.done() and isinstance(status.exception(), grpc.aio.UsageError)):  # else it has a status already
            self._task.cancel()
        with suppress(grpc.aio.BaseError):  # AbortError if all went well
            await status
