"""Fetching what is held: whole, from anywhere within, and over streams that break off."""

import itertools
from collections.abc import Callable, Sequence

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import DTYPES
from steer_service.core.capture import CaptureSite
from steer_service.core.errors import EngineFailed
from steer_service.core.request import CaptureBlock
from steer_service.wire.blocks import Lease, shared_block_to_proto
from steer_service.wire.capture_pb2 import CAPTURE_SITE_AFTER, FetchCaptureResponse
from steer_service.wire.chunks import fetch_response_to_bytes
from steer_service.wire.held import FetchReader, fetch_to_proto
from steer_service.wire.position_pb2 import RowSpan
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
def test_a_stream_that_skips_is_the_tail_of_the_whole_with_the_same_headers_and_ends(skip_bytes: int) -> None:
    whole, tail = sent(BLOCKS), sent(BLOCKS, skip_bytes=skip_bytes)

    assert payload(tail) == WHOLE[skip_bytes:]
    assert [response.sequence for response in tail] == list(range(len(tail)))
    for kind in ("capture_header", "capture_end"):
        assert [getattr(one, kind) for one in tail if one.HasField(kind)] == [
            getattr(one, kind) for one in whole if one.HasField(kind)
        ]
    ends = [response.capture_end.crc32c for response in tail if response.HasField("capture_end")]
    assert ends == [crc32c.crc32c(one.hidden.tobytes()) for one in BLOCKS]


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
    is_within_a_block = not ONE_BY_ONE[broken - 1].HasField("capture_end")
    if is_within_a_block:
        with pytest.raises(EngineFailed, match="before the capture was complete"):
            reader.check_complete()
        reader.begin_again()
        with pytest.raises(EngineFailed, match="before the capture was complete"):
            reader.check_complete()  # the next stream ended before it began


Change = Callable[[list[FetchCaptureResponse]], None]


def change(number: int, **fields: object) -> Change:
    def apply(responses: list[FetchCaptureResponse]) -> None:
        body = getattr(responses[number], responses[number].WhichOneof("event"))
        for name, value in fields.items():
            setattr(body, name, value)

    return apply


def drop(number: int) -> Change:
    def apply(responses: list[FetchCaptureResponse]) -> None:
        del responses[number]
        for sequence, response in enumerate(responses):
            response.sequence = sequence

    return apply


# The first stream broke off after 9 bytes. Of the second: 0 header, 1 end, 2 header, 3 end, 4 header,
# 5 chunk of 3 bytes at 5, 6 end, 7 header, 8..10 chunks, 11 end
BROKEN = {
    "it is another capture's": change(0, output_index=1),
    "a finished layer is another": change(0, layer=4),
    "the layer is another": change(4, layer=4),
    "the site is another": change(4, site=CAPTURE_SITE_AFTER),
    "the rows are others": lambda responses: responses[4].capture_header.spans[0].CopyFrom(RowSpan(first=1, count=2)),
    "its number is another": change(4, capture=3),
    "a layer is left out": drop(4),
    "it begins too early": change(5, offset=4),
    "it begins too late": change(5, offset=6),
    "bytes are lost": drop(5),
    "bytes are others": change(5, data=b"\1\2\3"),
    "the checksum is another": change(6, crc32c=5),
    "the total is another": change(6, total_bytes=7),
    "the total of a finished layer is another": change(1, total_bytes=5),
    "bytes of what is complete": change(5, capture=0),
    "a message is lost": change(5),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_does_not_go_on_where_the_last_broke_off_is_noticed(name: str) -> None:
    reader = FetchReader()
    first = sent(BLOCKS, 1)
    cut = next(number for number, _ in enumerate(first) if len(payload(first[:number])) == 9)
    read(reader, first[:cut])
    reader.begin_again()
    second = sent(BLOCKS, 3, reader.received_bytes)
    assert (len(second), second[5].capture_chunk.offset) == (12, 5)
    BROKEN[name](second)
    if name == "a message is lost":
        del second[5]
    with pytest.raises(EngineFailed) as caught:
        read(reader, second)
    assert caught.value.reason == "BAD_STREAM"


def test_a_layer_that_was_complete_ends_once_in_each_stream() -> None:
    reader = FetchReader()
    first = sent(BLOCKS, 1)
    read(reader, first[:6])
    assert first[5].HasField("capture_end")
    for _ in range(2):
        reader.begin_again()
        assert read(reader, sent(BLOCKS, 1, 4)[:2]) == []
    again = sent(BLOCKS, 1, 4)[1]
    again.sequence = 2
    with pytest.raises(EngineFailed, match="has ended"):
        reader.block(again)


def test_bytes_that_were_broken_before_the_stream_broke_off_are_noticed() -> None:
    reader = FetchReader()
    first = sent(BLOCKS, 1)
    first[1].capture_chunk.data = b"\xff"
    read(reader, first[:3])
    reader.begin_again()
    with pytest.raises(EngineFailed, match="wrong checksum"):
        read(reader, sent(BLOCKS, 3, 2))


def test_what_is_fetched_never_lies_in_shared_memory() -> None:
    lease = Lease(token=b"x", segment_name="x", expires_at=1.0)
    header, _, end = shared_block_to_proto(block(3, 1), 0, 0, lease)
    reader = FetchReader()
    reader.block(FetchCaptureResponse(sequence=0, capture_header=header))
    with pytest.raises(EngineFailed) as caught:
        reader.block(FetchCaptureResponse(sequence=1, capture_end=end))
    assert caught.value.reason == "BAD_STREAM"


def test_kinds_of_a_later_revision_are_skipped() -> None:
    reader = FetchReader()
    responses = sent(BLOCKS)
    responses.insert(1, FetchCaptureResponse.FromString(b"\xfa\x01\x00"))
    for sequence, response in enumerate(responses):
        response.sequence = sequence
    assert read(reader, responses) == [facts(one) for one in BLOCKS]
