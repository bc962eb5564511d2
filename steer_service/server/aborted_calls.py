"""Ends a call with the gRPC status of its error: the only place where errors become statuses."""

import asyncio
import logging
import math
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.server.error_counts import counted_status

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
            logger.warning(
                "%d requests were not messages of the contract, the last from %s", self._unlogged, context.peer()
            )
            self._next_at, self._unlogged = time.monotonic() + self.EVERY_S, 0


_malformed = _MalformedLog()


@asynccontextmanager
async def errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status of the error that the block raises; CancelledError and GeneratorExit pass.

    An error that is not a SteerError is logged, and the client receives EngineFailed (INTERNAL).
    """
    try:
        yield
    except SteerError as error:
        if error.reason == "MALFORMED":
            _malformed.log(context)
        await _abort(context, error)
    except Exception as error:
        _log(error)
        await _abort(context, EngineFailed("the server failed", reason="INTERNAL"))


async def _abort(context: grpc.aio.ServicerContext, error: SteerError) -> None:
    try:
        await context.abort_with_status(counted_status(error))
    except grpc.aio.UsageError:  # a CallEnd has ended the call in the same moment
        raise asyncio.CancelledError from None


def _log(error: Exception) -> None:
    # Log the traceback without the message: the text of an unexpected error may hold a prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a call failed unexpectedly with %s\n%s", type(error).__name__, frames)
