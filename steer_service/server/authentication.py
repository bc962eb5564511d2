"""Refuses calls without a valid bearer token before anything of their message is read."""

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from steer_service.core.errors import Unauthenticated
from steer_service.server.callers import Identity, identify
from steer_service.server.error_counts import counted_status
from steer_service.server.tokens import TokenClient, TokenFile

logger = logging.getLogger(__name__)

KEY = "authorization"
"""Metadata key of the token, as `Bearer TOKEN`."""

MOST_TOKEN_BYTES = 4096
LOG_EVERY_S = 60.0
"""Refusals are logged in one line at most per this time: anyone can cause them."""

OPEN_METHODS = f"/{health.SERVICE_NAME}/"
"""Methods that need no token begin with this: a health check says nothing but the status."""

Handler = Any


class Authentication(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc.aio has no types
    """Names the client of each call by its token."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._log_at = -math.inf
        self._unlogged = 0
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)  # reads no message, whatever the method

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        """The method's own handler for a client that is known."""
        if not details.method.startswith(OPEN_METHODS):
            client = self._client_of(details.invocation_metadata)
            if client is None:
                return self._refusal
            identify(Identity(name=client.name))
        return await continuation(details)

    def _client_of(self, metadata: Any) -> TokenClient | None:
        given = [value for key, value in metadata or () if key == KEY]
        if len(given) != 1 or not isinstance(given[0], str):
            return None
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MOST_TOKEN_BYTES:
            return None
        return self._tokens.client_of(token.encode())

    async def _refuse(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        self._unlogged += 1
        if time.monotonic() >= self._log_at:
            logger.warning("%d calls had no valid token, the last from %s", self._unlogged, context.peer())
            self._log_at, self._unlogged = time.monotonic() + LOG_EVERY_S, 0
        await context.abort_with_status(counted_status(Unauthenticated("the call needs a valid bearer token")))
