"""Renders prompts without blocking the event loop."""

import asyncio
from functools import partial
from typing import Any

from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.runtime.prompts import RenderedPrompt, render_prompt

LONG_TEXT = 20_000
"""Characters above which a text is tokenised in a thread."""

LONG_CHAT = 16
"""Messages above which a chat is rendered in a thread."""


async def render_off_loop(tokenizer: Any, request: GenerateRequest) -> RenderedPrompt:
    """The request's prompt as token ids; a long one is rendered in a thread."""
    render = partial(render_prompt, request.prompt, tokenizer, with_boundaries=request.capture is not None)
    return await asyncio.to_thread(render) if _is_long(request.prompt) else render()


def _is_long(prompt: Prompt) -> bool:
    """True if rendering may block the event loop for too long."""
    match prompt:
        case TextPrompt():
            return len(prompt.text) > LONG_TEXT
        case ChatPrompt():
            return len(prompt.messages) > LONG_CHAT or sum(len(m.content) for m in prompt.messages) > LONG_TEXT
    return False
