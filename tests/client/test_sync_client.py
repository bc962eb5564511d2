"""The blocking client: the same calls, with no event loop in sight."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureSpec,
    Completed,
    EngineFailed,
    GenerateRequest,
    OutputCaptured,
    Started,
    SteerClient,
    SteeringSpec,
    TextPrompt,
    TokenDelta,
)
from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import Gate, Serve, Server


@pytest.fixture
def blocking(server: Server):
    with SteerClient(server.address) as client:
        yield client


def test_two_calls_in_a_row_give_the_same(blocking: SteerClient) -> None:
    assert blocking.generate("a b", max_tokens=3) == blocking.generate("a b", max_tokens=3)


def test_it_answers_as_the_asynchronous_client_does(blocking: SteerClient, server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    spec = SteeringSpec.simple_add(1, [1.0] * 8)

    async def ask() -> tuple[object, ...]:
        async with AsyncSteerClient(server.address) as client:
            return (
                await client.generate(["a", "b"], max_tokens=3, n=2, steering_spec=spec, raw_output=False),
                await client.chat(messages, max_tokens=3, continue_final_message=True),
                [piece async for piece in client.stream("a b", max_tokens=3)],
            )

    assert asyncio.run(ask()) == (
        blocking.generate(["a", "b"], max_tokens=3, n=2, steering_spec=spec, raw_output=False),
        blocking.chat(messages, max_tokens=3, continue_final_message=True),
        list(blocking.stream("a b", max_tokens=3)),
    )


def test_its_events_have_handles_without_a_loop(blocking: SteerClient, server: Server) -> None:
    for delivery in ("inline", "held"):
        capture = CaptureSpec(layers=(1,), delivery=delivery)
        events = list(blocking.stream_events("a b", max_tokens=3, capture=capture))

        [handle] = [event.handle for event in events if isinstance(event, OutputCaptured)]
        with handle:
            assert handle.fetch()[1][0]["hidden"].shape == (4, 8)
        assert isinstance(events[-1], Completed)
        texts = [event.text for event in events if isinstance(event, TokenDelta)]
        assert ["".join(texts)] == blocking.generate("a b", max_tokens=3).texts
    server.wait_holding(0)


def test_leaving_its_events_ends_the_request(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))
    with SteerClient(server.address) as client, closing(client.stream_events("a b", max_tokens=3)) as events:
        assert isinstance(next(events), Started)
        assert isinstance(next(events), TokenDelta)
    server.wait_idle()
    assert server.backend.aborted == 1


def test_facts_are_there_before_any_call(blocking: SteerClient) -> None:
    assert (blocking.hidden_size, blocking.layer_count, blocking.model_name) == (8, 4, "fake")


def test_submit_yields_events(blocking: SteerClient) -> None:
    assert isinstance(list(blocking.submit(GenerateRequest(prompt=TextPrompt(text="a"))))[-1], Completed)


async def test_it_works_inside_a_running_loop(server: Server) -> None:
    with SteerClient(server.address) as client:
        assert len(client.generate("a b", max_tokens=3)[0]) == 1


def test_many_threads_share_one_client(blocking: SteerClient) -> None:
    prompts = [f"prompt {number}" for number in range(8)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: blocking.generate(prompt, max_tokens=3), prompts))

    assert together == [blocking.generate(prompt, max_tokens=3) for prompt in prompts]


def test_a_call_within_a_progress_function_is_refused(blocking: SteerClient) -> None:
    with pytest.raises(RuntimeError, match="it would wait for itself"):
        blocking.generate("a", max_tokens=1, progress=lambda done, total: blocking.close())


def test_captures_that_came_with_the_response_stay_after_closing(server: Server) -> None:
    with SteerClient(server.address) as client:
        _, came = client.generate("a", max_tokens=2, capture=CaptureSpec(layers=(1,)))
        _, held = client.generate("a", max_tokens=2, capture=CaptureSpec(layers=(1,), delivery="held"))
    assert came is not None
    assert held is not None

    assert came[0].fetch()[1][0]["hidden"].shape == came[0].fetch_rows().hidden[1].shape == (2, 8)
    with pytest.raises(EngineFailed, match="the client is closed") as raised:
        held[0].fetch()
    assert raised.value.reason == "CLOSED"
    for handle in (*came, *held):
        handle.close()


def test_closing_twice_leaves_no_thread_and_refuses_calls(server: Server) -> None:
    before = threading.active_count()
    client = SteerClient(server.address)
    client.generate("a", max_tokens=1)
    client.close()
    client.close()

    assert threading.active_count() <= before + 1  # gRPC keeps one poller thread for the process
    with pytest.raises(EngineFailed, match="the client is closed") as raised:
        client.generate("a")
    assert raised.value.reason == "CLOSED"
