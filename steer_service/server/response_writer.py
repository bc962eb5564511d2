"""Writes the events of one Generate call as responses, counts their capture bytes and stores held captures."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import SharedMemoryFallback
from steer_service.core.errors import NotFound
from steer_service.core.events import CaptureBlock, CaptureHeld, Event, OutputFinished, Started, TokenDelta
from steer_service.server.admission import ActiveRequest
from steer_service.server.call_record import GenerationRecord
from steer_service.server.capture_store import CaptureStore, StoredCapture, blocks_of
from steer_service.server.metrics import ServerMetrics
from steer_service.server.shared_memory_sessions import SharedMemorySessions
from steer_service.server.vector_store import VectorUse
from steer_service.wire import generation_pb2
from steer_service.wire.blocks import Lease
from steer_service.wire.events import EventWriter, Response
from steer_service.wire.stored_capture import StoredCaptureNotice

SESSION_FIELD = "capture.shared_memory_session"


class ResponseWriter:
    """Turns the events of one request into its responses, and remembers what the request put into the stores."""

    def __init__(
        self,
        active: ActiveRequest,
        info: ModelInfo,
        fallback: SharedMemoryFallback | None,
        vectors: VectorUse,
        store: CaptureStore,
        sessions: SharedMemorySessions,
        metrics: ServerMetrics,
        numbers: Iterator[int],
        instance: str,
        record: GenerationRecord,
    ) -> None:
        """`instance`: the server's name. `record` receives what the request did."""
        self._record = record
        self._model = info.name
        self._token_at: dict[int, float] = {}  # output -> time of its last tokens
        self._request = active.request
        self._owner = active.caller.owner
        self._fallback = fallback
        self._instance = instance
        self._vectors = vectors
        self._store = store
        self._sessions = sessions
        self._metrics = metrics
        self._writer = _event_writer(active, info, numbers)
        self._stored: list[StoredCapture] = []

    def responses(self, event: Event) -> Iterable[Response]:
        """The responses of `event`, to be iterated once.

        Raises NotFound (SESSION_ENDED) for captures whose shared-memory session ended meanwhile.
        """
        if isinstance(event, TokenDelta):  # by far the most frequent
            self._note_tokens(event)
            return self._writer.responses(event)
        return self._others(event)

    def _others(self, event: Event) -> Iterator[Response]:
        self._record.note(event, self._model)
        match event:
            case CaptureHeld():
                yield from self._deliver_held(event)
            case CaptureBlock():
                yield from self._metrics.counted(self._writer.responses(event))
            case Started():
                yield self._started(event)
            case _:
                if isinstance(event, OutputFinished):
                    self._metrics.steered_rows.inc(event.receipt.rows_steered)
                    if not self._stored:  # stored captures were counted earlier
                        self._metrics.count("written", event.receipt.bytes_captured)
                yield from self._writer.responses(event)

    def _note_tokens(self, event: TokenDelta) -> None:
        now, last = time.monotonic(), self._token_at.get(event.output_index)
        if last is not None:
            self._metrics.token_latency.observe(now - last)
        elif not self._token_at:
            first_token_s = self._record.first_token_s = now - self._record.arrived_at
            self._metrics.first_token_s.observe(first_token_s)
        self._token_at[event.output_index] = now
        self._record.generated_tokens += len(event.token_ids)

    def release_captures(self) -> None:
        """Frees all captures that the request put into the store."""
        for stored in self._stored:
            self._store.release(stored.key, self._owner)

    def _started(self, event: Started) -> Response:
        are_stored = self._vectors.keep(self._request.steering)
        started = replace(
            event, shared_memory_fallback=self._fallback, vectors_stored=are_stored, instance=self._instance
        )
        (response,) = self._writer.responses(started)
        assert isinstance(response, generation_pb2.GenerateResponse)
        self._metrics.count("reserved", response.started.capture_bytes_limit)
        return response

    def _deliver_held(self, event: CaptureHeld) -> Iterator[Response]:
        capture = self._request.capture
        assert capture is not None
        self._metrics.count("written", event.held.metadata.total_bytes)
        if capture.delivery.is_shared:
            yield from self._lease(event, capture.shared_memory_session, capture.release_token)
            return
        stored = self._put(event, release_token=capture.release_token)
        yield self._writer.held(
            StoredCaptureNotice(
                capture_id=stored.key,
                output_index=event.output_index,
                metadata=event.held.metadata,
                instance=self._instance,
                expires_at=stored.expires_at,
                expires_in_s=stored.expires_in_s,
            )
        )

    def _lease(self, event: CaptureHeld, session: bytes, release_token: bytes) -> Iterator[Response]:
        """Hands the captures out in shared memory, leased to the session."""
        if not self._sessions.holds(session, self._owner):
            self._store.release(self._store.put(event, self._owner).key, self._owner)
            raise NotFound("the shared-memory session ended", reason="SESSION_ENDED", field=SESSION_FIELD)
        stored = self._put(event, session, release_token)
        place = stored.held.segment
        assert place is not None, "a server's backend captures into segments"
        lease = Lease(
            token=stored.key.encode(),
            segment_name=place.name,
            expires_at=stored.expires_at,
            expires_in_s=stored.expires_in_s,
        )
        blocks = list(blocks_of(stored))
        yield from self._writer.shared(blocks, [place.offsets[block.layer, block.site] for block in blocks], lease)
        self._metrics.count("delivered", event.held.metadata.total_bytes)
        if not event.held.metadata.total_bytes:  # no lease was handed out, so the client cannot release it
            self._store.release(stored.key, self._owner)

    def _put(self, event: CaptureHeld, session: bytes = b"", release_token: bytes = b"") -> StoredCapture:
        stored = self._store.put(event, self._owner, session, release_token)
        self._stored.append(stored)
        return stored


def _event_writer(active: ActiveRequest, info: ModelInfo, numbers: Iterator[int]) -> EventWriter:
    capture = active.request.capture
    if capture is None:
        return EventWriter(cancel_token=active.cancel_token, numbers=numbers)
    itemsize = dtype_from_name(capture.pooling.dtype_of(capture.dtype or info.dtype)).itemsize
    return EventWriter(
        capture.max_chunk_bytes,
        numbers=numbers,
        cancel_token=active.cancel_token,
        capture_row_bytes=len(capture.layers) * len(capture.site.parts) * info.hidden_size * itemsize,
        capture_positions=capture.positions,
        pooling=capture.pooling,
        special_token_ids=info.special_token_ids,
    )
