"""What is said of a field that is not set, asks for what is not built, or breaks a rule of a stream; and times."""

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
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    if known.ByteSize() != message.ByteSize():
        raise Unsupported(f"{_unknown_in(message)}, which this server does not know", reason="UNKNOWN_FIELD")


def _unknown_in(message: Message) -> str:
    """Which fields are unknown, in the first message that has some; "" if none has."""
    numbers = sorted({field.field_number for field in UnknownFieldSet(message)})
    if numbers:
        return f"{message.DESCRIPTOR.name} has fields {numbers}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            for part in value if descriptor.is_repeated else (value,):
                if found := _unknown_in(part):
                    return found
    return ""
