"""Held captures over a real channel: how they are announced, fetched whole and in part, and refused."""

from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest, NotFound, Unsupported
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_HELD,
    CAPTURE_DELIVERY_INLINE,
    CAPTURE_SITE_BOTH,
    FetchCaptureRequest,
)
from steer_service.wire.position_pb2 import PositionRange, PositionScope
from steer_service.wire.status_codes import DETAILS_KEY, error_from_rpc
from tests.server.capture_client import (
    LAYERS,
    ROW_BYTES,
    ROWS,
    Begin,
    all_of,
    asking,
    checksums,
    error,
    failure,
    headers,
    payload,
    places,
)
from tests.server.served import text_request


async def test_a_held_capture_is_announced_after_its_labels_and_before_the_end(begin: Begin):
    alice = await begin()
    responses = await alice.generate(asking())
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", *["token"] * 4, "capture_labels", "capture_held", "finished", "completed"]
    assert responses[0].started.capture_delivery == CAPTURE_DELIVERY_HELD
    assert responses[0].started.shared_memory_fallback == 0
    held = responses[6].capture_held
    assert 0 < held.expires_in.ToMilliseconds() <= held.expires_at.ToMilliseconds()
    assert (list(held.layers), held.rows, held.total_bytes) == (LAYERS, ROWS, 3 * ROWS * ROW_BYTES)
    assert [(span.first, span.count) for span in held.spans] == [(0, ROWS)]
    assert len(held.capture_id) >= 32
    receipt = responses[7].finished.receipt
    assert receipt.bytes_captured == held.total_bytes
    assert alice.served.backend.holding == 1


async def test_a_fetched_capture_equals_an_inline_one(begin: Begin):
    alice = await begin()
    inline = await alice.generate(asking(CAPTURE_DELIVERY_INLINE, site=CAPTURE_SITE_BOTH))
    held = await alice.held(asking(site=CAPTURE_SITE_BOTH))
    fetched = await alice.fetch(held.capture_id)
    assert [response.sequence for response in fetched] == list(range(len(fetched)))
    ours, theirs = (sorted(set(places(responses))) for responses in (inline, fetched))
    assert ours == theirs
    assert len(payload(fetched)) == len(payload(inline)) == held.total_bytes
    assert [(header.layer, header.site) for header in headers(fetched)] == [
        (layer, site) for layer in LAYERS for site in (2, 1)
    ]
    tokens = [decode_row(row)[2] for row in np.frombuffer(payload(fetched), np.float32).reshape(-1, 8)[:ROWS]]
    [labels] = [one.capture_labels for one in inline if one.HasField("capture_labels")]
    assert tokens == list(labels.token_ids)


async def test_a_held_capture_can_be_fetched_more_than_once(begin: Begin):
    alice = await begin()
    held = await alice.held()
    assert await alice.fetch(held.capture_id) == await alice.fetch(held.capture_id)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layers": [1]}, [(1, row) for row in range(6)]),
        ({"layers": [1, 3, 1]}, [(layer, row) for layer in (1, 3) for row in range(6)]),
        ({"layers": [0], "positions": PositionScope(generated=True)}, [(0, 3), (0, 4), (0, 5)]),
        ({"positions": PositionScope(prompt=True)}, [(layer, row) for layer in LAYERS for row in range(3)]),
        (
            {"layers": [3], "positions": PositionScope(ranges=[PositionRange(first=-1, last=-1)])},
            [(3, 2)],
        ),
        (
            {
                "layers": [3, 0],
                "positions": PositionScope(ranges=[PositionRange(first=4), PositionRange(first=0, last=1)]),
            },
            [(layer, row) for layer in (3, 0) for row in (0, 1, 4, 5)],
        ),
    ],
    ids=str,
)
async def test_a_part_is_fetched_alone(begin: Begin, fields: dict[str, Any], expected: list[tuple[int, int]]):
    alice = await begin()
    held = await alice.held()
    fetched = await alice.fetch(held.capture_id, **fields)
    assert places(fetched) == expected
    for header in headers(fetched):
        named = [row for span in header.spans for row in range(span.first, span.first + span.count)]
        assert named == [row for layer, row in expected if layer == header.layer]


async def test_rows_between_which_others_were_left_out_are_fetched_by_position(begin: Begin):
    alice = await begin()
    scope = PositionScope(ranges=[PositionRange(first=0, last=1), PositionRange(first=4)])
    held = await alice.held(asking(positions=scope))
    part = PositionScope(ranges=[PositionRange(first=1, last=1), PositionRange(first=5, last=5)])
    assert places(await alice.fetch(held.capture_id, layers=[0], positions=part)) == [(0, 1), (0, 5)]
    assert places(await alice.fetch(held.capture_id, layers=[0])) == [(0, 0), (0, 1), (0, 4), (0, 5)]


@pytest.mark.parametrize("part", [{}, {"layers": [1, 3], "positions": PositionScope(generated=True)}], ids=str)
async def test_a_fetch_that_skips_is_the_tail_of_the_whole(begin: Begin, part: dict[str, Any]):
    alice = await begin()
    held = await alice.held()
    whole = await alice.fetch(held.capture_id, **part)
    total = len(payload(whole))
    ends = checksums(whole)
    for skip_bytes in (0, 1, ROW_BYTES, 95, 96, 97, total - 1, total):
        tail = await alice.fetch(held.capture_id, skip_bytes=skip_bytes, **part)
        assert payload(tail) == payload(whole)[skip_bytes:]
        assert headers(tail) == headers(whole)
        assert checksums(tail) == ends


async def test_chunks_are_at_most_as_large_as_asked_and_as_the_contract_says(begin: Begin):
    alice = await begin(FakeBackend(replace(FAKE_MODEL, hidden_size=1 << 16)))
    held = await alice.held()
    for size, expected in ((None, 256 * 1024), (4096, 4096), (1 << 20, 1 << 20)):
        fields = {} if size is None else {"max_chunk_bytes": size}
        sizes = {len(one.capture_chunk.data) for one in await alice.fetch(held.capture_id, **fields)}
        assert max(sizes) == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"skip_bytes": 3 * ROWS * ROW_BYTES + 1}, "skip_bytes"),
        ({"layers": [3], "skip_bytes": ROWS * ROW_BYTES + 1}, "skip_bytes"),
        ({"layers": [3, 2]}, "layers[1]"),
        ({"layers": [2**31]}, "layers[0]"),
        ({"positions": PositionScope(ranges=[PositionRange(first=6, last=6)])}, "positions.ranges[0]"),
        ({"positions": PositionScope(ranges=[PositionRange(first=-4, last=-1)])}, "positions.ranges[0]"),
        ({"positions": PositionScope(ranges=[PositionRange(first=4, last=1)])}, "positions.ranges[0]"),
        ({"positions": PositionScope()}, "positions"),
        ({"max_chunk_bytes": 4095}, "max_chunk_bytes"),
        ({"max_chunk_bytes": (1 << 20) + 1}, "max_chunk_bytes"),
    ],
    ids=str,
)
async def test_an_invalid_fetch_is_refused_by_field_before_anything_is_sent(
    begin: Begin, fields: dict[str, Any], field: str
):
    alice = await begin()
    held = await alice.held()
    call = alice.fetching(held.capture_id, **fields)
    failed = await failure(call.read())
    assert failed.code() == grpc.StatusCode.INVALID_ARGUMENT
    told = error_from_rpc(failed)
    assert (type(told), told.field) == (InvalidRequest, field)
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


@pytest.mark.parametrize(
    ("captured", "asked"),
    [
        (PositionScope(generated=True), PositionScope(prompt=True)),
        (PositionScope(prompt=True), PositionScope(generated=True)),
        (PositionScope(ranges=[PositionRange(first=3, last=3)]), PositionScope(generated=True)),
    ],
    ids=["prompt", "generated", "more generated"],
)
async def test_a_row_that_was_not_captured_is_refused(begin: Begin, captured: PositionScope, asked: PositionScope):
    alice = await begin()
    held = await alice.held(asking(positions=captured))
    told = await error(alice.fetch(held.capture_id, positions=asked))
    assert (type(told), told.field, told.reason) == (InvalidRequest, "positions", "NOT_CAPTURED")


async def test_a_capture_that_is_not_there_is_not_found_whatever_the_cause(begin: Begin):
    alice = await begin()
    expired = await begin(shm_ttl=0.0)
    bob, nobody = replace(alice, name="bob"), replace(alice, name="")
    foreign = await alice.held()
    released = await alice.held()
    await alice.release(capture_id=released.capture_id)
    gone = await expired.held()
    calls = {
        "unknown": alice.fetching("nonsense"),
        "empty": alice.fetching(""),
        "foreign": bob.fetching(foreign.capture_id),
        "without a name": nobody.fetching(foreign.capture_id),
        "released": alice.fetching(released.capture_id),
        "expired": expired.fetching(gone.capture_id),
    }

    failures = [await failure(all_of(call)) for call in calls.values()]

    assert {one.code() for one in failures} == {grpc.StatusCode.NOT_FOUND}
    assert len({one.details() for one in failures}) == 1
    assert len({dict(one.trailing_metadata())[DETAILS_KEY] for one in failures}) == 1
    told = error_from_rpc(failures[0])
    assert (type(told), told.reason, told.field) == (NotFound, "UNKNOWN_CAPTURE", "capture_id")


async def test_a_field_of_a_later_revision_is_refused(begin: Begin):
    alice = await begin()
    later = FetchCaptureRequest.FromString(b"\xfa\x01\x00")
    told = await error(all_of(alice.served.capture.FetchCapture(later)))
    assert (type(told), told.reason) == (Unsupported, "UNKNOWN_FIELD")


async def test_every_output_is_held_on_its_own(begin: Begin):
    alice = await begin()
    request = asking()
    request.sampling.n = 2
    first, second = (one.capture_held for one in await alice.generate(request) if one.HasField("capture_held"))
    assert (first.output_index, second.output_index) == (0, 1)
    await alice.release(capture_id=first.capture_id)
    fetched = await alice.fetch(second.capture_id)
    assert {header.output_index for header in headers(fetched)} == {1}
    assert alice.served.backend.holding == 1


async def test_a_capture_without_rows_is_held_and_fetched_empty(begin: Begin):
    alice = await begin()
    probe = await alice.generate(text_request(max_tokens=1))
    request = asking(positions=PositionScope(generated=True))
    request.sampling.stop_token_ids.extend(probe[1].token.token_ids)
    held = await alice.held(request)
    assert (held.rows, held.total_bytes) == (0, 0)
    fetched = await alice.fetch(held.capture_id)
    assert [list(header.shape) for header in headers(fetched)] == [[0, 8]] * 3


async def test_of_an_output_that_stopped_at_its_first_token_the_generated_rows_are_fetched_empty(begin: Begin):
    alice = await begin()
    probe = await alice.generate(text_request(max_tokens=1))
    request = asking()
    request.sampling.stop_token_ids.extend(probe[1].token.token_ids)
    held = await alice.held(request)
    assert held.rows == 3
    fetched = await alice.fetch(held.capture_id, positions=PositionScope(generated=True))
    assert [list(header.shape) for header in headers(fetched)] == [[0, 8]] * 3
