"""Goes around every handler: errors become statuses here alone, and each call leaves a log line and a span."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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


@asynccontextmanager
async def errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[CallRecord]:
    """Ends the call with the status of the error that the block raises; CancelledError and GeneratorExit pass.

    An error that is not a SteerError is logged, and the client receives EngineFailed (INTERNAL). The block receives the
    record of the call. A handler that sends several responses opens the call before the first of them.
    """
    call = current_call()
    call.begin()
    try:
        yield call
        await call.open(context)
    except SteerError as error:
        if error.reason == "MALFORMED":
            _malformed.log(context)
        await _abort(context, call, error)
    except Exception as error:
        # The places without the message: the text of an unexpected error may hold a prompt.
        log_event(logger, logging.ERROR, "call_failed", f"a call failed unexpectedly with {places_of(error)}")
        await _abort(context, call, EngineFailed("the server failed", reason="INTERNAL"))
    except (asyncio.CancelledError, GeneratorExit):
        call.note_gone(context)
        raise
    finally:
        call.finish()
        log_call(call)
        if call.span is not None:
            call.span.end(call)


async def _abort(context: grpc.aio.ServicerContext, call: CallRecord, error: SteerError) -> None:
    try:
        await context.abort_with_status(call.status(error))
    except grpc.aio.UsageError:  # a CallEnd has ended the call in the same moment
        raise asyncio.CancelledError from None
