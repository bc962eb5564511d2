"""Prompts as users write them, rendered to token ids by the model's own tokenizer and chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import Unsupported
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.runtime.chat import message_boundaries
from steer_service.runtime.chat_defaults import NO_DEFAULTS, ChatDefaults
from steer_service.runtime.chat_template import ChatTemplate, tokens_of_chat
from steer_service.runtime.prompt_length import LengthCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """The tokens of a prompt."""

    token_ids: tuple[int, ...]
    """Token ids that are fed to the model."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """The tokens of each message of a chat."""


def render_prompt(
    prompt: Prompt,
    tokenizer: Any,
    *,
    with_boundaries: bool,
    check: LengthCheck | None = None,
    defaults: ChatDefaults = NO_DEFAULTS,
) -> RenderedPrompt:
    """Token ids of any prompt; raises InvalidRequest or Unsupported for a chat the template refuses.

    `with_boundaries` also finds the tokens of each message. `check` refuses a text before it is tokenised, and its
    tokens before the boundaries are looked for. `defaults` are those of the model's chats.
    """
    match prompt:
        case TokenPrompt():
            return RenderedPrompt(token_ids=prompt.token_ids)
        case TextPrompt():
            if check is not None:
                check.text(prompt.text)
            return RenderedPrompt(
                token_ids=tuple(tokenizer.encode(prompt.text, add_special_tokens=prompt.add_special_tokens))
            )
        case ChatPrompt():
            return _render_chat(prompt, tokenizer, with_boundaries, check, defaults)


def _render_chat(
    prompt: ChatPrompt, tokenizer: Any, with_boundaries: bool, check: LengthCheck | None, defaults: ChatDefaults
) -> RenderedPrompt:
    if not hasattr(tokenizer, "chat_template"):
        return _rendered_by_tokenizer(prompt, tokenizer, check)
    template = ChatTemplate(prompt, tokenizer, defaults)
    text = template.prompt_text()
    if check is not None:
        check.text(text)
    with_boundaries = with_boundaries and tokenizer.is_fast  # a slow tokenizer does not know where its tokens are
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=with_boundaries)
    if check is not None:
        check.tokens(len(encoded["input_ids"]))
    boundaries = _boundaries(template, text, encoded["offset_mapping"]) if with_boundaries else ()
    return RenderedPrompt(token_ids=tuple(encoded["input_ids"]), message_boundaries=boundaries)


def _rendered_by_tokenizer(prompt: ChatPrompt, tokenizer: Any, check: LengthCheck | None) -> RenderedPrompt:
    """A chat whose tokenizer writes it without a template, as Mistral's does; it has no boundaries."""
    if check is not None:
        check.text("".join(message.content for message in prompt.messages))
    token_ids = tokens_of_chat(prompt, tokenizer)
    if check is not None:
        check.tokens(len(token_ids))
    return RenderedPrompt(token_ids=token_ids)


def _boundaries(template: ChatTemplate, text: str, offsets: Sequence[tuple[int, int]]) -> tuple[MessageBoundary, ...]:
    try:
        return message_boundaries(
            template.messages, template.render, text, offsets, render_marked=template.render_marked
        )
    except Unsupported:  # a template that reorders or merges messages: the capture has no boundaries
        return ()
