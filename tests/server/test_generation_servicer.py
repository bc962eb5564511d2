"""Generate and Cancel over a real channel: what arrives, what is refused, and what is released."""

import asyncio
import math
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound, Overloaded
from steer_service.core.events import CaptureBlock
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from steer_service.wire import generation_pb2, steering_pb2
from steer_service.wire.events import events_from_responses
from steer_service.wire.request import request_to_proto
from steer_service.wire.status_codes import error_from_rpc
from steer_service.wire.tensor_pb2 import DTYPE_F32, Tensor
from tests.server.served import Gate, Serve, bounded, text_request

LONG = "w " * 5000


def steered(layer: int = 1, data: bytes = np.ones(8, np.float32).tobytes(), shape=(8,), dtype=DTYPE_F32, **fields):
    vector = steering_pb2.Vector(inline=Tensor(dtype=dtype, shape=shape, data=data))
    add = steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(vector=vector, **fields))
    entry = steering_pb2.LayerSteeringSpec(layer=layer, operations=[add])
    return text_request(steering=steering_pb2.SteeringSpec(layers=[entry]))


def capped(**fields):
    vector = steering_pb2.Vector(inline=Tensor(dtype=DTYPE_F32, shape=[8], data=np.ones(8, np.float32).tobytes()))
    cap = steering_pb2.SteeringOperation(projection_cap=steering_pb2.ProjectionCapSpec(vector=vector, **fields))
    entry = steering_pb2.LayerSteeringSpec(layer=1, operations=[cap])
    return text_request(steering=steering_pb2.SteeringSpec(layers=[entry]))


async def test_a_request_arrives_and_its_events_come_back(serve: Serve):
    served = await serve()
    spec = SteeringSpec.simple_add(2, np.ones(8))
    request = GenerateRequest(
        prompt=TextPrompt(text="one two three"),
        sampling=SamplingOptions(max_tokens=4),
        steering=spec,
        capture=CaptureSpec(layers=(1, 3)),
        request_id="mine",
    )
    stream = served.generation.Generate(request_to_proto(request))
    events = await bounded(_collect(stream))
    assert served.backend.requests[-1] == replace(
        request, client_id="address 127.0.0.1"
    )  # who has no id takes its address's share
    assert events[0].request_id == "mine"
    rows = [decode_row(row)[:2] for block in events if isinstance(block, CaptureBlock) for row in block.hidden]
    assert rows == [(layer, position) for layer in (1, 3) for position in range(6)]
    assert events[-2].receipt.steering_digest == spec.digest()


async def _collect(stream):
    return [event async for event in events_from_responses(stream)]


async def test_an_empty_request_id_is_made_and_unlike_others(serve: Serve):
    served = await serve()
    ids = {(await served.generate(text_request()))[0].started.request_id for _ in range(3)}
    assert len(ids) == 3
    assert "" not in ids


async def test_capture_chunks_are_at_most_as_large_as_asked(serve: Serve):
    wide = ModelInfo(**{**_facts(FAKE_MODEL), "hidden_size": 4096})
    served = await serve(FakeBackend(wide))
    request = text_request()
    request.capture.layers.append(0)
    request.capture.max_chunk_bytes = 4096
    responses = await served.generate(request)
    assert {len(r.capture_chunk.data) for r in responses if r.HasField("capture_chunk")} == {4096}
    assert responses[0].started.capture_bytes_limit == 6 * 4096 * 4


def _facts(info: ModelInfo) -> dict:
    return {name: getattr(info, name) for name in ModelInfo.__dataclass_fields__}


BAD = {
    "unknown layer": (steered(layer=4), InvalidRequest, "steering.layers[0]"),
    "wrong width": (
        steered(data=bytes(range(1, 17)), shape=[4]),
        InvalidRequest,
        "steering.layers[0].operations[0].vector",
    ),
    "non-finite vector": (
        steered(data=np.full(8, np.inf, np.float32).tobytes()),
        InvalidRequest,
        "steering.layers[0].operations[0].vector",
    ),
    "non-finite scale": (steered(scale=float("nan")), InvalidRequest, "steering.layers[0].operations[0].scale"),
    "zero norm": (steered(data=bytes(32)), InvalidRequest, "steering.layers[0].operations[0].vector"),
    "inverted bounds": (capped(min=1.0, max=0.0), InvalidRequest, "steering.layers[0].operations[0].min"),
    "empty prompt": (text_request(text=""), InvalidRequest, "prompt.text"),
    "no prompt": (generation_pb2.GenerateRequest(), InvalidRequest, "prompt"),
    "max_tokens beyond its limit": (text_request(max_tokens=2**31), InvalidRequest, "sampling.max_tokens"),
    "prompt too long": (text_request(text=LONG), InvalidRequest, "prompt"),
    "malformed bytes": (steered(data=b"\0"), InvalidRequest, "steering.layers[0].operations[0].vector"),
    "lying shape": (steered(shape=[2**62]), InvalidRequest, "steering.layers[0].operations[0].vector"),
    "unknown dtype": (steered(dtype=77), InvalidRequest, "steering.layers[0].operations[0].vector"),
    "unknown model": (text_request(model="other"), NotFound, "model"),
    "time budget of nothing": (text_request(time_budget=Duration()), InvalidRequest, "time_budget"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_a_typed_error_before_any_event_and_the_server_continues(serve: Serve, name: str):
    message, kind, field = BAD[name]
    served = await serve()
    call = served.generation.Generate(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call.read())
    error = error_from_rpc(caught.value)
    assert type(error) is kind
    assert error.field == field
    assert error.reason
    assert served.backend.running == 0
    assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_bad_input_disturbs_no_request_under_way(serve: Serve):
    gate = Gate()
    served = await serve(FakeBackend())
    served.backend.step = gate
    neighbour = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())
    for message, _, _ in BAD.values():
        await served.failure(message)
    gate.opened.set()
    assert (await bounded(neighbour))[-1].HasField("completed")


async def test_a_message_over_the_limit_is_refused_and_the_server_continues(serve: Serve):
    served = await serve(max_message_bytes=10_000)
    error = error_from_rpc(await served.failure(text_request(text="x" * 20_000)))
    assert type(error) is InvalidRequest
    assert error.reason == "MESSAGE_TOO_LARGE"
    assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_a_refusal_sends_no_initial_metadata_that_would_forbid_a_retry(serve: Serve):
    served = await serve()
    call = served.generation.Generate(text_request(text=""))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call.read())
    assert not caught.value.initial_metadata()


async def test_a_failure_in_the_middle_keeps_its_type_and_frees_the_request(serve: Serve):
    backend = FakeBackend(failure=Overloaded("full", reason="FULL", retry_after_s=2.0), fail_at=2)
    served = await serve(FakeBackend())
    await served.server.open(FakeBackend())
    served.server._admission.open(backend)
    error = error_from_rpc(await served.failure(text_request()))
    assert (type(error), error.reason, error.retry_after_s) == (Overloaded, "FULL", 2.0)
    assert backend.running == 0
    assert served.server.running == 0


class Broken(FakeBackend):
    """Answers the warm-up, then fails as no backend should."""

    def submit(self, request: GenerateRequest):
        if request.request_id != "warm-up":
            raise ZeroDivisionError(request.prompt)
        return super().submit(request)


async def test_an_unexpected_error_is_internal_and_does_not_repeat_the_prompt(serve: Serve, caplog):
    served = await serve(Broken())
    failure = await served.failure(text_request("secret"))
    assert failure.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in (failure.details() or "")
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text


async def test_an_unexpected_error_of_a_cancellation_is_internal_without_its_message(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    served = await serve()
    monkeypatch.setattr(served.server._admission, "_by_token", None)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=b"secret")))
    error = error_from_rpc(caught.value)
    assert (caught.value.code(), type(error)) == (grpc.StatusCode.INTERNAL, EngineFailed)
    assert (error.reason, error.message) == ("INTERNAL", "the server failed")


async def test_cancelling_while_the_engine_works_releases_the_request(serve: Serve):
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    call = served.generation.Generate(text_request())
    await bounded(call.read())
    await bounded(gate.reached.wait())
    call.cancel()
    await bounded(served.backend.wait_idle())
    await bounded(served.server._admission.wait_idle())
    assert served.backend.aborted == 1


async def unread(served) -> grpc.aio.UnaryStreamCall:
    """A call whose first message was read, and whose others fill every buffer on their way."""
    request = text_request(text="w " * 3000, max_tokens=1)
    request.capture.layers.extend(range(4))
    request.capture.max_chunk_bytes = 1 << 20
    call = served.generation.Generate(request)
    await bounded(call.read())
    [sender] = served.server._send_timeout._senders
    await bounded(_until_stuck(served.backend, sender))
    return call


async def _until_stuck(backend, sender) -> None:
    previous = -1  # no event tells that gRPC waits for its reader: the stream is stuck when nothing moves any more
    while (sent := backend.yielded) != previous or sender.since == math.inf:
        previous = sent
        await asyncio.sleep(0.05)


class Wide(FakeBackend):
    """Counts its events; its captures are larger than what fits between a server and a client that does not read."""

    yielded = 0

    def __init__(self) -> None:
        super().__init__(ModelInfo(**{**_facts(FAKE_MODEL), "hidden_size": 4096}))

    async def submit(self, request: GenerateRequest):
        async for event in super().submit(request):
            self.yielded += 1
            yield event


async def test_cancelling_while_a_slow_reader_holds_the_stream_releases_the_request(serve: Serve):
    served = await serve(Wide())
    call = await unread(served)
    assert served.backend.running == 1
    call.cancel()
    await bounded(served.backend.wait_idle())
    await bounded(served.server._admission.wait_idle())
    assert served.backend.aborted == 1


async def test_a_request_is_cancelled_by_its_token(serve: Serve):
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    call = served.generation.Generate(text_request())
    token = (await bounded(call.read())).started.cancel_token
    await bounded(gate.reached.wait())
    first = await bounded(served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=token)))
    assert first.cancelled
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(_collect_all(call))
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    assert error_from_rpc(caught.value).reason == "CANCELLED"
    await bounded(served.backend.wait_idle())
    assert served.backend.aborted == 1
    again = await bounded(served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=token)))
    assert not again.cancelled


async def _collect_all(call):
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def test_a_token_cancels_a_request_whose_reader_is_slow(serve: Serve):
    served = await serve(Wide())
    call = await unread(served)
    token = next(iter(served.server._admission._by_token))
    assert (await bounded(served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=token)))).cancelled
    await bounded(served.backend.wait_idle())  # freed although nobody reads
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(_collect_all(call))
    assert caught.value.code() == grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("token", [b"", b"nonsense"])
async def test_an_unknown_token_cancels_nothing(serve: Serve, token: bytes):
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    running = asyncio.ensure_future(served.generate(text_request(request_id="victim")))
    await bounded(gate.reached.wait())
    for guess in (token, b"victim"):
        answer = await bounded(served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=guess)))
        assert not answer.cancelled
    gate.opened.set()
    assert (await bounded(running))[-1].HasField("completed")


async def test_a_deadline_ends_the_request(serve: Serve):
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(_collect_all(served.generation.Generate(text_request(), timeout=0.2)))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await bounded(served.backend.wait_idle())


async def test_a_duplicate_id_is_refused_while_the_first_runs_and_allowed_after(serve: Serve):
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    first = asyncio.ensure_future(served.generate(text_request(request_id="same")))
    await bounded(gate.reached.wait())
    failure = await served.failure(text_request(request_id="same"))
    assert failure.code() == grpc.StatusCode.ALREADY_EXISTS
    error = error_from_rpc(failure)
    assert (type(error), error.reason, error.field) == (InvalidRequest, "DUPLICATE_REQUEST_ID", "request_id")
    gate.opened.set()
    assert (await bounded(first))[-1].HasField("completed")
    assert (await served.generate(text_request(request_id="same")))[-1].HasField("completed")


async def test_requests_beyond_the_limit_are_refused_with_a_delay(serve: Serve):
    gate = Gate()
    served = await serve(max_concurrent_requests=1, retry_after_s=0.25)
    served.backend.step = gate
    first = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())
    failure = await served.failure(text_request())
    assert failure.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_rpc(failure)
    assert (type(error), error.reason, error.retry_after_s) == (Overloaded, "QUEUE_FULL", 0.25)
    assert dict(failure.trailing_metadata())["grpc-retry-pushback-ms"] == "250"
    gate.opened.set()
    await bounded(first)
    assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_many_requests_at_once_all_complete(serve: Serve):
    served = await serve()
    answers = await bounded(asyncio.gather(*(served.generate(text_request(f"prompt {i}")) for i in range(200))))
    assert all(answer[-1].HasField("completed") for answer in answers)
    assert served.server.running == 0


async def test_a_program_that_is_too_large_is_refused(serve: Serve):
    served = await serve()
    spec = SteeringSpec({0: LayerSteeringSpec([AddSpec(np.ones(8))] * 9)})
    request = GenerateRequest(prompt=TextPrompt(text="hi"), steering=spec)
    failure = await served.failure(request_to_proto(request))
    assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_from_rpc(failure).reason == "PROGRAM_TOO_LARGE"


async def test_an_unknown_hook_point_is_unimplemented_and_named_by_its_entry(serve: Serve):
    served = await serve()
    request = GenerateRequest(prompt=TextPrompt(text="hi"), steering=SteeringSpec.simple_add(1, np.ones(8)))
    message = request_to_proto(request)
    message.steering.layers[0].hook = 2
    failure = await served.failure(message)
    assert failure.code() == grpc.StatusCode.UNIMPLEMENTED
    error = error_from_rpc(failure)
    assert (error.reason, error.field) == ("UNKNOWN_HOOK_POINT", "steering.layers[0].hook")


async def test_engine_death_is_unavailable_and_turns_health_off(serve: Serve):
    served = await serve()
    served.backend.failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    assert (await served.failure(text_request())).code() == grpc.StatusCode.UNAVAILABLE
    await bounded(served.server.engine_died.wait())
    while set((await bounded(served.statuses())).values()) != {"NOT_SERVING"}:
        await asyncio.sleep(0)
