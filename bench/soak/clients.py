"""Clients whose calls are written into a history, and what they ask for."""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.soak.calls import GENERATE, channel_to
from bench.soak.history import OK, End, Operation, Reference
from bench.soak.hostile import serialized
from steer_service.wire.capture_pb2 import (
    CaptureHeader,
    FetchCaptureRequest,
    ReleaseCaptureRequest,
    SharedMemoryRegion,
)
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.chunks import (
    ChunkResponse,
    chunk_from_proto,
    fetch_response_from_bytes,
    generate_response_from_bytes,
)
from steer_service.wire.generation_pb2 import CancelRequest, GenerateRequest
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.status_codes import error_from_rpc

SHARED_MEMORY = "/dev/shm"

FETCH = "/steer.v1.CaptureService/FetchCapture"

EXPIRY_SLACK_S = 1.0
"""Seconds after its expiry within which a capture is surely gone."""


def read_segment(name: str) -> bytes:
    """The bytes of a segment."""
    return Path(SHARED_MEMORY, name).read_bytes()


class Rows:
    """The rows of the captures of one response stream."""

    def __init__(self) -> None:
        self._data: dict[int, bytearray] = {}
        self._places: dict[int, tuple[int, int, int]] = {}
        self.lease = b""
        """The token of its lease of shared memory, if it has one."""
        self.segment = ""
        """The name of the shared memory."""

    def add(self, response: Any) -> None:
        """Takes the chunk in a response, if it has one."""
        if isinstance(response, ChunkResponse):
            chunk = response.chunk
        elif getattr(response, "capture_shm", None) is not None and response.HasField("capture_shm"):
            self._map(response.capture_shm)
            return
        elif response.HasField("capture_chunk"):
            chunk = chunk_from_proto(response.capture_chunk)
        else:
            return
        data = self._data.setdefault(chunk.capture, bytearray())
        assert len(data) == chunk.offset, "a chunk is missing"
        data += chunk.data
        if chunk.header is not None:
            self._place(chunk.capture, chunk.header)

    def _map(self, region: SharedMemoryRegion) -> None:
        memory = read_segment(region.segment_name)
        self.lease, self.segment = region.lease_token, region.segment_name
        self._data[region.capture] = bytearray(memory[region.offset : region.offset + region.header.total_bytes])
        self._place(region.capture, region.header)

    def _place(self, capture: int, header: CaptureHeader) -> None:
        first = header.spans[0].first if header.spans else 0
        self._places[capture] = header.layer, header.site, first

    def joined(self) -> bytes:
        """All rows, by layer, site and position, in however many captures they came; b"" if there are none."""
        order = sorted(self._data, key=lambda number: self._places[number])
        return b"".join(bytes(self._data[number]) for number in order)


def hash_of(rows: bytes, asked: str) -> str:
    """SHA-256 of the rows; "" without any."""
    return hashlib.sha256(rows).hexdigest() if rows else ""


@dataclass(slots=True)
class Log:
    """The history of a run."""

    references: dict[str, Reference] = field(default_factory=dict)
    """What is right, by the name of what was asked."""
    operations: list[Operation] = field(default_factory=list)
    """All operations, in the order in which they began."""
    outages: list[tuple[float, float]] = field(default_factory=list)
    """From when until when there was no engine."""
    hash_of: Callable[[bytes, str], str] = hash_of
    """Hash of the rows that were received for what was asked."""
    numbers: int = 0
    """Ids that were given out."""

    def next_id(self) -> str:
        """An id that no request had before."""
        self.numbers += 1
        return f"r{self.numbers}"


@dataclass(slots=True, kw_only=True)
class Held:
    """A capture that the server holds."""

    id: str
    owner: str
    asked: str
    until_s: float = math.inf
    """When it expires if it is not used, on the monotonic clock."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What a Generate call left."""

    operation: Operation
    held: Held | None = None
    token: bytes = b""
    """Its cancel token."""
    call: Any = None
    """The call, which can be cancelled."""
    rows: Rows = field(default_factory=Rows)
    """Its captured rows."""

    @property
    def end(self) -> End:
        return self.operation.ends[0]


OnToken = Callable[[int, Result], Awaitable[Any] | None]
"""Called at the beginning and after each token with the number of tokens; what it returns is awaited."""


class Client:
    """One client of a server, with an id and a connection of its own."""

    def __init__(
        self,
        log: Log,
        owner: str,
        address: str,
        asks: Mapping[str, GenerateRequest],
        options: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.log = log
        self.owner = owner
        self.asks = asks
        self.channel = channel_to(address, options)
        self.metadata = (("steer-client-id", owner),)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def generate(
        self,
        asked: str,
        *,
        request: GenerateRequest | bytes | None = None,
        id: str = "",
        allowed: frozenset[str] = OK,
        fault: str = "",
        on_token: OnToken | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """Sends what is `asked`, or `request` in its place, and reads the stream to its end."""
        id = id or self.log.next_id()
        operation = self.begin("generate", id, asked=asked, allowed=allowed, fault=fault)
        if request is None:
            request = GenerateRequest()
            request.CopyFrom(self.asks[asked])
        if isinstance(request, GenerateRequest):
            request.request_id = id
        make = self.channel.unary_stream(
            GENERATE, request_serializer=serialized, response_deserializer=generate_response_from_bytes
        )
        result, tokens, completed = Result(operation=operation), list[int](), 0
        call = result.call = make(request, metadata=self.metadata, timeout=timeout_s)
        try:
            await _told(on_token, 0, result)
            async for response in call:
                if completed:
                    self.end(operation, "OK", "something came after Completed")
                result.rows.add(response)
                event = "" if isinstance(response, ChunkResponse) else response.WhichOneof("event")
                if event == "started":
                    result.token = response.started.cancel_token
                elif event == "token":
                    tokens += response.token.token_ids
                    await _told(on_token, len(tokens), result)
                elif event == "capture_held":
                    until_s = time.monotonic() + response.capture_held.expires_at.seconds - time.time()
                    result.held = Held(
                        id=response.capture_held.capture_id, owner=self.owner, asked=asked, until_s=until_s
                    )
                completed += event == "completed"
            status, reason = "OK" if completed else "INCOMPLETE", ""
        except grpc.aio.AioRpcError as error:
            status, reason = error.code().name, error_from_rpc(error).reason
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            status, reason = "CANCELLED", ""
        except grpc.aio.UsageError:  # the channel was closed
            status, reason = "CANCELLED", ""
        digest = self.log.hash_of(result.rows.joined(), asked) if status == "OK" else ""
        if result.held is not None and asked in self.log.references:
            digest = self.log.references[asked].rows  # the fetch shows them
        self.end(operation, status, reason, tuple(tokens), digest)
        return result

    async def fetch(self, held: Held, *, allowed: frozenset[str] = OK, fault: str = "") -> Operation:
        """Fetches a held capture."""
        operation = self.begin("fetch", held.id, asked=held.asked, of=held.owner, allowed=allowed, fault=fault)
        operation.expires_s = held.until_s + EXPIRY_SLACK_S
        make = self.channel.unary_stream(
            FETCH,
            request_serializer=FetchCaptureRequest.SerializeToString,
            response_deserializer=fetch_response_from_bytes,
        )
        rows, status, reason = Rows(), "OK", ""
        try:
            async for response in make(FetchCaptureRequest(capture_id=held.id), metadata=self.metadata):
                rows.add(response)
        except grpc.aio.AioRpcError as error:
            status, reason = error.code().name, error_from_rpc(error).reason
        if status == "OK" and self.owner == held.owner:
            held.until_s = math.inf  # its use postponed the expiry
        self.end(operation, status, reason, (), self.log.hash_of(rows.joined(), held.asked) if status == "OK" else "")
        return operation

    async def release(self, held: Held) -> Operation:
        """Releases a held capture."""
        request = ReleaseCaptureRequest(capture_id=held.id)
        return await self._unary(
            "release", held.id, held.owner, CaptureServiceStub(self.channel).ReleaseCapture, request
        )

    async def cancel(self, result: Result, token: bytes = b"") -> Operation:
        """Cancels a request by its token, or by another `token`."""
        call, request = GenerationServiceStub(self.channel).Cancel, CancelRequest(cancel_token=token or result.token)
        return await self._unary("cancel", result.operation.id, result.operation.owner, call, request)

    async def send(self, method: str, data: bytes, allowed: frozenset[str], fault: str) -> None:
        """Sends bytes to a method, `/package.Service/Method`, and reads what comes for two seconds."""
        operation = self.begin("send", method, allowed=allowed, fault=fault)
        status, reason = "OK", ""
        try:
            async for _ in self.channel.unary_stream(method)(data, metadata=self.metadata, timeout=2.0):
                pass
        except grpc.aio.AioRpcError as error:
            status, reason = error.code().name, error_from_rpc(error).reason
        self.end(operation, status, reason)

    async def _unary(self, kind: str, id: str, of: str, call: Any, request: Any) -> Operation:
        operation = self.begin(kind, id, of=of)
        try:
            response = await call(request, metadata=self.metadata)
            status, reason = "OK", "cancelled" if getattr(response, "cancelled", False) else ""
        except grpc.aio.AioRpcError as error:
            status, reason = error.code().name, error_from_rpc(error).reason
        self.end(operation, status, reason)
        return operation

    def begin(self, kind: str, id: str, **fields: Any) -> Operation:
        """Writes the begin of an operation into the history."""
        operation = Operation(began_s=time.monotonic(), owner=self.owner, kind=kind, id=id, **fields)
        self.log.operations.append(operation)
        return operation

    @staticmethod
    def end(operation: Operation, status: str, reason: str = "", tokens: tuple[int, ...] = (), rows: str = "") -> None:
        """Writes its end into the history."""
        end = End(at_s=time.monotonic(), status=status, reason=reason, tokens=tokens, rows=rows)
        operation.ends.append(end)


async def _told(on_token: OnToken | None, count: int, result: Result) -> None:
    if on_token is not None and (waiting := on_token(count, result)) is not None:
        await waiting


async def compute_references(client: Client) -> None:
    """Computes everything that may be asked, each alone, and keeps it as right.

    Asks each twice; raises AssertionError if the results differ.
    """
    for asked in client.asks:
        seen = set()
        for _ in range(2):
            result = await client.generate(asked)
            assert result.end.status == "OK", result.operation
            rows = result.end.rows
            if result.held is not None:
                rows = (await client.fetch(result.held)).ends[0].rows
                await client.release(result.held)
            seen.add(Reference(result.end.tokens, rows))
        assert len(seen) == 1, f"{asked} differs when it is repeated"
        client.log.references[asked] = seen.pop()
    client.log.operations.clear()
