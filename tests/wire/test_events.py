"""Events as messages of a stream, and what a reader of the stream notices."""

import tracemalloc
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import name_of_dtype
from steer_service.core.capture import CapturedRows, CaptureSite, RowLabels
from steer_service.core.errors import EngineFailed
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    Event,
    Started,
    TokenDelta,
    Usage,
)
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.wire import capture_pb2
from steer_service.wire.blocks import Lease, SharedBlock
from steer_service.wire.capture import MAX_LABELS
from steer_service.wire.chunks import ChunkResponse, generate_response_to_bytes
from steer_service.wire.events import EventReader, EventWriter, events_from_responses
from steer_service.wire.generation_pb2 import FINISH_REASON_TIME_BUDGET, GenerateResponse
from steer_service.wire.position_pb2 import RowSpan
from steer_service.wire.stored_capture import StoredCaptureNotice
from tests.wire import strategies

STARTED = Started(request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingOptions(max_tokens=4, n=2))
COMPLETED = Completed(usage=Usage(prompt_tokens=3, completion_tokens=4))
DELTA = TokenDelta(output_index=0, text="a", token_ids=(1,))


def block(rows: int = 3, width: int = 5, **fields) -> CaptureBlock:
    hidden = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    given = {"output_index": 0, "layer": 2, "site": CaptureSite.AFTER, "hidden": hidden, **fields}
    return CaptureBlock(**{"spans": ((0, len(given["hidden"])),), **given})


def written(events: Sequence[Event], max_chunk_bytes: int = 7) -> list[GenerateResponse]:
    writer = EventWriter(max_chunk_bytes, cancel_token="token", capture_row_bytes=10)
    return [
        GenerateResponse.FromString(generate_response_to_bytes(response))
        for event in events
        for response in writer.responses(event)
    ]


async def stream(responses: Sequence[GenerateResponse]) -> AsyncGenerator[GenerateResponse, None]:
    for response in responses:
        yield response


async def read(responses: Sequence[GenerateResponse]) -> list[Event]:
    return [event async for event in events_from_responses(stream(responses))]


def same(left: Event, right: Event) -> bool:
    if isinstance(left, CaptureBlock) and isinstance(right, CaptureBlock):
        left_facts, right_facts = (
            (b.output_index, b.layer, b.site, b.spans, b.hidden.shape, b.hidden.dtype, b.hidden.tobytes())
            for b in (left, right)
        )
        return left_facts == right_facts
    return left == right


@given(
    strategies.started_events,
    st.lists(
        st.one_of(
            strategies.deltas, strategies.finished_events, strategies.capture_labels(), strategies.capture_blocks()
        ),
        max_size=6,
    ),
    strategies.completed_events,
    st.integers(1, 100),
)
async def test_events_come_back_equal(started, middle, completed, max_chunk_bytes):
    events = [started, *middle, completed]
    back = await read(written(events, max_chunk_bytes))
    assert len(back) == len(events)
    assert all(same(*pair) for pair in zip(events, back, strict=True))


def test_messages_are_numbered_from_zero_without_gaps():
    responses = written([STARTED, DELTA, block(), COMPLETED])
    assert [response.sequence for response in responses] == list(range(len(responses)))


def test_a_block_is_chunks_of_at_most_the_agreed_size_with_a_header_first_and_a_checksum_last():
    rows = block()
    chunks = [response.capture_chunk for response in written([rows], max_chunk_bytes=16)]
    assert [chunk.HasField("header") for chunk in chunks] == [True, False, False, False]
    assert [chunk.HasField("crc32c") for chunk in chunks] == [False, False, False, True]
    assert chunks[0].header.total_bytes == 60
    assert [len(chunk.data) for chunk in chunks] == [16, 16, 16, 12]
    assert [chunk.offset for chunk in chunks] == [0, 16, 32, 48]
    assert b"".join(chunk.data for chunk in chunks) == rows.hidden.tobytes()
    assert chunks[-1].crc32c == crc32c.crc32c(rows.hidden.tobytes())


def test_a_small_block_and_one_without_rows_are_one_message():
    for rows in (block(), block(rows=0)):
        [only] = written([rows], max_chunk_bytes=60)
        assert only.capture_chunk.HasField("header")
        assert only.capture_chunk.HasField("crc32c")
        assert only.capture_chunk.data == rows.hidden.tobytes()


def test_the_checksum_is_crc_32c():
    digits = np.frombuffer(b"12345678", dtype=np.float32).reshape(1, 2)
    *_, end = written([block(hidden=digits)])
    assert end.capture_chunk.crc32c == 0x6087809A


def test_the_default_chunk_is_256_kib():
    writer = EventWriter()
    responses = list(writer.responses(block(rows=3, width=1 << 15)))
    assert max(len(response.chunk.data) for response in responses if isinstance(response, ChunkResponse)) == 256 * 1024


def test_started_carries_the_cancel_token_and_announces_the_bytes_of_captures():
    started = written([STARTED])[0].started
    assert started.cancel_token == "token"
    assert started.capture_bytes_limit == 10 * (3 + 4 - 1) * 2


async def test_heartbeats_and_kinds_of_a_later_revision_are_skipped():
    responses = written([STARTED, DELTA, COMPLETED])
    writer = EventWriter()
    later = GenerateResponse.FromString(b"\xfa\x01\x00")
    responses.insert(1, writer.heartbeat())
    responses.insert(2, later)
    for number, response in enumerate(responses):
        response.sequence = number
    assert await read(responses) == [STARTED, DELTA, COMPLETED]


def change(number: int, **fields) -> Callable[[list[GenerateResponse]], None]:
    def apply(responses: list[GenerateResponse]) -> None:
        body = getattr(responses[number], responses[number].WhichOneof("event"))
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(body, name)[:] = value
            else:
                setattr(body, name, value)

    return apply


def change_header(number: int, **fields) -> Callable[[list[GenerateResponse]], None]:
    def apply(responses: list[GenerateResponse]) -> None:
        header = getattr(responses[number], responses[number].WhichOneof("event")).header
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(header, name)[:] = value
            else:
                setattr(header, name, value)

    return apply


def spans(number: int, *pairs: tuple[int, int]) -> Callable[[list[GenerateResponse]], None]:
    def apply(responses: list[GenerateResponse]) -> None:
        body = getattr(responses[number], responses[number].WhichOneof("event"))
        header = body.header
        del header.spans[:]
        header.spans.extend(RowSpan(first=first, count=count) for first, count in pairs)

    return apply


def drop(number: int, *, renumber: bool = True) -> Callable[[list[GenerateResponse]], None]:
    def apply(responses: list[GenerateResponse]) -> None:
        del responses[number]
        if renumber:
            for sequence, response in enumerate(responses):
                response.sequence = sequence

    return apply


def repeat(number: int) -> Callable[[list[GenerateResponse]], None]:
    def apply(responses: list[GenerateResponse]) -> None:
        copy = GenerateResponse()
        copy.CopyFrom(responses[number])
        responses.insert(number, copy)
        for sequence, response in enumerate(responses):
            response.sequence = sequence

    return apply


def clear(number: int, field: str) -> Callable[[list[GenerateResponse]], None]:
    return lambda responses: responses[number].capture_chunk.ClearField(field)


def give(number: int, field: str, of: int) -> Callable[[list[GenerateResponse]], None]:
    """A chunk gets what only another one should have."""

    def apply(responses: list[GenerateResponse]) -> None:
        part = GenerateResponse(capture_chunk=capture_pb2.CaptureChunk())
        part.capture_chunk.MergeFrom(responses[of].capture_chunk)
        for other in {"data", "offset", "capture", "header", "crc32c"} - {field}:
            part.capture_chunk.ClearField(other)
        responses[number].MergeFrom(part)

    return apply


# 0 started, 1 token, 2..4 chunks of 20 bytes, 5 finished, 6 completed
BROKEN = {
    "a message is lost": drop(3, renumber=False),
    "Started is lost": drop(0),
    "Started comes twice": repeat(0),
    "the header is lost": clear(2, "header"),
    "the header comes twice": give(3, "header", of=2),
    "the first chunk is lost": drop(2),
    "the first chunk comes twice": repeat(2),
    "a chunk is lost": drop(3),
    "a chunk comes twice": repeat(3),
    "the last chunk is lost": drop(4),
    "the last chunk comes twice": repeat(4),
    "the checksum is lost": clear(4, "crc32c"),
    "the checksum comes early": give(3, "crc32c", of=4),
    "Completed is lost": drop(6),
    "Completed comes twice": repeat(6),
    "a byte is flipped": change(3, data=bytes(20)),
    "the checksum is wrong": change(4, crc32c=1),
    "the total is wrong": change_header(2, total_bytes=2**50),
    "the shape is wrong": change_header(2, shape=[3, 6]),
    "the shape is negative": change_header(2, shape=[-3, -5]),
    "the shape has one dimension": change_header(2, shape=[15]),
    "the dtype is unknown": change_header(2, dtype=0),
    "the site is unknown": change_header(2, site=0),
    "the site is that of two": change_header(2, site=capture_pb2.CAPTURE_SITE_BOTH),
    "no position is said": spans(2),
    "positions are too few": spans(2, (0, 2)),
    "positions are too many": spans(2, (0, 4)),
    "positions overlap": spans(2, (0, 2), (1, 1)),
    "positions are out of order": spans(2, (2, 2), (0, 1)),
    "a span is empty": spans(2, (0, 3), (5, 0)),
    "a position is beyond every sequence": spans(2, (2**31 - 3, 3)),
    "the last chunk is too long": change(4, data=bytes(24)),
    "the last chunk is too short": change(4, data=bytes(16)),
    "a chunk is elsewhere": change(3, offset=24),
    "a chunk is another capture's": change(3, capture=1),
    "the number of the capture is another": change(2, capture=1),
    "the finish reason is unknown": change(5, reason=FINISH_REASON_TIME_BUDGET),
    "shared memory is not used for an unknown reason": change(0, shared_memory_fallback=77),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_stream_that_breaks_a_rule_is_noticed(name):
    finished = strategies.OutputFinished(output_index=0, reason=strategies.FinishReason.STOP)
    responses = written([STARTED, DELTA, block(), finished, COMPLETED], max_chunk_bytes=20)
    BROKEN[name](responses)
    with pytest.raises(EngineFailed) as caught:
        await read(responses)
    assert caught.value.reason == "BAD_STREAM"


LABELS = CaptureLabels(
    output_index=0,
    labels=RowLabels(positions=[0, 2], token_ids=[5, 6], is_generated=[False, True], is_steered=[False, True]),
)


@pytest.mark.parametrize("fields", [{"positions": [0]}, {"is_steered": []}, {"token_ids": [5, 2**31]}], ids=str)
async def test_labels_that_are_not_parallel_or_too_large_are_noticed(fields):
    responses = written([STARTED, LABELS, COMPLETED])
    change(1, **fields)(responses)
    with pytest.raises(EngineFailed) as caught:
        await read(responses)
    assert caught.value.reason == "BAD_STREAM"


async def test_the_labels_of_many_rows_come_in_several_messages():
    positions = np.arange(MAX_LABELS + 3)
    labels = RowLabels(
        positions=positions, token_ids=positions[::-1], is_generated=positions > 5, is_steered=positions > 7
    )
    responses = written([STARTED, CaptureLabels(output_index=1, labels=labels), COMPLETED])
    assert max(response.ByteSize() for response in responses) < 1 << 20
    _, *parts, _ = await read(responses)
    assert [len(part.labels) for part in parts] == [MAX_LABELS, 3]
    assert RowLabels.concatenate([part.labels for part in parts]) == labels


def test_started_announces_the_bytes_of_chosen_rows():
    scope = PositionScope(generated=True, ranges=(PositionRange(-1, -1),))
    [started] = EventWriter(capture_row_bytes=10, capture_positions=scope).responses(STARTED)
    assert started.started.capture_bytes_limit == 10 * (1 + 4 - 1) * 2


LEASE = Lease(token=b"lease", segment_name="steerllm-x", expires_at=1.5)


@given(st.lists(strategies.capture_blocks(), max_size=4), strategies.leases, st.data())
async def test_blocks_in_shared_memory_come_back_as_where_they_lie(blocks, lease, data):
    offsets = [data.draw(strategies.offsets) for _ in blocks]
    writer = EventWriter()
    messages = [*writer.responses(STARTED), *writer.shared(blocks, offsets, lease), *writer.responses(COMPLETED)]
    assert [message.sequence for message in messages] == list(range(len(messages)))
    assert all(isinstance(message, GenerateResponse) for message in messages)  # and none a chunk

    _, *back, _ = await read([GenerateResponse.FromString(message.SerializeToString()) for message in messages])

    nowhere = Lease(token=b"", segment_name="", expires_at=0.0)
    assert back == [
        SharedBlock(
            output_index=one.output_index,
            layer=one.layer,
            site=one.site,
            spans=one.spans,
            dtype=name_of_dtype(one.hidden.dtype),
            shape=one.hidden.shape,
            offset=offset if one.hidden.size else 0,
            lease=lease if one.hidden.size else nowhere,
        )
        for one, offset in zip(blocks, offsets, strict=True)
    ]


@given(strategies.held_notices)
async def test_a_notice_of_what_is_held_comes_back_equal(notice):
    begin = replace(STARTED, prompt_token_ids=(0,) * 3)
    token = TokenDelta(output_index=notice.output_index, text="", token_ids=(1, 2))
    notice = replace(notice, metadata=replace(notice.metadata, prompt_tokens=3, sequence_rows=3 + 2 - 1))
    writer = EventWriter()
    messages = [*writer.responses(begin), *writer.responses(token), writer.held(notice), *writer.responses(COMPLETED)]
    _, _, back, _ = await read([GenerateResponse.FromString(message.SerializeToString()) for message in messages])
    assert back == notice


def test_a_held_capture_is_no_event_of_the_wire():
    rows = CapturedRows(after={1: np.zeros((1, 2), np.float32)}, spans=((0, 1),))
    held = LocalCapture(metadata_of(rows, (1,), prompt_tokens=1, sequence_rows=1), rows)
    with pytest.raises(TypeError):
        list(EventWriter().responses(CaptureHeld(output_index=0, held=held)))


# 0 started, 1 region, 2 completed
BROKEN_SHARED = {
    "nothing says where it lies": change(1, segment_name=""),
    "it lies in two places": repeat(1),
    "its number is another": change(1, capture=1),
    "a chunk of it comes": lambda responses: responses[2].capture_chunk.CopyFrom(
        capture_pb2.CaptureChunk(data=bytes(60), crc32c=0)
    ),
    "nothing says what it is": lambda responses: responses[1].capture_shm.ClearField("header"),
    "the total is wrong": change_header(1, total_bytes=61),
    "the shape is wrong": change_header(1, shape=[3, 6]),
    "positions are too few": spans(1, (0, 2)),
}


@pytest.mark.parametrize("name", BROKEN_SHARED)
async def test_shared_memory_that_is_handed_out_against_the_rules_is_noticed(name):
    writer = EventWriter()
    responses = [*writer.responses(STARTED), *writer.shared([block()], [64], LEASE), *writer.responses(COMPLETED)]
    assert len(await read(responses)) == 3
    BROKEN_SHARED[name](responses)
    with pytest.raises(EngineFailed) as caught:
        await read(responses)
    assert caught.value.reason == "BAD_STREAM"


NOTICE = StoredCaptureNotice(
    capture_id="id",
    output_index=0,
    metadata=CaptureMetadata(
        layers=(1, 2),
        sites=(CaptureSite.AFTER,),
        spans=((0, 3),),
        dtype="float32",
        hidden_size=4,
        prompt_tokens=3,
        sequence_rows=3,
    ),
    expires_at=1.5,
)
# 0 started, 1 token, 2 held, 3 completed
BROKEN_HELD = {
    "rows are missing": change(2, rows=2),
    "bytes are missing": change(2, total_bytes=95),
    "positions are too few": lambda responses: responses[2].capture_held.spans[0].MergeFrom(RowSpan(count=2)),
    "positions are none": lambda responses: responses[2].capture_held.spans.append(RowSpan(first=1, count=0)),
    "the site is unknown": change(2, site=77),
    "the site is not said": change(2, site=0),
    "the dtype is unknown": change(2, dtype=0),
}


@pytest.mark.parametrize("name", BROKEN_HELD)
async def test_a_notice_that_cannot_be_is_noticed(name):
    writer = EventWriter()
    before = [*writer.responses(STARTED), *writer.responses(DELTA)]
    responses = [*before, writer.held(NOTICE), *writer.responses(COMPLETED)]
    assert (await read(responses))[2] == NOTICE
    BROKEN_HELD[name](responses)
    with pytest.raises(EngineFailed) as caught:
        await read(responses)
    assert caught.value.reason == "BAD_STREAM"


async def test_a_long_live_stream_is_read_in_little_memory():
    reader, writer = EventReader(), EventWriter()
    for response in writer.responses(STARTED):
        reader.event(response)

    def read_blocks(count: int) -> int:
        for _ in range(count):
            for response in writer.responses(block(rows=1)):
                reader.event(response)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = read_blocks(500)
        assert read_blocks(2000) - before < 20_000  # ten bytes a block
    finally:
        tracemalloc.stop()


async def test_captures_may_be_interleaved():
    first, second = block(layer=0), block(layer=1)
    responses = written([STARTED, first, second, COMPLETED], max_chunk_bytes=40)
    begin, a0, b0, a1, b1, end = responses
    mixed = [begin, a0, a1, b1, b0, end]
    for number, response in enumerate(mixed):
        response.sequence = number
    assert [event.layer for event in await read(mixed) if isinstance(event, CaptureBlock)] == [1, 0]
