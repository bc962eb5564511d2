"""Prompts: text, token ids or a conversation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_text, check_token_ids

MAX_MESSAGES = 4096
MAX_ROLE_LENGTH = 64


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        for index, message in enumerate(self.messages):
            if not isinstance(message, ChatMessage):
                raise InvalidRequest(f"{type(message).__name__} is not a ChatMessage", field=f"messages[{index}]")
        if not self.messages:
            raise InvalidRequest("the conversation is empty", reason="EMPTY_PROMPT", field="messages")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(f"{len(self.messages)} messages, at most {MAX_MESSAGES}", field="messages")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                f"continue_final_message needs a last message from the assistant, got {self.messages[-1].role!r}",
                field="continue_final_message",
            )


Prompt = TextPrompt | TokenPrompt | ChatPrompt


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
