"""Messages about captures in shared memory and about held ones."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import name_of_dtype
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.errors import EngineFailed
from steer_service.core.events import CaptureHeld, TokenDelta
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.wire import capture_pb2
from steer_service.wire.blocks import Lease, SharedBlock
from steer_service.wire.events import EventWriter
from steer_service.wire.generation_pb2 import GenerateResponse
from steer_service.wire.position_pb2 import RowSpan
from steer_service.wire.stored_capture import StoredCaptureNotice
from tests.wire import strategies
from tests.wire.event_streams import COMPLETED, DELTA, STARTED, block, change, change_header, read, repeat, spans

LEASE = Lease(token=b"lease", segment_name="steerllm-x", expires_at=1.5, expires_in_s=0.5)


@given(st.lists(strategies.capture_blocks(), max_size=4), strategies.leases, st.data())
async def test_blocks_in_shared_memory_come_back_with_their_place(blocks, lease, data):
    offsets = [data.draw(strategies.offsets) for _ in blocks]
    writer = EventWriter()
    messages = [*writer.responses(STARTED), *writer.shared(blocks, offsets, lease), *writer.responses(COMPLETED)]
    assert [message.sequence for message in messages] == list(range(len(messages)))
    assert all(isinstance(message, GenerateResponse) for message in messages)  # and none a chunk

    _, *back, _ = await read([GenerateResponse.FromString(message.SerializeToString()) for message in messages])

    nowhere = Lease(token=b"", segment_name="", expires_at=0.0, expires_in_s=0.0)
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
            pooling=one.pooling,
        )
        for one, offset in zip(blocks, offsets, strict=True)
    ]


@given(strategies.held_notices)
async def test_a_notice_of_a_held_capture_comes_back_equal(notice):
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
    expires_in_s=0.5,
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
async def test_an_inconsistent_notice_is_an_error(name):
    writer = EventWriter()
    before = [*writer.responses(STARTED), *writer.responses(DELTA)]
    responses = [*before, writer.held(NOTICE), *writer.responses(COMPLETED)]
    assert (await read(responses))[2] == NOTICE
    BROKEN_HELD[name](responses)
    with pytest.raises(EngineFailed) as caught:
        await read(responses)
    assert caught.value.reason == "BAD_STREAM"
