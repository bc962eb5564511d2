"""Captures over a real channel: live, held and in shared memory; what is handed out, refused and freed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound, OverBudget, SteerError, Unsupported
from steer_service.core.events import CaptureHeld as HeldEvent
from steer_service.core.request import GenerateRequest
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row, encode_row
from steer_service.wire import capture_pb2
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_HELD,
    CAPTURE_DELIVERY_INLINE,
    CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED,
    CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
    CAPTURE_SITE_BOTH,
    CAPTURE_TIMING_LIVE,
    ConfirmSharedMemoryRequest,
    FetchCaptureRequest,
    FetchCaptureResponse,
    OpenSharedMemoryRequest,
    ReleaseCaptureRequest,
)
from steer_service.wire.generation_pb2 import CancelRequest, GenerateResponse
from steer_service.wire.position_pb2 import PositionRange, PositionScope
from steer_service.wire.status_codes import DETAILS_KEY, error_from_rpc
from tests.arena import Arena
from tests.server.conftest import Gate, Serve, Served, bounded, text_request

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
        return await bounded(_all(self.served.generation.Generate(request, metadata=self.metadata)))

    async def held(self, request: Any = None) -> capture_pb2.CaptureHeld:
        [held] = [one.capture_held for one in await self.generate(request or asking()) if one.HasField("capture_held")]
        return held

    async def fetch(self, capture_id: str, **fields: Any) -> list[FetchCaptureResponse]:
        return await bounded(_all(self.fetching(capture_id, **fields)))

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


async def _all(stream: Any) -> list[Any]:
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


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    return Arena(tmp_path)


@pytest.fixture
def begin(serve: Serve, arena: Arena) -> Callable[..., Awaitable[Client]]:
    """`await begin(backend)` serves a backend whose held rows lie in segments; returns a client of it."""

    async def start(backend: FakeBackend | None = None, **config: Any) -> Client:
        backend = backend or FakeBackend()
        backend.place = arena
        return Client(await serve(backend, shm_dir=str(arena.folder), **config), "alice")

    return start


Begin = Callable[..., Awaitable[Client]]


# -- held ------------------------------------------------------------------------------------------------------------


async def test_what_is_held_is_announced_after_its_labels_and_before_its_end(begin: Begin):
    alice = await begin()
    responses = await alice.generate(asking())
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", *["token"] * 4, "capture_labels", "capture_held", "finished", "completed"]
    assert responses[0].started.capture_delivery == CAPTURE_DELIVERY_HELD
    assert responses[0].started.shared_memory_fallback == 0
    held = responses[6].capture_held
    assert (list(held.layers), held.rows, held.total_bytes) == (LAYERS, ROWS, 3 * ROWS * ROW_BYTES)
    assert [(span.first, span.count) for span in held.spans] == [(0, ROWS)]
    assert len(held.capture_id) >= 32
    receipt = responses[7].finished.receipt
    assert receipt.bytes_captured == held.total_bytes
    assert alice.served.backend.holding == 1


async def test_what_is_held_is_fetched_as_it_would_have_come_inline(begin: Begin):
    alice = await begin()
    inline = await alice.generate(asking(CAPTURE_DELIVERY_INLINE, site=CAPTURE_SITE_BOTH))
    held = await alice.held(asking(site=CAPTURE_SITE_BOTH))
    fetched = await alice.fetch(held.capture_id)
    assert [response.sequence for response in fetched] == list(range(len(fetched)))
    # The fake sends blocks of five rows inline; held rows of a layer come in one.
    ours, theirs = (sorted(set(places(responses))) for responses in (inline, fetched))
    assert ours == theirs
    assert len(payload(fetched)) == len(payload(inline)) == held.total_bytes
    assert [(header.layer, header.site) for header in headers(fetched)] == [
        (layer, site) for layer in LAYERS for site in (2, 1)
    ]
    tokens = [decode_row(row)[2] for row in np.frombuffer(payload(fetched), np.float32).reshape(-1, 8)[:ROWS]]
    [labels] = [one.capture_labels for one in inline if one.HasField("capture_labels")]
    assert tokens == list(labels.token_ids)


async def test_it_is_fetched_again_and_again(begin: Begin):
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
async def test_what_cannot_be_fetched_is_refused_by_its_field_before_anything_is_sent(
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

    failures = [await failure(_all(call)) for call in calls.values()]

    assert {one.code() for one in failures} == {grpc.StatusCode.NOT_FOUND}
    assert len({one.details() for one in failures}) == 1
    assert len({dict(one.trailing_metadata())[DETAILS_KEY] for one in failures}) == 1
    told = error_from_rpc(failures[0])
    assert (type(told), told.reason, told.field) == (NotFound, "UNKNOWN_CAPTURE", "capture_id")


async def test_what_nobody_uses_in_time_is_freed(begin: Begin, arena: Arena):
    alice = await begin(shm_ttl=0.0)
    held = await alice.held()
    await until(lambda: alice.served.backend.holding == 0)
    assert arena.segments == []
    assert alice.served.server.metrics.total("expired") == held.total_bytes


async def test_releasing_frees_and_may_be_said_twice(begin: Begin, arena: Arena):
    alice = await begin()
    held = await alice.held()
    assert len(arena.segments) == 1
    for _ in range(2):
        await alice.release(capture_id=held.capture_id)
        assert (alice.served.backend.holding, arena.segments) == (0, [])
    await alice.release(capture_id="never was")


async def test_nobody_else_can_release(begin: Begin):
    alice = await begin()
    held = await alice.held()
    for name in ("bob", ""):
        await replace(alice, name=name).release(capture_id=held.capture_id)
        await replace(alice, name=name).release(lease_token=held.capture_id.encode())
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


TOKEN = bytes(range(16))


async def test_a_token_of_the_caller_s_own_frees_all_of_its_request_and_nothing_else(begin: Begin, arena: Arena):
    alice = await begin()
    request = asking(release_token=TOKEN)
    request.sampling.n = 2
    await alice.generate(request)
    other = await alice.held(asking(release_token=TOKEN[::-1]))
    plain = await alice.held()
    for _ in range(2):
        await alice.release(release_token=TOKEN)
        assert alice.served.backend.holding == len(arena.segments) == 2
    for held in (other, plain):
        assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


async def test_nobody_else_can_release_by_a_token(begin: Begin):
    alice = await begin()
    held = await alice.held(asking(release_token=TOKEN))
    await replace(alice, name="bob").release(release_token=TOKEN)
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


async def test_a_request_that_still_runs_is_stopped_by_its_release_token(begin: Begin, arena: Arena):
    gate = Gate()
    alice = await begin()
    alice.served.backend.step = gate
    running = asyncio.ensure_future(error(alice.generate(asking(release_token=TOKEN))))
    await bounded(gate.reached.wait())
    await replace(alice, name="bob").release(release_token=TOKEN)
    assert not running.done()
    await alice.release(release_token=TOKEN)
    told = await bounded(running)
    assert (type(told), told.reason) == (EngineFailed, "CANCELLED")
    assert (alice.served.backend.holding, arena.segments) == (0, [])


@pytest.mark.parametrize("token", [b"", b"short", bytes(65)])
async def test_a_token_that_can_be_guessed_or_is_too_long_is_refused(begin: Begin, token: bytes):
    alice = await begin()
    told = await error(alice.release(release_token=token))
    assert (type(told), told.field) == (InvalidRequest, "release_token")
    if token:
        told = await error(alice.generate(asking(release_token=token)))
        assert (type(told), told.field) == (InvalidRequest, "capture.release_token")


async def test_clients_without_a_name_are_one_client(begin: Begin):
    nobody = replace(await begin(), name="")
    held = await nobody.held()
    assert len(payload(await nobody.fetch(held.capture_id))) == held.total_bytes


async def test_a_name_that_is_too_long_is_refused(begin: Begin):
    alice = replace(await begin(), name="x" * 129)
    told = await error(alice.generate(asking()))
    assert (type(told), told.field) == (InvalidRequest, "steer-client-id")


async def test_nothing_to_release_is_refused(begin: Begin):
    told = await error((await begin()).release())
    assert (type(told), told.field) == (InvalidRequest, "target")


async def test_a_field_of_a_later_revision_is_refused(begin: Begin):
    alice = await begin()
    later = FetchCaptureRequest.FromString(b"\xfa\x01\x00")
    told = await error(_all(alice.served.capture.FetchCapture(later)))
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


async def test_a_request_that_fails_after_it_was_held_leaves_nothing(begin: Begin, arena: Arena):
    backend = Interrupted(EngineFailed("broken", reason="BROKEN"))
    alice = await begin(backend)
    backend.go_on.set()
    assert (await error(alice.generate(asking()))).reason == "BROKEN"
    assert (backend.holding, arena.segments, len(alice.served.server._store)) == (0, [], 0)


async def test_a_request_that_is_cancelled_after_it_was_held_leaves_nothing(begin: Begin, arena: Arena):
    backend = Interrupted()
    alice = await begin(backend)
    call = alice.served.generation.Generate(asking(), metadata=alice.metadata)
    while not (response := await bounded(call.read())).HasField("capture_held"):
        pass
    capture_id = response.capture_held.capture_id
    assert len(payload(await alice.fetch(capture_id))) > 0  # it is there already
    call.cancel()
    await until(lambda: backend.holding == 0)
    assert arena.segments == []
    assert (await failure(alice.fetch(capture_id))).code() == grpc.StatusCode.NOT_FOUND


async def test_a_request_that_is_cancelled_by_its_token_after_it_was_held_leaves_nothing(begin: Begin):
    backend = Interrupted()
    alice = await begin(backend)
    call = alice.served.generation.Generate(asking(), metadata=alice.metadata)
    token = (await bounded(call.read())).started.cancel_token
    await bounded(backend.handed_over.wait())
    await bounded(alice.served.generation.Cancel(CancelRequest(cancel_token=token)))
    assert (await failure(_rest(call))).code() == grpc.StatusCode.CANCELLED
    assert backend.holding == 0


async def _rest(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


# -- slow readers ----------------------------------------------------------------------------------------------------


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


async def stuck_fetch(alice: Client) -> tuple[Any, str, int]:
    """A fetch whose first message was read, and whose others fill every buffer on their way."""
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    await until_stuck(lambda: alice.served.server.metrics.total("delivered"))
    return call, held.capture_id, held.total_bytes


async def test_a_slow_fetch_reads_ahead_of_its_reader_by_little(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call, _, total = await stuck_fetch(alice)
    assert total > 90 << 20
    assert alice.served.server.metrics.total("delivered") < BUFFERED
    call.cancel()


async def test_memory_that_is_being_sent_is_freed_when_its_reader_is_gone(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call, capture_id, total = await stuck_fetch(alice)
    await alice.release(capture_id=capture_id)
    assert alice.served.backend.holding == 1
    assert (await failure(alice.fetch(capture_id))).code() == grpc.StatusCode.NOT_FOUND

    rest = asyncio.ensure_future(failure(_rest(call)))

    assert (await bounded(rest)).code() == grpc.StatusCode.NOT_FOUND
    await until(lambda: alice.served.backend.holding == 0)
    assert alice.served.server.metrics.total("delivered") < total


async def test_a_fetch_that_is_cancelled_frees_what_was_released_meanwhile(begin: Begin):
    alice = await begin(FakeBackend(WIDE))
    call, capture_id, _ = await stuck_fetch(alice)
    await alice.release(capture_id=capture_id)
    call.cancel()
    await until(lambda: alice.served.backend.holding == 0)


async def test_a_reader_that_takes_nothing_for_too_long_loses_the_capture_and_learns_it(begin: Begin):
    alice = await begin(FakeBackend(WIDE), shm_ttl=2.0, send_timeout_s=0.0)
    call, _, total = await stuck_fetch(alice)
    assert alice.served.backend.holding == 1

    await until(lambda: alice.served.backend.holding == 0)  # freed although nobody reads

    assert alice.served.server.metrics.total("expired") == total
    assert (await failure(_rest(call))).code() == grpc.StatusCode.NOT_FOUND


async def test_a_fetch_that_lasts_longer_than_captures_are_kept_comes_to_its_end(begin: Begin):
    ttl_s, clock = 0.5, asyncio.get_running_loop().time
    alice = await begin(FakeBackend(WIDE), shm_ttl=ttl_s)
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0]))
    [stored] = alice.served.server._store._captures.values()
    began, received = clock(), 0

    async def freed() -> float:
        while alice.served.backend.holding:
            await asyncio.sleep(0.001)
        return clock()

    freeing = asyncio.ensure_future(freed())
    async for response in alice.fetching(held.capture_id):
        received += len(response.capture_chunk.data)
        await asyncio.sleep(ttl_s / 10)  # nothing leaves while 4 MiB wait in gRPC's window, which takes him 0.8 s

    assert received == held.total_bytes
    assert stored.used_at - began > 2 * ttl_s
    assert await bounded(freeing) - stored.used_at > ttl_s * 0.99  # which counts from the end of the fetch


async def test_using_a_capture_puts_its_end_off(begin: Begin):
    alice = await begin(shm_ttl=100.0)
    held = await alice.held()
    [stored] = alice.served.server._store._captures.values()
    stored.expires_at = 0.0
    await alice.fetch(held.capture_id)
    assert stored.expires_at > held.expires_at.ToMilliseconds() / 1000 - 1


# -- shared memory ---------------------------------------------------------------------------------------------------


def required(session: bytes = b"", **fields: Any) -> Any:
    return asking(CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED, shared_memory_session=session, **fields)


def preferred(session: bytes = b"", **fields: Any) -> Any:
    return asking(CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED, shared_memory_session=session, **fields)


def regions(responses: list[GenerateResponse]) -> list[capture_pb2.SharedMemoryRegion]:
    return [response.capture_shm for response in responses if response.HasField("capture_shm")]


async def test_the_nonce_is_read_by_this_user_alone_and_only_once(begin: Begin, arena: Arena):
    alice = await begin()
    challenge = await alice.challenge()
    segment = arena.folder / challenge.segment_name
    assert segment.stat().st_mode & 0o777 == 0o600
    assert segment.stat().st_size == 32
    nonce = segment.read_bytes()
    stream = alice.confirming(challenge.challenge_token, nonce)
    assert len((await bounded(stream.read())).session_token) == 32
    assert not segment.exists()
    told = await error(alice.confirming(challenge.challenge_token, nonce).read())
    assert (type(told), told.reason) == (InvalidRequest, "UNKNOWN_CHALLENGE")
    stream.cancel()


async def test_a_wrong_nonce_is_refused_and_ends_the_challenge(begin: Begin, arena: Arena):
    alice = await begin()
    challenge = await alice.challenge()
    nonce = (arena.folder / challenge.segment_name).read_bytes()
    told = await error(alice.confirming(challenge.challenge_token, bytes(32)).read())
    assert (type(told), told.reason, told.field) == (InvalidRequest, "WRONG_NONCE", "nonce")
    told = await error(alice.confirming(challenge.challenge_token, nonce).read())
    assert (told.reason, told.field) == ("UNKNOWN_CHALLENGE", "challenge_token")
    assert arena.segments == []


async def test_a_challenge_is_answered_only_by_the_client_that_asked(begin: Begin, arena: Arena):
    alice = await begin()
    challenge = await alice.challenge()
    nonce = (arena.folder / challenge.segment_name).read_bytes()
    told = await error(replace(alice, name="bob").confirming(challenge.challenge_token, nonce).read())
    assert told.reason == "UNKNOWN_CHALLENGE"
    stream = alice.confirming(challenge.challenge_token, nonce)
    assert (await bounded(stream.read())).session_token
    stream.cancel()


@pytest.mark.parametrize("ask", [required, preferred])
async def test_rows_in_shared_memory_are_those_that_come_inline(begin: Begin, arena: Arena, ask: Callable[..., Any]):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    responses = await alice.generate(ask(session, site=CAPTURE_SITE_BOTH))

    assert responses[0].started.capture_delivery == CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED
    assert responses[0].started.shared_memory_fallback == 0
    kinds = [response.WhichOneof("event") for response in responses]
    shared = ["capture_shm"] * 6
    assert kinds == ["started", *["token"] * 4, "capture_labels", *shared, "finished", "completed"]
    [segment] = arena.segments
    memory = segment.read_bytes()
    labels = next(one.capture_labels for one in responses if one.HasField("capture_labels"))
    for number, region in enumerate(regions(responses)):
        header = region.header
        assert (region.capture, region.segment_name, region.offset % 64) == (number, segment.name, 0)
        rows = np.frombuffer(memory, np.float32, ROWS * 8, region.offset).reshape(ROWS, 8)
        is_before = header.site == capture_pb2.CAPTURE_SITE_BEFORE
        expected = [encode_row(header.layer, *pair) for pair in zip(labels.positions, labels.token_ids, strict=True)]
        assert rows[:, :5].tolist() == np.stack(expected)[:, :5].tolist()
        assert rows[:, 5].tolist() == [is_before] * ROWS
    stream.cancel()


async def test_one_lease_is_for_all_regions_of_an_output_and_its_release_removes_the_segment(
    begin: Begin, arena: Arena
):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    request = required(session)
    request.sampling.n = 2
    responses = await alice.generate(request)
    by_output = {0: set(), 1: set()}
    for header, region in zip(headers(responses), regions(responses), strict=True):
        by_output[header.output_index].add((region.lease_token, region.segment_name))
    [(first, name)], [(second, other)] = by_output.values()
    assert first != second
    assert {path.name for path in arena.segments} == {name, other}
    await alice.release(lease_token=first)
    await alice.release(lease_token=first)
    assert [path.name for path in arena.segments] == [other]
    await replace(alice, name="bob").release(lease_token=second)
    assert alice.served.backend.holding == 1
    stream.cancel()
    await until(lambda: alice.served.backend.holding == 0)


async def no_session(_: Client, __: Path) -> tuple[bytes, Any]:
    return b"", None


async def unknown_session(_: Client, __: Path) -> tuple[bytes, Any]:
    return bytes(32), None


async def foreign_session(alice: Client, folder: Path) -> tuple[bytes, Any]:
    return await replace(alice, name="bob").session(folder)


async def ended_session(alice: Client, folder: Path) -> tuple[bytes, Any]:
    session, stream = await alice.session(folder)
    stream.cancel()
    await until(lambda: not alice.served.server._sessions.holds(session, "client alice"))
    return session, stream


REFUSED = {
    "was never proven": no_session,
    "is unknown": unknown_session,
    "is another client's": foreign_session,
    "has ended": ended_session,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_without_proof_required_is_refused_and_preferred_says_why_it_is_inline(
    begin: Begin, arena: Arena, name: str
):
    alice = await begin()
    session, stream = await REFUSED[name](alice, arena.folder)  # a stream that is dropped would end its session
    failed = await failure(alice.generate(required(session)))
    assert failed.code() == grpc.StatusCode.FAILED_PRECONDITION
    told = error_from_rpc(failed)
    assert (type(told), told.reason, told.field) == (Unsupported, "NO_SHARED_MEMORY", "capture.delivery")
    assert len(alice.served.backend.requests) == 1  # the warm-up

    responses = await alice.generate(preferred(session))

    started = responses[0].started
    expected = "NO_SESSION" if name == "was never proven" else "SESSION_ENDED"
    assert started.capture_delivery == CAPTURE_DELIVERY_INLINE
    assert capture_pb2.SharedMemoryFallback.Name(started.shared_memory_fallback) == f"SHARED_MEMORY_FALLBACK_{expected}"
    assert regions(responses) == []
    assert sorted(places(responses)) == sorted((layer, row) for layer in LAYERS for row in range(ROWS))
    assert alice.served.backend.holding == 0
    if stream is not None:
        stream.cancel()


async def test_a_server_may_share_no_memory(begin: Begin, arena: Arena):
    alice = await begin(shared_memory=0)
    told = await failure(alice.challenge())
    assert told.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error_from_rpc(told).reason == "SWITCHED_OFF"
    assert (await error(alice.generate(required(b"x")))).reason == "NO_SHARED_MEMORY"
    started = (await alice.generate(preferred(b"x")))[0].started
    assert started.shared_memory_fallback == capture_pb2.SHARED_MEMORY_FALLBACK_SWITCHED_OFF
    assert started.capture_delivery == CAPTURE_DELIVERY_INLINE
    assert len(payload(await alice.fetch((await alice.held()).capture_id))) > 0  # holding needs no shared memory


async def test_a_session_that_its_client_ends_frees_its_leases_and_no_others(begin: Begin, arena: Arena):
    alice = await begin()
    bob = replace(alice, name="bob")
    session, stream = await alice.session(arena.folder)
    other, lasting = await bob.session(arena.folder)
    await alice.generate(required(session))
    await alice.generate(required(session))
    kept = regions(await bob.generate(required(other)))[0]
    held = await alice.held()
    assert alice.served.backend.holding == 4

    stream.cancel()

    await until(lambda: alice.served.backend.holding == 2)
    assert kept.segment_name in {path.name for path in arena.segments}
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes
    lasting.cancel()


async def test_a_session_that_ends_under_way_fails_the_request_and_leaves_nothing(begin: Begin, arena: Arena):
    gate = Gate()
    alice = await begin()
    alice.served.backend.step = gate
    session, stream = await alice.session(arena.folder)
    running = asyncio.ensure_future(error(alice.generate(required(session))))
    await bounded(gate.reached.wait())
    stream.cancel()
    await until(lambda: not alice.served.server._sessions.holds(session, "client alice"))
    gate.opened.set()
    told = await bounded(running)
    assert (type(told), told.reason, told.field) == (NotFound, "SESSION_ENDED", "capture.shared_memory_session")
    assert (alice.served.backend.holding, arena.segments) == (0, [])


async def test_a_request_in_shared_memory_that_fails_late_leaves_nothing(begin: Begin, arena: Arena):
    backend = Interrupted(EngineFailed("broken", reason="BROKEN"))
    alice = await begin(backend)
    backend.go_on.set()
    session, stream = await alice.session(arena.folder)
    assert (await error(alice.generate(required(session)))).reason == "BROKEN"
    assert (backend.holding, arena.segments) == (0, [])
    stream.cancel()


async def test_a_lease_that_nobody_releases_expires(begin: Begin, arena: Arena):
    alice = await begin(shm_ttl=0.0)
    session, stream = await alice.session(arena.folder)
    responses = await alice.generate(required(session))
    assert len(regions(responses)) == 3
    await until(lambda: alice.served.backend.holding == 0)
    assert arena.segments == []
    stream.cancel()


async def test_captures_without_rows_are_handed_out_without_a_lease_and_held_by_nobody(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    probe = await alice.generate(text_request(max_tokens=1))
    request = required(session, positions=PositionScope(generated=True))
    request.sampling.stop_token_ids.extend(probe[1].token.token_ids)
    responses = await alice.generate(request)
    assert [list(header.shape) for header in headers(responses)] == [[0, 8]] * 3
    assert [(region.lease_token, region.segment_name) for region in regions(responses)] == [(b"", "")] * 3
    assert (alice.served.backend.holding, arena.segments) == (0, [])
    stream.cancel()


async def test_draining_ends_sessions_and_frees_what_is_held_and_leased(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    await alice.generate(required(session))
    await alice.held()
    await alice.challenge()  # never answered
    assert (alice.served.backend.holding, len(arena.segments)) == (2, 3)

    await bounded(alice.served.server.drain())

    assert await bounded(stream.read()) is grpc.aio.EOF  # it ended well
    assert (alice.served.backend.holding, arena.segments) == (0, [])
    assert alice.served.server.metrics.total("released") == 2 * 3 * ROWS * ROW_BYTES


async def test_a_session_ends_although_its_server_has_no_time(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    await alice.generate(required(session))
    alice.served.server.stop_now()
    await bounded(alice.served.server.drain())
    assert (alice.served.backend.holding, arena.segments) == (0, [])
    stream.cancel()


# -- live ------------------------------------------------------------------------------------------------------------


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
    assert (await bounded(_rest(call)))[-1].HasField("completed")


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


# -- metrics ---------------------------------------------------------------------------------------------------------

BYTES = 3 * ROWS * ROW_BYTES


def totals(client: Client) -> dict[str, int]:
    events = ("reserved", "written", "delivered", "released", "expired", "refused")
    return {
        event: client.served.server.metrics.total(event)
        for event in events
        if client.served.server.metrics.total(event)
    }


@pytest.mark.parametrize("timing", [0, CAPTURE_TIMING_LIVE])
async def test_inline_bytes_are_reserved_written_and_delivered(begin: Begin, timing: int):
    alice = await begin()
    responses = await alice.generate(asking(CAPTURE_DELIVERY_INLINE, timing=timing))
    assert responses[0].started.capture_bytes_limit == BYTES
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES}


async def test_held_bytes_are_delivered_as_often_as_they_are_fetched_and_released_once(begin: Begin):
    alice = await begin()
    held = await alice.held()
    assert totals(alice) == {"reserved": BYTES, "written": BYTES}
    await alice.fetch(held.capture_id)
    await alice.fetch(held.capture_id, skip_bytes=BYTES - 10)
    await alice.release(capture_id=held.capture_id)
    await alice.release(capture_id=held.capture_id)
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES + 10, "released": BYTES}


async def test_expired_bytes_are_not_released_ones(begin: Begin):
    alice = await begin(shm_ttl=0.0)
    await alice.held()
    await until(lambda: alice.served.backend.holding == 0)
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "expired": BYTES}


async def test_shared_bytes_are_delivered_when_they_are_handed_out(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    await alice.generate(required(session))
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES}
    stream.cancel()
    await until(lambda: alice.served.backend.holding == 0)
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "delivered": BYTES, "released": BYTES}


async def test_bytes_of_a_request_that_failed_are_released(begin: Begin):
    backend = Interrupted(EngineFailed("broken"))
    alice = await begin(backend)
    backend.go_on.set()
    await error(alice.generate(asking()))
    assert totals(alice) == {"reserved": BYTES, "written": BYTES, "released": BYTES}


async def test_bytes_that_are_over_a_budget_are_refused(begin: Begin):
    full = OverBudget("full", asked_bytes=1000, allowed_bytes=10, reason="SHM_SPACE", retry_after_s=1.0)
    alice = await begin()
    alice.served.backend.failure = full
    told = await error(alice.generate(asking()))
    assert (type(told), told.asked_bytes, told.allowed_bytes) == (OverBudget, 1000, 10)
    assert totals(alice)["refused"] == 1000
