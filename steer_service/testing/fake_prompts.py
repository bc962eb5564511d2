"""The prompts of the fake backend: one token per word, and chats whose messages follow each other."""

import hashlib
from dataclasses import replace
from functools import partial

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import MessageBoundary
from steer_service.core.json_fields import as_json
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.runtime.prompts import RenderedPrompt


def rendered(prompt: Prompt, info: ModelInfo, keep: int | None = None) -> RenderedPrompt:
    """The tokens of a prompt, its last `keep` tokens at most; of one that is too long, enough to refuse it."""
    if keep is None:
        return _rendered(prompt, info.vocab_size, info.max_model_len)
    whole = _rendered(prompt, info.vocab_size, -1)
    cut = max(0, len(whole.token_ids) - keep)
    boundaries = [
        replace(one, start_token=max(0, one.start_token - cut), end_token=max(0, one.end_token - cut))
        for one in whole.message_boundaries
    ]
    return replace(whole, token_ids=whole.token_ids[cut:], message_boundaries=tuple(boundaries))


def words_to_token_ids(text: str, vocab_size: int, limit: int = -1) -> tuple[int, ...]:
    """One token per whitespace-separated word of `text`, a hash of the word; no more than `limit` + 1 of them."""
    return tuple(hash_of(word.encode()) % vocab_size for word in text.split(None, limit))


def _rendered(prompt: Prompt, vocab_size: int, limit: int) -> RenderedPrompt:
    match prompt:
        case ChatPrompt():
            return _render_chat(prompt, vocab_size, limit)
        case TextPrompt():
            return RenderedPrompt(token_ids=words_to_token_ids(prompt.text, vocab_size, limit), text=prompt.text)
        case TokenPrompt():
            return RenderedPrompt(token_ids=prompt.token_ids)


def _render_chat(prompt: ChatPrompt, vocab_size: int, limit: int) -> RenderedPrompt:
    given = (*prompt.tools, *filter(None, [prompt.chat_template_kwargs]))
    tokens = partial(words_to_token_ids, vocab_size=vocab_size, limit=limit)
    texts = [*map(as_json, given)]
    token_ids = [*tokens(" ".join(texts))]
    boundaries = []
    for message in prompt.messages:
        token_ids += tokens(f"<{message.role}>")
        start = len(token_ids)
        texts += [f"<{message.role}>", message.content]
        token_ids += tokens(message.content)
        boundaries.append(MessageBoundary(message.role, message.content, start, len(token_ids)))
        if 0 <= limit < len(token_ids):
            break  # it will be refused
    if prompt.has_generation_prompt:
        texts.append("<assistant>")
        token_ids += tokens(texts[-1])
    return RenderedPrompt(token_ids=tuple(token_ids), message_boundaries=tuple(boundaries), text=" ".join(texts))


def hash_of(value: bytes) -> int:
    """A number of at most 64 bits that is the same in every process."""
    return int.from_bytes(hashlib.sha256(value).digest()[:8], "big")
