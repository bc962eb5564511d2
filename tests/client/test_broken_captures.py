"""What a server could say of captures and must not: a client takes none of it for what it asked for."""

import os
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from steer_client import AsyncSteerClient, CapturedRows, CaptureSite, EngineFailed, Overloaded, SteerError
from steer_client.aio import _CaptureRpcs
from steer_client.capture_handles import FETCH_ATTEMPTS, RemoteCapture
from steer_client.shared_memory import MappedRows, metadata_of_blocks
from steer_service.core.events import CaptureBlock
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.server.request_body import RequestBody
from steer_service.server.services import add_service
from steer_service.wire.blocks import Lease, SharedBlock
from steer_service.wire.capture_pb2 import FetchCaptureRequest, FetchCaptureResponse
from steer_service.wire.capture_pb2_grpc import CaptureServiceServicer
from steer_service.wire.status_codes import status_from_error
from steer_service.wire.stored_capture import StoredCaptureNotice, fetch_to_proto

FACTS = CaptureMetadata(
    layers=(2, 0),
    sites=(CaptureSite.AFTER,),
    spans=((0, 3),),
    dtype="float32",
    hidden_size=4,
    prompt_tokens=2,
    sequence_rows=3,
)
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
NOTICE = StoredCaptureNotice(capture_id="id", output_index=0, metadata=FACTS, expires_at=2e9, expires_in_s=60.0)


def block(layer: int, **fields: Any) -> CaptureBlock:
    given = {"output_index": 0, "layer": layer, "site": CaptureSite.AFTER, "spans": ((0, 3),), "hidden": ROWS + layer}
    return CaptureBlock(**{**given, **fields})


HONEST = (block(2), block(0))


class Scripted(CaptureServiceServicer):
    """Answers every fetch as its script says."""

    def __init__(self, script: Callable[[FetchCaptureRequest], Iterable[FetchCaptureResponse]]) -> None:
        self.script = script
        self.requests: list[FetchCaptureRequest] = []
        self.error: SteerError | None = None

    async def FetchCapture(self, body: RequestBody, context: Any) -> AsyncIterator[FetchCaptureResponse]:
        request = body.read(FetchCaptureRequest)
        self.requests.append(request)
        complete = list(saying(*HONEST)(request))
        responses = list(self.script(request))
        for response in responses:
            yield response
        if self.error is not None and len(responses) < len(complete):
            await context.abort_with_status(status_from_error(self.error))


@pytest.fixture
async def fetching() -> AsyncIterator[Callable[..., Any]]:
    """`await fetching(script)` is a capture whose server answers so, and that server."""
    server = grpc.aio.server()
    scripted = Scripted(lambda _: ())
    add_service("steer.v1.CaptureService", scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncSteerClient(f"127.0.0.1:{port}") as client:

        def begin(script: Callable[[FetchCaptureRequest], Iterable[FetchCaptureResponse]]) -> Any:
            scripted.script = script
            return RemoteCapture(NOTICE, _CaptureRpcs(client)), scripted

        yield begin
    await server.stop(0)


def saying(*blocks: CaptureBlock) -> Callable[[FetchCaptureRequest], Iterable[FetchCaptureResponse]]:
    return lambda request: fetch_to_proto(blocks, 5, request.skip_bytes)


async def test_an_honest_answer_is_taken(fetching: Callable[..., Any]) -> None:
    capture, server = fetching(saying(*HONEST))

    rows = await capture.rows()

    assert rows == CapturedRows(after={2: ROWS + 2, 0: ROWS}, spans=((0, 3),))
    assert list(server.requests[0].layers) == [2, 0]


LIES = {
    "nothing comes": saying(),
    "a layer is missing": saying(block(2)),
    "a layer comes twice": saying(*HONEST, block(0)),
    "a layer comes that was not asked for": saying(*HONEST, block(1)),
    "the site is another": saying(block(2), block(0, site=CaptureSite.BEFORE)),
    "the rows are others": saying(block(2), block(0, spans=((1, 4),))),
    "rows are missing": saying(block(2), block(0, spans=((0, 2),), hidden=ROWS[:2])),
    "the element type is another": saying(block(2), block(0, hidden=ROWS.astype(np.float16))),
    "the width is another": saying(block(2), block(0, hidden=np.zeros((3, 5), np.float32))),
    "the stream ends within a layer": lambda _: list(fetch_to_proto(HONEST, 5))[:-1],
    "a message is lost": lambda _: [one for one in fetch_to_proto(HONEST, 5) if one.sequence != 3],
}


@pytest.mark.parametrize("name", LIES)
async def test_rows_that_are_not_those_asked_for_are_noticed(fetching: Callable[..., Any], name: str) -> None:
    capture, server = fetching(LIES[name])
    with pytest.raises(EngineFailed) as raised:
        await capture.rows()
    assert raised.value.reason in ("BAD_STREAM", "INCOMPLETE")
    assert len(server.requests) == 1


def in_parts(chunks: int) -> Callable[[FetchCaptureRequest], Iterable[FetchCaptureResponse]]:
    """The honest answer, of which each response stream sends at most so many chunks of five bytes."""
    return lambda request: list(saying(*HONEST)(request))[:chunks]


async def test_only_a_lost_connection_is_worth_another_try(fetching: Callable[..., Any]) -> None:
    capture, server = fetching(in_parts(3))
    server.error = EngineFailed("a defect", reason="INTERNAL")
    with pytest.raises(EngineFailed, match="a defect"):
        await capture.rows()
    assert len(server.requests) == 1


async def test_response_streams_that_bring_nothing_end_the_fetch(fetching: Callable[..., Any]) -> None:
    capture, server = fetching(in_parts(0))
    server.error = EngineFailed("lost", reason="CONNECTION_LOST")
    with pytest.raises(EngineFailed) as raised:
        await capture.rows()
    assert raised.value.reason == "CONNECTION_LOST"
    assert {request.skip_bytes for request in server.requests} == {0}
    assert FETCH_ATTEMPTS <= len(server.requests) <= FETCH_ATTEMPTS * 4  # gRPC repeats each of them up to 4 times


@pytest.mark.parametrize(
    "error",
    [
        EngineFailed("lost", reason="CONNECTION_LOST"),
        Overloaded("nothing was read for 30 s", reason="SLOW_READER"),
    ],
    ids=lambda error: error.reason,
)
async def test_a_fetch_is_resumed_as_long_as_each_response_stream_brings_something(
    fetching: Callable[..., Any], error: SteerError
) -> None:
    capture, server = fetching(in_parts(3))  # of 96 bytes, so more response streams than FETCH_ATTEMPTS
    server.error = error

    rows = await capture.rows()

    assert rows == CapturedRows(after={2: ROWS + 2, 0: ROWS}, spans=((0, 3),))
    skipped = [request.skip_bytes for request in server.requests]
    assert skipped == sorted(set(skipped))
    assert len(skipped) > FETCH_ATTEMPTS


async def test_a_slow_reader_who_receives_nothing_learns_the_reason(fetching: Callable[..., Any]) -> None:
    capture, server = fetching(in_parts(0))
    server.error = Overloaded("nothing was read for 30 s", reason="SLOW_READER", retry_after_s=1.0)
    with pytest.raises(Overloaded) as raised:
        await capture.rows()
    assert (raised.value.reason, raised.value.retry_after_s) == ("SLOW_READER", 1.0)
    assert len(server.requests) == FETCH_ATTEMPTS


async def test_messages_that_cannot_be_read_are_an_error_like_any_other() -> None:
    async def nonsense(_: bytes, __: Any) -> AsyncIterator[bytes]:
        yield b"\xff"

    server = grpc.aio.server()
    for service, method in (("CaptureService", "FetchCapture"), ("GenerationService", "Generate")):
        handlers = {method: grpc.unary_stream_rpc_method_handler(nonsense)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"steer.v1.{service}", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncSteerClient(f"127.0.0.1:{port}") as client:
        for call in (RemoteCapture(NOTICE, _CaptureRpcs(client)).rows(), client.generate("hello")):
            with pytest.raises(EngineFailed, match="a message cannot be read") as raised:
                await call
            assert raised.value.reason == "BAD_STREAM"
    await server.stop(0)


LEASE = Lease(token=b"lease", segment_name="steerllm-x", expires_at=2e9, expires_in_s=60.0)


def shared(layer: int, offset: int = 64, **fields: Any) -> SharedBlock:
    given = {
        "output_index": 0,
        "layer": layer,
        "site": CaptureSite.AFTER,
        "spans": ((0, 3),),
        "dtype": "float32",
        "shape": (3, 4),
        "offset": offset,
        "lease": LEASE,
    }
    return SharedBlock(**{**given, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "steerllm-x").write_bytes(bytes(64) + ROWS.tobytes())
    return tmp_path


def test_rows_lie_where_the_server_says(folder: Path) -> None:
    assert MappedRows(folder, [shared(2)]).captured == CapturedRows(after={2: ROWS}, spans=((0, 3),))


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../steerllm-x",
        "/etc/hostname",
        ".hidden",
        "another",
        "steerllm-y",
        "a/b",
        "steerllm-z/../another",
    ],
)
def test_a_name_that_is_no_file_of_the_directory_is_not_opened(folder: Path, name: str) -> None:
    inner = folder / "inner"
    (inner / "steerllm-z").mkdir(parents=True)
    for foreign in (".hidden", "another"):
        (inner / foreign).write_bytes(bytes(1000))
    with pytest.raises(EngineFailed) as raised:
        MappedRows(inner, [shared(2, lease=replace(LEASE, segment_name=name or "/"))])
    assert raised.value.reason == "CAPTURE_LOST"
    assert str(folder) not in str(raised.value)


def test_neither_a_link_nor_a_pipe_nor_a_directory_is_a_segment(folder: Path) -> None:
    (folder / "steerllm-link").symlink_to(folder / "steerllm-x")
    (folder / "steerllm-directory").mkdir()
    for name in ("steerllm-link", "steerllm-directory"):
        with pytest.raises(EngineFailed, match="is gone"):
            MappedRows(folder, [shared(2, lease=replace(LEASE, segment_name=name))])


def test_a_pipe_that_nobody_writes_does_not_hold_its_reader(folder: Path) -> None:
    os.mkfifo(folder / "steerllm-pipe")
    with pytest.raises(EngineFailed, match="is gone"):
        MappedRows(folder, [shared(2, lease=replace(LEASE, segment_name="steerllm-pipe"))])


@pytest.mark.parametrize("offset", [68, 2**40, 2**63])
def test_rows_beyond_the_segment_are_an_error_and_not_a_crash(folder: Path, offset: int) -> None:
    with pytest.raises(EngineFailed, match="is too short"):
        MappedRows(folder, [shared(2), shared(0, offset)])


def test_a_file_that_is_cut_off_before_it_is_mapped_is_an_error(folder: Path) -> None:
    os.truncate(folder / "steerllm-x", 100)
    with pytest.raises(EngineFailed, match="is too short"):
        MappedRows(folder, [shared(2)])


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float16"},
        {"shape": (3, 5)},
        {"spans": ((1, 4),)},
        {"lease": replace(LEASE, token=b"other")},
        {"lease": replace(LEASE, segment_name="steerllm-y")},
    ],
    ids=str,
)
def test_blocks_of_one_output_lie_together(fields: dict[str, Any]) -> None:
    assert metadata_of_blocks([shared(2), shared(0)], 2, 3) == FACTS
    with pytest.raises(EngineFailed) as raised:
        metadata_of_blocks([shared(2), shared(0, **fields)], 2, 3)
    assert raised.value.reason == "BAD_STREAM"
