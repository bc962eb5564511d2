"""`stream_events` over scripted backends and the fake one: text, captures, receipt and usage as they come."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.events import (
    CaptureBlock,
    CaptureLabels,
    Completed,
    OutputFinished,
    PromptLogprobs,
    Started,
    TokenDelta,
)
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.stream_events import OutputCaptured
from steer_service.testing.fake_backend import FakeBackend
from tests.runtime.scripted import DONE, LIMIT_S, Scripted, answer, capturing, finished, rows, said, started

V = [1.0] * 8


async def test_without_captures_they_are_the_events_of_the_backend() -> None:
    script = answer("a", "b")

    assert [event async for event in Scripted(script).stream_events("p", max_tokens=2)] == script


@pytest.mark.parametrize("delivery", ["inline", "held"])
async def test_the_captures_of_an_output_come_as_a_handle_before_its_end(delivery: str) -> None:
    backend = FakeBackend()
    capture = CaptureSpec(layers=(1, 3), delivery=delivery)
    asked = {"max_tokens": 2, "n": 2, "prompt_logprobs": 0, "steering_spec": SteeringSpec.simple_add(1, V)}

    events = [event async for event in backend.stream_events("a b", capture=capture, **asked)]

    kinds = [type(event) for event in events]
    ends = [OutputCaptured, OutputFinished]
    assert kinds == [Started, PromptLogprobs, *[TokenDelta] * 4, *ends, *ends, Completed]
    [generation], handles = await backend.generate("a b", capture=capture, raw_output=True, **asked)
    finished_ones = [event for event in events if isinstance(event, OutputFinished)]
    for index, (event, handle) in enumerate(zip(events[-5::2][:2], handles, strict=True)):
        assert (event.output_index, event.handle.layer_indices) == (index, (1, 3))
        got, want = await event.handle.fetch(), await handle.fetch()
        for layer in (1, 3):
            assert np.array_equal(got[layer][0]["hidden"], want[layer][0]["hidden"])
            assert got[layer][0]["meta"] == want[layer][0]["meta"]
        assert finished_ones[index].receipt == generation.outputs[index].receipt
        await event.handle.close()
        await handle.close()
    assert backend.holding == 0


async def test_a_chat_s_handle_knows_its_messages() -> None:
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))

    events = [event async for event in FakeBackend().stream_events(chat, max_tokens=1, capture_layers=1)]

    [handle] = [event.handle for event in events if isinstance(event, OutputCaptured)]
    assert [one.role for one in handle.message_boundaries] == ["user"]


async def test_a_live_capture_comes_with_its_tokens_as_arrays_that_may_be_kept() -> None:
    backend = FakeBackend()
    capture = CaptureSpec(layers=(1,), is_live=True)

    events = [event async for event in backend.stream_events("a b", max_tokens=3, capture=capture)]

    blocks = [event.hidden for event in events if isinstance(event, CaptureBlock)]
    assert len(blocks) > 1
    assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
    assert all(block.base is None and block.flags.owndata for block in blocks)
    assert any(isinstance(event, CaptureLabels) for event in events)
    assert not any(isinstance(event, OutputCaptured) for event in events)
    [handle] = (await backend.generate("a b", max_tokens=3, capture_layers=1)).handles
    assert np.array_equal(np.concatenate(blocks), (await handle.fetch())[1][0]["hidden"])


async def test_closing_the_iterator_releases_what_was_not_received() -> None:
    backend = FakeBackend()
    capture = CaptureSpec(layers=(1,), delivery="held")
    async with aclosing(backend.stream_events("a b", max_tokens=2, n=2, capture=capture)) as events:
        async for event in events:
            if isinstance(event, OutputCaptured):
                break
    assert (backend.holding, backend.running) == (1, 0)  # the one that this test received

    await event.handle.close()
    assert backend.holding == 0


async def test_a_response_that_contradicts_the_request_is_an_error() -> None:
    script = [capturing(), said("a"), said("b"), rows(1, 0, 2), finished(0, (1,), 3), DONE]
    with pytest.raises(EngineFailed) as refused:
        async for _ in Scripted(script).stream_events("p", capture_layers=1):
            pass
    assert refused.value.reason == "INCOMPLETE"


async def test_closing_it_closes_the_request() -> None:
    backend = Scripted([started(), said("a"), asyncio.Event()])
    async with aclosing(backend.stream_events("p")) as events:
        await asyncio.wait_for(anext(events), LIMIT_S)
    assert backend.closed == [0]


async def test_bad_options_are_refused_before_anything_starts() -> None:
    backend = Scripted()
    for options in ({"raw_output": True}, {"capture": 5}, {"capture_layers": -1}, {"capture_dtype": "float32"}):
        with pytest.raises(InvalidRequest):
            await anext(backend.stream_events("p", **options))
    assert backend.requests == []
