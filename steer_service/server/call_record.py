"""What the server notes of a call: its ids, its client, what it did and how it ended; for its log line and its span."""

import hashlib
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import grpc

from steer_service.core.errors import SteerError
from steer_service.core.events import Completed, Event, OutputFinished, Started
from steer_service.core.field_checks import IDENTIFIER
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.server.error_counts import counted_status
from steer_service.server.instance import Instance
from steer_service.wire.status_codes import X_REQUEST_ID, RpcStatus, code_of

MOST_METHOD = 100
"""Characters of a method's name at most; those of methods that exist have fewer."""

CLIENT_GONE = "CLIENT_GONE"
"""Reason in logs and traces of a call that its client cancelled, or whose connection was lost."""

DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"

_KEY = secrets.token_bytes(16)
"""Of the hashes of clients' names: without it, a hash of a short secret or of an address could be guessed."""

Metadata = Sequence[tuple[str, str | bytes]]

TraceHeaders = tuple[tuple[str, str], ...]


class Span(Protocol):
    """A span of a trace."""

    trace_id: str
    """Of its trace, 32 hexadecimal digits."""
    headers: TraceHeaders
    """W3C trace context of what the call causes elsewhere."""

    def end(self, call: "CallRecord") -> None:
        """Ends it with what is known of the call."""
        ...


class Tracer(Protocol):
    """Begins spans."""

    def begin(self, method: str, metadata: Metadata) -> Span | None:
        """The span of a call that begins now; None for one that has none."""
        ...


@dataclass(slots=True, kw_only=True)
class GenerationRecord:
    """What is known of a Generate call beyond any other."""

    arrived_at: float
    """When the request came, on the monotonic clock in seconds."""
    on_finished: Callable[[grpc.StatusCode], None]
    """Called once, with the code of the call's status, before the client has it."""
    request: GenerateRequest | None = None
    """The request, once it was admitted."""
    model: str = ""
    """The model or adapter that serves it, once the backend has accepted it."""
    sampling: SamplingOptions | None = None
    """The effective options, likewise."""
    queue_wait_s: float | None = None
    """Seconds until it had its place."""
    first_token_s: float | None = None
    """Seconds from its arrival to its first tokens."""
    prompt_tokens: int | None = None
    """Tokens of its prompt."""
    generated_tokens: int = 0
    """Tokens that were generated, all outputs together."""
    cached_tokens: int = 0
    """Prompt tokens from the prefix cache."""
    steered_rows: int = 0
    """Rows of complete outputs that were steered."""
    captured_bytes: int = 0
    """Bytes of captured rows of complete outputs."""
    finish_reasons: list[str] = field(default_factory=list)
    """Of each complete output."""

    def note(self, event: Event, model: str) -> None:
        """Notes an event that is not a TokenDelta. `model`: the name of the loaded model."""
        match event:
            case Started():
                self.model = (self.request.model if self.request is not None else "") or model
                self.sampling = event.sampling
                self.prompt_tokens = len(event.prompt_token_ids)
            case OutputFinished():
                self.steered_rows += event.receipt.rows_steered
                self.captured_bytes += event.receipt.bytes_captured
                self.finish_reasons.append(event.reason.value)
            case Completed():
                self.generated_tokens = event.usage.completion_tokens
                self.cached_tokens = event.usage.cached_tokens


class CallRecord:
    """One call, from its arrival to its end."""

    def __init__(
        self,
        method: str,
        metadata: Metadata = (),
        tracer: Tracer | None = None,
        instance: Instance | None = None,
    ) -> None:
        """`method`: `package.Service/Method`, of which MOST_METHOD characters are kept.

        `instance`: the server's name, which its responses have.
        """
        self.method = method[:MOST_METHOD]
        """Its full name."""
        self.arrived_at = time.monotonic()
        """When it came, on the monotonic clock in seconds."""
        self.client = ""
        """A proven name, or else a hash that stays the same while this process runs; "" if it is not known yet."""
        self.error: SteerError | None = None
        """The error that it is ended with; None if it is not."""
        self.gone = ""
        """CLIENT_GONE or DEADLINE_EXCEEDED if its client waits no longer; "" otherwise."""
        self.is_open = False
        """True once its headers are being sent."""
        self.generation: GenerationRecord | None = None
        """Of a Generate call."""
        self.x_request_id = _x_request_id(metadata) or str(uuid.uuid4())
        """The id that its client gave, or a new one."""
        self.span: Span | None = None
        """Its span; None without one."""
        self._metadata = metadata
        self._tracer = tracer
        self._instance = instance
        self._is_finished = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent with the headers of its responses, or else with its status."""
        own = (X_REQUEST_ID, self.x_request_id)
        return (own, self._instance.header) if self._instance is not None else (own,)

    @property
    def code(self) -> grpc.StatusCode:
        """The code of its status."""
        if self.error is not None:
            return code_of(self.error)
        if self.gone:
            return grpc.StatusCode.DEADLINE_EXCEEDED if self.gone == DEADLINE_EXCEEDED else grpc.StatusCode.CANCELLED
        return grpc.StatusCode.OK

    @property
    def reason(self) -> str:
        """Why it ended with an error; "" if it did not."""
        return self.error.reason if self.error is not None else self.gone

    @property
    def trace_headers(self) -> TraceHeaders:
        """W3C trace context of what it causes elsewhere; empty without a span."""
        return self.span.headers if self.span is not None else ()

    def begin(self) -> None:
        """Begins its span: its handler runs, and will end it."""
        if self._tracer is not None:
            self.span = self._tracer.begin(self.method, self._metadata)

    def forgo_span(self) -> None:
        """It gets no span: anyone can cause it, and name it as they like."""
        self._tracer = None

    def name_client(self, share: str, *, is_proven: bool) -> None:
        """Notes whose call it is; a name that is not proven is a secret or an address."""
        hashed = hashlib.blake2b(share.encode(), digest_size=8, key=_KEY).hexdigest
        self.client = share if is_proven else f"~{hashed()}"

    def finish(self) -> None:
        """Its code is known; the first call counts it."""
        if self.generation is not None and not self._is_finished:
            self._is_finished = True
            self.generation.on_finished(self.code)

    def status(self, error: SteerError) -> RpcStatus:
        """The status with which it ends now."""
        if self.error is None:
            self.error = error
        self.finish()
        status = counted_status(error)
        return replace(status, trailing_metadata=(*status.trailing_metadata, *self.metadata))

    async def open(self, context: grpc.aio.ServicerContext) -> None:
        """Sends its headers, unless they were sent or it was ended; await it before the first response.

        For calls that no other task ends; others have `CallEnd.open`.
        """
        if not self.is_open and self.error is None:
            self.is_open = True
            with suppress(grpc.aio.BaseError):  # the client is gone, or the server stops: gRPC ends the handler
                await context.send_initial_metadata(self.metadata)

    def note_gone(self, context: grpc.aio.ServicerContext) -> None:
        """Its client waits no longer: it has gone, or its deadline has passed."""
        remaining_s = context.time_remaining()
        self.gone = DEADLINE_EXCEEDED if remaining_s is not None and remaining_s <= 0 else CLIENT_GONE


_current: ContextVar[CallRecord | None] = ContextVar("call", default=None)
"""Of the running call; each call runs in a task of its own."""


def current_call() -> CallRecord:
    """The record of the call that runs in this task; a new one, without a name, if there is none."""
    return _current.get() or CallRecord("")


class CallRecords(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc.aio has no types
    """Makes the record of each call, before any other interceptor."""

    def __init__(self, tracer: Tracer | None, instance: Instance) -> None:
        self._tracer = tracer
        self._instance = instance

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's own handler."""
        metadata = tuple(details.invocation_metadata or ())
        _current.set(CallRecord(details.method.lstrip("/"), metadata, self._tracer, self._instance))
        return await continuation(details)


def _x_request_id(metadata: Metadata) -> str:
    """The id that the client gave; "" for none, several, or one that is not 1..128 of `A-Za-z0-9._:-`."""
    given = [value for key, value in metadata if key == X_REQUEST_ID]
    if len(given) == 1 and isinstance(given[0], str) and IDENTIFIER.fullmatch(given[0]):
        return given[0]
    return ""
