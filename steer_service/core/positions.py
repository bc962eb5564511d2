"""Which rows (tokens fed to the model) something applies to, in the caller's words and as absolute spans."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_service.core.errors import InvalidRequest, within

OPEN_END = 2**31 - 1
"""End of a span that goes on to the end of the sequence."""

MAX_RANGES = 1024
"""Ranges of one scope at most."""

Span = tuple[int, int]
"""Consecutive positions: the first, and the one after the last or OPEN_END."""

Spans = tuple[Span, ...]
"""Ascending, without overlap, none empty."""

EVERYWHERE: Spans = ((0, OPEN_END),)
"""All rows."""


@dataclass(frozen=True, slots=True)
class PositionRange:
    """Consecutive positions, both included; negative ones count back from the prompt's end: -1 is its last token."""

    first: int | None = None
    """First position. Default: 0."""
    last: int | None = None
    """Last position. Default: the end of the sequence."""

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise InvalidRequest(f"{value!r} is not an integer", reason="BAD_POSITION", field=name)
            if not -OPEN_END <= value < OPEN_END:
                raise InvalidRequest(f"position {value} is outside the numbers of 32 bits", field=name)
            object.__setattr__(self, name, int(value))
        first = self.first or 0
        if self.last is not None and (first < 0) == (self.last < 0) and first > self.last:
            raise _reversed(first, self.last)

    def resolve(self, prompt_tokens: int, row_limit: int) -> Span:
        """The span it means after a prompt of this length, in a request of at most `row_limit` rows."""
        first = _absolute(self.first or 0, prompt_tokens, row_limit)
        if self.last is None:
            return first, OPEN_END
        last = _absolute(self.last, prompt_tokens, row_limit)
        if first > last:
            raise _reversed(first, last)
        return first, last + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionScope:
    """The union of what is set; something must be."""

    prompt: bool = False
    """The rows of the prompt."""
    generated: bool = False
    """The rows of generated tokens; the last one sampled is never fed to the model and has no row."""
    ranges: tuple[PositionRange, ...] = ()
    """Further rows by their position; the first prompt token has position 0, generated ones follow the prompt."""

    def __post_init__(self) -> None:
        for name in ("prompt", "generated"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{getattr(self, name)!r} is not True or False", field=name)
        object.__setattr__(self, "ranges", tuple(self.ranges))
        for index, item in enumerate(self.ranges):
            if not isinstance(item, PositionRange):
                raise InvalidRequest(f"{type(item).__name__} is not a PositionRange", field=f"ranges[{index}]")
        if len(self.ranges) > MAX_RANGES:
            raise InvalidRequest(f"{len(self.ranges)} ranges, at most {MAX_RANGES}", field="ranges")
        if not (self.prompt or self.generated or self.ranges):
            raise InvalidRequest("no positions are selected", reason="EMPTY_POSITIONS")

    def resolve(self, prompt_tokens: int, row_limit: int) -> Spans:
        """The spans it means after a prompt of `prompt_tokens`, in a request of at most `row_limit` rows.

        Raises InvalidRequest for a range before the prompt's beginning, beyond the request or reversed, and for
        generated rows of a request that has none.
        """
        spans = [(0, prompt_tokens)] if self.prompt else []
        if self.generated:
            if row_limit <= prompt_tokens:
                raise InvalidRequest(
                    "with max_tokens 1 no generated token is fed to the model",
                    reason="EMPTY_POSITIONS",
                    field="generated",
                )
            spans.append((prompt_tokens, OPEN_END))
        for index, item in enumerate(self.ranges):
            with within(f"ranges[{index}]"):
                spans.append(item.resolve(prompt_tokens, row_limit))
        return _united(spans)


def scope_from(value: Any) -> PositionScope | None:
    """A scope as users write it.

    None (all rows), "prompt", "generated", a position, a `range`, a PositionRange, a PositionScope, or several of the
    last five in a sequence.
    """
    if value is None or isinstance(value, PositionScope):
        return value
    if isinstance(value, (str, int, np.integer, range, PositionRange)):
        value = (value,)
    if not isinstance(value, Iterable):
        raise InvalidRequest(f"{value!r} does not name positions", reason="BAD_POSITION")
    items: Sequence[Any] = tuple(value)
    words = [item for item in items if isinstance(item, str)]
    for word in words:
        if word not in ("prompt", "generated"):
            raise InvalidRequest(f"{word!r} is neither 'prompt' nor 'generated'", reason="BAD_POSITION")
    return PositionScope(
        prompt="prompt" in words,
        generated="generated" in words,
        ranges=tuple(_range_from(item) for item in items if not isinstance(item, str)),
    )


def count_rows(spans: Spans, end: int) -> int:
    """How many rows of positions 0..end-1 the spans hold."""
    return sum(max(0, min(last, end) - first) for first, last in spans)


def _range_from(item: Any) -> PositionRange:
    if isinstance(item, PositionRange):
        return item
    if isinstance(item, range):
        if item.step != 1 or not item:
            raise InvalidRequest(f"{item!r} is empty or has a step", reason="EMPTY_POSITIONS")
        return PositionRange(item[0], item[-1])
    return PositionRange(item, item)


def _absolute(position: int, prompt_tokens: int, row_limit: int) -> int:
    absolute = position if position >= 0 else prompt_tokens + position
    if absolute < 0:
        raise InvalidRequest(
            f"position {position} lies before the beginning of a prompt of {prompt_tokens} tokens",
            reason="OUT_OF_RANGE",
        )
    if absolute >= row_limit:
        raise InvalidRequest(
            f"position {position} lies beyond the request, which has at most {row_limit} rows "
            "(prompt tokens + max_tokens - 1)",
            reason="OUT_OF_RANGE",
        )
    return absolute


def _reversed(first: int, last: int) -> InvalidRequest:
    return InvalidRequest(f"positions {first} to {last} are reversed", reason="EMPTY_POSITIONS")


def _united(spans: Iterable[Span]) -> Spans:
    united: list[Span] = []
    for first, end in sorted(spans):
        if united and first <= united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((first, end))
    return tuple(united)
