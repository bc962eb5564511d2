"""Chunks of rows, written to and read from the bytes of their messages without further copies.

Protobuf copies bytes into a message, and again out of it, on either side. For the largest messages of a stream, which
are nearly all data, that costs as much as sending them; here they are joined to the few bytes before them, and found in
place. The bytes are those of protobuf, and whatever does not look exactly like a chunk is left to it.
"""

from dataclasses import dataclass

from steer_service.wire import capture_pb2, generation_pb2

WORTHWHILE_BYTES = 4096
"""Shorter messages are protobuf's."""

_SEQUENCE, _CAPTURE, _OFFSET, _DATA = 0x08, 0x08, 0x10, 0x1A  # field << 3 | wire type
_GENERATE_CHUNK = generation_pb2.GenerateResponse.CAPTURE_CHUNK_FIELD_NUMBER << 3 | 2
_FETCH_CHUNK = capture_pb2.FetchCaptureResponse.CAPTURE_CHUNK_FIELD_NUMBER << 3 | 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a capture, as in the message of the same purpose."""

    capture: int
    """Number of the capture, from its header."""
    offset: int
    """Where in the capture the bytes begin."""
    data: memoryview
    """The bytes, where they lie: in the rows, or in the message that brought them."""


@dataclass(frozen=True, slots=True)
class ChunkResponse:
    """A response of Generate or FetchCapture that holds a chunk."""

    sequence: int
    """Its number within the stream."""
    chunk: Chunk
    """The chunk."""


def generate_response_to_bytes(response: generation_pb2.GenerateResponse | ChunkResponse) -> bytes:
    """A response of Generate as it travels."""
    return _to_bytes(response, _GENERATE_CHUNK) if isinstance(response, ChunkResponse) else response.SerializeToString()


def fetch_response_to_bytes(response: capture_pb2.FetchCaptureResponse | ChunkResponse) -> bytes:
    """A response of FetchCapture as it travels."""
    return _to_bytes(response, _FETCH_CHUNK) if isinstance(response, ChunkResponse) else response.SerializeToString()


def generate_response_from_bytes(message: bytes) -> generation_pb2.GenerateResponse | ChunkResponse:
    """A response of Generate."""
    return _chunk_in(message, _GENERATE_CHUNK) or generation_pb2.GenerateResponse.FromString(message)


def fetch_response_from_bytes(message: bytes) -> capture_pb2.FetchCaptureResponse | ChunkResponse:
    """A response of FetchCapture."""
    return _chunk_in(message, _FETCH_CHUNK) or capture_pb2.FetchCaptureResponse.FromString(message)


def _chunk_in(message: bytes, chunk_tag: int) -> ChunkResponse | None:
    """The chunk that fills `message`, fields in the order of their numbers; None for anything else."""
    if len(message) < WORTHWHILE_BYTES:
        return None
    try:
        return _chunk_at_the_end(message, chunk_tag)
    except IndexError:  # it ends within a number
        return None


def _chunk_at_the_end(message: bytes, chunk_tag: int) -> ChunkResponse | None:
    sequence, at = _field(message, 0, _SEQUENCE)
    if message[at] != chunk_tag:
        return None
    length, at = _varint(message, at + 1)
    if at + length != len(message):
        return None
    capture, at = _field(message, at, _CAPTURE)
    offset, at = _field(message, at, _OFFSET)
    if message[at] != _DATA:
        return None
    length, at = _varint(message, at + 1)
    if at + length != len(message) or max(sequence, offset) >= 1 << 64 or capture >= 1 << 32:
        return None
    return ChunkResponse(sequence, Chunk(capture, offset, memoryview(message)[at:]))


def _to_bytes(response: ChunkResponse, chunk_tag: int) -> bytes:
    chunk = response.chunk
    inner = b"".join(
        (
            _encoded(_CAPTURE, chunk.capture),
            _encoded(_OFFSET, chunk.offset),
            _encoded(_DATA, len(chunk.data)),
        )
    )
    length = len(inner) + len(chunk.data)
    head = _encoded(_SEQUENCE, response.sequence), _encoded(chunk_tag, length) or bytes((chunk_tag, 0))
    return b"".join((*head, inner, chunk.data))


def _encoded(tag: int, number: int) -> bytes:
    """A field's tag and its number, or the length of what follows; nothing for 0, as protobuf has it."""
    if not number:
        return b""
    encoded = bytearray((tag,))
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _field(message: bytes, at: int, tag: int) -> tuple[int, int]:
    """The number in a field that is left out if it is 0, and where the next field begins."""
    return _varint(message, at + 1) if message[at] == tag else (0, at)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
        shift += 7
