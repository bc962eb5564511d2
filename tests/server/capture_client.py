"""A client of captures that speaks the wire format, and what tests read from its responses."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from steer_service.core.errors import SteerError
from steer_service.core.events import CaptureHeld as HeldEvent
from steer_service.core.request import GenerateRequest
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from steer_service.wire import capture_pb2
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_HELD,
    CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED,
    CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
    ConfirmSharedMemoryRequest,
    FetchCaptureRequest,
    FetchCaptureResponse,
    OpenSharedMemoryRequest,
    ReleaseCaptureRequest,
)
from steer_service.wire.generation_pb2 import GenerateResponse
from steer_service.wire.status_codes import error_from_rpc
from tests.server.served import Served, bounded, text_request

LAYERS = [3, 0, 1]
ROWS = 6
"""Of every request here: three tokens of the prompt and three of the four that are generated."""
ROW_BYTES = 32
WIDE = replace(FAKE_MODEL, hidden_size=4096)


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0)

    await bounded(wait())


def asking(
    delivery: int = CAPTURE_DELIVERY_HELD, layers: list[int] = LAYERS, text: str = "one two three", **fields: Any
):
    sampling = {"max_tokens": fields.pop("max_tokens", 4)}
    return text_request(text, **sampling, capture=capture_pb2.CaptureSpec(layers=layers, delivery=delivery, **fields))


@dataclass(frozen=True)
class Client:
    """One client of a server, by its own account."""

    served: Served
    name: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("steer-client-id", self.name),) if self.name else ()

    async def generate(self, request: Any) -> list[GenerateResponse]:
        return await bounded(all_of(self.served.generation.Generate(request, metadata=self.metadata)))

    async def held(self, request: Any = None) -> capture_pb2.CaptureHeld:
        [held] = [one.capture_held for one in await self.generate(request or asking()) if one.HasField("capture_held")]
        return held

    async def fetch(self, capture_id: str, **fields: Any) -> list[FetchCaptureResponse]:
        return await bounded(all_of(self.fetching(capture_id, **fields)))

    def fetching(self, capture_id: str, **fields: Any) -> Any:
        request = FetchCaptureRequest(capture_id=capture_id, **fields)
        return self.served.capture.FetchCapture(request, metadata=self.metadata)

    async def release(self, **target: Any) -> None:
        await bounded(self.served.capture.ReleaseCapture(ReleaseCaptureRequest(**target), metadata=self.metadata))

    async def challenge(self) -> capture_pb2.OpenSharedMemoryResponse:
        return await bounded(self.served.capture.OpenSharedMemory(OpenSharedMemoryRequest(), metadata=self.metadata))

    def confirming(self, token: bytes, nonce: bytes) -> Any:
        request = ConfirmSharedMemoryRequest(challenge_token=token, nonce=nonce)
        return self.served.capture.ConfirmSharedMemory(request, metadata=self.metadata)

    async def session(self, folder: Path) -> tuple[bytes, Any]:
        """A session's token and the stream that it lasts with."""
        challenge = await self.challenge()
        nonce = (folder / challenge.segment_name).read_bytes()
        stream = self.confirming(challenge.challenge_token, nonce)
        return (await bounded(stream.read())).session_token, stream


Begin = Callable[..., Awaitable[Client]]
"""`await begin(backend)` serves a backend and returns a client of it: a fixture."""


async def all_of(stream: Any) -> list[Any]:
    return [response async for response in stream]


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call)
    return caught.value


async def error(call: Awaitable[Any]) -> SteerError:
    return error_from_rpc(await failure(call))


def payload(responses: list[Any]) -> bytes:
    return b"".join(response.capture_chunk.data for response in responses)


def headers(responses: list[Any]) -> list[capture_pb2.CaptureHeader]:
    bodies = [getattr(response, response.WhichOneof("event")) for response in responses]
    kinds = (capture_pb2.CaptureChunk, capture_pb2.SharedMemoryRegion)
    return [body.header for body in bodies if isinstance(body, kinds) and body.HasField("header")]


def checksums(responses: list[Any]) -> list[int]:
    chunks = [response.capture_chunk for response in responses]
    return [chunk.crc32c for chunk in chunks if chunk.HasField("crc32c")]


def places(responses: list[Any]) -> list[tuple[int, int]]:
    """(layer, position) of every row that came, as the rows themselves say."""
    rows = np.frombuffer(payload(responses), np.float32).reshape(-1, FAKE_MODEL.hidden_size)
    return [decode_row(row)[:2] for row in rows]


class Interrupted(FakeBackend):
    """Stops when it has handed over what it holds, until it is told how to go on."""

    def __init__(self, then: SteerError | None = None) -> None:
        super().__init__()
        self.then = then
        self.handed_over = asyncio.Event()
        self.go_on = asyncio.Event()

    async def submit(self, request: GenerateRequest) -> AsyncIterator[Any]:
        async with aclosing(super().submit(request)) as events:
            async for event in events:
                yield event
                if isinstance(event, HeldEvent):
                    self.handed_over.set()
                    await self.go_on.wait()
                    if self.then is not None:
                        raise self.then


async def rest_of(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def until_stuck(progress: Callable[[], int]) -> None:
    """Returns when nothing moves any more; no event tells that gRPC waits for its reader."""

    async def wait() -> None:
        previous = 0
        while (now := progress()) != previous or not now:
            previous = now
            await asyncio.sleep(0.05)

    await bounded(wait())


LONG = "w " * 1500
BUFFERED = 16 << 20
"""Bytes that gRPC may take from the server for a reader that takes none: HTTP/2's window of a fast connection."""


def required(session: bytes = b"", **fields: Any) -> Any:
    return asking(CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED, shared_memory_session=session, **fields)


def preferred(session: bytes = b"", **fields: Any) -> Any:
    return asking(CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED, shared_memory_session=session, **fields)


def regions(responses: list[GenerateResponse]) -> list[capture_pb2.SharedMemoryRegion]:
    return [response.capture_shm for response in responses if response.HasField("capture_shm")]
