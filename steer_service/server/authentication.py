"""Refuses calls of unknown clients: by a bearer token before anything of their message is read, or by a certificate."""

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from steer_service.core.errors import PermissionDenied, SteerError, Unauthenticated
from steer_service.core.log_lines import log_event
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.call_record import current_call
from steer_service.server.callers import Identity, ProxyRules, identify, identity_of_peer, set_rules
from steer_service.server.late_reading import reading_late
from steer_service.server.tokens import TokenClient, TokenFile

logger = logging.getLogger(__name__)

KEY = "authorization"
"""Metadata key of the token, as `Bearer TOKEN`."""

MOST_TOKEN_BYTES = 4096
LOG_EVERY_S = 60.0
"""Refusals are logged in one line at most per this time: anyone can cause them."""

NO_TOKEN = "the call needs a valid bearer token"
"""Text of every refusal of a caller that is not known: it says nothing of what is wrong."""

OPEN_METHODS = f"/{health.SERVICE_NAME}/"
"""Methods that need no token begin with this: a health check says nothing but the status."""

Handler = Any


class Authentication(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc.aio has no types
    """Names the client of each call by its token, or admits the names that the token file has without one."""

    def __init__(self, tokens: TokenFile | None, rules: ProxyRules, *, has_names: bool) -> None:
        """`tokens`: None if calls need none. `has_names`: whether peers may have names: certificates, or proxies."""
        self._tokens = tokens
        self._rules = rules
        self._has_names = has_names
        self._log_at = -math.inf
        self._unlogged = 0
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)  # reads no message, whatever the method

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        """The method's own handler for a client that is known."""
        set_rules(self._rules)
        if self._tokens is None or details.method.startswith(OPEN_METHODS):
            return await continuation(details)
        given = [value for key, value in details.invocation_metadata or () if key == KEY]
        client = self._client_of(self._tokens, given)
        if client is not None:
            identify(Identity(name=client.name))
            return await continuation(details)
        if given or not self._has_names:
            return self._refusal
        handler = await continuation(details)
        return self._refusal if handler is None else reading_late(handler, self._admit)

    def _client_of(self, tokens: TokenFile, given: list[Any]) -> TokenClient | None:
        if len(given) != 1 or not isinstance(given[0], str):
            return None
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MOST_TOKEN_BYTES:
            return None
        return tokens.client_of(token.encode())

    async def _refuse(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        await self._end(context, Unauthenticated(NO_TOKEN))

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """Ends the call unless the token file has the peer's name; only the call itself knows its peer."""
        assert self._tokens is not None
        try:
            identity = identity_of_peer(context)
        except SteerError as error:
            refusal: SteerError = error
        else:
            if identity is not None and self._tokens.has_certificate(identity.name):
                identify(identity)
                return
            refusal = (
                Unauthenticated(NO_TOKEN)
                if identity is None
                else PermissionDenied("this client may not use this server")
            )
        await self._end(context, refusal)

    async def _end(self, context: grpc.aio.ServicerContext, refusal: SteerError) -> None:
        """Ends the call, without a span; it is logged, or counted for the next line."""
        self._unlogged += 1
        if time.monotonic() >= self._log_at:
            log_event(
                logger,
                logging.WARNING,
                "unauthenticated",
                f"{self._unlogged} calls had no valid token, the last from {context.peer()}",
            )
            self._log_at, self._unlogged = time.monotonic() + LOG_EVERY_S, 0
        current_call().forgo_span()
        async with errors_as_status(context):
            raise refusal
