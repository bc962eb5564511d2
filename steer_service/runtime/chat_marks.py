"""Where a chat template begins each message, found by marks that a copy of the template prints.

A template writes its messages in a loop. A copy of its source prints a mark of each message at the beginning of the
loop's body: `{% for m in messages %}` becomes `{% for m in messages %}{% print m.steer_mark %}`. Without the marks, the
copy must write what the template itself writes, or nothing is concluded. The work is linear in the conversation.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from steer_service.core.errors import SteerError
from steer_service.core.prompt import ChatMessage
from steer_service.runtime.conversations import as_dict

MARK_KEY = "steer_mark"
"""Key of a message's mark, beside `role` and `content`."""

LOOP = re.compile(r"(\{%[-+]?\s*for\s+(\w+)\s+in\b[^%]*?)([-+]?)%\}")
"""A loop with one variable. Loops of other shapes are left as they are."""

RenderMarked = Callable[[Sequence[Mapping[str, Any]]], str]
"""Messages with marks -> their text by the template `with_marks`, without a generation header; may raise SteerError."""


def with_marks(template: str) -> str:
    """The source of `template`, changed to print the mark of each message at the beginning of a loop's body."""
    # `print` is a block, so that the template's options treat the whitespace around it as that around the loop.
    return LOOP.sub(rf"\1\3%}}{{% print \2.{MARK_KEY} \3%}}", template)


def ends_by_marks(messages: Sequence[ChatMessage], render_marked: RenderMarked, full_text: str) -> list[int] | None:
    """The position in `full_text` at which each message ends; None if the marks do not prove them."""
    nonce = secrets.token_hex(8)  # no message can contain a mark
    try:
        marked = _render(messages, [message.content for message in messages], nonce, render_marked)
        names = _render(messages, [f"{nonce}={index};" for index in range(len(messages))], nonce, render_marked)
    except SteerError:
        return None
    if full_text.startswith(marked.text):
        end = len(marked.text)
    elif marked.text.startswith(full_text):
        end = len(full_text)  # the last message is to be continued
    else:
        return None
    starts, starts_of_names = marked.starts(len(messages)), names.starts(len(messages))
    if starts is None or starts_of_names is None or end < starts[-1]:
        return None
    if _has_foreign_name(names.text, [*starts_of_names, len(names.text)], nonce):
        return None
    return [*starts[1:], end]


@dataclass(frozen=True, slots=True)
class _Marked:
    """A rendered conversation."""

    text: str
    """Without the marks."""
    marks: dict[int, int]
    """Message -> position of its last mark in `text`; templates may look through the messages before they write."""

    def starts(self, count: int) -> list[int] | None:
        """Where each of `count` messages begins; None if one of them but the first has no mark or is out of order.

        What the template writes before its loop belongs to the first message.
        """
        starts = [0, *(self.marks.get(index, -1) for index in range(1, count))]
        return starts if all(left <= right for left, right in pairwise(starts)) else None


def _render(
    messages: Sequence[ChatMessage], contents: Sequence[str], nonce: str, render_marked: RenderMarked
) -> _Marked:
    rendered = render_marked(
        [
            as_dict(message) | {"content": content, MARK_KEY: f"<{nonce}:{index}>"}
            for index, (message, content) in enumerate(zip(messages, contents, strict=True))
        ]
    )
    pieces = re.split(f"<{nonce}:([0-9]+)>", rendered)
    marks, position = {}, 0
    for text, index in zip(pieces[::2], pieces[1::2], strict=False):
        position += len(text)
        marks[int(index)] = position
    return _Marked("".join(pieces[::2]), marks)


def _has_foreign_name(text: str, bounds: Sequence[int], nonce: str) -> bool:
    """True if the content of a message stands inside another message, as when a template merges two."""
    for found in re.finditer(f"{nonce}=([0-9]+);", text):
        index = int(found[1])
        if not bounds[index] <= found.start() < bounds[index + 1]:
            return True
    return False
