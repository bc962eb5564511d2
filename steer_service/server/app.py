"""The server: all services on one address around one backend, from loading to the last drained request."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.log_lines import log_event
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.usage import BackendUsage
from steer_service.server.admission import Admission
from steer_service.server.authentication import Authentication
from steer_service.server.bind import Reservation, check_free, check_not_exposed, with_port
from steer_service.server.call_record import CallRecords
from steer_service.server.capture_servicer import CaptureServicer
from steer_service.server.capture_store import CaptureStore
from steer_service.server.certificates import Certificates
from steer_service.server.client_limits import ClientLimits
from steer_service.server.config import ServerConfig
from steer_service.server.engine_series import EngineSeries
from steer_service.server.error_counts import ErrorCounts
from steer_service.server.generation_servicer import GenerationServicer
from steer_service.server.health import Health, HealthServicer
from steer_service.server.health_listener import HealthListener
from steer_service.server.http_listener import HttpListener
from steer_service.server.info_servicer import API_REVISION, InfoServicer
from steer_service.server.instance import Instance
from steer_service.server.metrics import ServerMetrics
from steer_service.server.pulse import Pulse
from steer_service.server.quarantine import Quarantine
from steer_service.server.services import SERVICES, add_health, add_reflection, add_service
from steer_service.server.shared_memory_sessions import SharedMemorySessions
from steer_service.server.slow_readers import SendTimeout
from steer_service.server.state_series import StateSeries, build_labels
from steer_service.server.tokenizer_servicer import TokenizerServicer
from steer_service.server.tokens import TokenFile
from steer_service.server.vector_servicer import VectorServicer
from steer_service.server.vector_store import VectorStore

if TYPE_CHECKING:
    from steer_service.server.tracing import Tracing

logger = logging.getLogger(__name__)

WATCH_S = 0.1
"""How often the server checks that the engine is alive, in seconds."""

REFRESH_S = 1.0
"""How often the server looks whether the files of tokens and certificates have changed, in seconds."""

SETTLE_S = 0.75
"""Time for stopped requests to free what they hold, and again for gRPC to send their last messages, in seconds."""


class _WithoutMetadata(logging.Filter):
    """Drops gRPC's lines that quote metadata which is not text: it may be a secret, and anyone can cause them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for such a line."""
        return "Invalid encoding" not in str(record.msg)


logging.getLogger("grpc._cython.cygrpc").addFilter(_WithoutMetadata())


class SteerServer:
    """Serves one backend; create it in the event loop in which it runs.

    `listen` binds the address; until `open`, requests are refused with LOADING, or connections with
    `listen_when_ready`. `open` admits requests once the backend has completed a warm-up request. `drain` stops the
    server.
    """

    def __init__(self, config: ServerConfig, tokens: TokenFile | None = None) -> None:
        """`tokens`: of the clients, if they were read already."""
        self.config = config
        """The server's settings."""
        self.address = config.address
        """The address it listens on; has the real port once `listen` has returned."""
        self.health_address = config.health_address
        """The address that serves health checks alone, likewise; "" for none."""
        self.engine_died = asyncio.Event()
        """Set when the engine has died, until `open`; meanwhile health checks report NOT_SERVING."""
        self.instance = Instance(config.instance)
        """Its name among the servers behind a balancer."""
        self.restart_s = config.retry_after_s
        """Seconds that starting the engine again is expected to take, for clients that ask when to retry."""
        self.metrics = ServerMetrics()
        """The server's series for Prometheus."""
        self._tracing = _tracing(config.otlp_traces_endpoint, self.instance.run_id)
        self._tokens = tokens or (TokenFile(config.token_file) if config.token_file else None)
        self._limits = ClientLimits(config, self._tokens)
        self._admission = Admission(config, self._limits, self.instance)
        # A capture that is being fetched need not expire if the send timeout ends fetches whose client has stopped.
        self._store = CaptureStore(
            config.shm_ttl, self.metrics.count, keeps_read=config.send_timeout_s > 0, instance=self.instance
        )
        self._send_timeout = SendTimeout(config.send_timeout_s)
        self._sessions = SharedMemorySessions(config.segments if config.shared_memory else None, instance=self.instance)
        self._quarantine = Quarantine()
        self._vectors = VectorStore(
            config.vector_store_bytes, config.client_vector_bytes, limit_of=self._limits.vector_bytes
        )
        self._health = Health(SERVICES)
        self._pulse = Pulse()
        self._health_listener = HealthListener(self._health, self._pulse)
        self._http = HttpListener(self.metrics.registry, self._health, self._pulse)
        self.metrics.registry.register(ErrorCounts())
        self.metrics.registry.register(EngineSeries(lambda: self._admission.waiting))
        self.metrics.registry.register(self._state_series())
        self.metrics.show_requests(lambda: self._admission.in_places, lambda: self._admission.waiting)
        self._backend: Backend | None = None
        self._died_at = 0.0
        self._server: grpc.aio.Server | None = None
        self._captures: CaptureServicer | None = None
        self._certificates: Certificates | None = None
        self._reservation: Reservation | None = None
        self._stop_now = asyncio.Event()
        self._watching_engine: asyncio.Task[None] | None = None
        self._watching_readers: asyncio.Task[None] | None = None
        self._watching_files: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        """The number of running requests."""
        return self._admission.running

    async def listen(self) -> str:
        """Binds the address and serves health checks; returns the address.

        With `listen_when_ready`, the address is reserved, and `open` binds it.

        Raises EngineFailed if the address is not free. Raises InvalidRequest or Overloaded if no capture memory can be
        created.
        """
        check_free(self.config.address)
        if self.config.certificates is None and not self.config.insecure:
            check_not_exposed(self.config.address)
        self.config.segments.check()  # also removes segments of servers that died, before anything else
        server = grpc.aio.server(
            options=self.config.channel_options(),
            compression=grpc.Compression.NoCompression,
            interceptors=[
                CallRecords(self._tracing, self.instance),
                Authentication(
                    self._tokens,
                    self.config.proxy_rules,
                    has_names=bool(self.config.tls_client_ca or self.config.trusted_proxy),
                ),
            ],
        )
        self._add_services(server)
        self._server = server
        files = self.config.certificates
        self._certificates = Certificates(files) if files is not None else None
        if self.config.metrics_port:
            self._listen_for_metrics()
        if self.config.health_address:
            self.health_address = self._health_listener.listen(self.config.health_address)
        if self.config.listen_when_ready:
            self._reservation = Reservation(self.config.address)
            self.address = self._reservation.address
        else:
            await self._accept()
        self._watching_readers = asyncio.ensure_future(self._send_timeout.run())
        self._watching_files = asyncio.ensure_future(_refresh(self._tokens, self._certificates))
        return self.address

    async def _accept(self) -> None:
        """Binds the address and accepts connections; raises EngineFailed if it is not free."""
        assert self._server is not None, "`listen` was called"
        check_free(self.address)  # gRPC would remove the Unix socket of another server
        try:
            with self.config.socket_permissions.applied(self.address):
                if self._certificates is not None:
                    port = self._server.add_secure_port(self.address, self._certificates.credentials())
                else:
                    port = self._server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise EngineFailed(f"cannot listen on {self.address}", reason="ADDRESS_UNAVAILABLE") from error
        await self._server.start()
        self.address = with_port(self.address, port)

    def _state_series(self) -> StateSeries:
        return StateSeries(
            build=build_labels(API_REVISION),
            health=self._health,
            pulse=self._pulse,
            store=self._store,
            sessions=self._sessions,
            vectors=self._vectors,
            segments=self.config.segments,
            usage=self._usage,
            expiries=lambda: self._certificates.expiries if self._certificates is not None else {},
        )

    def _usage(self) -> BackendUsage | None:
        backend = self._backend
        return backend.usage if backend is not None else None

    def _listen_for_metrics(self) -> None:
        host, port = self.config.metrics_host, self.config.metrics_port
        try:
            self._http.listen(port, host)
            self._pulse.start()
        except OSError as error:
            raise EngineFailed(f"cannot listen on {host}:{port} for metrics", reason="ADDRESS_UNAVAILABLE") from error

    async def open(self, backend: Backend) -> None:
        """Generates two tokens with `backend` and then admits requests; from now on `drain` closes the backend.

        Raises the errors of that generation. Once the backend has died, `close_backend` makes room for another one.
        """
        await self._stop_watching_engine()
        self._backend = backend
        await _warm_up(backend)
        self.engine_died.clear()
        if backend.start_proof is not None:
            self.metrics.show_proof(backend.start_proof)
        self._admission.open(backend)
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None
            await self._accept()
        self._health.set(is_serving=True)
        self._watching_engine = asyncio.ensure_future(self._watch_engine(backend))

    async def close_backend(self) -> None:
        """Closes the backend. What its requests left in the stores of the server stays."""
        await self._stop_watching_engine()
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    async def _stop_watching_engine(self) -> None:
        if self._watching_engine is not None:
            self._watching_engine.cancel()
            await asyncio.wait([self._watching_engine])

    def stop_now(self) -> None:
        """Ends the grace period of running requests, for a `drain` that runs or will run."""
        self._stop_now.set()

    async def drain(self) -> None:
        """Stops serving in order; the backend is closed at the end.

        Health checks report NOT_SERVING, and after `lame_duck_s` new requests are refused. What runs has `grace_s` to
        finish: requests, fetches, and captures that a client has just received the id or the segment of. The rest is
        ended with DRAINING.
        """
        log_event(logger, logging.INFO, "stopping", "", {"running": self.running, "waiting": self._admission.waiting})
        self._health.end()
        await _first_of(self.config.lame_duck_s, self._stop_now.wait())
        self._admission.drain()
        await _first_of(self.config.grace_s, self._finish(), self._stop_now.wait())
        stopped = EngineFailed("the server stopped", reason="DRAINING")
        self._admission.stop_all(stopped)
        if self._captures is not None:
            self._captures.stop_all(stopped)
        await _first_of(SETTLE_S, self._admission.wait_idle())
        self._sessions.close()
        for watching in (self._watching_readers, self._watching_files):
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])
        if self._reservation is not None:
            self._reservation.release()
        if self._server is not None:
            await self._server.stop(0 if self._stop_now.is_set() else SETTLE_S)
        self._store.close()
        await asyncio.to_thread(self._http.close)  # waits for its thread
        await self._health_listener.close()
        await self._pulse.stop()
        await self.close_backend()
        if self._tracing is not None:
            await self._tracing.close()
        log_event(logger, logging.INFO, "stopped")

    async def _finish(self) -> None:
        """Returns when no request runs and all captures have reached their clients."""
        await self._admission.wait_idle()
        await self._store.wait_handed_over()

    def _add_services(self, server: grpc.aio.Server) -> None:
        generation = GenerationServicer(
            self.config,
            self._admission,
            self._store,
            self._vectors,
            self._sessions,
            self.metrics,
            self._send_timeout,
            self._quarantine,
            self._note_engine_death,
            self.instance,
            self._limits,
        )
        captures = self._captures = CaptureServicer(
            self.config,
            self._admission,
            self._store,
            self._sessions,
            self.metrics,
            self._send_timeout,
            self._limits,
            self.instance,
        )
        add_service("steer.v1.GenerationService", generation, server)
        add_service(
            "steer.v1.VectorService",
            VectorServicer(self._admission, self._vectors, self.instance, self._limits),
            server,
        )
        add_service("steer.v1.CaptureService", captures, server)
        add_service("steer.v1.TokenizerService", TokenizerServicer(self._admission), server)
        add_service("steer.v1.InfoService", InfoServicer(self.config, self._admission, self.instance), server)
        add_health(HealthServicer(self._health), server)
        add_reflection(server)

    async def _watch_engine(self, backend: Backend) -> None:
        while backend.is_alive:
            await asyncio.sleep(WATCH_S)
        self._note_engine_death(backend)

    def _note_engine_death(self, backend: Backend) -> float:
        """Ends all requests and refuses new ones; returns the seconds until the engine should serve again.

        Does nothing if `backend` was replaced meanwhile: its last requests may end after that.
        """
        if backend is self._backend and not self.engine_died.is_set():
            self.engine_died.set()
            self._died_at = asyncio.get_running_loop().time()
            log_event(logger, logging.ERROR, "engine_died", "the engine died", {"requests": self.running})
            self._health.set(is_serving=False)
            self._quarantine.note_death(self._admission.in_engine())
            self._admission.close(self._restarting)
            self._admission.stop_all(
                EngineFailed(
                    "the engine died; requests in flight are lost",
                    reason="ENGINE_DIED",
                    retry_after_s=self._retry_after_s(),
                )
            )
        return self._retry_after_s()

    def _restarting(self) -> EngineFailed:
        return EngineFailed(
            "the engine died and is starting again", reason="ENGINE_RESTARTING", retry_after_s=self._retry_after_s()
        )

    def _retry_after_s(self) -> float:
        passed_s = asyncio.get_running_loop().time() - self._died_at
        return max(self.config.retry_after_s, self.restart_s - passed_s)


def _tracing(endpoint: str, instance_id: str) -> "Tracing | None":
    """What makes the spans of a server's calls; imports OpenTelemetry, if there is an endpoint."""
    if not endpoint:
        return None
    try:
        from steer_service.server.tracing import Tracing

        return Tracing(endpoint, instance_id)
    except ModuleNotFoundError as error:
        message = f"traces need {error.name}; run: pip install 'steerllm[otel]'"
        raise InvalidRequest(message, field="otlp_traces_endpoint") from error


async def _refresh(*files: TokenFile | Certificates | None) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        for file in files:
            if file is not None:
                file.refresh()


async def _warm_up(backend: Backend) -> None:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(0,)),
        sampling=SamplingOptions(max_tokens=2, ignore_eos=True),
        request_id="warm-up",
    )
    async with aclosing(backend.submit(request)) as events:
        async for _ in events:
            pass


async def _first_of(timeout_s: float, *waits: Coroutine[Any, Any, object]) -> None:
    """Returns when the first of `waits` ends, or after `timeout_s`."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
