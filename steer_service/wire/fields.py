"""What is said of a field that is not set, asks for what is not built, or breaks a rule of a stream; and times."""

from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from steer_service.core.errors import EngineFailed, InvalidRequest, Unsupported


def not_built(what: str, field: str = "") -> Unsupported:
    """The error for a part of the contract that this server does not do yet."""
    return Unsupported(f"{what} is not built yet", reason="NOT_BUILT", field=field)


def missing(what: str, field: str = "") -> InvalidRequest:
    """The error for a field that must be set and is not."""
    return InvalidRequest(f"{what} is not set", reason="MISSING_FIELD", field=field)


def bad_stream(message: str) -> EngineFailed:
    """The error for a stream that breaks a rule of the contract."""
    return EngineFailed(message, reason="BAD_STREAM")


def unreadable() -> EngineFailed:
    """The error for a message of a stream that is none of this contract."""
    return bad_stream("a message cannot be read")


def timestamp_to_proto(seconds: float) -> Timestamp:
    """A time in seconds since 1970 as a message."""
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp


def timestamp_from_proto(stamp: Timestamp) -> float:
    """The time of a message in seconds since 1970."""
    milliseconds: int = stamp.ToMilliseconds()
    return milliseconds / 1000


def check_known(message: Message) -> None:
    """Raises Unsupported if a newer client set a field that is not in this server's contract.

    Protobuf would drop it without a word, and the answer would not be what was asked for.
    """
    if not _is_known(message):
        raise Unsupported(f"{_unknown_in(message)}, which this server does not know", reason="UNKNOWN_FIELD")


def _is_known(message: Message) -> bool:
    """True if no field is unknown.

    A program is looked at layer by layer: a copy of it whole is fresh memory each time, and to touch that for the first
    time takes longer than all else that is done to a request.
    """
    if message.DESCRIPTOR.full_name in _LOOKED_INTO:
        return not UnknownFieldSet(message) and all(_is_known(part) for part in _parts(message))
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return bool(known == message or known.ByteSize() == message.ByteSize())  # a message with a NaN equals no other


_LOOKED_INTO = frozenset({"steer.v1.GenerateRequest", "steer.v1.SteeringSpec"})
"""Messages that hold a program."""


def _unknown_in(message: Message) -> str:
    """Which fields are unknown, in the first message that has some; "" if none has."""
    numbers = sorted({field.field_number for field in UnknownFieldSet(message)})
    if numbers:
        return f"{message.DESCRIPTOR.name} has fields {numbers}"
    return next(filter(None, map(_unknown_in, _parts(message))), "")


def _parts(message: Message) -> Iterator[Message]:
    """The messages directly in `message`, but for entries of maps."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            yield from value if descriptor.is_repeated else (value,)
