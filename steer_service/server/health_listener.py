"""Health checks on an address of their own, in a thread of their own, for probes of an orchestrator.

All other calls share one event loop: a check waits there while thousands of new calls arrive.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.server.bind import check_free, with_port
from steer_service.server.health import Health, checked
from steer_service.server.pulse import Pulse
from steer_service.server.request_body import RequestBody
from steer_service.server.services import add_health
from steer_service.wire.status_codes import status_from_error

THREADS = 2
"""Threads that answer checks."""

MAX_CALLS = 64
"""Checks at once; more are refused."""

MAX_BYTES = 4096
"""Bytes of a request at most."""


class HealthListener:
    """Answers Check; Watch is not offered, for which clients have the server's main address."""

    def __init__(self, health: Health, pulse: Pulse) -> None:
        """`pulse`: while it is stale, the status is NOT_SERVING."""
        self._health = health
        self._pulse = pulse
        self._server: grpc.Server | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="steer-health")

    def listen(self, address: str) -> str:
        """Listens until `close`; returns the address with its port. Raises EngineFailed (ADDRESS_UNAVAILABLE)."""
        check_free(address)
        options = (
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_BYTES),
            ("grpc.max_concurrent_streams", MAX_CALLS),
        )
        server = grpc.server(self._threads, options=options, maximum_concurrent_rpcs=MAX_CALLS)
        add_health(self, server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise EngineFailed(f"cannot listen on {address} for health", reason="ADDRESS_UNAVAILABLE") from error
        self._pulse.start()
        server.start()
        self._server = server
        return with_port(address, port)

    async def close(self) -> None:
        """Ends what `listen` began."""
        if self._server is not None:
            await asyncio.to_thread(self._server.stop(0).wait)
        self._threads.shutdown()

    def Check(self, body: RequestBody, context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
        """Returns the status of a service."""
        try:
            return checked(self._health, body, self._status)
        except SteerError as error:
            context.abort_with_status(status_from_error(error))
            raise

    @property
    def _status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        return health_pb2.HealthCheckResponse.NOT_SERVING if self._pulse.is_stale else self._health.status
