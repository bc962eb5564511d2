"""Prompts: text, token ids or a conversation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_text, check_token_ids
from steer_service.core.json_fields import JsonObject, json_object
from steer_service.core.number_limits import MAX_TEMPLATE_KWARGS_BYTES, MAX_TOOL_BYTES, MAX_TOOLS

MAX_MESSAGES = 4096
MAX_ROLE_LENGTH = 64

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
    """A prompt as text; the model's tokenizer adds its default special tokens."""

    text: str
    """At least one character."""

    def __post_init__(self) -> None:
        check_text(self.text, "text")
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
class ChatMessage:
    """One turn of a conversation."""

    role: str
    """The author: `system`, `user`, `assistant` or another role that the model's chat template accepts."""
    content: str
    """The text; may be empty."""

    def __post_init__(self) -> None:
        check_text(self.role, "role")
        check_text(self.content, "content")
        if not 1 <= len(self.role) <= MAX_ROLE_LENGTH:
            raise InvalidRequest(f"a role has {len(self.role)} characters, expected 1..{MAX_ROLE_LENGTH}", field="role")


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

    def _check_messages(self) -> None:
        for index, message in enumerate(self.messages):
            if not isinstance(message, ChatMessage):
                raise InvalidRequest(f"{type(message).__name__} is not a ChatMessage", field=f"messages[{index}]")
        if not self.messages:
            raise InvalidRequest("the conversation is empty", reason="EMPTY_PROMPT", field="messages")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(f"{len(self.messages)} messages, at most {MAX_MESSAGES}", field="messages")

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


Prompt = TextPrompt | TokenPrompt | ChatPrompt


def _tools_from(tools: Any) -> tuple[JsonObject, ...]:
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise InvalidRequest(f"expected a list of tools, got {type(tools).__name__}", reason="BAD_JSON", field="tools")
    given = tuple(tools)
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"{len(given)} tools, at most {MAX_TOOLS}", reason="OUT_OF_RANGE", field="tools")
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
