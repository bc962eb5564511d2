"""Chunks that are found in place are those that protobuf reads, and everything else is left to it."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from steer_service.wire import capture_pb2, generation_pb2
from steer_service.wire.chunks import (
    WORTHWHILE_BYTES,
    ChunkResponse,
    chunk_from_proto,
    fetch_response_from_bytes,
    fetch_response_to_bytes,
    generate_response_from_bytes,
    generate_response_to_bytes,
)

READERS = {
    generation_pb2.GenerateResponse: generate_response_from_bytes,
    capture_pb2.FetchCaptureResponse: fetch_response_from_bytes,
}
WRITERS = {
    generation_pb2.GenerateResponse: generate_response_to_bytes,
    capture_pb2.FetchCaptureResponse: fetch_response_to_bytes,
}
chunks = st.builds(
    capture_pb2.CaptureChunk,
    capture=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**53),
    header=st.none()
    | st.builds(capture_pb2.CaptureHeader, layer=st.integers(0, 200), total_bytes=st.integers(0, 2**53)),
    crc32c=st.none() | st.integers(0, 2**32 - 1),
    data=st.binary(max_size=64).map(lambda data: data * 128),
)


@pytest.mark.parametrize("kind", READERS)
@given(sequence=st.integers(0, 2**64 - 1), chunk=chunks)
def test_a_chunk_is_read_as_protobuf_reads_it(kind: type, sequence: int, chunk: capture_pb2.CaptureChunk) -> None:
    message = kind(sequence=sequence, capture_chunk=chunk).SerializeToString()
    response = READERS[kind](message)
    if isinstance(response, ChunkResponse):
        assert response == ChunkResponse(sequence, chunk_from_proto(chunk))
    else:
        assert response == kind.FromString(message)
    assert isinstance(response, ChunkResponse) == (len(message) >= WORTHWHILE_BYTES)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
def test_messages_other_than_plain_chunks_use_protobuf(kind: type, data: st.DataObject) -> None:
    """Fields in another order, twice or unknown, numbers cut short, bytes behind the end: protobuf says what it is."""
    header = data.draw(st.none() | st.just(capture_pb2.CaptureHeader(layer=3, shape=[1, 1250])))
    chunk = capture_pb2.CaptureChunk(header=header, crc32c=data.draw(st.none() | st.just(5)), data=bytes(5000))
    message = bytearray(kind(sequence=7, capture_chunk=chunk).SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, 30))] = data.draw(st.integers(0, 255))
    message += data.draw(st.binary(max_size=4))
    try:
        want = kind.FromString(bytes(message))
    except DecodeError:
        want = None
    try:
        response = READERS[kind](bytes(message))
    except DecodeError:
        response = None
    if isinstance(response, ChunkResponse):
        assert want is not None
        assert response == ChunkResponse(want.sequence, chunk_from_proto(want.capture_chunk))
    else:
        assert response == want


@pytest.mark.parametrize("kind", WRITERS)
@given(sequence=st.integers(0, 2**64 - 1), chunk=chunks)
def test_a_chunk_is_written_as_protobuf_writes_it(kind: type, sequence: int, chunk: capture_pb2.CaptureChunk) -> None:
    response = ChunkResponse(sequence, chunk_from_proto(chunk))
    assert WRITERS[kind](response) == kind(sequence=sequence, capture_chunk=chunk).SerializeToString()


def test_other_messages_are_serialized_by_protobuf() -> None:
    token = generation_pb2.GenerateResponse(sequence=1, token=generation_pb2.TokenDelta(text="x" * 10_000))
    assert generate_response_from_bytes(token.SerializeToString()) == token
