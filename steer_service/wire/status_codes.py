"""SteerErrors <-> gRPC statuses, by one table; google.rpc details carry the reason, field and retry delay."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from steer_service.core.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MissingVectors,
    NotFound,
    OtherInstance,
    OverBudget,
    Overloaded,
    PermissionDenied,
    SteerError,
    Unauthenticated,
    Unsupported,
)
from steer_service.wire import steering_pb2
from steer_service.wire.connection_problems import (
    NEVER_CONNECTED,
    ConnectionProblem,
    cause_in,
    http_status_in,
    problem_in,
)

Detail = TypeVar("Detail", bound=Message)

DOMAIN = "steerllm"
"""`ErrorInfo.domain` of every error of this project."""

DETAILS_KEY = "grpc-status-details-bin"
X_REQUEST_ID = "x-request-id"
"""Metadata key of an id that proxies and clients give a call, for logs and traces."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"

_BYTES = ("asked_bytes", "allowed_bytes")
"""Keys of `ErrorInfo.metadata` in an OverBudget, named after its attributes."""

_INSTANCE = "instance"
"""Its key in a MissingVectors and an OtherInstance, likewise."""

MAX_TEXT_BYTES = 1000
"""Bytes of an error's text at most. The trailers hold it up to three times, escaped; clients accept 8 KiB of them."""

MAX_FIELD_BYTES = 250
"""Bytes of a field's path at most."""

MAX_DIGESTS = 128
"""Digests of missing vectors that are listed at most; they take 6 of the 8 KiB."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of the table: a type of error and its status code."""

    kind: type[SteerError]
    """The type of the error, or a base class of it."""
    code: grpc.StatusCode
    """The code of such an error's status."""
    reasons: frozenset[str] = frozenset()
    """Reasons that the row applies to; empty: all that no row above applies to."""


_TABLE = (
    _Row(InvalidRequest, grpc.StatusCode.ALREADY_EXISTS, frozenset({"DUPLICATE_REQUEST_ID"})),
    _Row(InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(NotFound, grpc.StatusCode.NOT_FOUND),
    _Row(
        Unsupported,
        grpc.StatusCode.FAILED_PRECONDITION,
        frozenset({"SWITCHED_OFF", "NO_SHARED_MEMORY", "NO_CLIENT_ID", "QUARANTINED"}),
    ),
    _Row(Unsupported, grpc.StatusCode.UNIMPLEMENTED),
    _Row(Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    _Row(DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    _Row(Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    _Row(PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    _Row(EngineFailed, grpc.StatusCode.CANCELLED, frozenset({"CANCELLED"})),
    _Row(
        EngineFailed,
        grpc.StatusCode.UNAVAILABLE,
        frozenset(
            {
                "LOADING",
                "DRAINING",
                "CLOSED",
                "ENGINE_DIED",
                "ENGINE_RESTARTING",
                "UNREACHABLE",
                "TLS_FAILED",
                "CONNECTION_LOST",
            }
        ),
    ),
    _Row(EngineFailed, grpc.StatusCode.INTERNAL),
)

CODES = tuple(dict.fromkeys(row.code for row in _TABLE))
"""Codes with which a call of this project may fail."""

_NOT_OURS: dict[grpc.StatusCode, tuple[type[SteerError], str, str]] = {
    grpc.StatusCode.UNAVAILABLE: (EngineFailed, "UNREACHABLE", "the server cannot be reached"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlineExceeded, "DEADLINE_EXCEEDED", "the deadline passed"),
    grpc.StatusCode.CANCELLED: (EngineFailed, "CANCELLED", "the call was cancelled"),
    grpc.StatusCode.UNIMPLEMENTED: (Unsupported, "UNKNOWN_METHOD", "the server does not know this method"),
    grpc.StatusCode.UNAUTHENTICATED: (Unauthenticated, "UNAUTHENTICATED", "the call has no valid credentials"),
    grpc.StatusCode.PERMISSION_DENIED: (PermissionDenied, "PERMISSION_DENIED", "the call is not allowed"),
    grpc.StatusCode.OUT_OF_RANGE: (InvalidRequest, "OUT_OF_RANGE", "a value is out of range"),
}
"""Meaning of a status without this project's details: it comes from gRPC itself or from a proxy."""

_CAN_BE_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    }
)
"""Codes with which gRPC reports that the connection broke or that the other side reset the call."""

_LOST_TEXTS = ("Stream removed", "RST_STREAM", "GOAWAY", "Socket closed", "recvmsg:", "No status received")
"""Parts of gRPC's texts for such a call. tests/client/test_lost_connections.py notices a change."""

LOST_RETRY_S = 1.0
"""Seconds after which a call may be repeated whose connection was lost."""


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """A status for `context.abort_with_status`."""

    code: grpc.StatusCode
    """The status code."""
    details: str
    """The error's text."""
    trailing_metadata: tuple[tuple[str, str | bytes], ...]
    """The google.rpc details, and the delay after which a retry may help."""


def status_from_error(error: SteerError) -> RpcStatus:
    """`error` as a status with ErrorInfo, and with BadRequest, QuotaFailure or RetryInfo where they apply."""
    if type(error) is Overloaded:  # hundreds a second are alike
        return _status_of_overload(error.message, error.reason, error.field, error.retry_after_s)
    return _status(error)


@lru_cache(maxsize=64)
def _status_of_overload(message: str, reason: str, field: str, retry_after_s: float | None) -> RpcStatus:
    return _status(Overloaded(message, reason=reason, field=field, retry_after_s=retry_after_s))


def _status(error: SteerError) -> RpcStatus:
    code = code_of(error)
    text = _shortened(str(error), MAX_TEXT_BYTES)
    status = status_pb2.Status(code=code.value[0], message=text)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_facts(error)))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shortened(error.field, MAX_FIELD_BYTES), description=_shortened(error.message, MAX_TEXT_BYTES)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, MissingVectors):
        listed = steering_pb2.MissingVectors(digests=error.digests[:MAX_DIGESTS], count=error.count)
        status.details.add().Pack(listed)
    if isinstance(error, Overloaded):
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=f"{DOMAIN}:{error.reason}", description=_shortened(error.message, MAX_TEXT_BYTES)
        )
        status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[quota]))
    trailers: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        delay_ms = max(0, round(error.retry_after_s * 1000))
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(delay_ms)
        status.details.add().Pack(retry)
        trailers.append((PUSHBACK_KEY, str(delay_ms)))
    trailers.append((DETAILS_KEY, status.SerializeToString()))
    return RpcStatus(code=code, details=text, trailing_metadata=tuple(trailers))


def error_from_rpc(error: grpc.RpcError) -> SteerError:
    """The SteerError that the server raised, from a failed call; for a status of gRPC or a proxy, the nearest one."""
    translated = _error_from_rpc(error)
    translated.x_request_id = next((str(value) for key, value in _trailers_of(error) if key == X_REQUEST_ID), "")
    return translated


def _error_from_rpc(error: grpc.RpcError) -> SteerError:
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    text = (error.details() if hasattr(error, "details") else None) or ""
    status = _details_of(error)
    info = _unpacked(status, error_details_pb2.ErrorInfo)
    if status is None or info is None or info.domain != DOMAIN:
        return _error_from_others(code, text)
    violations = _unpacked(status, error_details_pb2.BadRequest)
    retry = _unpacked(status, error_details_pb2.RetryInfo)
    violation = violations.field_violations[0] if violations and violations.field_violations else None
    message = violation.description if violation else status.message
    field = violation.field if violation else ""
    delay_s = retry.retry_delay.ToMilliseconds() / 1000 if retry else None
    kind = _kind_of(code)
    asked, allowed = (info.metadata.get(name, "") for name in _BYTES)
    if kind is Overloaded and asked.isdecimal() and allowed.isdecimal():
        return OverBudget(
            message,
            asked_bytes=int(asked),
            allowed_bytes=int(allowed),
            reason=info.reason,
            field=field,
            retry_after_s=delay_s,
        )
    instance = info.metadata.get(_INSTANCE, "")
    if kind is NotFound and info.reason == OtherInstance.default_reason:
        return OtherInstance(message, instance=instance, field=field)
    absent = _unpacked(status, steering_pb2.MissingVectors)
    if kind is NotFound and absent is not None:
        return MissingVectors(
            message,
            digests=tuple(absent.digests),
            count=absent.count,
            instance=instance,
            reason=info.reason,
            field=field,
            retry_after_s=delay_s,
        )
    return kind(message, reason=info.reason, field=field, retry_after_s=delay_s)


def _facts(error: SteerError) -> dict[str, str]:
    """The entries of `ErrorInfo.metadata`."""
    if isinstance(error, MissingVectors | OtherInstance):
        return {_INSTANCE: error.instance}
    return {name: str(getattr(error, name)) for name in _BYTES} if isinstance(error, OverBudget) else {}


def code_of(error: SteerError) -> grpc.StatusCode:
    """The code of the status of `error`, one of CODES."""
    for row in _TABLE:
        if isinstance(error, row.kind) and (not row.reasons or error.reason in row.reasons):
            return row.code
    return grpc.StatusCode.INTERNAL


def _kind_of(code: grpc.StatusCode) -> type[SteerError]:
    return next((row.kind for row in _TABLE if row.code == code), EngineFailed)


def is_of_server(error: grpc.RpcError) -> bool:
    """True if a server of this project gave the status, and not gRPC or a proxy."""
    info = _unpacked(_details_of(error), error_details_pb2.ErrorInfo)
    return info is not None and info.domain == DOMAIN


def _error_from_others(code: grpc.StatusCode, text: str) -> SteerError:
    problem = problem_in(text)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return InvalidRequest(_too_large(text), reason="MESSAGE_TOO_LARGE")
    if problem is ConnectionProblem.ROUTE_TIMEOUT:
        return EngineFailed("a proxy's limit on the time of a route passed", reason="ROUTE_TIMEOUT")
    if code == grpc.StatusCode.UNAVAILABLE and NEVER_CONNECTED in text:
        kind, reason, message = _NOT_OURS[code]
        return kind(message, reason=reason)
    if code == grpc.StatusCode.UNAVAILABLE and problem is ConnectionProblem.TOO_MANY_PINGS:
        message = "the connection to the server was lost: too many pings"
        return EngineFailed(message, reason="CONNECTION_LOST", retry_after_s=LOST_RETRY_S)
    if code in _CAN_BE_LOST and any(part in text for part in _LOST_TEXTS):
        message = "the connection to the server was lost"
        return EngineFailed(message, reason="CONNECTION_LOST", retry_after_s=LOST_RETRY_S)
    if code in _NOT_OURS:
        kind, reason, message = _NOT_OURS[code]
        return kind(_with_its_sender(code, text, message), reason=reason)
    return _kind_of(code)(text or code.name, reason=code.name)


def _too_large(text: str) -> str:
    """The sentence for a message that one side does not send or accept, from gRPC's."""
    sizes = re.search(r"\((\d+) vs\. (\d+)\)", text)
    numbers = f": {int(sizes[1]):,} bytes, and {int(sizes[2]):,} are allowed" if sizes else ""
    if "CLIENT: Received" in text:
        return f"the response is larger than this client accepts{numbers}; see grpc.max_receive_message_length"
    if "CLIENT: Sent" in text:
        return f"the request is larger than this client sends{numbers}; see grpc.max_send_message_length"
    return f"the message is larger than the receiver accepts{numbers}"


def _with_its_sender(code: grpc.StatusCode, text: str, message: str) -> str:
    """`message`, with what a proxy says: only gRPC's own texts are known, and our server sends details."""
    if code == grpc.StatusCode.UNIMPLEMENTED and (not text or http_status_in(text)):
        return f"{message}: what answers is a proxy or a web server that has no route for it (HTTP status 404)"
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED) and text:
        return f"{message}; a proxy, and not the server, says so: {cause_in(text)}"
    return message


def _trailers_of(error: grpc.RpcError) -> Iterable[tuple[str, str | bytes]]:
    return (error.trailing_metadata() if hasattr(error, "trailing_metadata") else None) or ()


def _details_of(error: grpc.RpcError) -> status_pb2.Status | None:
    for key, value in _trailers_of(error):
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _unpacked(status: status_pb2.Status | None, kind: type[Detail]) -> Detail | None:
    for packed in status.details if status is not None else ():
        detail: Detail = kind()
        try:
            if packed.Unpack(detail):
                return detail
        except DecodeError:
            return None
    return None


def _shortened(text: str, limit: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode(errors="ignore") + "…"
