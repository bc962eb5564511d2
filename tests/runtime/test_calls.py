"""The calls users know, over a backend that says exactly what the test scripts."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import (
    CaptureDelivery,
    CapturedRows,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    Event,
    FinishReason,
    OutputFinished,
    Receipt,
    Started,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.runtime.results import ChatResponse, collect

LIMIT_S = 5
INFO = ModelInfo(
    name="scripted",
    architecture="Script",
    layer_count=4,
    hidden_size=2,
    vocab_size=100,
    max_model_len=64,
    dtype="float32",
    max_programs=1,
    max_operations=8,
    max_operations_per_layer=8,
)


class Scripted(SteeringCalls):
    """Answers each prompt with its own script; an exception in a script is raised, an Event waited for.

    Without scripts it answers as a backend does that did all it was asked for.
    """

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.requests: list[GenerateRequest] = []
        self.closed: list[int] = []
        """Numbers of the requests whose generator has ended, in the order in which they did."""

    @property
    def info(self) -> ModelInfo:
        return INFO

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        number = len(self.requests)
        self.requests.append(request)
        try:
            for item in self.scripts[number] if self.scripts else honest_answer(request):
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for _ in range(10 * (number + 1)):
                await asyncio.sleep(0)  # cleaning up takes turns of the loop, as it does over a network
            self.closed.append(number)

    async def close(self) -> None:
        pass


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)


def started(
    n: int = 1,
    boundaries: tuple[MessageBoundary, ...] = (),
    delivery: CaptureDelivery | None = None,
    fallback: SharedMemoryFallback | None = None,
) -> Started:
    return Started(
        request_id="r1",
        prompt_token_ids=(7, 8),
        sampling=SamplingOptions(n=n),
        message_boundaries=boundaries,
        capture_delivery=delivery,
        shared_memory_fallback=fallback,
    )


def capturing(n: int = 1, boundaries: tuple[MessageBoundary, ...] = ()) -> Started:
    return started(n, boundaries, CaptureDelivery.INLINE)


def said(text: str, index: int = 0, token: int = 1) -> TokenDelta:
    logprobs = (TokenLogprob(token_id=token, logprob=-0.5),)
    return TokenDelta(output_index=index, text=text, token_ids=(token,), logprobs=logprobs)


def rows(layer: int, first: int, count: int, index: int = 0) -> CaptureBlock:
    hidden = np.array([[layer, position] for position in range(first, first + count)], dtype=np.float32)
    spans = ((first, first + count),) if count else ()
    return CaptureBlock(output_index=index, layer=layer, site=CaptureSite.AFTER, spans=spans, hidden=hidden)


def finished(index: int = 0, captured: tuple[int, ...] = (), count: int = 0) -> OutputFinished:
    receipt = Receipt(
        captured_layers=captured,
        rows_captured=count,
        rows_total=count,
        bytes_captured=len(captured) * count * ROW_BYTES,
    )
    return OutputFinished(output_index=index, reason=FinishReason.LENGTH, receipt=receipt)


ROW_BYTES = 8
"""Of the rows above."""

DONE = Completed(usage=Usage(prompt_tokens=2, completion_tokens=2))


def answer(*words: str) -> list[Event]:
    return [started(), *map(said, words), finished(), DONE]


def honest_answer(request: GenerateRequest) -> list[Event]:
    layers = request.capture.layers if request.capture is not None else ()
    steering = request.steering
    receipt = Receipt(
        steering_digest=steering.digest() if steering is not None else "",
        steered_layers=tuple(steering.layers) if steering is not None else (),
        rows_steered=2 if steering is not None else 0,
        captured_layers=layers,
        rows_captured=2 if layers else 0,
        rows_total=2,
        bytes_captured=len(layers) * 2 * ROW_BYTES,
    )
    end = OutputFinished(output_index=0, reason=FinishReason.LENGTH, receipt=receipt)
    return [capturing() if layers else started(), said("a"), *(rows(layer, 0, 2) for layer in layers), end, DONE]


# -- generate --------------------------------------------------------------------------------------------------------


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

    assert backend.requests[0].sampling == SamplingOptions(max_tokens=256, temperature=1.0)
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
        with pytest.raises(InvalidRequest, match="max_token is not a sampling option; there are n, max_tokens"):
            await call


async def test_a_bad_option_is_refused_before_anything_starts() -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.generate(["a", "b"], max_tokens=0)

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


# -- captures --------------------------------------------------------------------------------------------------------


async def test_blocks_of_a_layer_are_joined_by_position() -> None:
    script = [
        capturing(),
        said("a"),
        said("b"),
        rows(3, 0, 2),
        rows(1, 0, 2),
        rows(3, 2, 1),
        rows(1, 2, 1),
        finished(0, (3, 1), 3),
        DONE,
    ]

    _, handles = await Scripted(script).generate("p", capture_layers=(3, 1))

    [handle] = handles or []
    captures = await handle.fetch()
    assert handle.layer_indices == (3, 1)
    assert captures[3][0]["hidden"].tolist() == [[3, 0], [3, 1], [3, 2]]
    assert captures[1][0]["hidden"].tolist() == [[1, 0], [1, 1], [1, 2]]


async def test_rows_are_copied_before_the_next_event() -> None:
    block = rows(1, 0, 2)

    async def reused() -> AsyncGenerator[Event, None]:
        yield started()
        yield block
        block.hidden[:] = -1.0
        yield finished(0, (1,), 2)
        yield DONE

    assert (await collect(reused())).outputs[0].captures[1].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "blocks",
    [
        [rows(1, 0, 2), rows(1, 3, 1)],
        [rows(1, 0, 2), rows(1, 1, 2)],
        [rows(1, 1, 2), rows(1, 0, 1)],
        [rows(1, 0, 2)],
        [],
    ],
    ids=["a gap", "an overlap", "out of order", "too few", "none"],
)
async def test_captured_rows_that_did_not_come_are_an_error(blocks: list[CaptureBlock]) -> None:
    end = finished(0, (1,), 3)
    came = sum(block.hidden.nbytes for block in blocks)
    for end_ in (end, replace(end, receipt=replace(end.receipt, bytes_captured=came))):
        backend = Scripted([capturing(), said("a"), said("b"), *blocks, end_, DONE])
        with pytest.raises(EngineFailed, match="rows|bytes" if end_ is end else "rows") as raised:
            await backend.generate("p", capture_layers=1)
        assert raised.value.reason == "INCOMPLETE"


async def test_duplicate_layers_are_captured_once() -> None:
    backend = Scripted()

    await backend.generate("p", capture_layers=[2, 0, 2])
    await backend.generate("p", capture_layers=np.int64(2))

    assert [request.capture for request in backend.requests] == [CaptureSpec(layers=(2, 0)), CaptureSpec(layers=(2,))]


async def test_capturing_no_layers_gives_handles_without_layers() -> None:
    _, handles = await Scripted().generate("p", capture_layers=[])

    [handle] = handles or []
    assert await handle.fetch() == {}


@pytest.mark.parametrize("layers", ["12", [-1], [1.5], 2.0], ids=repr)
async def test_a_bad_layer_is_refused_before_anything_starts(layers: Any) -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.generate("p", capture_layers=layers)

    assert raised.value.field.startswith("capture.layers")
    assert backend.requests == []


# -- captures that are held ------------------------------------------------------------------------------------------

HELD = CaptureSpec(layers=(1,), delivery=CaptureDelivery.HELD)
LABELS = RowLabels(positions=[0, 1], token_ids=[7, 8], is_generated=[False, False], is_steered=[False, False])


def holding() -> Started:
    return started(delivery=CaptureDelivery.HELD)


class Region:
    """Memory that holds two rows of layer 1 and knows whether it was freed."""

    freed = 0

    def free(self) -> None:
        self.freed += 1

    def answer(self, *then: Any) -> list[Any]:
        captured = CapturedRows(after={1: rows(1, 0, 2).hidden}, spans=((0, 2),))
        held = LocalCapture(metadata_of(captured, (1,), prompt_tokens=2, sequence_rows=2), captured, release=self.free)
        return [
            holding(),
            said("a"),
            CaptureLabels(output_index=0, labels=LABELS),
            CaptureHeld(output_index=0, held=held),
            *(then or (finished(0, (1,), 2), DONE)),
        ]


async def test_what_is_held_stays_until_its_handle_is_closed() -> None:
    region = Region()
    [generation], handles = await Scripted(region.answer()).generate("p", capture=HELD, raw_output=True)

    [handle] = handles or []
    assert generation.capture_delivery is CaptureDelivery.HELD
    assert (generation.outputs[0].held is not None, generation.outputs[0].labels) == (True, LABELS)
    assert generation.outputs[0].captures == {}
    async with handle:
        [entry] = (await handle.fetch())[1]
        assert region.freed == 0
    assert (entry["hidden"].tolist(), entry["meta"]) == ([[1, 0], [1, 1]], LABELS)
    assert region.freed == 1


async def test_why_nothing_is_shared_is_told() -> None:
    spec = CaptureSpec(layers=(1,), delivery=CaptureDelivery.SHARED_MEMORY_PREFERRED)
    begin = started(delivery=CaptureDelivery.INLINE, fallback=SharedMemoryFallback.SWITCHED_OFF)

    [generation], _ = await Scripted([begin, said("a"), rows(1, 0, 2), finished(0, (1,), 2), DONE]).generate(
        "p", capture=spec, raw_output=True
    )

    assert generation.capture_delivery is CaptureDelivery.INLINE
    assert generation.shared_memory_fallback is SharedMemoryFallback.SWITCHED_OFF
    assert generation.outputs[0].captures[1].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "then",
    [[EngineFailed("broken")], [finished(0, (1,), 2)], [finished(0, (1,), 3), DONE]],
    ids=["fails", "ends", "lies"],
)
async def test_an_answer_that_breaks_frees_what_it_held(then: list[Any]) -> None:
    region = Region()
    with pytest.raises(EngineFailed):
        await Scripted(region.answer(*then)).generate("p", capture=HELD)
    assert region.freed == 1


async def test_a_failing_prompt_frees_what_the_others_hold() -> None:
    finished_first, late, never = Region(), asyncio.Event(), asyncio.Event()
    under_way = Region()
    backend = Scripted(finished_first.answer(), [holding(), late, Overloaded("full")], under_way.answer(never))
    call = asyncio.create_task(backend.generate(["a", "b", "c"], capture=HELD))
    await until(lambda: backend.closed == [0])
    assert finished_first.freed == 0

    late.set()

    with pytest.raises(Overloaded, match="full"):
        await asyncio.wait_for(call, LIMIT_S)
    assert (finished_first.freed, under_way.freed) == (1, 1)


async def test_cancelling_a_call_frees_what_it_holds() -> None:
    done, never = Region(), asyncio.Event()
    backend = Scripted(done.answer(), [holding(), never])
    call = asyncio.create_task(backend.generate(["a", "b"], capture=HELD))
    await until(lambda: backend.closed == [0])

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, LIMIT_S)
    assert done.freed == 1


async def test_a_chat_hands_on_what_is_held() -> None:
    region = Region()
    responses, handles = await Scripted(region.answer()).chat([{"role": "user", "content": "Hi"}], capture=HELD)

    [handle] = handles or []
    assert [response.generated for response in responses] == ["a"]
    assert region.freed == 0
    await handle.close()
    assert region.freed == 1


# -- failures and cancellation ---------------------------------------------------------------------------------------


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

    with pytest.raises(EngineFailed, match="the answer ended before it was complete"):
        await backend.generate("a")
    assert backend.closed == [0]


# -- chat ------------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]


async def test_a_conversation_gives_a_list_of_one_response() -> None:
    backend = Scripted(answer("Hi", " there"))

    responses, handles = await backend.chat(HELLO)

    assert responses == [ChatResponse("", "Hi there")]
    assert handles is None
    assert backend.requests[0].prompt == ChatPrompt(messages=(ChatMessage(role="user", content="Hello"),))


async def test_conversations_give_responses_in_their_order() -> None:
    responses, _ = await Scripted(answer("one"), answer("two")).chat([HELLO, HELLO])

    assert list(map(str, responses)) == ["one", "two"]


async def test_a_beginning_is_the_prefill_of_its_response() -> None:
    backend = Scripted(answer(" capital is Paris."))
    messages = [*HELLO, {"role": "assistant", "content": "The"}]

    [response], _ = await backend.chat(messages, continue_final_message=True)

    assert backend.requests[0].prompt.continue_final_message
    assert (response.prefill, response.generated, response.has_prefill) == ("The", " capital is Paris.", True)
    assert response.full_text() == str(response) == "The capital is Paris."
    assert response.to_message() == {"role": "assistant", "content": "The capital is Paris."}


async def test_an_answer_that_is_not_continued_is_no_prefill() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The"}]

    [response], _ = await Scripted(answer("So")).chat(messages)

    assert (response.prefill, response.has_prefill) == ("", False)


async def test_a_chat_handle_knows_the_places_of_its_messages() -> None:
    boundary = MessageBoundary("user", "Hello", 0, 2)
    script = [capturing(boundaries=(boundary,)), said("a"), said("b"), rows(1, 0, 3), finished(0, (1,), 3), DONE]
    backend = Scripted(script)

    _, handles = await backend.chat(HELLO, capture_layers=1)

    [handle] = handles or []
    await handle.fetch()
    assert handle.message_boundaries == (boundary,)
    assert handle.get_message_activations(0, 1).tolist() == [[1, 0], [1, 1]]


async def test_a_handle_of_a_text_has_no_messages() -> None:
    _, handles = await Scripted().generate("p", capture_layers=[])

    assert [handle.message_boundaries for handle in handles or []] == [None]


async def test_n_responses_come_from_one_conversation() -> None:
    backend = Scripted([started(n=2), said("a", 0), said("b", 1), finished(0), finished(1), DONE])

    responses, _ = await backend.chat(HELLO, n=2)

    assert list(map(str, responses)) == ["a", "b"]


async def test_raw_output_of_a_chat_is_a_generation() -> None:
    [generation], _ = await Scripted(answer("a")).chat(HELLO, raw_output=True)

    assert generation.outputs[0].text == "a"


async def test_a_message_without_a_role_is_of_an_unknown_one() -> None:
    backend = Scripted()

    await backend.chat([{"content": "Hello"}])

    assert backend.requests[0].prompt == ChatPrompt(messages=(ChatMessage(role="unknown", content="Hello"),))


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ([[]], "messages"),
        ("Hello", "messages"),
        (None, "messages"),
        ({"role": "user", "content": "Hello"}, "messages"),
        (["Hello"], "messages"),
        ([HELLO[0], "Hello"], "messages[1]"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "messages[0].content"),
        ([{"role": "assistant", "content": "", "tool_calls": []}], "messages[0]"),
    ],
    ids=repr,
)
async def test_a_bad_conversation_is_refused_before_anything_starts(messages: Any, field: str) -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.chat(messages)

    assert raised.value.field == field
    assert backend.requests == []


# -- stream ----------------------------------------------------------------------------------------------------------


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

    with pytest.raises(InvalidRequest, match="stream serves one output") as raised:
        await anext(backend.stream("p", n=2))

    assert raised.value.field == "n"
    assert backend.requests == []


# -- facts -----------------------------------------------------------------------------------------------------------


def test_facts_of_the_model_have_the_names_users_know() -> None:
    backend = Scripted()

    assert (backend.hidden_size, backend.layer_count, backend.model_name) == (2, 4, "scripted")
