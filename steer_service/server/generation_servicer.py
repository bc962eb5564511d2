"""GenerationService: requests come in, events go out."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

import grpc

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, SharedMemoryFallback
from steer_service.core.errors import EngineFailed, NotFound, OverBudget, Unsupported
from steer_service.core.events import CaptureBlock, CaptureHeld, Event, OutputFinished, Started
from steer_service.core.request import GenerateRequest
from steer_service.server.admission import ActiveRequest, Admission
from steer_service.server.capture_store import CaptureStore, StoredCapture, blocks_of
from steer_service.server.client_id import client_id_of
from steer_service.server.metrics import CaptureMetrics
from steer_service.server.shared_memory_sessions import SharedMemorySessions
from steer_service.server.slow_readers import SendTimeout
from steer_service.server.status import errors_as_status
from steer_service.server.vector_store import VectorStore, VectorUse
from steer_service.wire import generation_pb2
from steer_service.wire.blocks import Lease
from steer_service.wire.events import EventWriter, Response
from steer_service.wire.generation_pb2_grpc import GenerationServiceServicer
from steer_service.wire.request import request_from_proto
from steer_service.wire.steering import carries_vectors, named_vectors
from steer_service.wire.stored_capture import StoredCaptureNotice

SESSION_FIELD = "capture.shared_memory_session"

_REFUSED = {
    SharedMemoryFallback.NO_SESSION: "the request has no session token from ConfirmSharedMemory",
    SharedMemoryFallback.SESSION_ENDED: "its session is unknown or has ended",
    SharedMemoryFallback.SWITCHED_OFF: "this server hands out no shared memory",
}


class GenerationServicer(GenerationServiceServicer):
    """Serves Generate and Cancel around whatever backend `admission` has."""

    def __init__(
        self,
        admission: Admission,
        store: CaptureStore,
        vectors: VectorStore,
        sessions: SharedMemorySessions,
        metrics: CaptureMetrics,
        send_timeout: SendTimeout,
        on_engine_death: Callable[[], None],
    ) -> None:
        self._admission = admission
        self._store = store
        self._vectors = vectors
        self._sessions = sessions
        self._metrics = metrics
        self._send_timeout = send_timeout
        self._on_engine_death = on_engine_death

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[Response, None]:
        """Streams the events of one request; closing the stream aborts it."""
        # An async generator: gRPC ends it in either of two ways, CancelledError while it awaits the engine and
        # GeneratorExit while it waits for a slow reader. Both pass, and release everything on their way.
        async with errors_as_status(context):
            backend = self._admission.backend  # a server that is not ready says so before it reads the request
            client_id = client_id_of(context)
            named = self._vectors.named(client_id, named_vectors(request.steering))
            asked = replace(request_from_proto(request, named), client_id=client_id)
            delivered, fallback = self._deliverable(asked)
            with (
                self._vectors.using(client_id, named, carries_vectors(request.steering)) as vectors,
                self._admission.admit(delivered) as active,
                self._kept_if_complete(active.request, vectors) as kept,
                self._send_timeout.sender() as sending,
            ):
                writer = _writer_for(active, backend.info)
                active.events = backend.submit(active.request)
                async with aclosing(active):
                    try:
                        async for event in active.events:
                            for response in self._responses(event, writer, kept, fallback):
                                active.is_sending = True
                                with sending:
                                    yield response
                                active.is_sending = False
                                active.check_running()
                    except EngineFailed as error:
                        if error.reason == "ENGINE_DIED":
                            self._on_engine_death()
                        raise
                    except OverBudget as error:
                        self._metrics.count("refused", error.asked_bytes)
                        raise
                kept.is_complete = True

    async def Cancel(
        self, request: generation_pb2.CancelRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.CancelResponse:
        """Stops the request whose token is given, if it is running."""
        async with errors_as_status(context):
            return generation_pb2.CancelResponse(cancelled=self._admission.cancel(request.cancel_token))

    def _deliverable(self, request: GenerateRequest) -> tuple[GenerateRequest, SharedMemoryFallback | None]:
        """The request as it can be served, and why not as it prefers; raises Unsupported for what it requires."""
        capture = request.capture
        if capture is None or not capture.delivery.is_shared:
            return request, None
        fallback = self._fallback(capture.shared_memory_session, request.client_id)
        if fallback is None:
            return request, None
        if capture.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED:
            raise Unsupported(
                f"captures cannot go through shared memory: {_REFUSED[fallback]}",
                reason="NO_SHARED_MEMORY",
                field="capture.delivery",
            )
        return replace(request, capture=replace(capture, delivery=CaptureDelivery.INLINE)), fallback

    def _fallback(self, session: bytes, client_id: str) -> SharedMemoryFallback | None:
        if not self._sessions.is_on:
            return SharedMemoryFallback.SWITCHED_OFF
        if not session:
            return SharedMemoryFallback.NO_SESSION
        return None if self._sessions.holds(session, client_id) else SharedMemoryFallback.SESSION_ENDED

    @contextmanager
    def _kept_if_complete(self, request: GenerateRequest, vectors: VectorUse) -> Iterator["_Kept"]:
        """Captures that the request leaves in the store stay there only if its whole answer was sent."""
        kept = _Kept(request, vectors)
        try:
            yield kept
        finally:
            if not kept.is_complete:
                for stored in kept.captures:
                    self._store.release(stored.key, request.client_id)

    def _responses(
        self, event: Event, writer: EventWriter, kept: "_Kept", fallback: SharedMemoryFallback | None
    ) -> Iterator[Response]:
        match event:
            case CaptureHeld():
                yield from self._hand_over(event, writer, kept)
            case CaptureBlock():
                yield from self._metrics.counted(writer.responses(event))
            case Started():
                stored = kept.vectors.keep(kept.request.steering)
                started = replace(event, shared_memory_fallback=fallback, vectors_stored=stored)
                for response in writer.responses(started):
                    if isinstance(response, generation_pb2.GenerateResponse):
                        self._metrics.count("reserved", response.started.capture_bytes_limit)
                    yield response
            case _:
                if isinstance(event, OutputFinished) and not kept.captures:  # those were counted when they came
                    self._metrics.count("written", event.receipt.bytes_captured)
                yield from writer.responses(event)

    def _hand_over(self, event: CaptureHeld, writer: EventWriter, kept: "_Kept") -> Iterator[Response]:
        capture, client_id = kept.request.capture, kept.request.client_id
        assert capture is not None
        self._metrics.count("written", event.held.metadata.total_bytes)
        if not capture.delivery.is_shared:
            stored = kept.add(self._store.put(event, client_id, release_token=capture.release_token))
            yield writer.held(
                StoredCaptureNotice(
                    capture_id=stored.key,
                    output_index=event.output_index,
                    metadata=event.held.metadata,
                    expires_at=stored.expires_at,
                )
            )
            return
        if not self._sessions.holds(capture.shared_memory_session, client_id):
            self._store.release(self._store.put(event, client_id).key, client_id)
            raise NotFound("the shared-memory session ended", reason="SESSION_ENDED", field=SESSION_FIELD)
        session, release_token = capture.shared_memory_session, capture.release_token
        stored = kept.add(self._store.put(event, client_id, session, release_token))
        place = stored.held.segment
        assert place is not None, "a server's backend captures into segments"
        lease = Lease(token=stored.key.encode(), segment_name=place.name, expires_at=stored.expires_at)
        blocks = list(blocks_of(stored))
        yield from writer.shared(blocks, [place.offsets[block.layer, block.site] for block in blocks], lease)
        self._metrics.count("delivered", event.held.metadata.total_bytes)
        if not event.held.metadata.total_bytes:  # nothing was handed out: nobody would ever release it
            self._store.release(stored.key, client_id)


@dataclass(slots=True)
class _Kept:
    """What one request leaves in the stores."""

    request: GenerateRequest
    """The request."""
    vectors: VectorUse
    """The stored vectors that it uses."""
    captures: list[StoredCapture] = field(default_factory=list)
    """Its outputs' captures."""
    is_complete: bool = False
    """Its whole answer was sent."""

    def add(self, stored: StoredCapture) -> StoredCapture:
        """Notes `stored` and returns it."""
        self.captures.append(stored)
        return stored


def _writer_for(active: ActiveRequest, info: ModelInfo) -> EventWriter:
    capture = active.request.capture
    if capture is None:
        return EventWriter(cancel_token=active.cancel_token)
    itemsize = dtype_from_name(capture.dtype or info.dtype).itemsize
    return EventWriter(
        capture.max_chunk_bytes,
        cancel_token=active.cancel_token,
        capture_row_bytes=len(capture.layers) * len(capture.site.parts) * info.hidden_size * itemsize,
        capture_positions=capture.positions,
    )
