"""Where the text of each message stands in a rendered conversation, found by marks in the texts.

The conversation is rendered once more with a mark at the beginning and at the end of each text. Without its marks it
must be the prompt, or nothing is concluded. Templates treat texts in several ways, so several places for marks are
tried: around the whole text; inside its whitespace, which many templates trim; and between its tags, such as those of
reasoning, by which templates take texts apart. The work is linear in the conversation.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer_service.core.errors import SteerError, Unsupported
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.conversations import as_dict

TAG = re.compile(r"</?[^<>\s]{1,64}>|\[/?[A-Z_]{1,64}\]")
"""What a template may take a text apart by."""

Span = tuple[int, int]
"""First character, and the one after the last."""

RenderMarked = Callable[[Sequence[Mapping[str, Any]]], str]
"""Messages with marks -> the whole prompt with marks; may raise SteerError."""


def spans_by_marks(
    messages: Sequence[ChatMessage], render_marked: RenderMarked, full_text: str, *, is_open: bool
) -> list[Span]:
    """The characters of each message's own text in `full_text`, its prompt, in the order of the messages.

    That is its reasoning, its content, and the names and arguments of its calls, from the first to the last of them. A
    message without text, or whose text the template leaves out, has an empty span. `is_open`: the last message is
    continued, so that the prompt ends with its content as it is.

    Raises Unsupported (MESSAGE_BOUNDARIES) if the template does not write each text once and in order.
    """
    spans: list[Span | None] = [None] * len(messages)
    unknown = set(range(len(messages)))
    for pieces_of in (_whole, _trimmed, _between_tags):
        marks = _Marks(pieces_of, is_last=pieces_of is _between_tags)
        last = len(messages) - 1 if is_open else None
        marked = [_with_marks(message, index, marks, is_open=index == last) for index, message in enumerate(messages)]
        try:
            text, places = marks.take(render_marked(marked))
        except SteerError:  # it refuses texts that begin otherwise
            continue
        if text == full_text:
            found, lost = marks.spans(places)
            for index in unknown - lost:
                spans[index] = found.get(index)
            unknown &= lost
        if not unknown:
            return [*_in_order(_with_arguments(messages, spans, full_text))]
    raise _unknown("writes messages in a way that depends on their texts")


def _whole(text: str) -> Iterator[Span]:
    yield 0, len(text)


def _trimmed(text: str) -> Iterator[Span]:
    yield from _filled(text, 0, len(text))


def _between_tags(text: str) -> Iterator[Span]:
    first = 0
    for tag in TAG.finditer(text):
        yield from _filled(text, first, tag.start())
        first = tag.end()
    yield from _filled(text, first, len(text))


def _filled(text: str, first: int, end: int) -> Iterator[Span]:
    """The part of `text[first:end]` inside its whitespace, if there is any."""
    part = text[first:end]
    start = first + len(part) - len(part.lstrip())
    if part.strip():
        yield start, start + len(part.strip())


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a text between two marks."""

    message: int
    """Number of its message."""
    is_optional: bool
    """True if a template may leave it out and keep the rest of the text."""


class _Marks:
    """The marks in the texts of one conversation."""

    def __init__(self, pieces_of: Callable[[str], Iterator[Span]], *, is_last: bool) -> None:
        """`is_last`: there are no better places for marks, and a text without marks has been left out."""
        self._pieces_of = pieces_of
        self._is_last = is_last
        self._pieces: list[_Piece] = []
        self._nonce = secrets.token_hex(8)  # no text can contain a mark

    def put(
        self,
        text: str,
        message: int,
        pieces_of: Callable[[str], Iterator[Span]] | None = None,
        *,
        is_optional: bool = False,
    ) -> str:
        """`text` of a message with marks around each of its pieces."""
        parts, done = [], 0
        for first, end in (pieces_of or self._pieces_of)(text):
            number = len(self._pieces)
            self._pieces.append(_Piece(message, is_optional or self._is_last))
            parts += [text[done:first], f"{self._nonce}b{number}_", text[first:end], f"{self._nonce}e{number}_"]
            done = end
        return "".join([*parts, text[done:]])

    def take(self, marked: str) -> tuple[str, dict[tuple[str, int], list[int]]]:
        """The text without marks, and the places of each mark in it."""
        parts = re.split(f"{self._nonce}([be])([0-9]+)_", marked)
        places: dict[tuple[str, int], list[int]] = {}
        position = 0
        for text, kind, number in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
            position += len(text)
            places.setdefault((kind, int(number)), []).append(position)
        return "".join(parts[::3]), places

    def spans(self, places: Mapping[tuple[str, int], list[int]]) -> tuple[dict[int, Span], set[int]]:
        """The characters of each message from its first mark to its last, and the messages that lost a mark.

        Raises Unsupported if a text is repeated.
        """
        spans: dict[int, Span] = {}
        lost: set[int] = set()
        for number, piece in enumerate(self._pieces):
            begin, end = places.get(("b", number), []), places.get(("e", number), [])
            if len(begin) > 1 or len(end) > 1:
                raise _unknown(f"repeats the text of message {piece.message}")
            if begin and end:
                known = spans.get(piece.message, (begin[0], end[0]))
                spans[piece.message] = min(known[0], begin[0]), max(known[1], end[0])
            elif begin or end or not piece.is_optional:
                lost.add(piece.message)
        return spans, lost


def _with_marks(message: ChatMessage, index: int, marks: _Marks, *, is_open: bool) -> dict[str, Any]:
    """A message as templates take it, with marks in its texts; the content of an open one is not trimmed."""
    marked = as_dict(message)
    if message.content or not message.tool_calls:  # templates ask whether there is content beside calls
        marked["content"] = marks.put(message.content, index, _whole if is_open else None)
    if message.reasoning_content:
        marked["reasoning_content"] = marks.put(message.reasoning_content, index, is_optional=True)
    for call in marked.get("tool_calls", ()):
        function = call["function"]
        function["name"] = marks.put(function["name"], index)
        function["arguments"] = _leaves_with_marks(function["arguments"], index, marks)
    return marked


def _leaves_with_marks(value: Any, index: int, marks: _Marks) -> Any:
    match value:
        case str():
            return marks.put(value, index, is_optional=True)
        case Mapping():
            return {key: _leaves_with_marks(one, index, marks) for key, one in value.items()}
        case list() | tuple():
            return [_leaves_with_marks(one, index, marks) for one in value]
    return value


def _with_arguments(
    messages: Sequence[ChatMessage], spans: Sequence[Span | None], full_text: str
) -> Iterator[Span | None]:
    """`spans`, up to the end of the last call's arguments where these are written as JSON."""
    for index, (message, span) in enumerate(zip(messages, spans, strict=True)):
        if span is not None and message.tool_calls:
            first, end = span
            limit = next((later[0] for later in spans[index + 1 :] if later is not None), len(full_text))
            arguments = json.dumps(message.tool_calls[-1].arguments, ensure_ascii=False)
            found = full_text.rfind(arguments, first, limit)
            span = first, max(end, found + len(arguments) if found >= 0 else 0)
        yield span


def _in_order(spans: Iterator[Span | None]) -> Iterator[Span]:
    """The spans; messages without one stand after the one before. Raises Unsupported if they are out of order."""
    done = 0
    for span in spans:
        first, end = span or (done, done)
        if first < done:
            raise _unknown("does not write one message after the other")
        yield first, end
        done = end


def _unknown(what: str) -> Unsupported:
    return Unsupported(
        f"the model's chat template {what}, so the positions of the messages are unknown",
        reason="MESSAGE_BOUNDARIES",
        field="prompt.messages",
    )
