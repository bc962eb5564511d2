"""Where errors become statuses: once, at the edge."""

import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.wire.errors import status_from_error

logger = logging.getLogger(__name__)


@asynccontextmanager
async def errors_as_status(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the call with the status of any error raised inside; cancellation passes."""
    try:
        yield
    except SteerError as error:
        await context.abort_with_status(status_from_error(error))
    except Exception as error:
        _log(error)
        await context.abort_with_status(status_from_error(EngineFailed("the server failed", reason="INTERNAL")))


def _log(error: Exception) -> None:
    # Where it happened but not what it says: the text of an unexpected error may hold a prompt.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a call failed unexpectedly with %s\n%s", type(error).__name__, frames)
