"""Errors of fields and response streams, the check for unknown fields, and timestamps."""

from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from steer_service.core.errors import EngineFailed, InvalidRequest, Unsupported


def not_built(what: str, field: str = "") -> Unsupported:
    """The error for a part of the contract that this server does not implement yet."""
    return Unsupported(f"{what} is not supported yet", reason="NOT_BUILT", field=field)


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


def timestamp_from_proto(stamp: Timestamp) -> float:
    """The time in a message, in seconds since 1970."""
    milliseconds: int = stamp.ToMilliseconds()
    return milliseconds / 1000


def check_known(message: Message) -> None:
    """Raises Unsupported (UNKNOWN_FIELD) if the client set a field that is not in this server's contract.

    Protobuf would ignore the field, and the response would not be what the client asked for.
    """
    if not _is_known(message):
        raise Unsupported(f"{_unknown_in(message)}, which are not known to this server", reason="UNKNOWN_FIELD")


def _is_known(message: Message) -> bool:
    """True if no field is unknown.

    Messages that hold a program are checked part by part, since the check makes a copy. Touching fresh memory for a
    copy of a whole program would take longer than all other work on a request.
    """
    if message.DESCRIPTOR.full_name in _CHECKED_BY_PART:
        return not UnknownFieldSet(message) and all(_is_known(part) for part in _parts(message))
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return bool(known == message or known.ByteSize() == message.ByteSize())  # a message with a NaN equals no other


_CHECKED_BY_PART = frozenset({"steer.v1.GenerateRequest", "steer.v1.SteeringSpec"})
"""Messages that are checked part by part, since they hold a program."""


def _unknown_in(message: Message) -> str:
    """Names the unknown fields of the first message that has some; "" if there are none."""
    numbers = sorted({field.field_number for field in UnknownFieldSet(message)})
    if numbers:
        return f"{message.DESCRIPTOR.name} has fields {numbers}"
    return next(filter(None, map(_unknown_in, _parts(message))), "")


def _parts(message: Message) -> Iterator[Message]:
    """The messages directly in `message`, except entries of maps."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            yield from value if descriptor.is_repeated else (value,)
