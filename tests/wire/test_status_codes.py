"""Errors as statuses and back."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MissingVectors,
    NotFound,
    OverBudget,
    Overloaded,
    SteerError,
    Unauthenticated,
    Unsupported,
)
from steer_service.wire.status_codes import error_from_rpc, status_from_error

KINDS = [InvalidRequest, NotFound, Unsupported, Overloaded, DeadlineExceeded, Unauthenticated, EngineFailed]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def call_error(code: grpc.StatusCode, details: str = "", trailers=()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=details)


def round_trip(error: SteerError) -> SteerError:
    status = status_from_error(error)
    return error_from_rpc(call_error(status.code, status.details, status.trailing_metadata))


@given(
    st.sampled_from(KINDS),
    texts,
    st.from_regex(r"[A-Z][A-Z_]{0,20}", fullmatch=True),
    texts,
    st.none() | st.integers(0, 10**6).map(lambda ms: ms / 1000),
)
def test_an_error_comes_back_with_type_reason_field_message_and_delay(kind, message, reason, field, retry_after_s):
    error = kind(message, reason=reason, field=field, retry_after_s=retry_after_s)
    back = round_trip(error)
    assert type(back) is kind
    assert (back.message, back.reason, back.field) == (message, reason, field)
    assert back.retry_after_s == retry_after_s


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("x"), "INVALID_ARGUMENT"),
        (InvalidRequest("x", reason="DUPLICATE_REQUEST_ID"), "ALREADY_EXISTS"),
        (NotFound("x"), "NOT_FOUND"),
        (Unsupported("x", reason="NOT_BUILT"), "UNIMPLEMENTED"),
        (Unsupported("x", reason="SWITCHED_OFF"), "FAILED_PRECONDITION"),
        (Unsupported("x", reason="NO_SHARED_MEMORY"), "FAILED_PRECONDITION"),
        (Overloaded("x"), "RESOURCE_EXHAUSTED"),
        (DeadlineExceeded("x"), "DEADLINE_EXCEEDED"),
        (EngineFailed("x", reason="LOADING"), "UNAVAILABLE"),
        (EngineFailed("x", reason="DRAINING"), "UNAVAILABLE"),
        (EngineFailed("x", reason="ENGINE_DIED"), "UNAVAILABLE"),
        (EngineFailed("x", reason="CONNECTION_LOST"), "UNAVAILABLE"),
        (Overloaded("x", reason="SLOW_READER"), "RESOURCE_EXHAUSTED"),
        (EngineFailed("x", reason="CANCELLED"), "CANCELLED"),
        (EngineFailed("x"), "INTERNAL"),
        (SteerError("x"), "INTERNAL"),
    ],
)
def test_every_kind_has_its_code(error, code):
    assert status_from_error(error).code == grpc.StatusCode[code]


def test_the_details_are_those_of_google_rpc():
    error = Overloaded("full", reason="QUEUE_FULL", field="a.b", retry_after_s=1.5)
    status = status_from_error(error)
    rich = rpc_status.from_call(call_error(status.code, status.details, status.trailing_metadata))
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    quota = error_details_pb2.QuotaFailure()
    kinds = (info, request, quota, retry)
    assert all(detail.Unpack(kind) for detail, kind in zip(rich.details, kinds, strict=True))
    assert [(one.subject, one.description) for one in quota.violations] == [("steerllm:QUEUE_FULL", "full")]
    assert (info.reason, info.domain) == ("QUEUE_FULL", "steerllm")
    assert (request.field_violations[0].field, request.field_violations[0].description) == ("a.b", "full")
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert dict(status.trailing_metadata)["grpc-retry-pushback-ms"] == "1500"
    assert status.details == "a.b: full"


@pytest.mark.parametrize(
    ("code", "details", "kind", "reason"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", EngineFailed, "UNREACHABLE"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ("CANCELLED", "Locally cancelled by application!", EngineFailed, "CANCELLED"),
        ("UNIMPLEMENTED", "Method not found!", Unsupported, "UNKNOWN_METHOD"),
        (
            "RESOURCE_EXHAUSTED",
            "SERVER: Received message larger than max (9 vs. 4)",
            InvalidRequest,
            "MESSAGE_TOO_LARGE",
        ),
        ("RESOURCE_EXHAUSTED", "too many pings", Overloaded, "RESOURCE_EXHAUSTED"),
        ("UNAUTHENTICATED", "no token", Unauthenticated, "UNAUTHENTICATED"),
        ("UNKNOWN", "", EngineFailed, "UNKNOWN"),
        ("UNKNOWN", "Unexpected <class 'KeyError'>: 3", EngineFailed, "UNKNOWN"),
        ("INTERNAL", "Exception deserializing response!", EngineFailed, "INTERNAL"),
        ("INTERNAL", "Received RST_STREAM with error code 2", EngineFailed, "CONNECTION_LOST"),
        ("CANCELLED", "Received RST_STREAM with error code 8", EngineFailed, "CONNECTION_LOST"),
        ("UNAVAILABLE", "GOAWAY received", EngineFailed, "CONNECTION_LOST"),
        ("UNAVAILABLE", "recvmsg:Connection reset by peer (104)", EngineFailed, "CONNECTION_LOST"),
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: recvmsg:Connection reset by peer",
            EngineFailed,
            "UNREACHABLE",
        ),
    ],
)
def test_a_status_that_is_not_ours_has_a_meaning_too(code, details, kind, reason):
    error = error_from_rpc(call_error(grpc.StatusCode[code], details))
    assert type(error) is kind
    assert error.reason == reason
    assert error.message


def test_an_internal_error_of_our_server_is_never_a_lost_connection():
    back = round_trip(EngineFailed("RST_STREAM", reason="INTERNAL"))
    assert (back.reason, back.retry_after_s) == ("INTERNAL", None)


@pytest.mark.parametrize("data", [b"\xff\xff", b"", status_pb2.Status(code=3, message="x").SerializeToString()])
def test_details_that_cannot_be_read_do_not_hide_the_error(data):
    error = error_from_rpc(call_error(grpc.StatusCode.INVALID_ARGUMENT, "wrong", [("grpc-status-details-bin", data)]))
    assert type(error) is InvalidRequest
    assert error.message == "wrong"


def test_the_bytes_of_an_error_over_budget_come_back():
    error = OverBudget("too much", asked_bytes=2**40, allowed_bytes=3, field="capture", retry_after_s=1.0)
    back = round_trip(error)
    assert type(back) is OverBudget
    assert (back.asked_bytes, back.allowed_bytes, back.reason) == (2**40, 3, "OVER_BUDGET")
    assert (back.message, back.field, back.retry_after_s) == ("too much", "capture", 1.0)
    assert status_from_error(error).code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_digests_of_missing_vectors_come_back():
    digests = tuple(bytes([number]) * 32 for number in range(90))
    error = MissingVectors("not there", digests=digests, field="steering")
    back = round_trip(error)
    assert type(back) is MissingVectors
    assert (back.digests, back.count, back.reason) == (digests, 90, "UNKNOWN_VECTOR")
    assert (back.message, back.field) == ("not there", "steering")
    assert status_from_error(error).code == grpc.StatusCode.NOT_FOUND


def test_more_missing_vectors_than_fit_the_trailers_are_counted():
    digests = tuple(number.to_bytes(32) for number in range(1000))
    error = MissingVectors("not there", digests=digests, field="x" * 10**6)
    back = round_trip(error)
    assert (back.digests, back.count) == (digests[:128], 1000)
    assert len(dict(status_from_error(error).trailing_metadata)["grpc-status-details-bin"]) < 6000


def test_long_texts_are_shortened_to_fit_the_trailers():
    status = status_from_error(InvalidRequest("ä" * 10**6, field="x" * 10**6))
    assert len(status.details.encode()) <= 1000
    assert status.details.endswith("…")
    assert len(dict(status.trailing_metadata)["grpc-status-details-bin"]) < 3000


def test_a_bare_rpc_error_is_an_engine_failure():
    assert type(error_from_rpc(grpc.RpcError())) is EngineFailed
