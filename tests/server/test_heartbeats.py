"""Heartbeats on response streams that are silent."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from steer_client import AsyncSteerClient
from steer_service.core.events import Event
from steer_service.core.request import GenerateRequest
from steer_service.server.heartbeats import Heartbeats
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import generation_pb2
from tests.server.served import Gate, Serve, Served, bounded, text_request

OFTEN_S = 0.01


async def until_kind(call: Any, kind: str, count: int = 1) -> list[Any]:
    """The responses up to the last of `count` of this kind."""
    responses: list[Any] = []
    while sum(response.WhichOneof("event") == kind for response in responses) < count:
        responses.append(await bounded(call.read()))
    return responses


async def rest_of(call: Any) -> list[Any]:
    """The further responses."""
    responses = []
    while (response := await bounded(call.read())) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def occupied(serve: Serve, **settings: float) -> tuple[Served, Gate, Any]:
    """A server whose only place is taken until the gate is opened, and the call that takes it, which must be kept."""
    backend = FakeBackend()
    served = await serve(backend, heartbeat_s=OFTEN_S, max_running_requests=1, **settings)
    backend.step = gate = Gate(1)
    running = served.generation.Generate(text_request())
    await until_kind(running, "token")
    return served, gate, running


@pytest.mark.parametrize("at", [0, 2])
async def test_a_silent_response_stream_gets_heartbeats_after_started(serve: Serve, at: int) -> None:
    backend = FakeBackend()
    served = await serve(backend, heartbeat_s=OFTEN_S)
    backend.step = gate = Gate(at)
    call = served.generation.Generate(text_request(max_tokens=4))

    responses = await until_kind(call, "heartbeat", 3)
    gate.opened.set()
    responses += await rest_of(call)

    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "started"
    assert [kind for kind in kinds if kind != "heartbeat"] == ["started", *["token"] * 4, "finished", "completed"]
    assert [response.sequence for response in responses] == list(range(len(responses)))


async def test_nothing_follows_completed_while_a_request_is_cleared_away(serve: Serve) -> None:
    class SlowToEnd(FakeBackend):
        async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            async with aclosing(super().submit(request)) as events:
                async for event in events:
                    yield event
            await asyncio.sleep(20 * OFTEN_S)

    served = await serve(SlowToEnd(), heartbeat_s=OFTEN_S)
    responses = await rest_of(served.generation.Generate(text_request()))
    assert responses[-1].WhichOneof("event") == "completed"


async def test_a_request_that_waits_for_its_place_gets_heartbeats_before_started(serve: Serve) -> None:
    served, gate, _running = await occupied(serve)
    call = served.generation.Generate(text_request())

    responses = await until_kind(call, "heartbeat", 3)
    assert {response.WhichOneof("event") for response in responses} == {"heartbeat"}
    gate.opened.set()
    responses += await rest_of(call)

    kinds = [response.WhichOneof("event") for response in responses if response.WhichOneof("event") != "heartbeat"]
    assert kinds == ["started", *["token"] * 4, "finished", "completed"]
    assert [response.sequence for response in responses] == list(range(len(responses)))


async def test_the_wait_for_a_place_counts_in_the_time_budget(serve: Serve) -> None:
    served, gate, _running = await occupied(serve)
    call = served.generation.Generate(text_request(time_budget=Duration(nanos=int(2 * OFTEN_S * 1e9))))
    responses = await until_kind(call, "heartbeat", 3)
    served.backend.step = None
    gate.opened.set()

    responses += await rest_of(call)

    kinds = [response.WhichOneof("event") for response in responses if response.WhichOneof("event") != "heartbeat"]
    assert kinds == ["started", "finished", "completed"]
    [finished] = [response.finished for response in responses if response.HasField("finished")]
    assert finished.reason == generation_pb2.FINISH_REASON_TIME_BUDGET


async def test_a_request_is_refused_with_its_error_after_heartbeats_too(serve: Serve) -> None:
    served, gate, _running = await occupied(serve)
    call = served.generation.Generate(text_request(model="another"))
    await until_kind(call, "heartbeat", 2)

    gate.opened.set()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await rest_of(call)

    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_waiting_request_is_ended_with_its_status_after_heartbeats(serve: Serve) -> None:
    served, gate, _running = await occupied(serve, max_deadline_s=0.3)
    call = served.generation.Generate(text_request())
    await until_kind(call, "heartbeat", 2)

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await rest_of(call)

    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gate.opened.set()


async def test_the_client_waits_through_heartbeats(serve: Serve) -> None:
    backend = FakeBackend()
    served = await serve(backend, heartbeat_s=OFTEN_S)

    async def slow(_: int) -> None:
        await asyncio.sleep(5 * OFTEN_S)

    backend.step = slow
    async with AsyncSteerClient(served.server.address) as client:
        texts, _ = await client.generate("one two", max_tokens=3)

    assert texts[0].count(" t") == 3


async def test_responses_that_come_in_time_are_alone(serve: Serve) -> None:
    served = await serve(heartbeat_s=60.0)
    kinds = {response.WhichOneof("event") for response in await served.generate(text_request(max_tokens=50))}
    assert kinds == {"started", "token", "finished", "completed"}


async def test_a_server_without_heartbeats_sends_none(serve: Serve) -> None:
    served = await serve(heartbeat_s=0.0)
    served.backend.step = gate = Gate(1)
    call = served.generation.Generate(text_request())
    await until_kind(call, "token")
    gate.opened.set()
    assert {response.WhichOneof("event") for response in await rest_of(call)} == {"token", "finished", "completed"}


async def test_a_request_with_heartbeats_is_cancelled_like_any_other(serve: Serve) -> None:
    backend = FakeBackend()
    served = await serve(backend, heartbeat_s=OFTEN_S)
    backend.step = Gate(1)
    call = served.generation.Generate(text_request())
    await until_kind(call, "heartbeat", 2)

    call.cancel()

    await bounded(backend.wait_idle())
    assert backend.aborted == 1


class Scripted:
    """A response stream and what was sent on it; `send` may be held."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.sent: list[str] = []
        self.may_send = asyncio.Event()
        self.may_respond = asyncio.Event()
        self.beating = asyncio.Event()
        if is_open:
            self.may_send.set()

    async def send(self, number: int) -> None:
        self.beating.set()
        await self.may_send.wait()
        self.sent.append(f"beat {number}")

    async def read(self) -> None:
        async with Heartbeats(self.send, OFTEN_S) as heartbeats:
            for kind in ("first", "second"):
                number = next(heartbeats.numbers)
                if heartbeats.pause():
                    await heartbeats.wait_sent()
                self.sent.append(f"{kind} {number}")
                heartbeats.resume()
                await self.may_respond.wait()


async def test_a_response_waits_for_the_heartbeat_that_is_being_sent() -> None:
    script = Scripted(is_open=False)
    reading = asyncio.ensure_future(script.read())
    await bounded(script.beating.wait())
    script.may_respond.set()
    for _ in range(20):
        await asyncio.sleep(0)

    assert script.sent == ["first 0"]
    script.may_send.set()
    await bounded(reading)
    assert script.sent == ["first 0", "beat 1", "second 2"]


async def test_a_response_stream_that_ends_leaves_no_heartbeat_behind() -> None:
    script = Scripted(is_open=False)
    reading = asyncio.ensure_future(script.read())
    await bounded(script.beating.wait())
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    script.may_send.set()
    assert script.sent == ["first 0"]
