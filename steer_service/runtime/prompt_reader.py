"""Shows prompts as the model gets them: rendered as for a request, with what helps to choose positions."""

from functools import cache, partial
from itertools import takewhile
from typing import Any

from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_kept, check_served, check_token_ids, check_token_prompt, kept_tokens
from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import MAX_INT
from steer_service.core.prompt import ChatPrompt, Prompt, TokenPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.runtime.chat_defaults import NO_DEFAULTS, ChatDefaults
from steer_service.runtime.prompt_length import LengthCheck, TokenizerFacts
from steer_service.runtime.prompt_tail import PromptTail
from steer_service.runtime.prompts import render_prompt
from steer_service.runtime.token_texts import TokenizerTexts, text_alone
from steer_service.runtime.worker_threads import WorkerThreads

THREADS = 2
"""Prompts that are read at the same time, so that a slow one does not hold up another."""


def shown_prefill(prompt: Prompt, text: str) -> str:
    """The beginning of the response with which `text` ends: less than the whole if the prompt was cut within it."""
    prefill = prompt.prefill if isinstance(prompt, ChatPrompt) else ""
    if text.endswith(prefill):
        return prefill
    pairs = zip(reversed(prefill), reversed(text), strict=False)
    left = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return prefill[len(prefill) - left :]


class PromptReader:
    """The tokens and texts of one model's prompts, made in threads: requests that run are not held up."""

    def __init__(self, tokenizer: Any, info: ModelInfo, defaults: ChatDefaults = NO_DEFAULTS) -> None:
        """`defaults`: those of the model's chats."""
        self._tokenizer = tokenizer
        self._info = info
        self._defaults = defaults
        self._texts = TokenizerTexts(tokenizer)
        self._facts = cache(partial(TokenizerFacts.of, tokenizer))
        # Nothing is generated, so that no token is left for an output.
        self._check = LengthCheck(tokenizer, self._facts, info, is_rows_only=True)
        self._threads = WorkerThreads("prompts to show", THREADS, MAX_INT)  # a server lets few wait here

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """The tokens of a prompt; see `core.backend.Backend.tokens_of`."""
        check_served(request.model, self._info, field="model")
        check_kept(request.truncate_prompt_tokens, self._info)
        if isinstance(request.prompt, TokenPrompt):
            check_token_prompt(request.prompt, request.truncate_prompt_tokens, self._info, is_rows_only=True)
        return await self._threads.run(partial(self._tokens, request))

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens; see `core.backend.Backend.text_of`."""
        check_served(request.model, self._info, field="model")
        if not request.token_ids:
            return ""
        if len(request.token_ids) > self._info.max_model_len:
            raise InvalidRequest(
                f"{len(request.token_ids)} tokens, at most {self._info.max_model_len}, the model's limit",
                reason="TOO_MANY_ENTRIES",
                field="token_ids",
            )
        check_token_ids(request.token_ids, self._info, field="token_ids")
        return await self._threads.run(partial(self._text, request.token_ids, request.skip_special_tokens))

    def _tokens(self, request: RenderRequest) -> PromptTokens:
        prompt, tail = request.prompt, self._tail_of(request.truncate_prompt_tokens)
        rendered = render_prompt(
            prompt,
            self._tokenizer,
            with_boundaries=True,
            with_offsets=request.with_offsets and tail is None,
            check=self._check,
            tail=tail,
            defaults=self._defaults,
        )
        token_ids = rendered.token_ids
        self._check.tokens(len(token_ids))
        check_token_ids(token_ids, self._info, field="prompt")  # a tokenizer may have more ids than its model
        texts = tuple(text_alone(self._texts, token) for token in token_ids) if request.with_token_texts else None
        text = self._text(token_ids, False) if rendered.text is None or tail is not None else rendered.text
        return PromptTokens(
            text=text,
            token_ids=token_ids,
            token_texts=texts,
            offsets=rendered.offsets,
            special_positions=tuple(place for place, token in enumerate(token_ids) if self._is_special(token)),
            message_boundaries=rendered.message_boundaries,
            boundaries_missing_reason=rendered.boundaries_missing_reason,
            prefill=shown_prefill(prompt, text),
        )

    def _tail_of(self, keep: int | None) -> PromptTail | None:
        kept = kept_tokens(keep, self._info, is_rows_only=True)
        return None if kept is None else PromptTail(kept, self._tokenizer, self._facts)

    def _text(self, token_ids: tuple[int, ...], skip_special: bool) -> str:
        # Slow tokenizers raise for ids that they do not have.
        known = [token for token in token_ids if not self._texts.is_silent(token, skip_special=skip_special)]
        return self._texts.decode(known, skip_special=skip_special)

    def _is_special(self, token: int) -> bool:
        return self._texts.is_silent(token, skip_special=True) and not self._texts.is_silent(token, skip_special=False)
