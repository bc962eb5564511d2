"""Chunks of rows to and from bytes, with fewer copies than protobuf makes.

Protobuf copies a chunk's data into a message and out of it again, on both sides. That costs as much as sending it. Here
the data is appended to the few bytes before it, and read where it is. The bytes are the same as protobuf's; protobuf
reads every message that does not have the exact form of a chunk.
"""

from functools import lru_cache
from typing import NamedTuple

from google.protobuf.message import DecodeError

from steer_service.wire import capture_pb2, generation_pb2

WORTHWHILE_BYTES = 4096
"""Bytes below which protobuf reads a message."""

_SEQUENCE, _CAPTURE, _OFFSET = 0x08, 0x08, 0x10  # field << 3 | wire type
_HEADER, _CRC32C, _DATA = 0x1A, 0x25, 0x2A
_GENERATE_CHUNK = generation_pb2.GenerateResponse.CAPTURE_CHUNK_FIELD_NUMBER << 3 | 2
_FETCH_CHUNK = capture_pb2.FetchCaptureResponse.CAPTURE_CHUNK_FIELD_NUMBER << 3 | 2
_CRC_BYTES = 4


class Chunk(NamedTuple):
    """A part of one capture's bytes, as in the message CaptureChunk."""

    capture: int
    """Number of the capture within its response stream, from 0."""
    offset: int
    """Byte in the capture at which the data begins."""
    header: capture_pb2.CaptureHeader | None
    """The capture's header, in its first chunk only."""
    crc32c: int | None
    """Checksum of the whole capture, in its last chunk only."""
    data: memoryview
    """The bytes: a view of the captured rows, or of the received message."""


class ChunkResponse(NamedTuple):
    """A response of Generate or FetchCapture that holds a chunk."""

    sequence: int
    """Its number within the response stream, from 0."""
    chunk: Chunk
    """The part of a capture that it holds."""


def chunk_from_proto(message: capture_pb2.CaptureChunk) -> Chunk:
    """The chunk in a message."""
    return Chunk(
        capture=message.capture,
        offset=message.offset,
        header=message.header if message.HasField("header") else None,
        crc32c=message.crc32c if message.HasField("crc32c") else None,
        data=memoryview(message.data),
    )


def generate_response_to_bytes(response: generation_pb2.GenerateResponse | ChunkResponse) -> bytes:
    """A response of Generate as bytes."""
    return _to_bytes(response, _GENERATE_CHUNK) if isinstance(response, ChunkResponse) else response.SerializeToString()


def fetch_response_to_bytes(response: capture_pb2.FetchCaptureResponse | ChunkResponse) -> bytes:
    """A response of FetchCapture as bytes."""
    return _to_bytes(response, _FETCH_CHUNK) if isinstance(response, ChunkResponse) else response.SerializeToString()


def generate_response_from_bytes(message: bytes) -> generation_pb2.GenerateResponse | ChunkResponse:
    """The response of Generate in `message`; raises protobuf's DecodeError if it cannot be read."""
    return _chunk_in(message, _GENERATE_CHUNK) or generation_pb2.GenerateResponse.FromString(message)


def fetch_response_from_bytes(message: bytes) -> capture_pb2.FetchCaptureResponse | ChunkResponse:
    """The response of FetchCapture in `message`; raises protobuf's DecodeError if it cannot be read."""
    return _chunk_in(message, _FETCH_CHUNK) or capture_pb2.FetchCaptureResponse.FromString(message)


def _chunk_in(message: bytes, chunk_tag: int) -> ChunkResponse | None:
    """The chunk if `message` is one, with fields in the order of their numbers; None for any other message."""
    if len(message) < WORTHWHILE_BYTES:
        return None
    try:
        return _chunk_at_the_end(message, chunk_tag)
    except (IndexError, _OtherForm):  # IndexError: the message ends within a number
        return None


def _chunk_at_the_end(message: bytes, chunk_tag: int) -> ChunkResponse | None:
    sequence, at = _field(message, 0, _SEQUENCE)
    at = _to_the_end(message, at, chunk_tag)
    capture, at = _field(message, at, _CAPTURE)
    offset, at = _field(message, at, _OFFSET)
    header, at = _header(message, at)
    crc32c, at = _crc32c(message, at)
    at = _to_the_end(message, at, _DATA)
    if max(sequence, offset) >= 1 << 64 or capture >= 1 << 32:
        raise _OtherForm
    return ChunkResponse(sequence, Chunk(capture, offset, header, crc32c, memoryview(message)[at:]))


class _OtherForm(Exception):
    """The message does not have the expected form."""


def _to_the_end(message: bytes, at: int, tag: int) -> int:
    """The start of the content of the field at `at`, which must reach to the end of the message."""
    if message[at] != tag:
        raise _OtherForm
    length, at = _varint(message, at + 1)
    if at + length != len(message):
        raise _OtherForm
    return at


def _header(message: bytes, at: int) -> tuple[capture_pb2.CaptureHeader | None, int]:
    if message[at] != _HEADER:
        return None, at
    length, at = _varint(message, at + 1)
    try:
        return capture_pb2.CaptureHeader.FromString(message[at : at + length]), at + length
    except DecodeError as error:
        raise _OtherForm from error


def _crc32c(message: bytes, at: int) -> tuple[int | None, int]:
    if message[at] != _CRC32C:
        return None, at
    end = at + 1 + _CRC_BYTES
    return int.from_bytes(message[at + 1 : end], "little"), end


def _to_bytes(response: ChunkResponse, chunk_tag: int) -> bytes:
    chunk = response.chunk
    inner = _encoded(_CAPTURE, chunk.capture) + _encoded(_OFFSET, chunk.offset)
    if chunk.header is not None:
        header = chunk.header.SerializeToString()
        inner += _length(_HEADER, len(header)) + header
    if chunk.crc32c is not None:
        inner += bytes((_CRC32C,)) + chunk.crc32c.to_bytes(_CRC_BYTES, "little")
    inner += _encoded(_DATA, len(chunk.data))
    head = _encoded(_SEQUENCE, response.sequence) + _length(chunk_tag, len(inner) + len(chunk.data))
    return b"".join((head, inner, chunk.data))


def _length(tag: int, length: int) -> bytes:
    """A field's tag and the length of its content, even if that is 0."""
    return _encoded(tag, length) or bytes((tag, 0))


@lru_cache(maxsize=4096)  # the same lengths and offsets occur in every capture
def _encoded(tag: int, number: int) -> bytes:
    """A field's tag and its number, or the length of its content; empty for 0, as in protobuf."""
    if number == 0:
        return b""
    encoded = [tag]
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _field(message: bytes, at: int, tag: int) -> tuple[int, int]:
    """The number in a field, 0 if the field is absent, and the start of the next field."""
    return _varint(message, at + 1) if message[at] == tag else (0, at)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    byte = message[at]
    if byte < 0x80:
        return byte, at + 1
    number = shift = 0
    while byte >= 0x80:
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        byte = message[at]
    return number | byte << shift, at + 1
