"""What the operator of a model chooses for all its chats: a template, and arguments of the template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.core.small_file import read_small

TEMPLATE_CHARACTERS = "{}\n"
"""A name of a file has none of them, as vLLM decides it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDefaults:
    """The template and the arguments in force where a chat says nothing."""

    template: str | None = None
    """Source of the template; None: the tokenizer's own."""
    kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the template; those of a chat come before them. The template need not use them."""

    @classmethod
    def of(cls, template: str | None, kwargs: Mapping[str, Any] | str | None) -> "ChatDefaults":
        """`template`: name of a file or a template's text. `kwargs`: a JSON object or its text.

        Raises InvalidRequest (`chat_template`, `default_chat_template_kwargs`).
        """
        try:  # the rules are those of a chat that gives the arguments itself
            prompt = ChatPrompt(messages=(ChatMessage(role="user"),), chat_template_kwargs=kwargs or {})  # type: ignore[arg-type]
        except InvalidRequest as error:
            error.field = "default_chat_template_kwargs"
            raise
        return cls(template=None if template is None else template_from(template), kwargs=prompt.chat_template_kwargs)

    def has_chats(self, tokenizer: Any) -> bool:
        """True if chats are served: with a template, or by a tokenizer that writes them itself."""
        return self.template is not None or not hasattr(tokenizer, "chat_template") or bool(tokenizer.chat_template)

    def check(self, tokenizer: Any) -> None:
        """Raises Unsupported if there are defaults and the tokenizer writes chats without a template."""
        if (self.template is not None or self.kwargs) and not hasattr(tokenizer, "chat_template"):
            name = "default_chat_template_kwargs" if self.template is None else "chat_template"
            raise Unsupported(
                "the model's tokenizer writes chats itself, without a template", reason="NO_CHAT_TEMPLATE", field=name
            )


NO_DEFAULTS = ChatDefaults()


def template_from(value: str) -> str:
    """The template in the file named `value`, or `value` if it is a template; raises InvalidRequest."""
    if any(character in value for character in TEMPLATE_CHARACTERS):
        return value
    try:
        return read_small(value).decode()
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{value!r} is neither a file that can be read nor the text of a template",
            reason="BAD_ARGUMENT",
            field="chat_template",
        ) from error
