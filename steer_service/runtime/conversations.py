"""Conversations as users write them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.prompt import ChatMessage

Messages = Sequence[Mapping[str, str] | ChatMessage]
"""A conversation as users write it: `[{"role": "user", "content": "..."}]`."""


def conversations_from(messages: Any) -> list[Any]:
    """One conversation or several, as users write them, as a list; raises InvalidRequest (`messages`)."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidRequest(f"messages are a list of turns, got {type(messages).__name__}", field="messages")
    given: list[Any] = list(messages)
    if not given:
        raise InvalidRequest("the conversation is empty", reason="EMPTY_PROMPT", field="messages")
    return [given] if isinstance(given[0], (Mapping, ChatMessage)) else given


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
    unknown = set(message) - {"role", "content"}
    if unknown:
        raise InvalidRequest(
            f"{', '.join(sorted(map(str, unknown)))} is not a key of a message; there are role and content"
        )
    return ChatMessage(role=message.get("role", "unknown"), content=message.get("content", ""))
