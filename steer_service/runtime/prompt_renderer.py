"""Renders the prompts of one model: short ones at once, long ones in a few threads of its own."""

import logging
from functools import cache, partial
from typing import Any

from steer_service.core.backend import ModelInfo
from steer_service.core.checks import kept_tokens
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.bad_words import bad_word_tokens
from steer_service.runtime.chat_defaults import NO_DEFAULTS, ChatDefaults
from steer_service.runtime.prompt_length import LengthCheck, TokenizerFacts
from steer_service.runtime.prompt_tail import PromptTail
from steer_service.runtime.prompts import RenderedPrompt, render_prompt
from steer_service.runtime.worker_threads import WorkerThreads

logger = logging.getLogger(__name__)

LONG_TEXT = 4_000
"""Characters above which a text is tokenised in a thread. A shorter one takes a few milliseconds at most."""

LONG_CHAT = 16
"""Messages above which a chat is rendered in a thread; one with tools or their calls always is."""

THREADS = 2
"""Prompts that are rendered at the same time."""

MAX_WAITING = 256
"""Long prompts that may wait for a thread; more are refused."""


class PromptRenderer:
    """Renders prompts without blocking the event loop. A cancelled one leaves the queue."""

    def __init__(self, tokenizer: Any, info: ModelInfo, defaults: ChatDefaults = NO_DEFAULTS) -> None:
        """Raises Unsupported for `defaults` of a template that the tokenizer does not have."""
        defaults.check(tokenizer)
        self._defaults = defaults
        self._tokenizer = tokenizer
        self._info = info
        self._facts = cache(partial(TokenizerFacts.of, tokenizer))
        self._has_hinted = False
        self._threads = WorkerThreads("prompts", THREADS, MAX_WAITING)

    async def render(self, request: GenerateRequest) -> RenderedPrompt:
        """The request's prompt as token ids.

        Raises InvalidRequest for a prompt that is too long for the model, without tokenising all of it; Overloaded if
        too many prompts wait; and the errors of `render_prompt`.
        """
        tail = self._tail_of(request)
        render = partial(
            render_prompt,
            request.prompt,
            self._tokenizer,
            with_boundaries=request.capture is not None or request.names_messages,
            check=LengthCheck(self._tokenizer, self._facts, self._info, is_rows_only=request.sampling.is_rows_only),
            tail=tail,
            defaults=self._defaults,
        )
        # The text of a chat may be long although its messages are not: what is proven of the tokenizer takes a second.
        is_long = _is_long(request.prompt) or (tail is not None and isinstance(request.prompt, ChatPrompt))
        rendered = await self._threads.run(render) if is_long else render()
        if not self._has_hinted and self._begins_twice(request.prompt, rendered):
            self._has_hinted = True
            logger.warning("a text began with the BOS token, which was added again; said once (add_special_tokens)")
        return rendered

    def _tail_of(self, request: GenerateRequest) -> PromptTail | None:
        keep = kept_tokens(request.truncate_prompt_tokens, self._info, is_rows_only=request.sampling.is_rows_only)
        return None if keep is None else PromptTail(keep, self._tokenizer, self._facts)

    def _begins_twice(self, prompt: Prompt, rendered: RenderedPrompt) -> bool:
        if not isinstance(prompt, TextPrompt) or not prompt.add_special_tokens:
            return False
        bos = getattr(self._tokenizer, "bos_token_id", None)
        return bos is not None and rendered.token_ids[:2] == (bos, bos)

    def bad_words(self, options: SamplingOptions) -> tuple[tuple[int, ...], ...]:
        """The token sequences that are not to be generated; raises the InvalidRequest of `bad_word_tokens`."""
        return bad_word_tokens(options.bad_words, self._tokenizer, self._info) if options.bad_words else ()


def _is_long(prompt: Prompt) -> bool:
    """True if rendering may block the event loop for too long."""
    match prompt:
        case TextPrompt():
            return len(prompt.text) > LONG_TEXT
        case ChatPrompt():
            if prompt.tools or len(prompt.messages) > LONG_CHAT or any(m.tool_calls for m in prompt.messages):
                return True
            return sum(len(m.content) + len(m.reasoning_content) for m in prompt.messages) > LONG_TEXT
    return False
