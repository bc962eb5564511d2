"""`generate` and `stream` over a scripted backend: prompts, options, failures and cancellation."""

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded
from steer_service.core.events import Event, FinishReason, TokenLogprob
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.calls import COLLECTED_INTERVAL, in_few_pieces
from steer_service.testing.fake_backend import FakeBackend
from tests.runtime.scripted import DONE, LIMIT_S, Scripted, answer, capturing, finished, rows, said, started, until


async def test_texts_come_in_the_order_of_the_prompts_not_of_their_ends() -> None:
    late = asyncio.Event()
    backend = Scripted([started(), late, said("first"), finished(), DONE], answer("sec", "ond"))
    call = asyncio.create_task(backend.generate(["a", "b"]))

    await until(lambda: backend.closed)
    late.set()

    assert await asyncio.wait_for(call, LIMIT_S) == (["first", "second"], None)
    assert backend.closed == [1, 0]


async def test_one_prompt_gives_a_list_of_one_text() -> None:
    assert await Scripted(answer("one")).generate("a") == (["one"], None)


async def test_no_prompts_give_no_texts() -> None:
    assert await Scripted().generate([]) == ([], None)
    assert await Scripted().generate([], capture_layers=[1]) == ([], [])


async def test_every_kind_of_prompt_is_taken() -> None:
    backend = Scripted()
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="Hi"),))

    await backend.generate(["text", [1, 2], np.array([3]), TextPrompt(text="x"), TokenPrompt(token_ids=(4,)), chat])

    assert [request.prompt for request in backend.requests] == [
        TextPrompt(text="text"),
        TokenPrompt(token_ids=(1, 2)),
        TokenPrompt(token_ids=(3,)),
        TextPrompt(text="x"),
        TokenPrompt(token_ids=(4,)),
        chat,
    ]


@pytest.mark.parametrize("prompts", ["", [""], [[]], None, 5, [5], b"abc", {"a": 1}, [None], ["a", ""]], ids=repr)
async def test_a_bad_prompt_is_refused_before_anything_starts(prompts: Any) -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.generate(prompts)

    assert raised.value.field.startswith("prompt")
    assert backend.requests == []


async def test_the_defaults_are_those_users_know() -> None:
    backend = Scripted()

    await backend.generate("a")

    assert backend.requests[0].sampling == SamplingOptions()  # left to the backend
    [generation], _ = await FakeBackend().generate("a", raw_output=True)
    assert (generation.sampling.max_tokens, generation.sampling.temperature) == (256, 1.0)
    assert (backend.requests[0].steering, backend.requests[0].capture) == (None, None)


async def test_sampling_is_given_by_keyword_or_whole() -> None:
    backend = Scripted()
    options = SamplingOptions(max_tokens=5, temperature=0.0, top_k=3)

    await backend.generate("a", max_tokens=5, temperature=0, top_k=3)
    await backend.generate("a", options)

    assert [request.sampling for request in backend.requests] == [options, options]


@pytest.mark.parametrize("extra", [{"max_tokens": 5}, {"temperature": 0.0}, {"top_k": 3}])
async def test_sampling_given_twice_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Provide either sampling or sampling keyword overrides, not both"):
        await Scripted().generate("a", SamplingOptions(), **extra)


async def test_sampling_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected SamplingOptions, got dict"):
        await Scripted().generate("a", {"max_tokens": 5})


async def test_an_unknown_keyword_is_refused_by_name() -> None:
    for call in (
        Scripted().generate("a", max_token=5),
        Scripted().chat([{"role": "user", "content": "a"}], max_token=5),
    ):
        with pytest.raises(InvalidRequest, match="max_token is not an option of this call; there are n, max_tokens"):
            await call


async def test_a_bad_option_is_refused_before_anything_starts() -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.generate(["a", "b"], max_tokens=-1)

    assert raised.value.field == "max_tokens"
    assert backend.requests == []


@pytest.mark.parametrize("asked", [{"steering_spec": SteeringSpec.simple_add(1, [1.0, 2.0])}, {"capture_layers": [1]}])
async def test_an_answer_that_leaves_out_what_was_asked_is_an_error(asked: dict[str, Any]) -> None:
    """Whatever stands between, nobody takes an unsteered or uncaptured answer for another."""
    with pytest.raises(EngineFailed) as caught:
        await Scripted(answer("a")).generate("p", **asked)
    assert caught.value.reason == "RECEIPT_DIFFERS"


async def test_a_stream_that_was_not_steered_ends_in_an_error() -> None:
    spec = SteeringSpec.simple_add(1, [1.0, 2.0])
    with pytest.raises(EngineFailed, match=r"nothing .* were applied"):
        async for _ in Scripted(answer("a")).stream("p", steering_spec=spec):
            pass


async def test_steering_holds_for_every_prompt() -> None:
    backend = Scripted()
    spec = SteeringSpec.simple_add(1, [1.0, 2.0])

    await backend.generate(["a", "b"], steering_spec=spec)

    assert [request.steering for request in backend.requests] == [spec, spec]


async def test_n_outputs_give_n_texts_and_n_handles_each_with_its_own_rows() -> None:
    script = [
        capturing(n=2),
        said("a", 0),
        said("x", 1),
        said("b", 0),
        rows(1, 0, 3, index=0),
        finished(0, (1,), 3),
        rows(1, 0, 2, index=1),
        finished(1, (1,), 2),
        DONE,
    ]

    texts, handles = await Scripted(script).generate("p", n=2, capture_layers=1)

    assert texts == ["ab", "x"]
    assert [len((await handle.fetch())[1][0]["hidden"]) for handle in handles or []] == [3, 2]


async def test_raw_output_gives_everything_there_is_to_know() -> None:
    backend = Scripted([started(n=2), said("a", 0, 5), said("b", 1, 6), finished(0), finished(1), DONE])

    [generation], handles = await backend.generate("p", n=2, raw_output=True)

    assert handles is None
    assert (generation.request_id, generation.prompt_token_ids, generation.usage) == ("r1", (7, 8), DONE.usage)
    assert [(output.text, output.token_ids) for output in generation.outputs] == [("a", [5]), ("b", [6])]
    assert generation.outputs[1].logprobs == [TokenLogprob(token_id=6, logprob=-0.5)]
    assert generation.outputs[0].finish_reason is FinishReason.LENGTH


async def test_a_failing_prompt_aborts_the_others_and_closes_what_they_held() -> None:
    never = asyncio.Event()
    backend = Scripted([started(), said("a"), never], [started(), Overloaded("full", reason="FULL")], [never])

    with pytest.raises(Overloaded, match="full"):
        await asyncio.wait_for(backend.generate(["a", "b", "c"]), LIMIT_S)

    assert sorted(backend.closed) == [0, 1, 2]


async def test_the_first_failure_is_the_one_that_is_told() -> None:
    gate = asyncio.Event()
    backend = Scripted([gate, EngineFailed("second")], [InvalidRequest("first")])

    with pytest.raises(InvalidRequest, match="first"):
        await asyncio.wait_for(backend.generate(["a", "b"]), LIMIT_S)


async def test_cancelling_a_call_closes_every_request() -> None:
    never = asyncio.Event()
    backend = Scripted([started(), never], [started(), never])
    call = asyncio.create_task(backend.generate(["a", "b"]))
    await until(lambda: len(backend.requests) == 2)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, LIMIT_S)
    assert sorted(backend.closed) == [0, 1]


@pytest.mark.parametrize("script", [[], [started()], [started(), said("a"), finished()]], ids=len)
async def test_an_answer_that_ends_early_is_an_error(script: list[Event]) -> None:
    backend = Scripted(script)

    with pytest.raises(EngineFailed, match="the response ended before it was complete"):
        await backend.generate("a")
    assert backend.closed == [0]


async def test_a_stream_yields_text_as_it_comes() -> None:
    backend = Scripted(answer("a", "", "b"))

    assert [text async for text in backend.stream("p", max_tokens=3)] == ["a", "b"]
    assert backend.requests[0].sampling.max_tokens == 3
    assert backend.closed == [0]


async def test_closing_a_stream_closes_the_request() -> None:
    backend = Scripted([started(), said("a"), asyncio.Event()])

    async with aclosing(backend.stream("p")) as texts:
        assert await asyncio.wait_for(anext(texts), LIMIT_S) == "a"

    assert backend.closed == [0]


async def test_a_failure_in_a_stream_follows_the_text_before_it() -> None:
    texts = Scripted([started(), said("a"), EngineFailed("gone")]).stream("p")

    assert await anext(texts) == "a"
    with pytest.raises(EngineFailed, match="gone"):
        await anext(texts)


async def test_a_stream_has_one_output() -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest, match="stream yields one output") as raised:
        await anext(backend.stream("p", n=2))

    assert raised.value.field == "n"
    assert backend.requests == []


def test_facts_of_the_model_have_the_names_users_know() -> None:
    backend = Scripted()

    assert (backend.hidden_size, backend.layer_count, backend.model_name) == (2, 4, "scripted")


async def test_every_call_names_a_model_and_a_cache_salt() -> None:
    backend = Scripted()

    await backend.generate(["a", "b"], model="adapter", cache_salt="mine")
    await backend.chat([{"role": "user", "content": "a"}], model="adapter", cache_salt="mine")
    async with aclosing(backend.stream("a", model="adapter", cache_salt="mine")) as texts:
        _ = [text async for text in texts]

    assert [(request.model, request.cache_salt) for request in backend.requests] == [("adapter", "mine")] * 4


async def test_calls_that_return_whole_outputs_ask_for_few_pieces_and_streams_do_not() -> None:
    backend = Scripted()

    await backend.generate(["a", "b"])
    await backend.chat([{"role": "user", "content": "a"}])
    async with aclosing(backend.stream("a")) as texts:
        _ = [text async for text in texts]

    assert [request.stream_interval for request in backend.requests] == [COLLECTED_INTERVAL] * 3 + [None]


def test_a_live_capture_and_an_interval_of_the_caller_are_left_as_they_are() -> None:
    request = GenerateRequest(prompt=TextPrompt(text="a"))
    live = replace(request, capture=CaptureSpec(layers=(0,), is_live=True))
    held = replace(request, capture=CaptureSpec(layers=(0,)))

    assert in_few_pieces(live) == live
    assert in_few_pieces(replace(request, stream_interval=1)).stream_interval == 1
    assert in_few_pieces(held).stream_interval == COLLECTED_INTERVAL


async def test_every_call_takes_a_priority_and_an_interval() -> None:
    backend = Scripted()

    await backend.generate(["a", "b"], priority=-3, stream_interval=8)
    await backend.chat([{"role": "user", "content": "a"}], priority=-3, stream_interval=8)
    async with aclosing(backend.stream("a", priority=-3, stream_interval=8)) as texts:
        _ = [text async for text in texts]

    assert [(request.priority, request.stream_interval) for request in backend.requests] == [(-3, 8)] * 4
