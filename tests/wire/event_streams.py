"""Streams of event messages: written, read, compared, and broken in one place."""

from collections.abc import AsyncGenerator, Callable, Sequence

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.core.events import CaptureBlock, Completed, Event, Started, TokenDelta, Usage
from steer_service.core.sampling_options import SamplingOptions
from steer_service.wire import capture_pb2
from steer_service.wire.chunks import generate_response_to_bytes
from steer_service.wire.events import EventWriter, events_from_responses
from steer_service.wire.generation_pb2 import GenerateResponse
from steer_service.wire.position_pb2 import RowSpan

STARTED = Started(request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingOptions(max_tokens=4, n=2))
COMPLETED = Completed(usage=Usage(prompt_tokens=3, completion_tokens=4))
DELTA = TokenDelta(output_index=0, text="a", token_ids=(1,))


def block(rows: int = 3, width: int = 5, **fields) -> CaptureBlock:
    hidden = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    given = {"output_index": 0, "layer": 2, "site": CaptureSite.AFTER, "hidden": hidden, **fields}
    return CaptureBlock(**{"spans": ((0, len(given["hidden"])),), **given})


def written(events: Sequence[Event], max_chunk_bytes: int = 7) -> list[GenerateResponse]:
    writer = EventWriter(max_chunk_bytes, cancel_token=b"token", capture_row_bytes=10)
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
