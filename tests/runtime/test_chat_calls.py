"""`chat` over a scripted backend: conversations in, responses out."""

from dataclasses import replace
from typing import Any

import pytest

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt, ToolCall
from steer_service.runtime.results import ChatResponse
from tests.runtime.scripted import DONE, Scripted, answer, capturing, finished, rows, said, started

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


async def test_what_is_for_the_template_is_part_of_every_prompt() -> None:
    backend = Scripted(answer("one"), answer("two"))
    tools = [{"type": "function"}]

    await backend.chat(
        [HELLO, HELLO], chat_template_kwargs={"a": 1}, tools=tools, add_generation_prompt=False, max_tokens=5
    )

    for request in backend.requests:
        assert request.prompt == ChatPrompt(
            messages=(ChatMessage(role="user", content="Hello"),),
            chat_template_kwargs={"a": 1},
            tools=({"type": "function"},),
            add_generation_prompt=False,
        )
        assert request.sampling.max_tokens == 5


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


async def test_a_chat_without_places_of_its_messages_says_why() -> None:
    start = replace(capturing(), boundaries_missing_reason="the template repeats texts")
    script = [start, said("a"), said("b"), rows(1, 0, 3), finished(0, (1,), 3), DONE]

    _, handles = await Scripted(script).chat(HELLO, capture_layers=1)

    [handle] = handles or []
    await handle.fetch()
    assert handle.message_boundaries == ()
    assert handle.boundaries_missing_reason == "the template repeats texts"
    with pytest.raises(RuntimeError, match=r"not available for this capture: the template repeats texts\. Choose"):
        handle.get_message_activations(0, 1)


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


async def test_parts_of_text_are_joined() -> None:
    backend = Scripted()

    await backend.chat(
        [{"role": "user", "content": [{"type": "text", "text": "One"}, "two", {"type": "text", "text": ""}]}]
    )

    assert backend.requests[0].prompt.messages == (ChatMessage(role="user", content="One\ntwo\n"),)


async def test_parts_of_other_kinds_are_not_served() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org"}}

    with pytest.raises(Unsupported, match="'image_url'") as refused:
        await Scripted().chat([{"role": "user", "content": [{"type": "text", "text": "Look"}, image]}])

    assert (refused.value.reason, refused.value.field) == ("CONTENT_PART", "messages[0].content[1]")


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
async def test_tools_are_called_and_reply(arguments: object) -> None:
    backend = Scripted()
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}

    await backend.chat(
        [
            {"role": "user", "name": "Ann", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I look."},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "Sun"},
        ]
    )

    assert backend.requests[0].prompt.messages == (
        ChatMessage(role="user", content="Weather?", name="Ann"),
        ChatMessage(
            role="assistant",
            tool_calls=(ToolCall(id="c1", name="weather", arguments={"city": "Paris"}),),
            reasoning_content="I look.",
        ),
        ChatMessage(role="tool", content="Sun", tool_call_id="c1", name="weather"),
    )


async def test_a_message_of_openai_s_interface_may_have_empty_fields() -> None:
    backend = Scripted()

    await backend.chat([{"role": "assistant", "content": "Hi", "tool_calls": None, "name": None, "tool_call_id": None}])

    assert backend.requests[0].prompt.messages == (ChatMessage(role="assistant", content="Hi"),)


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
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": ["Hello", 5]}], "messages[0].content[1]"),
        ([{"role": "user", "contents": "Hello"}], "messages[0]"),
        ([{"role": "assistant", "reasoning_content": ["hm"]}], "messages[0].reasoning_content"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": ["now"]}], "messages[0].tool_calls[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}],
            "messages[0].tool_calls[0].function.name",
        ),
        ([{"role": "assistant", "tool_calls": [{"type": "x", "function": {}}]}], "messages[0].tool_calls[0].type"),
    ],
    ids=repr,
)
async def test_a_bad_conversation_is_refused_before_anything_starts(messages: Any, field: str) -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.chat(messages)

    assert raised.value.field == field
    assert backend.requests == []
