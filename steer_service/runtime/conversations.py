"""Conversations as users write them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported, within
from steer_service.core.field_checks import check_text
from steer_service.core.prompt import ChatMessage, ToolCall

Messages = Sequence[Mapping[str, object] | ChatMessage]
"""A conversation as users write it: `[{"role": "user", "content": "..."}]`; the keys are the fields of ChatMessage.

Content may be None or a list of text parts, and tool calls may have the form of OpenAI's interface."""


def conversations_from(messages: Any) -> list[Any]:
    """One conversation or several, as users write them, as a list; raises InvalidRequest (`messages`)."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidRequest(f"messages are a list of turns, got {type(messages).__name__}", field="messages")
    given: list[Any] = list(messages)
    if not given:
        raise InvalidRequest("the conversation is empty", reason="EMPTY_PROMPT", field="messages")
    return [given] if is_one_conversation(given) else given


def is_one_conversation(messages: Any) -> bool:
    """True for what is a conversation and not a list of them."""
    return isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], (Mapping, ChatMessage))


def conversation_from(messages: Messages) -> tuple[ChatMessage, ...]:
    """A conversation as users write it; raises InvalidRequest with the field, from `messages` on."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidRequest(f"a conversation is a list of turns, got {type(messages).__name__}", field="messages")
    turns = []
    for index, message in enumerate(messages):
        with within(f"messages[{index}]"):
            turns.append(message if isinstance(message, ChatMessage) else _message_from(message))
    return tuple(turns)


def _message_from(message: Any) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f'expected {{"role": ..., "content": ...}}, got {type(message).__name__}')
    unknown = set(message) - set(ChatMessage.__dataclass_fields__)
    if unknown:
        raise InvalidRequest(
            f"{', '.join(sorted(map(str, unknown)))} is not a key of a message; there are "
            f"{', '.join(ChatMessage.__dataclass_fields__)}"
        )
    return ChatMessage(
        role=message.get("role", "unknown"),
        content=_content_from(_or_empty(message.get("content"))),
        name=_or_empty(message.get("name")),
        tool_calls=tuple(_tool_calls_from(message.get("tool_calls"))),
        tool_call_id=_or_empty(message.get("tool_call_id")),
        reasoning_content=_or_empty(message.get("reasoning_content")),
    )


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def _content_from(content: Any) -> Any:
    """Content as text: the texts of its parts, joined by line feeds as vLLM does, if it is a list of parts."""
    if not isinstance(content, (list, tuple)):
        return content
    return "\n".join(_text_of_part(part, f"content[{index}]") for index, part in enumerate(content))


def _text_of_part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"a part is text or an object, got {type(part).__name__}", reason="BAD_TEXT", field=name)
    if part.get("type") != "text":
        raise Unsupported(
            f"parts of type {str(part.get('type'))[:64]!r} are not served; text is", reason="CONTENT_PART", field=name
        )
    check_text(part.get("text"), f"{name}.text")
    return str(part["text"])


def _tool_calls_from(calls: Any) -> Iterator[ToolCall]:
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Iterable | None):
        raise InvalidRequest(f"tool calls are a list, got {type(calls).__name__}", field="tool_calls")
    for index, call in enumerate(calls or ()):
        with within(f"tool_calls[{index}]"):
            yield call if isinstance(call, ToolCall) else _tool_call_from(call)


def _tool_call_from(call: Any) -> ToolCall:
    """A call as OpenAI's interface writes it: {"id": ..., "type": "function", "function": {"name", "arguments"}}."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest('expected {"type": "function", "function": {"name": ..., "arguments": ...}}')
    if call.get("type", "function") != "function":
        raise InvalidRequest(f"{call['type']!r} is not a type of a call; function is", field="type")
    with within("function"):
        return ToolCall(
            id=_or_empty(call.get("id")),
            name=_or_empty(function.get("name")),
            arguments=function.get("arguments") or {},
        )


def as_dict(message: ChatMessage) -> dict[str, Any]:
    """A message as templates take it: tool calls in the form of OpenAI's interface, with arguments as objects."""
    given: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name):
            given[name] = getattr(message, name)
    if message.tool_calls:
        given["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return given
