"""Chats: arguments of the template and tools, each bound told by name."""

import json
from typing import Any

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.json_fields import as_json
from steer_service.core.prompt import RENDERER_KEYS, ChatMessage, ChatPrompt, ToolCall

USER = ChatMessage(role="user", content="Hi")
ASSISTANT = ChatMessage(role="assistant", content="The")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def padded(size: int) -> dict[str, str]:
    """An object of `size` bytes as JSON."""
    return {"a": "x" * (size - len('{"a":""}'))}


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        ChatPrompt(messages=(USER, ASSISTANT), **fields)
    return raised.value


def test_the_header_of_the_next_turn_follows_unless_a_turn_is_continued() -> None:
    assert ChatPrompt(messages=[USER]).has_generation_prompt
    assert not ChatPrompt(messages=[USER, ASSISTANT], continue_final_message=True).has_generation_prompt
    assert not ChatPrompt(messages=[USER], add_generation_prompt=False).has_generation_prompt


def test_a_turn_is_not_continued_and_followed_by_another() -> None:
    assert refused(continue_final_message=True, add_generation_prompt=True).field == "add_generation_prompt"


@pytest.mark.parametrize("name", ["continue_final_message", "add_generation_prompt"])
def test_a_flag_is_true_or_false(name: str) -> None:
    assert refused(**{name: "yes"}).field == name


def test_arguments_of_the_template_keep_their_types_and_their_order() -> None:
    kwargs = {"b": 5, "a": 5.0, "documents": [{"title": None}], "é": True}
    prompt = ChatPrompt(messages=[USER], chat_template_kwargs=kwargs)

    assert as_json(prompt.chat_template_kwargs) == '{"b":5,"a":5.0,"documents":[{"title":null}],"é":true}'
    assert ChatPrompt(messages=[USER], chat_template_kwargs=json.dumps(kwargs)) == prompt
    kwargs["b"] = 6
    assert prompt.chat_template_kwargs["b"] == 5


@pytest.mark.parametrize("key", [*RENDERER_KEYS, "return_dict", "return_tensors"])
def test_arguments_of_the_renderer_are_refused_by_name(key: str) -> None:
    error = refused(chat_template_kwargs={key: "x"})
    assert (error.reason, error.field) == ("RESERVED_KEY", "chat_template_kwargs")
    assert key in error.message


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"a": float("nan")}, "BAD_JSON"),
        ({"a": np.float32(1)}, "BAD_JSON"),
        ({"a": "\ud800"}, "BAD_JSON"),
        ([1], "BAD_JSON"),
        ("[1]", "BAD_JSON"),
        ("{", "BAD_JSON"),
        ('{"a": NaN}', "BAD_JSON"),
        ('{"a": 1e999}', "BAD_JSON"),
        (r'{"a": "\ud800"}', "BAD_JSON"),
        ('{"a":' + "[" * 6000 + "]" * 6000 + "}", "BAD_JSON"),
        (5, "BAD_JSON"),
        (padded((16 << 10) + 1), "OUT_OF_RANGE"),
        (as_json(padded((16 << 10) + 1)), "OUT_OF_RANGE"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_other_arguments_than_a_small_json_object_are_refused(kwargs: Any, reason: str) -> None:
    error = refused(chat_template_kwargs=kwargs)
    assert (error.reason, error.field) == (reason, "chat_template_kwargs")


def test_nested_too_deeply_they_are_refused() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert refused(chat_template_kwargs={"a": deep}).reason == "BAD_JSON"


def test_arguments_of_sixteen_kibibytes_are_taken() -> None:
    assert ChatPrompt(messages=[USER], chat_template_kwargs=padded(16 << 10)).chat_template_kwargs


def test_tools_are_json_objects() -> None:
    assert ChatPrompt(messages=[USER], tools=[TOOL] * 128).tools == (TOOL,) * 128
    assert ChatPrompt(messages=[USER], tools=[padded(64 << 10)]).tools


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ([TOOL] * 129, "tools"),
        ([TOOL, padded((64 << 10) + 1)], "tools[1]"),
        ([TOOL, test_tools_are_json_objects], "tools[1]"),
        ([TOOL, r'{"\ud800": 1}'], "tools[1]"),
        (TOOL, "tools"),
        ("weather", "tools"),
        (5, "tools"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_tools_are_refused(tools: Any, field: str) -> None:
    assert refused(tools=tools).field == field


def test_chats_have_hashes() -> None:
    one, other = (ChatPrompt(messages=[USER], chat_template_kwargs={"a": 1}, tools=[TOOL]) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


CALL = ToolCall(name="weather", arguments={"city": "Paris"}, id="c1")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "x" * 257}, "name"),
        ({"name": 5}, "name"),
        ({"tool_call_id": "x" * 257}, "tool_call_id"),
        ({"tool_calls": (CALL,) * 129}, "tool_calls"),
        ({"tool_calls": ({"name": "weather"},)}, "tool_calls[0]"),
        ({"reasoning_content": None}, "reasoning_content"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_fields_of_a_message_have_bounds(fields: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ChatMessage(role="assistant", **fields)
    assert raised.value.field == field


def test_fields_of_a_message_are_taken_up_to_their_bounds() -> None:
    message = ChatMessage(role="assistant", name="x" * 256, tool_call_id="x" * 256, tool_calls=[CALL] * 128)
    assert len(message.tool_calls) == 128


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 257}, "name"),
        ({"name": "a", "id": "x" * 257}, "id"),
        ({"name": "a", "arguments": "[]"}, "arguments"),
        ({"name": "a", "arguments": "{"}, "arguments"),
        ({"name": "a", "arguments": None}, "arguments"),
        ({"name": "a", "arguments": r'{"a": "\udfff"}'}, "arguments"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_call_has_the_name_of_a_function_and_a_json_object(fields: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ToolCall(**fields)
    assert raised.value.field == field


def test_a_message_that_ends_with_calls_is_not_continued() -> None:
    with pytest.raises(InvalidRequest, match="ends with tool calls") as raised:
        ChatPrompt(messages=[USER, ChatMessage(role="assistant", tool_calls=[CALL])], continue_final_message=True)
    assert raised.value.field == "continue_final_message"
