"""Conversations rendered to text by a model's own chat template.

Relies on transformers: `apply_chat_template(messages, tokenize=False, ...)` of a tokenizer returns text, and raises
what the template raises. tests/runtime/test_chat_template.py notices a change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported

MAX_SENTENCE = 500
"""Characters of a template's own error that reach the caller."""


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """`messages` as text, by the template of `tokenizer`; `options` are those of `apply_chat_template`.

    Raises Unsupported (NO_CHAT_TEMPLATE) without a template; InvalidRequest (TEMPLATE_REFUSED), with the template's own
    sentence, for a conversation that the template refuses.
    """
    if not tokenizer.chat_template:
        raise Unsupported("the model has no chat template; send text or token ids", reason="NO_CHAT_TEMPLATE")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
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
