"""Prompts in the lines of files; the same keys mean the same in every command that reads such files."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatPrompt, TextPrompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.conversations import conversation_from

CHAT_KEYS = ("continue_final_message", "add_generation_prompt", "chat_template_kwargs", "tools")
"""Keys beside a conversation, which `ChatPrompt` describes."""

TEXT_KEYS = ("add_special_tokens",)
"""Keys beside a text, which `TextPrompt` describes."""

OPTIONS = frozenset(
    {
        *CHAT_KEYS,
        *TEXT_KEYS,
        *SamplingOptions.__dataclass_fields__,
        "cache_salt",
        "capture",
        "capture_dtype",
        "capture_layers",
        "capture_pooling",
        "chat_template",
        "enable_thinking",
        "steering",
        "steering_spec",
        "stream_interval",
        "time_budget_s",
        "timeout_s",
        "truncate_prompt_tokens",
    }
) - {"n", "seed", "stop"}
"""Keys that look like options. The three that are left out are common names of a user's own fields."""

SIMILAR = 0.85
"""Likeness, of 0 to 1, from which a key counts as a mistyped one."""

LONG_KEY = 10
"""Characters of a key that may be a mistyped one; short words are alike by chance."""


def chat_from_line(messages: Any, line: Mapping[str, Any]) -> ChatPrompt:
    """The chat of `messages` with the CHAT_KEYS of `line`; raises InvalidRequest with the key.

    Without `continue_final_message` and `add_generation_prompt`, an assistant's message at the end is the beginning of
    a response, which the model continues; after any other, the header of the model's turn follows.
    """
    conversation = conversation_from(messages)
    given = {key: line[key] for key in CHAT_KEYS if line.get(key) is not None}
    if "continue_final_message" not in given and "add_generation_prompt" not in given:
        given["continue_final_message"] = bool(conversation) and conversation[-1].role == "assistant"
    return ChatPrompt(messages=conversation, **given)


def text_from_line(text: Any, line: Mapping[str, Any], *, add_special_tokens: bool = True) -> TextPrompt:
    """The prompt of `text` with the TEXT_KEYS of `line`, or with the argument for one that it does not have.

    Raises InvalidRequest with the key.
    """
    given = {key: line[key] for key in TEXT_KEYS if line.get(key) is not None}
    return TextPrompt(text=text, **{"add_special_tokens": add_special_tokens, **given})


def check_line_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises InvalidRequest for a key that looks like an option and is not in `known`."""
    allowed = set(known)
    for key in keys:
        if key in allowed:
            continue
        if key in OPTIONS:
            raise InvalidRequest(
                f"{key} is no option here; there are {', '.join(sorted(allowed))}", reason="UNKNOWN_OPTION", field=key
            )
        close = (
            difflib.get_close_matches(key, (*CHAT_KEYS, *TEXT_KEYS), n=1, cutoff=SIMILAR)
            if len(key) >= LONG_KEY
            else []
        )
        if close:
            raise InvalidRequest(f"no such option; did you mean {close[0]}?", reason="UNKNOWN_OPTION", field=key)
