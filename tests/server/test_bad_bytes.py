"""Bytes that are no request: every method answers with a typed error, and the server logs one line."""

import asyncio
import gc
import logging
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.generation_pb2 import GenerateRequest
from steer_service.wire.status_codes import error_from_rpc
from tests.server.served import Gate, Serve, Served, bounded, text_request
from tests.wire.request_messages import add, inline, steered

NEVER = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}


def services() -> Iterator[ServiceDescriptor]:
    for file in (generation_pb2, steering_pb2, capture_pb2, tokenizer_pb2, info_pb2, health_pb2):
        yield from file.DESCRIPTOR.services_by_name.values()


METHODS = {method.full_name: method for service in services() for method in service.methods}
METHODS = {name: method for name, method in METHODS.items() if method.name not in ("Watch", "List")}
"""Every method that ends by itself."""


async def status(served: Served, method: MethodDescriptor, data: bytes) -> grpc.StatusCode:
    """The status with which the server answers these bytes; a stream is read to its end, or cancelled if it goes on."""
    make = served.channel.unary_stream if method.server_streaming else served.channel.unary_unary
    call = make(f"/{method.containing_service.full_name}/{method.name}")(data, timeout=8)
    if not method.server_streaming:
        return await call.code()
    while await call.read() is not grpc.aio.EOF:
        if method.name == "ConfirmSharedMemory":
            call.cancel()
            return grpc.StatusCode.OK
    return await call.code()


async def code(served: Served, method: MethodDescriptor, data: bytes) -> grpc.StatusCode:
    try:
        return await status(served, method, data)
    except grpc.aio.AioRpcError as error:
        return error.code()


async def test_nothing_is_read_of_a_request_for_which_there_is_no_room(serve: Serve) -> None:
    served = await serve(max_concurrent_requests=1)
    served.backend.step = gate = Gate()
    running = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())

    generate = METHODS["steer.v1.GenerationService.Generate"]
    assert await code(served, generate, b"\xff") is grpc.StatusCode.RESOURCE_EXHAUSTED

    gate.opened.set()
    await bounded(running)
    assert await code(served, generate, b"\xff") is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", METHODS)
async def test_bytes_that_are_no_message_are_an_invalid_argument(serve: Serve, name: str, caplog) -> None:
    served = await serve()
    with caplog.at_level(logging.WARNING):
        codes = [await bounded(code(served, METHODS[name], data)) for data in (b"\xff" * 9, b"\x80", b"\x00")]
    assert codes == [grpc.StatusCode.INVALID_ARGUMENT] * 3
    assert "Traceback" not in caplog.text


async def test_reflection_refuses_bytes_that_are_no_message(serve: Serve) -> None:
    served = await serve()
    call = served.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
    await call.write(b"\xff" * 9)
    assert await bounded(call.code()) == grpc.StatusCode.INVALID_ARGUMENT


async def test_many_bad_messages_make_one_line_of_log(serve: Serve, caplog, monkeypatch) -> None:
    monkeypatch.setattr("steer_service.server.aborted_calls._malformed._next_at", 0.0)
    served = await serve()
    with caplog.at_level(logging.WARNING, "steer_service"):
        for _ in range(20):
            await code(served, METHODS["steer.v1.GenerationService.Generate"], b"\xff")
    assert len(caplog.records) == 1


UNKNOWN_FIELD = b"\xc0\x3e\x01"
"""Field number 1000, which no message has."""


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("steer.")])
async def test_every_method_refuses_a_field_that_it_does_not_know(serve: Serve, name: str) -> None:
    served = await serve()
    assert await bounded(code(served, METHODS[name], UNKNOWN_FIELD)) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"capture": capture_pb2.CaptureSpec(layers=[1] * 400_000)}, "TOO_MANY_ENTRIES"),
        ({"steering": steering_pb2.SteeringSpec(layers=[{}] * (FAKE_MODEL.layer_count + 1))}, "TOO_MANY_ENTRIES"),
        ({"token_ids": generation_pb2.TokenIds(ids=[1] * (FAKE_MODEL.max_model_len + 1))}, "PROMPT_TOO_LONG"),
    ],
    ids=["layers to capture", "layers to steer", "tokens"],
)
async def test_a_request_with_too_many_entries_is_refused_without_waiting_for_a_place(
    serve: Serve, fields: dict[str, Any], reason: str
) -> None:
    served = await serve(max_running_requests=1)
    served.backend.step = gate = Gate()
    running = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())

    assert error_from_rpc(await served.failure(GenerateRequest(**fields))).reason == reason

    gate.opened.set()
    await bounded(running)


@pytest.mark.parametrize("rounds", [25, pytest.param(600, marks=[pytest.mark.extended, pytest.mark.slow])])
async def test_damaged_requests_never_look_like_a_defect_of_the_server(serve: Serve, rounds: int, caplog) -> None:
    served = await serve(FakeBackend())
    chance, codes = random.Random(rounds), set()
    with caplog.at_level(logging.ERROR):
        for _ in range(rounds):
            batch = [
                code(served, method, damaged(sample(method), chance)) for method in METHODS.values() for _ in range(2)
            ]
            codes |= set(await bounded(asyncio.gather(*batch)))
    assert not codes & NEVER
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert not caplog.records
    assert (await served.generate(text_request()))[-1].HasField("completed")


def sample(method: MethodDescriptor) -> bytes:
    """A right request of this method."""
    if method.input_type is GenerateRequest.DESCRIPTOR:
        message = steered(add(inline(bytes(range(32)), (8,))), layer=1)
        message.sampling.max_tokens = 2
        message.capture.layers.append(1)
        return message.SerializeToString()
    if method.name == "UploadVector":
        return steering_pb2.UploadVectorRequest(vector=inline(bytes(range(32)), (8,)).inline).SerializeToString()
    request = GetMessageClass(method.input_type)()
    for field in method.input_type.fields:
        if field.type == field.TYPE_BYTES:
            setattr(request, field.name, bytes(32))
        elif field.type == field.TYPE_STRING:
            setattr(request, field.name, "a name")
    return request.SerializeToString()


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data or b"\x00\x00\x00")
    for _ in range(chance.randint(1, 3)):
        match chance.randrange(3):
            case 0:
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            case 1:
                del changed[chance.randrange(len(changed)) :]
                changed = changed or bytearray(b"\x80")
            case _:
                place = chance.randrange(len(changed))
                changed[place:place] = chance.randbytes(chance.randint(1, 8))
    return bytes(changed)


async def test_refused_messages_are_not_kept(serve: Serve) -> None:
    """An error keeps the frames that it came through until the garbage collector comes; the bytes must not be there."""
    served = await serve()
    hostile = [b"\x2a\xfc\xff\x3f" + b"\x0a\x00" * 524_286, b"\xff" * (1 << 20)]
    method = METHODS["steer.v1.GenerationService.Generate"]
    upload = METHODS["steer.v1.VectorService.UploadVector"]
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for data in hostile * 10:
            for one in (method, upload):
                assert await bounded(code(served, one, data)) not in NEVER
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 6 << 20  # of 40 MiB
