"""Events as messages of a response stream, and what a reader of the stream notices."""

import tracemalloc

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import Pooling, RowLabels
from steer_service.core.errors import EngineFailed
from steer_service.core.events import CaptureBlock, CaptureLabels, PromptLogprobs, TokenDelta, TokenLogprob, TopLogprob
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.wire import capture_pb2
from steer_service.wire.capture import MAX_LABELS
from steer_service.wire.chunks import ChunkResponse
from steer_service.wire.events import EventReader, EventWriter, heartbeat
from steer_service.wire.generation_pb2 import GenerateResponse
from tests.wire import strategies
from tests.wire.event_streams import (
    COMPLETED,
    DELTA,
    STARTED,
    block,
    change,
    change_header,
    clear,
    drop,
    give,
    read,
    repeat,
    same,
    spans,
    written,
)


@given(
    strategies.started_events,
    st.lists(
        st.one_of(
            strategies.deltas,
            strategies.prompt_logprobs,
            strategies.finished_events,
            strategies.capture_labels(),
            strategies.capture_blocks(),
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


def test_blocks_at_the_same_positions_have_headers_of_their_own():
    chunks = [response.capture_chunk for response in written([block(), block(rows=4), block(layer=9), block()])]
    headers = [chunk.header for chunk in chunks if chunk.HasField("header")]
    assert [[(span.first, span.count) for span in header.spans] for header in headers] == [
        [(0, rows)] for rows in (3, 4, 3, 3)
    ]
    assert [header.layer for header in headers] == [2, 2, 9, 2]


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
    assert started.cancel_token == b"token"
    assert started.capture_bytes_limit == 10 * (3 + 4 - 1) * 2


async def test_the_scores_of_a_long_prompt_are_several_messages_in_order():
    entries = tuple(
        TokenLogprob(token_id=token, logprob=-1.0, top=tuple(TopLogprob(other, -2.0) for other in range(20)))
        for token in range(1000)
    )
    responses = written([STARTED, PromptLogprobs(first_position=1, logprobs=entries), COMPLETED])
    _, *parts, _ = await read(responses)
    assert [part.first_position for part in parts] == [1, 391, 781]
    assert tuple(entry for part in parts for entry in part.logprobs) == entries
    assert max(response.ByteSize() for response in responses) < 1 << 18


async def test_tokens_with_very_many_log_probabilities_are_several_messages_with_the_text_in_the_last():
    top = tuple(TopLogprob(token, -2.0, "a text of usual length", token + 1) for token in range(1 << 16))
    entries = tuple(TokenLogprob(token_id=token, logprob=-1.0, top=top) for token in range(3))
    responses = written([STARTED, TokenDelta(output_index=1, text="abc", token_ids=(0, 1, 2), logprobs=entries)])
    _, *parts = map(EventReader().event, responses)
    assert [part.text for part in parts] == ["", "", "abc"]
    assert [part.token_ids for part in parts] == [(0,), (1,), (2,)]
    assert tuple(entry for part in parts for entry in part.logprobs) == entries
    assert max(response.ByteSize() for response in responses) < 4 << 20


@pytest.mark.parametrize(("tokens", "characters"), [(3, 3), (200_000, 3), (3, 600_000), (200_000, 600_000)])
async def test_however_long_a_delta_is_its_messages_are_small(tokens, characters):
    text, token_ids = "\u20ac" * (characters - 1) + "x", tuple(range(tokens))
    responses = written([STARTED, TokenDelta(output_index=1, text=text, token_ids=token_ids)])
    _, *parts = map(EventReader().event, responses)
    assert "".join(part.text for part in parts) == text
    assert tuple(token for part in parts for token in part.token_ids) == token_ids
    assert max(response.ByteSize() for response in responses) < 4 << 20
    with_text = [number for number, part in enumerate(parts) if part.text]
    assert with_text[0] == max(number for number, part in enumerate(parts) if part.token_ids)


async def test_heartbeats_and_kinds_of_a_later_revision_are_skipped():
    responses = written([STARTED, DELTA, COMPLETED])
    later = GenerateResponse.FromString(b"\xfa\x01\x00")
    responses.insert(0, heartbeat(0))
    responses.insert(2, heartbeat(0))
    responses.insert(3, later)
    for number, response in enumerate(responses):
        response.sequence = number
    assert await read(responses) == [STARTED, DELTA, COMPLETED]


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


async def test_a_finish_reason_of_a_later_server_is_taken_as_another():
    finished = strategies.OutputFinished(output_index=0, reason=strategies.FinishReason.STOP)
    responses = written([STARTED, finished, COMPLETED])
    change(1, reason=99)(responses)

    assert (await read(responses))[1].reason is strategies.FinishReason.OTHER


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
    [started] = EventWriter(capture_row_bytes=10, pooling=Pooling.MAX).responses(STARTED)
    assert started.started.capture_bytes_limit == 10 * 2


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
