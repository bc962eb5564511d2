"""Errors of fields and response streams, timestamps and durations."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from steer_service.core.errors import EngineFailed, InvalidRequest


def missing(what: str, field: str = "") -> InvalidRequest:
    """The error for a required field that is not set."""
    return InvalidRequest(f"{what} is not set", reason="MISSING_FIELD", field=field)


def bad_stream(message: str) -> EngineFailed:
    """The error for a response stream that breaks a rule of the contract."""
    return EngineFailed(message, reason="BAD_STREAM")


def unreadable() -> EngineFailed:
    """The error for a response that is not a message of the contract."""
    return bad_stream("a message cannot be read")


def wrong_sequence(sequence: int, expected: int) -> EngineFailed:
    """The error for a response that is out of order."""
    return bad_stream(f"message {sequence} was received, but {expected} was expected")


def timestamp_to_proto(seconds: float) -> Timestamp:
    """`seconds` since 1970 as a message, to the millisecond."""
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp


def duration_to_proto(seconds: float) -> Duration:
    """`seconds` as a message, to the millisecond; a time that has passed is 0."""
    duration = Duration()
    duration.FromMilliseconds(max(0, round(seconds * 1000)))
    return duration


def duration_from_proto(duration: Duration) -> float:
    """The time in a message, in seconds."""
    milliseconds: int = duration.ToMilliseconds()
    return milliseconds / 1000


def timestamp_from_proto(stamp: Timestamp) -> float:
    """The time in a message, in seconds since 1970."""
    milliseconds: int = stamp.ToMilliseconds()
    return milliseconds / 1000
