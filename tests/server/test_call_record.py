"""`x-request-id` of every method: accepted, echoed, and replaced where it is missing or not valid."""

import asyncio
import re
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from steer_service.core.errors import MissingVectors
from steer_service.server.call_record import CallRecord
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.status_codes import error_from_rpc
from tests.server.capture_client import Begin, all_of
from tests.server.served import Gate, Serve, Served, bounded, text_request
from tests.server.test_tokens import entry

KEY = "x-request-id"
ALICE = ("steer-client-id", "alice")
UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
MOST_TRAILER_BYTES = 8192
"""Of gRPC's clients, unless they are told otherwise."""


def reflection(served: Served, **options: Any) -> Any:
    call = served.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
    )
    return call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), **options)


async def session(served: Served, **options: Any) -> Any:
    opened = await served.capture.OpenSharedMemory(capture_pb2.OpenSharedMemoryRequest(), metadata=(ALICE,))
    nonce = await asyncio.to_thread(Path(served.server.config.shm_dir, opened.segment_name).read_bytes)
    asked = capture_pb2.ConfirmSharedMemoryRequest(challenge_token=opened.challenge_token, nonce=nonce)
    return served.capture.ConfirmSharedMemory(asked, **options)


METHODS = {
    "Generate": lambda served, **options: served.generation.Generate(text_request(), **options),
    "Cancel": lambda served, **options: served.generation.Cancel(
        generation_pb2.CancelRequest(cancel_token=b"0" * 16), **options
    ),
    "ListVectors": lambda served, **options: served.steering.ListVectors(steering_pb2.ListVectorsRequest(), **options),
    "ReleaseCapture": lambda served, **options: served.capture.ReleaseCapture(
        capture_pb2.ReleaseCaptureRequest(capture_id="none"), **options
    ),
    "ConfirmSharedMemory": session,
    "Tokenize": lambda served, **options: served.tokenizer.Tokenize(
        tokenizer_pb2.TokenizeRequest(text="one"), **options
    ),
    "GetServerInfo": lambda served, **options: served.info.GetServerInfo(info_pb2.GetServerInfoRequest(), **options),
    "Check": lambda served, **options: served.health.Check(health_pb2.HealthCheckRequest(), **options),
    "Watch": lambda served, **options: served.health.Watch(health_pb2.HealthCheckRequest(), **options),
    "ServerReflectionInfo": reflection,
}


async def headers(begin: Begin, method: str, *metadata: tuple[str, str]) -> list[str]:
    """The ids in the headers of a call's responses."""
    served = (await begin()).served
    call = METHODS[method](served, metadata=(ALICE, *metadata))
    if asyncio.iscoroutine(call):
        call = await call
    sent = await bounded(call.initial_metadata())
    call.cancel()
    return [value for key, value in sent if key == KEY]


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_echoes_the_id_with_its_headers(begin: Begin, method: str) -> None:
    assert await headers(begin, method, (KEY, "edge-7:a.b_C")) == ["edge-7:a.b_C"]


async def test_a_fetch_echoes_it_too(begin: Begin) -> None:
    alice = await begin()
    held = await alice.held()
    request = capture_pb2.FetchCaptureRequest(capture_id=held.capture_id)
    call = alice.served.capture.FetchCapture(request, metadata=(*alice.metadata, (KEY, "fetch")))
    await bounded(all_of(call))
    assert dict(await call.initial_metadata())[KEY] == "fetch"


BAD = {
    "none": (),
    "an empty one": ((KEY, ""),),
    "a long one": ((KEY, "a" * 129),),
    "a space": ((KEY, "a b"),),
    "a quote": ((KEY, 'a"b'),),
    "two of them": ((KEY, "a"), (KEY, "b")),
}


@pytest.mark.parametrize("metadata", BAD.values(), ids=BAD)
async def test_an_id_that_is_missing_or_not_valid_is_replaced(begin: Begin, metadata: Any) -> None:
    [made] = await headers(begin, "GetServerInfo", *metadata)
    assert UUID.fullmatch(made)
    assert uuid.UUID(made).version == 4


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(all_of(call) if hasattr(call, "__aiter__") else call)
    return caught.value


async def test_a_refusal_has_it_in_its_trailers_alone(serve: Serve) -> None:
    served = await serve()
    for call in (
        served.generation.Generate(text_request(text=""), metadata=((KEY, "mine"),)),
        served.steering.ListVectors(steering_pb2.ListVectorsRequest(), metadata=((KEY, "mine"),)),
        served.capture.FetchCapture(capture_pb2.FetchCaptureRequest(capture_id="x"), metadata=((KEY, "mine"),)),
    ):
        error = await refused(call)
        assert not error.initial_metadata()  # headers would forbid a retry
        assert [value for key, value in error.trailing_metadata() if key == KEY] == ["mine"]
        assert error_from_rpc(error).reason


async def test_a_call_without_a_valid_token_has_it_in_its_trailers(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "tokens.toml").write_text(entry("alice", "alices"))
    served = await serve(token_file=str(tmp_path / "tokens.toml"))
    error = await refused(served.generation.Generate(text_request(), metadata=((KEY, "mine"),)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (error.initial_metadata(), dict(error.trailing_metadata())[KEY]) == (grpc.aio.Metadata(), "mine")


async def test_a_call_that_is_ended_from_elsewhere_has_it_in_headers_and_trailers(serve: Serve) -> None:
    gate = Gate()
    served = await serve(FakeBackend())
    served.backend.step = gate
    call = served.generation.Generate(text_request(), metadata=((KEY, "mine"),))
    started = (await bounded(call.read())).started

    await served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=started.cancel_token))

    async def read_on() -> None:
        while await call.read():
            pass

    error = await refused(read_on())
    assert error.code() is grpc.StatusCode.CANCELLED
    assert dict(await call.initial_metadata())[KEY] == dict(error.trailing_metadata())[KEY] == "mine"


def test_the_largest_status_fits_what_clients_accept() -> None:
    record = CallRecord("m", ((KEY, "a" * 128),))
    digests = tuple(number.to_bytes(32) for number in range(1000))
    status = record.status(MissingVectors("x" * 100, digests=digests, field="steering"))
    on_the_wire = sum(
        len(key) + 32 + (len(value) if isinstance(value, str) else len(value) * 4 // 3)
        for key, value in status.trailing_metadata
    )
    assert dict(status.trailing_metadata)[KEY] == "a" * 128
    assert on_the_wire + len(status.details.encode()) < MOST_TRAILER_BYTES
