"""GenerationService: receives requests and sends their events."""

import hmac
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import grpc

from steer_service.core.arrays import Float32Array
from steer_service.core.backend import Backend
from steer_service.core.capture import CaptureDelivery, SharedMemoryFallback
from steer_service.core.errors import EngineFailed, MissingVectors, OverBudget, Unsupported
from steer_service.core.events import Completed, Event
from steer_service.core.request import GenerateRequest
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.admission import ActiveRequest, Admission
from steer_service.server.call_end import CallEnd
from steer_service.server.call_record import GenerationRecord, TraceHeaders
from steer_service.server.callers import Caller, caller_of
from steer_service.server.capture_store import CaptureStore
from steer_service.server.client_limits import ClientLimits
from steer_service.server.config import ServerConfig
from steer_service.server.fair_queue import Load
from steer_service.server.heartbeats import Heartbeats
from steer_service.server.instance import Instance
from steer_service.server.metrics import ServerMetrics
from steer_service.server.quarantine import Quarantine
from steer_service.server.request_body import RequestBody
from steer_service.server.response_writer import SESSION_FIELD, ResponseWriter
from steer_service.server.shared_memory_sessions import SharedMemorySessions
from steer_service.server.slow_readers import Sender, SendTimeout
from steer_service.server.tokens import PERMISSIONS
from steer_service.server.vector_store import VectorStore, VectorUse
from steer_service.wire import generation_pb2
from steer_service.wire.events import Response, heartbeat
from steer_service.wire.field_paths import entries_named
from steer_service.wire.generation_pb2_grpc import GenerationServiceServicer
from steer_service.wire.message_scan import model_limits
from steer_service.wire.request import request_from_proto
from steer_service.wire.steering import carries_vectors, named_vectors

BYTES_PER_TOKEN = 4
"""Bytes of a text that count as one token while a request waits."""

BYTES_PER_TOKEN_ID = 2
"""Bytes of token ids that count as one."""

LEAST_BUDGET_S = 1e-6
"""Time budget of a request whose own passed while it waited for its place: it ends without a token."""

_FALLBACK_REASON = {
    SharedMemoryFallback.NO_SESSION: "the request has no session token from ConfirmSharedMemory",
    SharedMemoryFallback.SESSION_ENDED: "its session is unknown or has ended",
    SharedMemoryFallback.SWITCHED_OFF: "this server hands out no shared memory",
    SharedMemoryFallback.OTHER_INSTANCE: "its session is one of another server",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckedRequest:
    """A request that may be admitted."""

    request: GenerateRequest
    """The request as it can be served."""
    fallback: SharedMemoryFallback | None
    """Why its captures are sent inline although it prefers shared memory; None if they are not."""
    named_vectors: Mapping[bytes, Float32Array]
    """The stored vectors that it names, by digest."""
    carries_vectors: bool
    """True if it also carries vectors."""
    record: GenerationRecord
    """What is noted of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """An admitted request whose response stream is open."""

    active: ActiveRequest
    """The request's entry in the table of running requests."""
    events: AsyncGenerator[Event, None]
    """Its events from the backend."""
    writer: ResponseWriter
    """Turns them into responses."""
    sender: Sender
    """Goes around each `yield` of a response, for the send timeout."""


class GenerationServicer(GenerationServiceServicer):
    """Serves Generate and Cancel with the backend of `admission`."""

    def __init__(
        self,
        config: ServerConfig,
        admission: Admission,
        store: CaptureStore,
        vectors: VectorStore,
        sessions: SharedMemorySessions,
        metrics: ServerMetrics,
        send_timeout: SendTimeout,
        quarantine: Quarantine,
        on_engine_death: Callable[[Backend], float],
        instance: Instance,
        limits: ClientLimits,
    ) -> None:
        """`on_engine_death`: called for each request that met a dead engine; returns seconds until a retry helps."""
        self._config = config
        self._salt_key = secrets.token_bytes(32)
        self._admission = admission
        self._store = store
        self._vectors = vectors
        self._sessions = sessions
        self._metrics = metrics
        self._send_timeout = send_timeout
        self._quarantine = quarantine
        self._on_engine_death = on_engine_death
        self._instance = instance
        self._limits = limits

    async def Generate(self, body: RequestBody, context: grpc.aio.ServicerContext) -> AsyncGenerator[Response, None]:
        """Streams the events of one request; closing the response stream aborts it."""
        # gRPC ends this async generator in one of two ways: with CancelledError while it awaits the engine, or with
        # GeneratorExit while it waits for a slow reader. Both pass, and every block releases what it holds.
        async with errors_as_status(context) as record:
            end = CallEnd(context)
            done = record.generation = GenerationRecord(
                arrived_at=time.monotonic(), on_finished=self._metrics.count_finished
            )
            with entries_named() as layers:
                caller = caller_of(context)
                self._admission.check_room(caller)  # a refusal costs others little: their calls arrive behind it
                async with (
                    self._heartbeats(end, context) as heartbeats,
                    self._admission.place(caller, self._load_of(body), end),
                    self._admit(
                        self._check(body, caller, done, record.trace_headers, layers), caller, end, heartbeats.numbers
                    ) as call,
                ):
                    event = response = None
                    try:
                        async for event in call.events:
                            if isinstance(event, Completed):
                                heartbeats.stop()  # none follows the last response, however long the end takes
                            for response in call.writer.responses(event):
                                with call.sender:
                                    if heartbeats.pause():
                                        await heartbeats.wait_sent()
                                    if not end.is_open:
                                        await end.open()
                                    yield response
                                heartbeats.resume()
                    finally:
                        del event, response  # gRPC keeps the frame of an aborted call until the next garbage collection

    @asynccontextmanager
    async def _heartbeats(self, end: CallEnd, context: grpc.aio.ServicerContext) -> AsyncIterator[Heartbeats]:
        async def send(number: int) -> None:
            await end.open()
            await context.write(heartbeat(number))

        try:
            async with Heartbeats(send, self._config.heartbeat_s) as heartbeats:
                yield heartbeats
        finally:
            await end.wait_opened()

    async def Cancel(self, body: RequestBody, context: grpc.aio.ServicerContext) -> generation_pb2.CancelResponse:
        """Stops the request that has the given cancel token, if it is running."""
        async with errors_as_status(context):
            request = body.read(generation_pb2.CancelRequest)
            return generation_pb2.CancelResponse(
                cancelled=self._admission.cancel(request.cancel_token, caller_of(context))
            )

    def _load_of(self, body: RequestBody) -> Load:
        """What a request weighs in the queue; raises the SteerError of `scan` for bytes that are not parsed."""
        parts = body.scan(generation_pb2.GenerateRequest, model_limits(self._admission.backend.info))
        text = parts.get("text", 0) + parts.get("chat", 0)
        tokens = text // BYTES_PER_TOKEN + parts.get("token_ids", 0) // BYTES_PER_TOKEN_ID
        return Load(bytes=len(body), tokens=tokens)

    def _check(
        self, body: RequestBody, caller: Caller, record: GenerationRecord, trace: TraceHeaders, layers: list[int]
    ) -> _CheckedRequest:
        """Translates a message and decides how its captures are delivered; raises the SteerError that refuses it.

        `record` receives how long it has waited, `layers` the layers of the entries of its steering. `trace`: the trace
        context of what it causes in the engine.
        """
        waited_s = record.queue_wait_s = time.monotonic() - record.arrived_at
        self._metrics.queue_wait_s.observe(waited_s)
        message = body.parse(generation_pb2.GenerateRequest)
        for permission in PERMISSIONS:
            if message.HasField(permission):
                self._limits.check_allowed(caller.owner, permission)
        layers.extend(entry.layer for entry in message.steering.layers)
        named = self._vectors.named(caller.owner, named_vectors(message.steering))
        try:
            request = request_from_proto(message, named)
        except MissingVectors as error:
            error.instance = self._instance.name
            raise
        asked = self._isolated(
            replace(_less_wait(request, waited_s), client_id=caller.share, trace_headers=trace), caller
        )
        if caller.priority is not None and asked.priority is None and self._admission.has_priority:
            asked = replace(asked, priority=caller.priority)
        request, fallback = self._deliverable(asked, caller.owner)
        return _CheckedRequest(
            request=request,
            fallback=fallback,
            named_vectors=named,
            carries_vectors=carries_vectors(message.steering),
            record=record,
        )

    @asynccontextmanager
    async def _admit(
        self, checked: _CheckedRequest, caller: Caller, end: CallEnd, numbers: Iterator[int]
    ) -> AsyncIterator[_Call]:
        """Runs the request for the duration of the block; raises the SteerError of a refusal."""
        with (
            self._vectors.using(caller.owner, checked.named_vectors, checked.carries_vectors) as vectors,
            self._admission.admit(checked.request, caller, end) as active,
            self._writer(active, checked, vectors, numbers) as writer,
            self._send_timeout.sender(end) as sender,
        ):
            async with self._quarantine.turn(active.request), self._submit(active) as events:
                yield _Call(active=active, events=events, writer=writer, sender=sender)

    @contextmanager
    def _writer(
        self,
        active: ActiveRequest,
        checked: _CheckedRequest,
        vectors: VectorUse,
        numbers: Iterator[int],
    ) -> Iterator[ResponseWriter]:
        """Captures that the request leaves in the store stay there only if the block ends without an exception."""
        info = self._admission.open_backend.info
        checked.record.request = active.request
        writer = ResponseWriter(
            active,
            info,
            checked.fallback,
            vectors,
            self._store,
            self._sessions,
            self._metrics,
            numbers,
            self._instance.name,
            checked.record,
        )
        is_complete = False
        try:
            yield writer
            is_complete = True
        finally:
            if not is_complete:
                writer.release_captures()

    @asynccontextmanager
    async def _submit(self, active: ActiveRequest) -> AsyncIterator[AsyncGenerator[Event, None]]:
        """The backend's events, closed after the block; reports a dead engine and counts a request over budget."""
        backend = self._admission.open_backend
        active.events = backend.submit(active.request)
        async with aclosing(active):
            try:
                yield active.events
            except EngineFailed as error:
                if error.reason == "ENGINE_DIED":
                    active.end.claim(error)  # what ends all other requests does not end this one
                    error.retry_after_s = self._on_engine_death(backend)
                raise
            except OverBudget as error:
                self._metrics.count("refused", error.asked_bytes)
                raise

    def _isolated(self, request: GenerateRequest, caller: Caller) -> GenerateRequest:
        """The request with a salt that only this caller's requests have, if clients reuse no prompts of each other."""
        isolation = self._config.prefix_isolation
        if isolation == "none" or (isolation == "auto" and not caller.is_authenticated):
            return request
        named = f"{caller.namespace}\0{request.cache_salt}".encode()
        return replace(request, cache_salt=hmac.digest(self._salt_key, named, "sha256").hex())

    def _deliverable(self, request: GenerateRequest, owner: str) -> tuple[GenerateRequest, SharedMemoryFallback | None]:
        """The request as it can be served, and why that is not as it prefers.

        Raises Unsupported (NO_SHARED_MEMORY) if it requires shared memory and cannot have it; OtherInstance if that is
        because its session is one of another server.
        """
        capture = request.capture
        if capture is None or not capture.delivery.is_shared:
            return request, None
        fallback = self._fallback(capture.shared_memory_session, owner)
        if fallback is None:
            return request, None
        if capture.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED:
            self._instance.check_own(capture.shared_memory_session, SESSION_FIELD)
            raise Unsupported(
                f"captures cannot go through shared memory: {_FALLBACK_REASON[fallback]}",
                reason="NO_SHARED_MEMORY",
                field="capture.delivery",
            )
        return replace(request, capture=replace(capture, delivery=CaptureDelivery.INLINE)), fallback

    def _fallback(self, session: bytes, owner: str) -> SharedMemoryFallback | None:
        if not self._sessions.is_on:
            return SharedMemoryFallback.SWITCHED_OFF
        if not session:
            return SharedMemoryFallback.NO_SESSION
        if self._sessions.holds(session, owner):
            return None
        is_own = self._instance.is_own(session)
        return SharedMemoryFallback.SESSION_ENDED if is_own else SharedMemoryFallback.OTHER_INSTANCE


def _less_wait(request: GenerateRequest, waited_s: float) -> GenerateRequest:
    """The request with what is left of its time budget after a wait for its place."""
    budget_s = request.time_budget_s
    return request if budget_s is None else replace(request, time_budget_s=max(budget_s - waited_s, LEAST_BUDGET_S))
