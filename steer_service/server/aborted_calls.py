"""Ends a call with the gRPC status of its error: the only place where errors become statuses."""

import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.wire.status_codes import status_from_error

logger = logging.getLogger(__name__)


@asynccontextmanager
async def errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status of the error that the block raises; CancelledError and GeneratorExit pass.

    An error that is not a SteerError is logged, and the client receives EngineFailed (INTERNAL).
    """
    try:
        yield
    except SteerError as error:
        await context.abort_with_status(status_from_error(error))
    except Exception as error:
        _log(error)
        await context.abort_with_status(status_from_error(EngineFailed("the server failed", reason="INTERNAL")))


def _log(error: Exception) -> None:
    # Log the traceback without the message: the text of an unexpected error may hold a prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a call failed unexpectedly with %s\n%s", type(error).__name__, frames)
