"""Prompts as users write them, rendered to token ids by the model's own tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.runtime.chat import message_boundaries
from steer_service.runtime.chat_marks import with_marks
from steer_service.runtime.chat_template import apply_template
from steer_service.runtime.prompt_length import LengthCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """The tokens of a prompt."""

    token_ids: tuple[int, ...]
    """Token ids that are fed to the model."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """The tokens of each message of a chat."""


def render_prompt(
    prompt: Prompt, tokenizer: Any, *, with_boundaries: bool, check: LengthCheck | None = None
) -> RenderedPrompt:
    """Token ids of any prompt; raises InvalidRequest or Unsupported for a chat the template refuses.

    `with_boundaries` also finds the tokens of each message. `check` refuses a text before it is tokenised, and its
    tokens before the boundaries are looked for.
    """
    match prompt:
        case TokenPrompt():
            return RenderedPrompt(token_ids=prompt.token_ids)
        case TextPrompt():
            if check is not None:
                check.text(prompt.text)
            return RenderedPrompt(token_ids=tuple(tokenizer.encode(prompt.text)))
        case ChatPrompt():
            return _render_chat(prompt, tokenizer, with_boundaries, check)


def _render_chat(
    prompt: ChatPrompt, tokenizer: Any, with_boundaries: bool, check: LengthCheck | None
) -> RenderedPrompt:
    text = apply_template(
        tokenizer,
        _as_dicts(prompt.messages),
        add_generation_prompt=not prompt.continue_final_message,
        continue_final_message=prompt.continue_final_message,
    )
    if check is not None:
        check.text(text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=with_boundaries)
    if check is not None:
        check.tokens(len(encoded["input_ids"]))
    boundaries = _boundaries(prompt, tokenizer, text, encoded["offset_mapping"]) if with_boundaries else ()
    return RenderedPrompt(token_ids=tuple(encoded["input_ids"]), message_boundaries=boundaries)


def _boundaries(
    prompt: ChatPrompt, tokenizer: Any, text: str, offsets: Sequence[tuple[int, int]]
) -> tuple[MessageBoundary, ...]:
    marked = with_marks(tokenizer.get_chat_template())

    def render(messages: Sequence[ChatMessage]) -> str:
        return apply_template(tokenizer, _as_dicts(messages), add_generation_prompt=False)

    def render_marked(messages: Sequence[Mapping[str, str]]) -> str:
        return apply_template(tokenizer, messages, add_generation_prompt=False, chat_template=marked)

    try:
        return message_boundaries(prompt.messages, render, text, offsets, render_marked=render_marked)
    except Unsupported:  # a template that reorders or merges messages: the capture has no boundaries
        return ()


def _as_dicts(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
