"""The tokens of each message of a conversation in its rendered prompt."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import SteerError, Unsupported
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.chat_marks import RenderMarked, ends_by_marks

MAX_PREFIXES = 64
"""Messages whose prefixes are rendered at most: the work grows with the square of their number."""

Render = Callable[[Sequence[ChatMessage]], str]
"""Messages -> their text by the model's chat template, without a generation header; raises SteerError if refused."""


def message_boundaries(
    messages: Sequence[ChatMessage],
    render: Render,
    full_text: str,
    offsets: Sequence[tuple[int, int]],
    *,
    render_marked: RenderMarked | None = None,
) -> tuple[MessageBoundary, ...]:
    """One boundary per message, including its header and end marker; a preamble belongs to the first message.

    `full_text` is the rendered prompt, `offsets` the characters [start, end) of each of its tokens. A token belongs to
    the message in which it starts; the header of the model's turn belongs to no message. With `render_marked`, most
    templates render the conversation twice. Otherwise every prefix is rendered, of at most MAX_PREFIXES messages.

    Raises Unsupported if the template does not write one message after the other, or if there are more messages.
    """
    ends = ends_by_marks(messages, render_marked, full_text) if render_marked is not None and messages else None
    if ends is None:
        if len(messages) > MAX_PREFIXES:
            raise _not_in_order(f"is not known to write one message after the other for over {MAX_PREFIXES} messages")
        ends = _ends_of_messages(messages, render, full_text)
        _check_contents(messages, ends, full_text)
    starts = list(accumulate((start for start, _ in offsets), max))  # a token that the tokenizer adds has (0, 0)
    tokens = [0, *(bisect_left(starts, end) for end in ends)]
    return tuple(
        MessageBoundary(message.role, message.content, start, end)
        for message, (start, end) in zip(messages, pairwise(tokens), strict=True)
    )


def _ends_of_messages(messages: Sequence[ChatMessage], render: Render, full_text: str) -> list[int]:
    ends = [_end_of_prefix(messages[: index + 1], render, full_text) for index in range(len(messages))]
    if messages and ends[-1] is None:
        ends[-1] = _end_of_open_message(messages, render, full_text)
    known: list[int] = []
    for index, end in enumerate(ends):
        if end is None:
            end = _start_of_next(messages[: index + 2], render, full_text, known[-1] if known else 0, ends[index + 1])
        if end < (known[-1] if known else 0):
            raise _not_in_order()
        known.append(end)
    return known


def _end_of_prefix(prefix: Sequence[ChatMessage], render: Render, full_text: str) -> int | None:
    """Where `full_text` stops being the rendering of `prefix`; None if it does not begin with it."""
    try:
        text = render(prefix)
    except SteerError:  # a template may refuse a conversation that stops here
        return None
    return len(text) if full_text.startswith(text) else None


def _end_of_open_message(messages: Sequence[ChatMessage], render: Render, full_text: str) -> int:
    """The end of `full_text` if the last message, to be continued, runs up to there."""
    if not render(messages).startswith(full_text):
        raise _not_in_order()
    return len(full_text)


def _start_of_next(
    prefix: Sequence[ChatMessage], render: Render, full_text: str, start: int, next_end: int | None
) -> int:
    """Where the last message of `prefix` begins, found by leaving out the message before it.

    Some templates drop the reasoning of earlier turns: they render a turn differently once a question follows it.
    The conversation up to that turn is then not a beginning of the prompt, but the question is rendered the same.
    """
    if next_end is None:
        raise _not_in_order()
    try:
        without = render([*prefix[:-2], prefix[-1]])
    except SteerError as error:
        raise _not_in_order() from error
    following = without[start:]
    if not without.startswith(full_text[:start]) or not full_text[:next_end].endswith(following):
        raise _not_in_order()
    return next_end - len(following)


def _check_contents(messages: Sequence[ChatMessage], ends: Sequence[int], full_text: str) -> None:
    """Raises Unsupported if the text of a message is inside another message, as when a template merges two."""
    for message, (start, end) in zip(messages, pairwise([0, *ends]), strict=True):
        content = message.content.strip()
        if content not in full_text[start:end] and content in full_text:
            raise _not_in_order()


def _not_in_order(what: str = "does not write one message after the other") -> Unsupported:
    return Unsupported(
        f"the model's chat template {what}, so their positions are unknown",
        reason="MESSAGE_BOUNDARIES",
        field="prompt.messages",
    )
