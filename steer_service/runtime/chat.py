"""The tokens of each message of a conversation in its rendered prompt."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from steer_service.core.capture import MessageBoundary
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.chat_marks import Span


def message_boundaries(
    messages: Sequence[ChatMessage], spans: Sequence[Span], offsets: Sequence[Span]
) -> tuple[MessageBoundary, ...]:
    """One boundary per message: the tokens that have a character of its own text.

    `spans` are the characters of each message's text in the prompt, in order, and `offsets` those of each token. What
    the template writes itself belongs to no message, unless a token has characters of both. A token of two messages
    belongs to the first of them. A message without text has no tokens.
    """
    starts, ends = [], []
    place = 0
    for start, end in offsets:
        if end <= start:  # the token stands for no text, and its offsets may be (0, 0)
            start = end = place
        starts.append(start)
        ends.append(end)
        place = end
    return tuple(_boundaries(messages, spans, starts, ends))


def _boundaries(
    messages: Sequence[ChatMessage], spans: Sequence[Span], starts: Sequence[int], ends: Sequence[int]
) -> Iterator[MessageBoundary]:
    done = 0
    for message, (first, end) in zip(messages, spans, strict=True):
        start_token = max(done, bisect_right(ends, first))
        done = max(start_token, bisect_left(starts, end)) if end > first else start_token
        yield MessageBoundary(message.role, message.content, start_token, done)
