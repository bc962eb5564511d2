"""Metadata that every response has: in its headers, or, if the call is refused, beside the status."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from steer_service.server.instance import Instance

Metadata = tuple[tuple[str, str], ...]

_headers: ContextVar[Metadata] = ContextVar("headers", default=())
"""Of the running call; each call runs in a task of its own."""


def response_headers() -> Metadata:
    """The metadata of the running call's response; () in a server that sets none."""
    return _headers.get()


class ResponseHeaders(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc.aio has no types
    """Sets the metadata of each call before anything can refuse it."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's own handler."""
        _headers.set((self._instance.header,))
        return await continuation(details)
