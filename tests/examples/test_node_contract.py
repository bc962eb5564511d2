"""The Node example takes responses that keep the contract, and no others."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import crc32c
import grpc
import pytest

from steer_service.wire import capture_pb2
from steer_service.wire.generation_pb2 import Completed, GenerateResponse, OutputFinished, Receipt, Started, TokenDelta
from steer_service.wire.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from steer_service.wire.position_pb2 import RowSpan
from steer_service.wire.tensor_pb2 import DTYPE_F32
from tests.examples.node import PROMPT, answer_in_node, needs_node, run_node


class Scripted(GenerationServiceServicer):
    """Answers every request with the same messages."""

    def __init__(self, responses: list[GenerateResponse]) -> None:
        self._responses = responses

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        for response in self._responses:
            yield response


@asynccontextmanager
async def scripted(responses: list[GenerateResponse]) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(Scripted(responses), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def right_answer() -> list[GenerateResponse]:
    rows = bytes(range(16))
    header = capture_pb2.CaptureHeader(
        layer=1,
        site=capture_pb2.CAPTURE_SITE_AFTER,
        dtype=DTYPE_F32,
        shape=[2, 2],
        spans=[RowSpan(first=0, count=2)],
        total_bytes=16,
    )
    chunks = [
        capture_pb2.CaptureChunk(header=header, data=rows[:10]),
        capture_pb2.CaptureChunk(offset=10, data=rows[10:], crc32c=crc32c.crc32c(rows)),
    ]
    responses = [
        GenerateResponse(started=Started(capture_delivery=capture_pb2.CAPTURE_DELIVERY_INLINE)),
        GenerateResponse(token=TokenDelta(text=" t", token_ids=[7])),
        *(GenerateResponse(capture_chunk=chunk) for chunk in chunks),
        GenerateResponse(finished=OutputFinished(receipt=Receipt(bytes_captured=16))),
        GenerateResponse(completed=Completed()),
    ]
    for sequence, response in enumerate(responses):
        response.sequence = sequence
    return responses


@needs_node
async def test_node_accepts_a_response_that_keeps_the_contract() -> None:
    async with scripted(right_answer()) as address:
        answer = await answer_in_node(address, "--layers", "1")

    assert answer["captures"][0]["sha256"] == hashlib.sha256(bytes(range(16))).hexdigest()


@needs_node
@pytest.mark.parametrize(
    ("number", "field", "value", "said"),
    [
        (3, "sequence", 5, "message 5 came out of order"),
        (2, "capture_chunk.capture", 1, "capture 1 came out of order"),
        (2, "capture_chunk.header.total_bytes", 12, "capture 0 announces bytes that its shape contradicts"),
        (2, "capture_chunk.crc32c", 1, "capture 0 ends after 10 of 16 bytes"),
        (3, "capture_chunk.capture", 1, "capture 1 has no header"),
        (3, "capture_chunk.offset", 9, "capture 0 goes on at byte 9, not at 10"),
        (3, "capture_chunk.data", bytes(7), "capture 0 has more bytes than announced"),
        (3, "capture_chunk.data", bytes(5), "capture 0 ends after 15 of 16 bytes"),
        (3, "capture_chunk.data", bytes(6), "capture 0 has the wrong checksum"),
        (4, "finished.receipt.bytes_captured", 32, "16 bytes came, 32 were captured"),
    ],
)
async def test_node_refuses_a_response_that_breaks_the_contract(number: int, field: str, value: Any, said: str) -> None:
    responses = right_answer()
    *path, name = field.split(".")
    message: Any = responses[number]
    for part in path:
        message = getattr(message, part)
    setattr(message, name, value)

    async with scripted(responses) as address:
        code, _, err = await run_node(address, "--prompt", PROMPT, "--layers", "1", "--json")

    assert code == 1
    assert said in err


@needs_node
@pytest.mark.parametrize("kept", [0, 3, 5])
async def test_node_refuses_a_response_that_ends_early(kept: int) -> None:
    async with scripted(right_answer()[:kept]) as address:
        code, _, err = await run_node(address, "--prompt", PROMPT, "--layers", "1", "--json")

    assert code == 1
    assert "the stream ended before the request was complete" in err
