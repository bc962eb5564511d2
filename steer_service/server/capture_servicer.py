"""CaptureService: sends and releases stored captures, and checks that a client shares the server's memory."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress

import grpc

from steer_service.core.capture import check_chunk_bytes, check_release_token
from steer_service.core.errors import InvalidRequest, SteerError, within
from steer_service.core.positions import PositionScope
from steer_service.core.spans import Spans
from steer_service.core.stored_capture import CaptureMetadata, resolved, unknown_capture
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.admission import Admission
from steer_service.server.call_end import CallEnd
from steer_service.server.callers import Caller, caller_of
from steer_service.server.capture_store import CaptureStore, StoredCapture, blocks_of
from steer_service.server.client_limits import ClientLimits
from steer_service.server.client_streams import ClientStreams
from steer_service.server.config import ServerConfig
from steer_service.server.instance import Instance
from steer_service.server.metrics import ServerMetrics
from steer_service.server.request_body import RequestBody
from steer_service.server.shared_memory_sessions import SharedMemorySessions
from steer_service.server.slow_readers import SendTimeout
from steer_service.wire import capture_pb2
from steer_service.wire.blocks import DEFAULT_CHUNK_BYTES
from steer_service.wire.capture_pb2_grpc import CaptureServiceServicer
from steer_service.wire.chunks import ChunkResponse
from steer_service.wire.fields import duration_to_proto, missing, timestamp_to_proto
from steer_service.wire.positions import scope_from_proto
from steer_service.wire.stored_capture import fetch_to_proto

SESSION_BEAT_S = 20.0
"""How often a shared-memory session sends a message, in seconds: proxies close idle response streams."""


class CaptureServicer(CaptureServiceServicer):
    """Serves the captures of `store` to the clients that own them."""

    def __init__(
        self,
        config: ServerConfig,
        admission: Admission,
        store: CaptureStore,
        sessions: SharedMemorySessions,
        metrics: ServerMetrics,
        send_timeout: SendTimeout,
        limits: ClientLimits,
        instance: Instance,
    ) -> None:
        self._admission = admission
        self._instance = instance
        self._store = store
        self._sessions = sessions
        self._metrics = metrics
        self._send_timeout = send_timeout
        self._ends: set[CallEnd] = set()  # of running fetches
        self._fetches = ClientStreams("captures", limits.fetches, config.retry_after_s)
        self._open_sessions = ClientStreams("shared-memory sessions", limits.sessions, config.retry_after_s)

    async def FetchCapture(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[ChunkResponse, None]:
        """Streams a held capture, or the selected layers and positions of it."""
        async with errors_as_status(context):
            request = body.read(capture_pb2.FetchCaptureRequest)
            caller, end = caller_of(context), CallEnd(context)
            self._instance.check_own(request.capture_id, "capture_id")
            chunk_bytes, scope = _chunk_bytes(request), _scope(request)
            with (
                self._fetches.one_more(caller.share),
                self._store.reading(request.capture_id, caller.owner, lambda: end(unknown_capture())) as stored,
                self._ended(end),
                self._send_timeout.sender(end) as sender,
            ):
                response = None
                try:
                    for response in self._metrics.counted(_chunks_of(stored, request, scope, chunk_bytes)):
                        stored.check_there()
                        if not end.is_open:
                            await end.open()
                        with sender:
                            yield response
                        self._store.renew(stored)
                finally:
                    del response  # gRPC keeps the frame of an aborted call until the next garbage collection

    @contextmanager
    def _ended(self, end: CallEnd) -> Iterator[None]:
        """`stop_all` ends the call of the block."""
        self._ends.add(end)
        try:
            yield
        finally:
            self._ends.discard(end)

    def stop_all(self, error: SteerError) -> None:
        """Ends every fetch with `error`."""
        for end in list(self._ends):
            end(error)

    async def ReleaseCapture(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> capture_pb2.ReleaseCaptureResponse:
        """Frees a capture, a lease or all captures of a request; does nothing for those of another client."""
        async with errors_as_status(context):
            request = body.read(capture_pb2.ReleaseCaptureRequest)
            owner = caller_of(context).owner
            match request.WhichOneof("target"):
                case "capture_id":
                    released = self._release(request.capture_id, owner, "capture_id")
                case "lease_token":
                    released = self._release(request.lease_token.decode(errors="replace"), owner, "lease_token")
                case "release_token":
                    check_release_token(request.release_token)
                    self._instance.check_called(context)
                    is_stopped = self._admission.release_nowait(request.release_token, owner)
                    released = self._store.release_all(request.release_token, owner) or is_stopped
                case _:
                    raise missing("the capture or the lease", "target")
            return capture_pb2.ReleaseCaptureResponse(released=released)

    def _release(self, key: str, owner: str, field: str) -> bool:
        self._instance.check_own(key, field)
        return self._store.release(key, owner)

    async def OpenSharedMemory(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> capture_pb2.OpenSharedMemoryResponse:
        """Writes a nonce into shared memory, where only clients on this host can read it."""
        async with errors_as_status(context):
            body.read(capture_pb2.OpenSharedMemoryRequest)
            challenge = self._sessions.challenge(caller_of(context))
        return capture_pb2.OpenSharedMemoryResponse(
            challenge_token=challenge.token,
            segment_name=challenge.segment.name,
            instance=self._instance.name,
            expires_at=timestamp_to_proto(challenge.expires_at),
            expires_in=duration_to_proto(challenge.expires_at - time.time()),
        )

    async def ConfirmSharedMemory(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[capture_pb2.ConfirmSharedMemoryResponse, None]:
        """Keeps a session until either side ends the response stream; the session's leases end with it."""
        async with errors_as_status(context) as call:
            request = body.read(capture_pb2.ConfirmSharedMemoryRequest)
            caller = caller_of(context)
            with self._open_sessions.one_more(caller.share), self._session(request, caller) as session:
                while not self._sessions.closing.is_set():
                    await call.open(context)
                    yield capture_pb2.ConfirmSharedMemoryResponse(session_token=session)
                    await _wait(self._sessions.closing, SESSION_BEAT_S)

    @contextmanager
    def _session(self, request: capture_pb2.ConfirmSharedMemoryRequest, caller: Caller) -> Iterator[bytes]:
        """The token of a session that lasts as long as the block; its leases end with it."""
        with self._sessions.confirmed(request.challenge_token, request.nonce, caller.owner) as session:
            try:
                yield session
            finally:
                self._store.end_session(session)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Returns when `event` is set, or after `timeout_s`."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


def _chunk_bytes(request: capture_pb2.FetchCaptureRequest) -> int:
    if not request.HasField("max_chunk_bytes"):
        return DEFAULT_CHUNK_BYTES
    return check_chunk_bytes(request.max_chunk_bytes)


def _scope(request: capture_pb2.FetchCaptureRequest) -> PositionScope | None:
    with within("positions"):
        return scope_from_proto(request.positions) if request.HasField("positions") else None


def _chunks_of(
    stored: StoredCapture, request: capture_pb2.FetchCaptureRequest, scope: PositionScope | None, chunk_bytes: int
) -> Iterator[ChunkResponse]:
    """The responses that send what `request` selects; raises InvalidRequest, before the first, if it cannot be sent."""
    spans = resolved(stored.held.metadata, scope)
    _check_skip(stored.held.metadata, request, spans)
    blocks = blocks_of(stored, request.layers or None, spans)
    return fetch_to_proto(blocks, chunk_bytes, request.skip_bytes)


def _check_skip(metadata: CaptureMetadata, request: capture_pb2.FetchCaptureRequest, spans: Spans | None) -> None:
    total = metadata.bytes_of(request.layers or metadata.layers, metadata.spans if spans is None else spans)
    if request.skip_bytes > total:
        raise InvalidRequest(f"{request.skip_bytes} is outside 0..{total}", reason="OUT_OF_RANGE", field="skip_bytes")
