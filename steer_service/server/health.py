"""Health checks (`grpc.health.v1`): what they say, and the service beside all others.

grpcio's servicer loses watchers: when one of two Watch calls for a service ends, the other hears of no change any more.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2

from steer_service.core.errors import NotFound, Overloaded
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.request_body import RequestBody

MAX_WATCHERS = 1024
"""Calls of Watch at once: they need no credentials, and last as long as their client likes."""

Status: TypeAlias = health_pb2.HealthCheckResponse.ServingStatus
"""A status of health: SERVING, NOT_SERVING or SERVICE_UNKNOWN."""


class Health:
    """What health checks say: one status for the server and all its services. May be read from any thread."""

    def __init__(self, services: Iterable[str]) -> None:
        """`services`: the full names that a check may ask for, besides "" for the server."""
        self._services = frozenset(("", *services))
        self._is_serving = False
        self._is_ended = False
        self.changed = asyncio.Event()
        """Set at the next change, when another event takes its place."""

    @property
    def status(self) -> Status:
        """The status of every service."""
        return (
            health_pb2.HealthCheckResponse.SERVING if self._is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )

    def knows(self, service: str) -> bool:
        """True for "" and for the name of a service."""
        return service in self._services

    def set(self, *, is_serving: bool) -> None:
        """Says so from now on; does nothing after `end`."""
        if is_serving != self._is_serving and not (self._is_ended and is_serving):
            self._is_serving = is_serving
            changed, self.changed = self.changed, asyncio.Event()
            changed.set()

    def end(self) -> None:
        """Says NOT_SERVING for ever."""
        self._is_ended = True
        self.set(is_serving=False)


class HealthServicer:
    """Serves Check and Watch."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._watchers = 0

    async def Check(self, body: RequestBody, context: grpc.aio.ServicerContext) -> health_pb2.HealthCheckResponse:
        """Returns the status of a service."""
        async with errors_as_status(context):
            return checked(self._health, body, self._health.status)

    async def Watch(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Streams the status of a service now and after each change."""
        async with errors_as_status(context) as call, self._watching():
            is_known = self._health.knows(body.read(health_pb2.HealthCheckRequest).service)
            sent: Status | None = None
            while True:
                changed = self._health.changed
                status = self._health.status if is_known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                if status != sent:
                    sent = status
                    await call.open(context)
                    yield health_pb2.HealthCheckResponse(status=status)
                await changed.wait()

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Counts a watcher for the duration of the block; raises Overloaded if there are too many."""
        if self._watchers >= MAX_WATCHERS:
            raise Overloaded(f"{self._watchers} calls watch the health, at most {MAX_WATCHERS}", retry_after_s=1.0)
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1


def checked(health: Health, body: RequestBody, status: Status) -> health_pb2.HealthCheckResponse:
    """The response to a Check while the server has `status`; raises InvalidRequest, or NotFound (UNKNOWN_SERVICE)."""
    if not health.knows(body.read(health_pb2.HealthCheckRequest).service):
        raise NotFound("the server has no service of this name", reason="UNKNOWN_SERVICE", field="service")
    return health_pb2.HealthCheckResponse(status=status)
