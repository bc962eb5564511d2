"""Prompts as users write them, rendered to token ids by the model's own tokenizer and chat template."""

from dataclasses import dataclass
from typing import Any

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import Unsupported
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.runtime.chat import message_boundaries
from steer_service.runtime.chat_defaults import NO_DEFAULTS, ChatDefaults
from steer_service.runtime.chat_marks import spans_by_marks
from steer_service.runtime.chat_template import ChatTemplate, tokens_of_chat
from steer_service.runtime.prompt_length import LengthCheck
from steer_service.runtime.prompt_tail import PromptTail

NO_OFFSETS = "the model's tokenizer does not tell where its tokens are, so the positions of the messages are unknown"
TOO_LONG = "the chat is far longer than what is kept of it, so the positions of its messages were not looked for"
NO_TEMPLATE = (
    "the model's tokenizer writes chats itself, without a template, so the positions of the messages are unknown"
)
"""Why a chat has no boundaries, besides what `spans_by_marks` says of a template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """The tokens of a prompt."""

    token_ids: tuple[int, ...]
    """Token ids that are fed to the model."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """The tokens of each message of a chat."""
    boundaries_missing_reason: str = ""
    """Why a chat has no boundaries, a sentence; "" if it has, or if they were not looked for."""
    text: str | None = None
    """The text that was tokenised; None if there was none."""
    offsets: tuple[tuple[int, int], ...] | None = None
    """Characters [start, end) of each token in `text`, if they were asked for and the tokenizer has them."""

    def places(self, special_token_ids: tuple[int, ...]) -> PromptPlaces:
        """Where its messages and special tokens are; `special_token_ids` are those of the model."""
        return PromptPlaces(
            token_ids=self.token_ids,
            messages=self.message_boundaries,
            messages_missing_reason=self.boundaries_missing_reason,
            special_token_ids=special_token_ids,
        )


def render_prompt(
    prompt: Prompt,
    tokenizer: Any,
    *,
    with_boundaries: bool,
    with_offsets: bool = False,
    check: LengthCheck | None = None,
    tail: PromptTail | None = None,
    defaults: ChatDefaults = NO_DEFAULTS,
) -> RenderedPrompt:
    """Token ids of any prompt; raises InvalidRequest or Unsupported for a chat the template refuses.

    `with_boundaries` also finds the tokens of each message, `with_offsets` the characters of each token. `check`
    refuses a text before it is tokenised, and its tokens before the boundaries are looked for. `tail` cuts the prompt
    to its last tokens; of a message that is cut, the boundary is that of the rest. `defaults` are those of the model's
    chats.
    """
    match prompt:
        case TokenPrompt():
            return RenderedPrompt(token_ids=prompt.token_ids if tail is None else tail.of_tokens(prompt.token_ids))
        case TextPrompt() if tail is not None:
            return RenderedPrompt(token_ids=tail.of_text(prompt.text, add_special_tokens=prompt.add_special_tokens))
        case TextPrompt():
            if check is not None:
                check.text(prompt.text)
            token_ids, offsets = _encoded(prompt.text, tokenizer, prompt.add_special_tokens, with_offsets)
            return RenderedPrompt(token_ids=token_ids, text=prompt.text, offsets=offsets)
        case ChatPrompt():
            return _render_chat(prompt, tokenizer, with_boundaries, with_offsets, check, tail, defaults)


def _encoded(
    text: str, tokenizer: Any, add_special_tokens: bool, with_offsets: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...] | None]:
    """The tokens of a text, and their characters if they are asked for and known."""
    if not (with_offsets and getattr(tokenizer, "is_fast", False)):  # others do not know where their tokens are
        return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens)), None
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    return tuple(encoded["input_ids"]), tuple(encoded["offset_mapping"])


def _render_chat(
    prompt: ChatPrompt,
    tokenizer: Any,
    with_boundaries: bool,
    with_offsets: bool,
    check: LengthCheck | None,
    tail: PromptTail | None,
    defaults: ChatDefaults,
) -> RenderedPrompt:
    if not hasattr(tokenizer, "chat_template"):
        defaults.check(tokenizer)
        return _rendered_by_tokenizer(prompt, tokenizer, with_boundaries, check, tail)
    template = ChatTemplate(prompt, tokenizer, defaults)
    text = template.prompt_text()
    if check is not None and tail is None:
        check.text(text)
    if tail is None:
        token_ids, offsets = _encoded(text, tokenizer, False, with_boundaries or with_offsets)
    else:
        token_ids, offsets = tail.of_chat(text, with_offsets=with_boundaries or with_offsets)
    if check is not None:
        check.tokens(len(token_ids))
    boundaries: tuple[MessageBoundary, ...] = ()
    reason = NO_OFFSETS if with_boundaries else ""
    if with_boundaries and tail is not None and len(text) > tail.most_characters:
        reason = TOO_LONG
    elif with_boundaries and offsets is not None:
        try:
            spans = spans_by_marks(prompt.messages, template.render_marked, text, is_open=prompt.continue_final_message)
            boundaries, reason = message_boundaries(prompt.messages, spans, offsets), ""
        except Unsupported as error:
            reason = error.message
    return RenderedPrompt(
        token_ids=token_ids,
        message_boundaries=boundaries,
        boundaries_missing_reason=reason,
        text=text,
        offsets=offsets if with_offsets else None,
    )


def _rendered_by_tokenizer(
    prompt: ChatPrompt, tokenizer: Any, with_boundaries: bool, check: LengthCheck | None, tail: PromptTail | None
) -> RenderedPrompt:
    """A chat whose tokenizer writes it without a template, as Mistral's does; it has no boundaries."""
    if check is not None and tail is None:
        check.text("".join(message.content for message in prompt.messages))
    token_ids = tokens_of_chat(prompt, tokenizer)
    if tail is not None:
        token_ids = tail.of_tokens(token_ids)
    if check is not None:
        check.tokens(len(token_ids))
    return RenderedPrompt(token_ids=token_ids, boundaries_missing_reason=NO_TEMPLATE if with_boundaries else "")
