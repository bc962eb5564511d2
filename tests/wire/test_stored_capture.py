"""Fetching what is held: whole, from anywhere within, and over streams that break off."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import DTYPES
from steer_service.core.capture import CaptureSite
from steer_service.core.errors import EngineFailed
from steer_service.core.events import CaptureBlock
from steer_service.wire.capture_pb2 import CAPTURE_SITE_AFTER, FetchCaptureResponse
from steer_service.wire.chunks import fetch_response_to_bytes
from steer_service.wire.position_pb2 import RowSpan
from steer_service.wire.stored_capture import FetchReader, fetch_to_proto
from tests.wire import strategies


def block(layer: int, rows: int, width: int = 2, first: int = 0, site: CaptureSite = CaptureSite.AFTER) -> CaptureBlock:
    hidden = (np.arange(rows * width) + 10 * layer + 1).reshape(rows, width).astype(DTYPES["bfloat16"])
    spans = ((first, first + rows),) if rows else ()
    return CaptureBlock(output_index=0, layer=layer, site=site, spans=spans, hidden=hidden)


BLOCKS = [block(3, 1), block(1, 0), block(2, 2, site=CaptureSite.BEFORE), block(2, 2)]
"""4, 0, 8 and 8 bytes."""
TOTAL = 20


def sent(blocks: Sequence[CaptureBlock], chunk_bytes: int = 3, skip_bytes: int = 0) -> list[FetchCaptureResponse]:
    return [
        FetchCaptureResponse.FromString(fetch_response_to_bytes(response))
        for response in fetch_to_proto(blocks, chunk_bytes, skip_bytes)
    ]


def facts(one: CaptureBlock) -> tuple:
    return one.output_index, one.layer, one.site, one.spans, one.hidden.dtype, one.hidden.shape, one.hidden.tobytes()


def read(reader: FetchReader, responses: Sequence[FetchCaptureResponse]) -> list[tuple]:
    return [facts(one) for response in responses if (one := reader.block(response)) is not None]


def said(responses: Sequence[FetchCaptureResponse], field: str) -> list[Any]:
    """A field of the chunks that have it."""
    chunks = [response.capture_chunk for response in responses]
    return [getattr(chunk, field) for chunk in chunks if chunk.HasField(field)]


def payload(responses: Sequence[FetchCaptureResponse]) -> bytes:
    return b"".join(response.capture_chunk.data for response in responses)


WHOLE = b"".join(one.hidden.tobytes() for one in BLOCKS)


@given(st.lists(strategies.capture_blocks(), max_size=4), st.integers(1, 200))
def test_blocks_come_back_equal(blocks: list[CaptureBlock], chunk_bytes: int) -> None:
    reader = FetchReader()
    assert read(reader, sent(blocks, chunk_bytes)) == [facts(one) for one in blocks]
    reader.check_complete()
    assert reader.received_bytes == sum(one.hidden.nbytes for one in blocks)


@pytest.mark.parametrize("skip_bytes", range(TOTAL + 1))
def test_a_stream_that_skips_is_the_tail_of_the_whole_with_the_same_headers_and_checksums(skip_bytes: int) -> None:
    whole, tail = sent(BLOCKS), sent(BLOCKS, skip_bytes=skip_bytes)

    assert payload(tail) == WHOLE[skip_bytes:]
    assert [response.sequence for response in tail] == list(range(len(tail)))
    for kind in ("header", "crc32c"):
        assert said(tail, kind) == said(whole, kind)
    assert said(tail, "crc32c") == [crc32c.crc32c(one.hidden.tobytes()) for one in BLOCKS]


def test_rows_are_read_only_while_they_are_sent() -> None:
    taken: list[int] = []

    def blocks():
        for number, one in enumerate(BLOCKS):
            taken.append(number)
            yield one

    stream = fetch_to_proto(blocks(), 3)
    next(stream)
    assert taken == [0]


# With chunks of one byte, every offset at which a stream can break off lies between two messages.
ONE_BY_ONE = sent(BLOCKS, chunk_bytes=1)


@pytest.mark.parametrize("chunk_bytes", [1, 3, 100])
@pytest.mark.parametrize("broken", range(len(ONE_BY_ONE) + 1))
def test_a_stream_that_breaks_off_anywhere_is_taken_up_there(broken: int, chunk_bytes: int) -> None:
    reader = FetchReader()
    blocks = read(reader, ONE_BY_ONE[:broken])
    assert reader.received_bytes == len(payload(ONE_BY_ONE[:broken]))
    reader.begin_again()

    blocks += read(reader, sent(BLOCKS, chunk_bytes, reader.received_bytes))

    reader.check_complete()
    assert blocks == [facts(one) for one in BLOCKS]
    assert reader.received_bytes == TOTAL


def test_a_stream_that_breaks_off_twice_anywhere_is_taken_up_there() -> None:
    for first, second in itertools.product(range(len(ONE_BY_ONE) + 1), repeat=2):
        reader = FetchReader()
        blocks = read(reader, ONE_BY_ONE[:first])
        reader.begin_again()
        blocks += read(reader, sent(BLOCKS, 1, reader.received_bytes)[:second])
        reader.begin_again()
        blocks += read(reader, sent(BLOCKS, 7, reader.received_bytes))
        reader.check_complete()
        assert blocks == [facts(one) for one in BLOCKS], (first, second)


@pytest.mark.parametrize("broken", range(1, len(ONE_BY_ONE)))
def test_a_stream_that_is_not_taken_up_is_incomplete(broken: int) -> None:
    reader = FetchReader()
    read(reader, ONE_BY_ONE[:broken])
    is_within_a_block = not ONE_BY_ONE[broken - 1].capture_chunk.HasField("crc32c")
    if is_within_a_block:
        with pytest.raises(EngineFailed, match="before the capture was complete"):
            reader.check_complete()
        reader.begin_again()
        with pytest.raises(EngineFailed, match="before the capture was complete"):
            reader.check_complete()  # the next stream ended before it began


Change = Callable[[list[FetchCaptureResponse]], None]


def change(number: int, **fields: object) -> Change:
    def apply(responses: list[FetchCaptureResponse]) -> None:
        for name, value in fields.items():
            setattr(responses[number].capture_chunk, name, value)

    return apply


def change_header(number: int, **fields: object) -> Change:
    def apply(responses: list[FetchCaptureResponse]) -> None:
        for name, value in fields.items():
            setattr(responses[number].capture_chunk.header, name, value)

    return apply


def drop(number: int) -> Change:
    def apply(responses: list[FetchCaptureResponse]) -> None:
        del responses[number]
        for sequence, response in enumerate(responses):
            response.sequence = sequence

    return apply


# The first stream broke off after 9 bytes. Of the second: 0 and 1 have no bytes, 2 has 3 bytes at 5, 3..5 are the last
# capture's.
BROKEN = {
    "it is another capture's": change_header(0, output_index=1),
    "a finished layer is another": change_header(0, layer=4),
    "the layer is another": change_header(2, layer=4),
    "the site is another": change_header(2, site=CAPTURE_SITE_AFTER),
    "the rows are others": lambda responses: (
        responses[2].capture_chunk.header.spans[0].CopyFrom(RowSpan(first=1, count=2))
    ),
    "its number is another": change(2, capture=3),
    "its header is left out": lambda responses: responses[2].capture_chunk.ClearField("header"),
    "a layer is left out": drop(2),
    "it begins too early": change(2, offset=4),
    "it begins too late": change(2, offset=6),
    "bytes are lost": change(2, data=b""),
    "bytes are others": change(2, data=b"\1\2\3"),
    "the checksum is another": change(2, crc32c=5),
    "the total is another": change_header(2, total_bytes=7),
    "the total of a finished layer is another": change_header(0, total_bytes=5),
    "the checksum of a finished layer is another": change(0, crc32c=5),
    "bytes of what is complete": change(0, data=b"1"),
    "a message is lost": change(2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_does_not_resume_where_the_last_ended_is_an_error(name: str) -> None:
    reader = FetchReader()
    first = sent(BLOCKS, 1)
    cut = next(number for number, _ in enumerate(first) if len(payload(first[:number])) == 9)
    read(reader, first[:cut])
    reader.begin_again()
    second = sent(BLOCKS, 3, reader.received_bytes)
    assert (len(second), second[2].capture_chunk.offset) == (6, 5)
    BROKEN[name](second)
    if name == "a message is lost":
        del second[3]
    with pytest.raises(EngineFailed) as caught:
        read(reader, second)
    assert caught.value.reason == "BAD_STREAM"


def test_a_layer_that_was_complete_ends_once_in_each_stream() -> None:
    reader = FetchReader()
    first = sent(BLOCKS, 1)
    read(reader, first[:4])
    assert first[3].capture_chunk.HasField("crc32c")
    for _ in range(2):
        reader.begin_again()
        assert read(reader, sent(BLOCKS, 1, 4)[:1]) == []
    again = sent(BLOCKS, 1, 4)[0]
    again.sequence = 1
    again.capture_chunk.ClearField("header")
    with pytest.raises(EngineFailed, match="has ended"):
        reader.block(again)


def test_bytes_that_were_broken_before_the_stream_broke_off_are_noticed() -> None:
    reader = FetchReader()
    first = sent(BLOCKS, 1)
    first[0].capture_chunk.data = b"\xff"
    read(reader, first[:2])
    reader.begin_again()
    with pytest.raises(EngineFailed, match="wrong checksum"):
        read(reader, sent(BLOCKS, 3, 2))


def test_kinds_of_a_later_revision_are_skipped() -> None:
    reader = FetchReader()
    responses = sent(BLOCKS)
    responses.insert(1, FetchCaptureResponse.FromString(b"\xfa\x01\x00"))
    for sequence, response in enumerate(responses):
        response.sequence = sequence
    assert read(reader, responses) == [facts(one) for one in BLOCKS]
