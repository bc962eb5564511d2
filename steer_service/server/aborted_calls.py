"""Goes around every handler: errors become statuses here alone, and each call leaves a log line and a span."""

import asyncio
import logging
import math
import time
from types import TracebackType

import grpc

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.log_lines import log_event, places_of
from steer_service.server.call_log import log_call
from steer_service.server.call_record import CallRecord, current_call

logger = logging.getLogger(__name__)


class _MalformedLog:
    """Logs requests that are not messages of the contract, in at most one line per EVERY_S: a client can send many."""

    EVERY_S = 60.0

    def __init__(self) -> None:
        self._next_at = -math.inf
        self._unlogged = 0

    def log(self, context: grpc.aio.ServicerContext) -> None:
        """Counts a request; logs the peer and the count if the last line is long enough ago."""
        self._unlogged += 1
        if time.monotonic() >= self._next_at:
            message = f"{self._unlogged} requests were not messages of the contract, the last from {context.peer()}"
            log_event(logger, logging.WARNING, "malformed", message)
            self._next_at, self._unlogged = time.monotonic() + self.EVERY_S, 0


_malformed = _MalformedLog()


class errors_as_status:  # used as a function
    """Ends the call with the status of the error that the block raises; CancelledError and GeneratorExit pass.

    An error that is not a SteerError is logged, and the client receives EngineFailed (INTERNAL). The block receives the
    record of the call. A handler that sends several responses opens the call before the first of them.

    gRPC keeps the exception of an aborted call, and so the error, until the next garbage collection. No frame that the
    error passed stays with it: they have captured rows. A generator with `asynccontextmanager` would keep them.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._call = current_call()

    async def __aenter__(self) -> CallRecord:
        self._call.begin()
        return self._call

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del traceback
        try:
            if error is None:
                try:
                    await self._call.open(self._context)
                except BaseException as failure:
                    await self._end(failure)
                    raise
            else:
                await self._end(error)
        finally:
            self._call.finish()
            log_call(self._call)
            if self._call.span is not None:
                self._call.span.end(self._call)

    async def _end(self, error: BaseException) -> None:
        """Aborts the call, or returns if the error is to pass."""
        match error:
            case asyncio.CancelledError() | GeneratorExit():
                self._call.note_gone(self._context)
            case SteerError():
                if error.reason == "MALFORMED":
                    _malformed.log(self._context)
                await self._abort(error, error)
            case Exception():
                # The places without the message: the text of an unexpected error may hold a prompt.
                log_event(logger, logging.ERROR, "call_failed", f"a call failed unexpectedly with {places_of(error)}")
                await self._abort(EngineFailed("the server failed", reason="INTERNAL"), error)

    async def _abort(self, told: SteerError, error: BaseException) -> None:
        passed: BaseException | None = error
        while passed is not None:
            passed.__traceback__ = None
            passed = passed.__context__
        try:
            await self._context.abort_with_status(self._call.status(told))
        except grpc.aio.UsageError:  # a CallEnd has ended the call in the same moment
            raise asyncio.CancelledError from None
