"""Live captures: rows arrive while the request still generates."""

from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_INLINE,
    CAPTURE_TIMING_LIVE,
)
from tests.server.capture_client import (
    BUFFERED,
    LAYERS,
    LONG,
    ROWS,
    WIDE,
    Begin,
    asking,
    error,
    places,
    rest_of,
    until_stuck,
)
from tests.server.served import Gate, bounded, text_request


def live(**fields: Any) -> Any:
    return asking(CAPTURE_DELIVERY_INLINE, timing=CAPTURE_TIMING_LIVE, **fields)


async def test_live_rows_come_after_their_token_and_their_labels_and_in_order(begin: Begin):
    alice = await begin()
    request = live()
    request.sampling.n = 2
    responses = await alice.generate(request)

    labelled: dict[int, list[int]] = {0: [], 1: []}
    came: dict[tuple[int, int], list[int]] = {}
    tokens = {0: 0, 1: 0}
    for response in responses:
        if response.HasField("token"):
            tokens[response.token.output_index] += len(response.token.token_ids)
        if response.HasField("capture_labels"):
            labelled[response.capture_labels.output_index] += response.capture_labels.positions
        if response.HasField("capture_chunk"):
            header = response.capture_chunk.header  # they are small: each comes in one chunk
            assert response.capture_chunk.HasField("crc32c")
            rows = [row for span in header.spans for row in range(span.first, span.first + span.count)]
            assert set(rows) <= set(labelled[header.output_index])
            assert max(rows) <= 3 + tokens[header.output_index] - 2  # of tokens that were fed to the model
            came.setdefault((header.output_index, header.layer), []).extend(rows)
    assert came == {(output, layer): list(range(ROWS)) for output in range(2) for layer in LAYERS}
    assert labelled == {0: list(range(ROWS)), 1: list(range(ROWS))}
    assert sorted(places(responses)) == sorted(
        (layer, row) for layer in LAYERS for row in range(ROWS) for _ in range(2)
    )


async def test_live_rows_do_not_wait_for_the_last_token(begin: Begin):
    gate = Gate(at=2)
    alice = await begin()
    alice.served.backend.step = gate
    call = alice.served.generation.Generate(live(), metadata=alice.metadata)
    positions: set[int] = set()
    while len(positions) < 4:  # three of the prompt, and that of the first token
        response = await bounded(call.read())
        positions |= {span.first + row for span in response.capture_chunk.header.spans for row in range(span.count)}
    assert not gate.opened.is_set()
    gate.opened.set()
    assert (await bounded(rest_of(call)))[-1].HasField("completed")


async def test_live_captures_are_inline(begin: Begin):
    told = await error((await begin()).generate(asking(timing=CAPTURE_TIMING_LIVE)))
    assert (type(told), told.field) == (InvalidRequest, "capture.is_live")


async def test_a_slow_reader_of_live_rows_holds_a_few_chunks_and_can_be_left(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call = alice.served.generation.Generate(live(text=LONG, layers=[0, 1, 2, 3], max_tokens=300))
    await bounded(call.read())
    metrics = alice.served.server.metrics
    await until_stuck(lambda: metrics.total("delivered"))
    assert 0 < metrics.total("delivered") < BUFFERED < 1500 * 4 * 4096 * 4
    neighbour = await alice.generate(text_request())  # the engine goes on for others
    assert neighbour[-1].HasField("completed")
    call.cancel()
    await bounded(alice.served.backend.wait_idle())
    assert alice.served.backend.aborted == 1
