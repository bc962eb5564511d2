"""Conversations rendered to text by a model's own chat template.

Relies on transformers: `apply_chat_template(messages, tokenize=False, ...)` of a tokenizer returns text, passes further
keywords to the template, and raises what the template raises; `get_chat_template` returns the template's source.
The templates are Jinja's, with the tags `generation` and `break`. tests/runtime/test_chat_template.py notices a change.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt import ChatPrompt
from steer_service.runtime.chat_defaults import NO_DEFAULTS, ChatDefaults
from steer_service.runtime.conversations import as_dict

MAX_SENTENCE = 500
"""Characters of a template's own error that reach the caller."""

MAX_WRITTEN = 200
"""Characters of what a template writes around a response that reach the caller."""

TAG = re.compile(r"\s*(<[^<>\s]{1,64}>)")
"""A tag at the beginning of a response, such as that of reasoning."""

WORDS = re.compile(r"(<[^<>\s]{1,64}>)|\S(?:(?!<[^<>\s]{1,64}>).)*(?<!\s)", re.DOTALL)
"""A tag in a response, or the words between two of them."""

GENERATION_TAG = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")
"""A tag that transformers adds to Jinja; it marks responses."""

FUNCTIONS = frozenset({"raise_exception", "strftime_now"})
"""What transformers gives every template, besides the arguments."""

ASKS_FOR_NONE = re.compile(r"\bcontent\b[^%{}]{0,3}\s+(is\s+(not\s+)?none|[!=]=\s*none)\b", re.IGNORECASE)
"""A template that looks whether a message has content. Others take an empty text in its place."""


class ChatTemplate:
    """The template of a model, with the arguments that one conversation gives it."""

    def __init__(self, prompt: ChatPrompt, tokenizer: Any, defaults: ChatDefaults = NO_DEFAULTS) -> None:
        """Raises Unsupported (NO_CHAT_TEMPLATE) without a template; InvalidRequest for an argument it does not use."""
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._tools = [*prompt.tools] or None
        self._source = defaults.template or self._source_of(tokenizer)
        self._kwargs = {**defaults.kwargs, **prompt.chat_template_kwargs}
        nonce = secrets.token_hex(8)  # no message can contain a mark
        self._begin, self._end = f"<{nonce}>", f"</{nonce}>"
        self._asks_for_none = ASKS_FOR_NONE.search(self._source) is not None
        for key in prompt.chat_template_kwargs:  # without any, the template need not be parsed
            if key not in arguments_of(self._source):
                raise InvalidRequest(
                    f"the model's chat template does not use {key[:64]!r}",
                    reason="UNKNOWN_TEMPLATE_KEY",
                    field="prompt.chat_template_kwargs",
                )

    def prompt_text(self) -> str:
        """The text of the prompt.

        It ends with exactly the content of a message that is continued, also where the template trims contents.
        Raises InvalidRequest (TEMPLATE_REFUSED), with the template's own sentence, for a conversation that it refuses,
        and (PREFILL_ALTERED) if it does not write that content as it is. Raises Unsupported (NO_TOOLS) if it ignores
        the tools.
        """
        text = self._prompt_text(self._tools)
        if self._tools and text == self._prompt_text(None):
            raise Unsupported("the model's chat template ignores tools", reason="NO_TOOLS", field="prompt.tools")
        return text

    def render_marked(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of the prompt for messages with marks in their texts; see `chat_marks`."""
        return self._cut(self._uncut([*map(dict, messages)], self._tools))

    def _prompt_text(self, tools: list[JsonObject] | None) -> str:
        messages = [*map(as_dict, self._prompt.messages)]
        text = self._uncut(messages, tools)
        if self._prompt.continue_final_message:
            prefill = messages[-1]["content"]
            if text.count(f"{self._begin}{prefill}{self._end}") != 1 or text.count(self._end) != 1:
                raise _prefill_altered("removes, moves or repeats some of it", self._written(messages, tools))
            tag = TAG.match(prefill)
            if tag is not None and tag[1] in self._header(messages, tools):
                raise _prefill_altered(f"writes {tag[1]} before it", self._written(messages, tools))
        return self._cut(text)

    def _uncut(self, messages: list[dict[str, Any]], tools: list[JsonObject] | None) -> str:
        """The text of the prompt, with the marks of `_opened` and what follows them if a message is continued."""
        if self._prompt.continue_final_message:
            return self._apply(self._opened(messages), tools, add_generation_prompt=False)
        return self._apply(messages, tools, add_generation_prompt=self._prompt.has_generation_prompt)

    def _opened(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`messages` with marks around the content of the last one, which keep it from being trimmed."""
        last = messages[-1]
        return [*messages[:-1], {**last, "content": f"{self._begin}{last['content']}{self._end}"}]

    def _cut(self, text: str) -> str:
        """`text` up to the end of the message that is continued, if one is, without the marks of `_opened`."""
        return text.split(self._end, 1)[0].replace(self._begin, "")

    def _header(self, messages: list[dict[str, Any]], tools: list[JsonObject] | None) -> str:
        """What the template writes between the content of the last message and that of the one before."""
        *earlier, before, last = [{"role": "", "content": ""}, *messages]
        named = [*earlier, {**before, "content": self._end}, last][1:]
        text = self._apply(self._opened(named), tools, add_generation_prompt=False)
        return text.split(self._begin, 1)[0].rsplit(self._end, 1)[-1]

    def _written(self, messages: list[dict[str, Any]], tools: list[JsonObject] | None) -> str:
        """What the template writes for the last message, with "…" for the message's words, but not for its tags.

        It has no text of any message. Empty if the place of the message before is not found.
        """
        *earlier, last = messages
        masked = {key: WORDS.sub(_masked, last[key]) for key in ("content", "reasoning_content") if key in last}
        marked = [*({**message, "content": self._end} for message in earlier), {**last, **masked}]
        try:
            text = self._apply(marked, tools, add_generation_prompt=False)
        except InvalidRequest:  # it looks at what the messages say
            return ""
        return text.rsplit(self._end, 1)[-1] if self._end in text or not earlier else ""

    def _source_of(self, tokenizer: Any) -> str:
        if not tokenizer.chat_template:
            raise Unsupported(
                "the model has no chat template; send text or token ids",
                reason="NO_CHAT_TEMPLATE",
                field="prompt.messages",
            )
        try:
            return str(tokenizer.get_chat_template(tools=self._tools))
        except ValueError as error:  # there are several, and none is the default
            raise template_refused(error) from error

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: list[JsonObject] | None, **options: Any) -> str:
        if self._asks_for_none:
            messages = [{**m, "content": None} if m.get("tool_calls") and not m["content"] else m for m in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    **{"chat_template": self._source, **self._kwargs, **options},
                )
            )
        except Exception as error:  # a template may raise anything, most often errors of jinja2
            raise template_refused(error) from error


@lru_cache(maxsize=8)
def arguments_of(source: str) -> frozenset[str]:
    """The names that a template takes from its arguments; every word of one that Jinja alone cannot parse."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    parser = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(parser.parse(GENERATION_TAG.sub("", source)))
    except TemplateSyntaxError:
        names = set(re.findall(r"\w+", source))
    return frozenset(names) - FUNCTIONS


def tokens_of_chat(prompt: ChatPrompt, tokenizer: Any) -> tuple[int, ...]:
    """The tokens of a chat by a tokenizer that writes chats without a template.

    Raises Unsupported (NO_CHAT_TEMPLATE) for arguments of a template, and InvalidRequest as a ChatTemplate does.
    """
    if prompt.chat_template_kwargs:
        raise Unsupported(
            "the model's tokenizer writes chats itself, without a template that takes arguments",
            reason="NO_CHAT_TEMPLATE",
            field="prompt.chat_template_kwargs",
        )
    try:
        token_ids = tokenizer.apply_chat_template(
            [*map(as_dict, prompt.messages)],
            tools=[*prompt.tools] or None,
            tokenize=True,
            add_generation_prompt=prompt.has_generation_prompt,
            continue_final_message=prompt.continue_final_message,
        )
    except Exception as error:  # the tokenizer refuses with exceptions of several libraries
        raise template_refused(error) from error
    if prompt.continue_final_message:
        prefill = prompt.messages[-1].content
        if not tokenizer.decode(token_ids, skip_special_tokens=True).endswith(prefill):
            raise _prefill_altered("removes or moves some of it")
    return tuple(token_ids)


def _masked(words: re.Match[str]) -> str:
    return words[1] or "…"


def _prefill_altered(how: str, written: str = "") -> InvalidRequest:
    if len(written) > MAX_WRITTEN:
        written = "…" + written[1 - MAX_WRITTEN :]
    return InvalidRequest(
        f"the model's chat template does not keep the beginning of the response: it {how}"
        f"{f', as in {written!r}' if written else ''}; send another beginning, or the whole prompt as text",
        reason="PREFILL_ALTERED",
        field="prompt.messages",
    )


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
