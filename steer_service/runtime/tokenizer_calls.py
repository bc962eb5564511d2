"""The calls that show prompts as the model gets them: tokenize, detokenize and render, on every backend."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.runtime.call_options import one_prompt_from
from steer_service.runtime.conversations import Messages, conversation_from, is_one_conversation
from steer_service.runtime.deadline import call_deadline


class RenderKeywords(TypedDict, total=False):
    """Keywords of `render`: the fields of TextPrompt for a text, and of ChatPrompt for a conversation."""

    add_special_tokens: bool | None
    continue_final_message: bool
    add_generation_prompt: bool | None
    chat_template_kwargs: JsonObject | None
    tools: Sequence[JsonObject] | None


class TokenizerCalls(ABC):
    """`tokenize`, `detokenize` and `render`; a subclass adds `tokens_of` and `text_of`."""

    @abstractmethod
    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """The tokens of a prompt, those that `submit` gives to the model; raises the SteerErrors of such a prompt."""

    @abstractmethod
    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens; raises InvalidRequest for ids that the model does not have, or too many."""

    async def tokenize(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        model: str = "",
        timeout_s: float | None = None,
    ) -> PromptTokens:
        """The tokens of a text: the ids that `generate` gives to the model, their texts and their places in `text`.

        A text may have `max_prompt_tokens` of the model. Raises a SteerError; DeadlineExceeded after `timeout_s`
        seconds (default: `unary_timeout_s` of a client, no limit in this process).
        """
        with within("prompt"):
            prompt = TextPrompt(text=text, add_special_tokens=add_special_tokens)
        request = RenderRequest(
            prompt=prompt, model=model, with_token_texts=with_token_texts, with_offsets=with_offsets
        )
        async with call_deadline(timeout_s, "tokenize"):
            return await self.tokens_of(request)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str = "",
        timeout_s: float | None = None,
    ) -> str:
        """The text of tokens, at most as many as the model's limit. Raises a SteerError."""
        given: Any = token_ids
        request = DetokenizeRequest(token_ids=given, skip_special_tokens=skip_special_tokens, model=model)
        async with call_deadline(timeout_s, "detokenize"):
            return await self.text_of(request)

    async def render(
        self,
        prompt: str | Prompt | Sequence[int] | Messages,
        *,
        with_token_texts: bool = True,
        with_offsets: bool = True,
        truncate_prompt_tokens: int | None = None,
        model: str = "",
        timeout_s: float | None = None,
        **options: Unpack[RenderKeywords],
    ) -> PromptTokens:
        """A prompt as the model gets it: its text and tokens, and the positions of special tokens and of messages.

        `prompt` is what `generate` takes, or a conversation as `chat` takes it; `options` are their keywords. Nothing
        is generated. Raises a SteerError, for prompts that `generate` and `chat` refuse too.
        """
        request = RenderRequest(
            prompt=_prompt_from(prompt, options),
            model=model,
            truncate_prompt_tokens=truncate_prompt_tokens,
            with_token_texts=with_token_texts,
            with_offsets=with_offsets,
        )
        async with call_deadline(timeout_s, "render"):
            return await self.tokens_of(request)


def _prompt_from(value: Any, options: RenderKeywords) -> Prompt:
    unknown = set(options) - set(RenderKeywords.__annotations__)
    if unknown:
        raise InvalidRequest(
            f"{', '.join(sorted(unknown))} is not an option of a prompt; there are "
            f"{', '.join(RenderKeywords.__annotations__)}",
            field="prompt",
        )
    given: dict[str, Any] = {name: option for name, option in options.items() if option is not None}
    add_special_tokens = given.pop("add_special_tokens", None)
    with within("prompt"):
        if is_one_conversation(value):
            value = ChatPrompt(messages=conversation_from(value), **given)
        elif given:
            raise InvalidRequest(
                f"{', '.join(sorted(given))} is for a conversation; a ChatPrompt has fields for it",
                field=min(given),
            )
    return one_prompt_from(value, add_special_tokens)
