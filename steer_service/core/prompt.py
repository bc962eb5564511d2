"""Prompts: text, token ids or a conversation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_kind, check_length, check_text, check_token_ids
from steer_service.core.json_fields import JsonObject, json_object
from steer_service.core.number_limits import (
    MAX_CALL_NAME_LENGTH,
    MAX_INT,
    MAX_MESSAGES,
    MAX_ROLE_LENGTH,
    MAX_TEMPLATE_KWARGS_BYTES,
    MAX_TOOL_BYTES,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
)

RENDERER_KEYS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of the renderer, which `chat_template_kwargs` may not replace; those that begin with `return_` are too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """A prompt as text."""

    text: str
    """At least one character."""
    add_special_tokens: bool = True
    """True: the tokenizer adds its default special tokens, such as BOS. False for a text that has them already."""

    def __post_init__(self) -> None:
        check_text(self.text, "text")
        check_kind(self.add_special_tokens, bool, "add_special_tokens")
        if not self.text:
            raise InvalidRequest("the prompt is empty", reason="EMPTY_PROMPT", field="text")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """A prompt as token ids, fed to the model as they are."""

    token_ids: tuple[int, ...]
    """At least one id, each within the model's vocabulary."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", check_token_ids(self.token_ids, "token_ids"))
        if not self.token_ids:
            raise InvalidRequest("the prompt is empty", reason="EMPTY_PROMPT", field="token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool in an assistant's message."""

    name: str
    """Name of the function, 1..256 characters."""
    arguments: JsonObject = field(default_factory=dict, hash=False)
    """Arguments of the function, a JSON object."""
    id: str = ""
    """Id of the call, to which the tool's result refers; at most 256 characters. Empty: none."""

    def __post_init__(self) -> None:
        _check_names(self, "name", "id")
        if not self.name:
            raise InvalidRequest("a tool call needs the name of a function", field="name")
        object.__setattr__(self, "arguments", json_object(self.arguments, "arguments", MAX_INT))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    """The author: `system`, `user`, `assistant` or another role that the model's chat template accepts."""
    content: str = ""
    """The text; may be empty. None, as of a message that only calls tools, becomes ""."""
    name: str = ""
    """Name of the author, or of the tool whose result this is; at most 256 characters. Empty: none."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of tools by the assistant, at most 128."""
    tool_call_id: str = ""
    """Id of the call whose result this is; at most 256 characters. Empty: none."""
    reasoning_content: str = ""
    """Reasoning before the content of an assistant's message; the template decides whether to write it."""

    def __post_init__(self) -> None:
        if self.content is None:
            object.__setattr__(self, "content", "")
        for name in ("role", "content", "reasoning_content"):
            check_text(getattr(self, name), name)
        if not 1 <= len(self.role) <= MAX_ROLE_LENGTH:
            raise InvalidRequest(f"a role has {len(self.role)} characters, expected 1..{MAX_ROLE_LENGTH}", field="role")
        _check_names(self, "name", "tool_call_id")
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls))
        for index, call in enumerate(self.tool_calls):
            if not isinstance(call, ToolCall):
                raise InvalidRequest(f"{type(call).__name__} is not a ToolCall", field=f"tool_calls[{index}]")
        check_length(self.tool_calls, MAX_TOOL_CALLS, "tool calls", "tool_calls")


def _check_names(value: "ToolCall | ChatMessage", *names: str) -> None:
    for name in names:
        check_text(getattr(value, name), name)
        if len(getattr(value, name)) > MAX_CALL_NAME_LENGTH:
            raise InvalidRequest(f"more than {MAX_CALL_NAME_LENGTH} characters", reason="OUT_OF_RANGE", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A prompt as a conversation, rendered by the model's own chat template."""

    messages: tuple[ChatMessage, ...]
    """At least one turn, oldest first."""
    continue_final_message: bool = False
    """True: the model continues the last message, which must be an assistant's (a prefill)."""
    add_generation_prompt: bool | None = None
    """True: the prompt ends with the header of the model's turn. None: unless the last message is continued."""
    chat_template_kwargs: JsonObject = field(default_factory=dict, hash=False)
    """Further arguments of the chat template, such as `enable_thinking`; a JSON object of at most 16 KiB."""
    tools: tuple[JsonObject, ...] = field(default=(), hash=False)
    """Functions that the model may call, as the template takes them: at most 128 JSON objects of 64 KiB each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        self._check_messages()
        self._check_flags()
        kwargs = json_object(self.chat_template_kwargs, "chat_template_kwargs", MAX_TEMPLATE_KWARGS_BYTES)
        for key in kwargs:
            if key in RENDERER_KEYS or key.startswith("return_"):
                raise InvalidRequest(
                    f"{key[:64]!r} is an argument of the renderer, not of the template",
                    reason="RESERVED_KEY",
                    field="chat_template_kwargs",
                )
        object.__setattr__(self, "chat_template_kwargs", kwargs)
        object.__setattr__(self, "tools", _tools_from(self.tools))

    @property
    def has_generation_prompt(self) -> bool:
        """True if the prompt ends with the header of the model's turn."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def prefill(self) -> str:
        """Beginning of the response, the content of the last message; "" unless it is continued."""
        return self.messages[-1].content if self.continue_final_message else ""

    def _check_messages(self) -> None:
        for index, message in enumerate(self.messages):
            if not isinstance(message, ChatMessage):
                raise InvalidRequest(f"{type(message).__name__} is not a ChatMessage", field=f"messages[{index}]")
        if not self.messages:
            raise InvalidRequest("the conversation is empty", reason="EMPTY_PROMPT", field="messages")
        check_length(self.messages, MAX_MESSAGES, "messages", "messages")

    def _check_flags(self) -> None:
        for name, kinds in (("continue_final_message", bool), ("add_generation_prompt", (bool, type(None)))):
            value = getattr(self, name)
            if not isinstance(value, kinds):
                raise InvalidRequest(f"expected True or False, got {type(value).__name__}", field=name)
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message continues a turn and add_generation_prompt begins one; choose one of them",
                field="add_generation_prompt",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                f"continue_final_message needs a last message from the assistant, got {self.messages[-1].role!r}",
                field="continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].tool_calls:
            raise InvalidRequest(
                "continue_final_message continues content, and the last message ends with tool calls",
                field="continue_final_message",
            )


Prompt = TextPrompt | TokenPrompt | ChatPrompt


def only_for_text() -> InvalidRequest:
    """The error for `add_special_tokens` with a prompt that is not text."""
    return InvalidRequest(
        "only the tokenizer of a text adds special tokens; a chat's template and token ids have their own",
        field="add_special_tokens",
    )


def _tools_from(tools: Any) -> tuple[JsonObject, ...]:
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise InvalidRequest(f"expected a list of tools, got {type(tools).__name__}", reason="BAD_JSON", field="tools")
    given = tuple(tools)
    check_length(given, MAX_TOOLS, "tools", "tools")
    return tuple(json_object(tool, f"tools[{index}]", MAX_TOOL_BYTES) for index, tool in enumerate(given))


def prompt_from(value: "Prompt | str | Sequence[int]") -> Prompt:
    """The prompt for text, token ids, or one of the prompt classes; raises InvalidRequest for anything else."""
    if isinstance(value, (TextPrompt, TokenPrompt, ChatPrompt)):
        return value
    if isinstance(value, str):
        return TextPrompt(text=value)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(
            f"a prompt is text, token ids or a prompt object, got {type(value).__name__}", field="prompt"
        )
    return TokenPrompt(token_ids=tuple(value))
