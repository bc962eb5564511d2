"""Conversations rendered to text by a model's own chat template.

Relies on transformers: `apply_chat_template(messages, tokenize=False, ...)` of a tokenizer returns text, passes further
keywords to the template, and raises what the template raises; `get_chat_template` returns the template's source.
tests/runtime/test_chat_template.py notices a change.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.runtime.chat_marks import with_marks
from steer_service.runtime.conversations import as_dict

MAX_SENTENCE = 500
"""Characters of a template's own error that reach the caller."""


ASKS_FOR_NONE = re.compile(r"\bcontent\b[^%{}]{0,3}\s+(is\s+(not\s+)?none|[!=]=\s*none)\b", re.IGNORECASE)
"""A template that looks whether a message has content. Others take an empty text in its place."""


class ChatTemplate:
    """The template of a model, with the arguments that one conversation gives it."""

    def __init__(self, prompt: ChatPrompt, tokenizer: Any) -> None:
        """Raises Unsupported (NO_CHAT_TEMPLATE) without a template; InvalidRequest for an argument it does not use."""
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._tools = [*prompt.tools] or None
        self._source = self._source_of(tokenizer)
        self._marked_source: str | None = None
        self._asks_for_none = ASKS_FOR_NONE.search(self._source) is not None
        for key in prompt.chat_template_kwargs:
            if not re.search(rf"\b{re.escape(key)}\b", self._source):
                raise InvalidRequest(
                    f"the model's chat template does not use {key[:64]!r}",
                    reason="UNKNOWN_TEMPLATE_KEY",
                    field="prompt.chat_template_kwargs",
                )

    def prompt_text(self) -> str:
        """The text of the prompt.

        Raises InvalidRequest (TEMPLATE_REFUSED), with the template's own sentence, for a conversation that it refuses;
        Unsupported (NO_TOOLS) if it ignores the tools.
        """
        text = self._prompt_text(self._tools)
        if self._tools and text == self._prompt_text(None):
            raise Unsupported("the model's chat template ignores tools", reason="NO_TOOLS", field="prompt.tools")
        return text

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text of `messages` without a generation header."""
        return self._apply([*map(as_dict, messages)], self._tools, add_generation_prompt=False)

    def render_marked(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The same for messages with marks, which a copy of the template prints; see `chat_marks`."""
        if self._marked_source is None:
            self._marked_source = with_marks(self._source)
        return self._apply(messages, self._tools, add_generation_prompt=False, chat_template=self._marked_source)

    def _prompt_text(self, tools: list[JsonObject] | None) -> str:
        return self._apply(
            [*map(as_dict, self._prompt.messages)],
            tools,
            add_generation_prompt=self._prompt.has_generation_prompt,
            continue_final_message=self._prompt.continue_final_message,
        )

    def _source_of(self, tokenizer: Any) -> str:
        if not tokenizer.chat_template:
            raise Unsupported("the model has no chat template; send text or token ids", reason="NO_CHAT_TEMPLATE")
        try:
            return str(tokenizer.get_chat_template(tools=self._tools))
        except ValueError as error:  # there are several, and none is the default
            raise template_refused(error) from error

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: list[JsonObject] | None, **options: Any) -> str:
        if self._asks_for_none:
            messages = [{**m, "content": None} if m.get("tool_calls") and not m["content"] else m for m in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    **{"chat_template": self._source, **self._prompt.chat_template_kwargs, **options},
                )
            )
        except Exception as error:  # a template may raise anything, most often errors of jinja2
            raise template_refused(error) from error


def template_refused(error: Exception) -> InvalidRequest:
    """The error for the caller, with the sentence of the template in `error`, on one line and of bounded length."""
    kind = type(error).__name__
    sentence = " ".join(str(getattr(error, "message", None) or error).split())
    if len(sentence) > MAX_SENTENCE:
        sentence = sentence[: MAX_SENTENCE - 1] + "…"
    return InvalidRequest(
        f"the model's chat template refuses the conversation: {sentence or 'no reason given'} ({kind})",
        reason="TEMPLATE_REFUSED",
        field="prompt.messages",
    )
