"""The positions that a spec or a capture selects, as users write them and as absolute spans."""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from steer_service.core.errors import InvalidRequest, Unsupported, within
from steer_service.core.field_checks import check_length, named_messages, named_roles
from steer_service.core.number_limits import MAX_RANGES
from steer_service.core.spans import (
    EVERYWHERE,
    NOWHERE,
    OPEN_END,
    Span,
    Spans,
    check_count,
    clipped,
    united,
    without,
)

NOT_SPECIAL = "skip_special_tokens"
"""The word for `PositionScope.skip_special_tokens` among positions."""

_MESSAGE = re.compile(r"messages\[(-?\d{1,4})\]", re.ASCII)
_ROLE = re.compile(r"roles\[(.{1,64})\]", re.DOTALL)
_SLICE = re.compile(r"generated\[(?:(\d{1,19})|(\d{0,19}):(\d{0,19}))\]", re.ASCII)


class Places(Protocol):
    """Where the messages and special tokens of one prompt are: `core.prompt_places.PromptPlaces`."""

    def of_message(self, index: int) -> Span:
        """The positions of a message; -1 is the last one."""
        ...

    def of_role(self, role: str) -> Iterable[Span]:
        """The positions of the messages of `role`."""
        ...

    @property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """Which tokens of the prompt are special, as far as the last one that is."""
        ...


@dataclass(frozen=True, slots=True)
class PositionRange:
    """Consecutive positions, both ends included; a negative one counts from the prompt's end: -1 is its last token."""

    first: int = 0
    """First position."""
    last: int | None = None
    """Last position. Default: the end of the sequence."""

    def __post_init__(self) -> None:
        if type(self.first) is int and type(self.last) is int and 0 <= self.first <= self.last < OPEN_END:
            return  # as nearly all are, and a request may have thousands
        object.__setattr__(self, "first", _position(self.first, "first"))
        if self.last is None:
            return
        object.__setattr__(self, "last", _position(self.last, "last"))
        if (self.first < 0) == (self.last < 0) and self.first > self.last:
            raise _reversed(self.first, self.last)

    def resolve(self, prompt_tokens: int, row_limit: int) -> Span:
        """The span it means after a prompt of this length, in a request of at most `row_limit` rows."""
        first = _absolute(self.first, prompt_tokens, row_limit)
        if self.last is None:
            return first, OPEN_END
        last = _absolute(self.last, prompt_tokens, row_limit)
        if first > last:
            raise _reversed(first, last)
        return first, last + 1

    def after_prompt(self, prompt_tokens: int) -> Span:
        """The span it means if it counts from the first generated token, position 0, which follows the prompt."""
        end = OPEN_END if self.last is None else min(prompt_tokens + self.last + 1, OPEN_END)
        return min(prompt_tokens + self.first, OPEN_END - 1), end


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionScope:
    """The positions that a spec, an operation or a capture is for: the union of what is set.

    Wherever positions are given, a short form is accepted too: "prompt", "generated", generated tokens as a slice such
    as "generated[0:8]" or "generated[3]", a message such as "messages[-1]", messages of a role such as "roles[user]",
    "skip_special_tokens", a position, a `range` or a PositionRange, or several of these in a sequence. None means all.

    A part may be empty in a request, the union may not. Raises InvalidRequest if nothing is set, and for a number that
    is outside its range.
    """

    prompt: bool = False
    """The rows of the prompt."""
    generated: bool = False
    """The rows of generated tokens; the last one sampled is never fed to the model and has no row."""
    ranges: tuple[PositionRange, ...] = ()
    """Further rows by their position; the first prompt token has position 0, generated ones follow the prompt."""
    generated_ranges: tuple[PositionRange, ...] = ()
    """Further rows of generated tokens, of which the first has position 0 here; no end is negative.

    They may exceed the request: an answer may end at any token.
    """
    messages: tuple[int, ...] = ()
    """The rows of the texts of these messages of a chat, -4096..4095; -1 is the last one. At most 1024."""
    roles: tuple[str, ...] = ()
    """The rows of the texts of all messages of these roles, which may be none; at most 64."""
    skip_special_tokens: bool = False
    """True: without the prompt's special tokens. Alone: all rows but those."""

    def __post_init__(self) -> None:
        for name in ("prompt", "generated", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{getattr(self, name)!r} is not True or False", field=name)
        for name in ("ranges", "generated_ranges"):
            object.__setattr__(self, name, _ranges(getattr(self, name), name))
        for index, item in enumerate(self.generated_ranges):
            for name in ("first", "last"):
                if (getattr(item, name) or 0) < 0:
                    raise InvalidRequest(
                        f"position {getattr(item, name)} of the generated tokens is negative: where they end is not "
                        "known in advance",
                        reason="OUT_OF_RANGE",
                        field=f"generated_ranges[{index}].{name}",
                    )
        object.__setattr__(self, "messages", named_messages(self.messages))
        object.__setattr__(self, "roles", named_roles(self.roles))
        if not (self._has_places or self.skip_special_tokens):
            raise InvalidRequest("no positions are selected", reason="EMPTY_POSITIONS")

    @property
    def _has_places(self) -> bool:
        """True if it selects anything in other words than `skip_special_tokens`."""
        return bool(
            self.prompt or self.generated or self.ranges or self.generated_ranges or self.messages or self.roles
        )

    @property
    def entry_count(self) -> int:
        """How many ranges, messages and roles it names."""
        return len(self.ranges) + len(self.generated_ranges) + len(self.messages) + len(self.roles)

    @property
    def is_generated_only(self) -> bool:
        """True if it selects nothing that a request for one token could have."""
        return self._has_places and not (self.prompt or self.ranges or self.names_messages)

    @property
    def names_messages(self) -> bool:
        """True if it means anything only in a chat whose messages have known positions."""
        return bool(self.messages or self.roles)

    @property
    def needs_prompt(self) -> bool:
        """True if its meaning depends on more than the length of the prompt."""
        return self.names_messages or self.skip_special_tokens

    def resolve(self, prompt_tokens: int, row_limit: int, places: Places | None = None, before: int = 0) -> Spans:
        """The spans it means after a prompt of `prompt_tokens`, in a request of at most `row_limit` rows.

        `places` are needed for messages, roles and special tokens. Raises InvalidRequest for a range before the
        prompt's beginning, beyond the request or reversed, for a message that the chat does not have, if nothing is
        selected, and for too many spans: see `spans.check_count`, also for `before`. Raises Unsupported if the places
        are not known.
        """
        spans = self._spans(prompt_tokens, row_limit, places, before)
        check_count(len(spans), before)
        if spans and spans[0][0] < row_limit:
            return spans
        if not self.is_generated_only:
            raise InvalidRequest(
                "no token is selected: the prompt has no such messages, or they are without text or cut off, or all of "
                "their tokens are special",
                reason="EMPTY_POSITIONS",
                field="messages" if self.messages else "roles" if self.roles else "skip_special_tokens",
            )
        rows = row_limit - prompt_tokens
        raise InvalidRequest(
            f"the request has at most {rows} rows of generated tokens, since the last token is never fed to the model; "
            "the last prompt token, -1, is the row that the first generated token is computed from",
            reason="EMPTY_POSITIONS",
            field="generated" if self.generated else "generated_ranges[0]",
        )

    def resolve_within(self, prompt_tokens: int, rows: int) -> Spans:
        """The spans it means in a sequence of `rows` rows that has ended, of which it may be none that is generated.

        Raises InvalidRequest for a range that leaves the sequence or is reversed.
        """
        return clipped(self._spans(prompt_tokens, rows), rows)

    def _spans(self, prompt_tokens: int, row_limit: int, places: Places | None = None, before: int = 0) -> Spans:
        if self.needs_prompt and places is None:
            raise Unsupported(
                "messages, roles and special tokens have positions in a request only; give the positions as numbers",
                reason="UNRESOLVED_POSITIONS",
            )
        spans = [(0, prompt_tokens)] if self.prompt else []
        spans += [(prompt_tokens, OPEN_END)] if self.generated else []
        spans += [item.after_prompt(prompt_tokens) for item in self.generated_ranges]
        for index, item in enumerate(self.ranges):
            with within(f"ranges[{index}]"):
                spans.append(item.resolve(prompt_tokens, row_limit))
        if places is None:
            return united(spans)
        for index, message in enumerate(self.messages):
            with within(f"messages[{index}]"):
                spans.append(places.of_message(message))
        for index, role in enumerate(self.roles):
            with within(f"roles[{index}]"):
                spans += places.of_role(role)
        result = united(span for span in spans if span[0] < span[1])
        if not self.skip_special_tokens:
            return result
        with within("skip_special_tokens"):
            is_special = places.is_special
        return without(result if self._has_places else EVERYWHERE, is_special, before)

    def canonical_bytes(self) -> bytes:
        """What it selects, as bytes: scopes with equal bytes mean the same rows of every request that can have both.

        The order of ranges does not matter, nor how consecutive positions are cut into ranges.
        """
        answer = [PositionRange()] if self.generated else self.generated_ranges
        generated = united(item.after_prompt(0) for item in answer)
        parts = [struct.pack("<??", self.prompt, generated == EVERYWHERE)]
        for first, last in _canonical(self.ranges):
            parts.append(struct.pack("<ii", first, OPEN_END if last is None else last))
        if generated not in (NOWHERE, EVERYWHERE):
            parts += [b"generated", *(struct.pack("<ii", *span) for span in generated)]
        return b"".join([*self._prompt_bytes(), *parts])

    def _prompt_bytes(self) -> Iterator[bytes]:
        """What depends on more than the length of the prompt; the first byte differs from that of all other scopes."""
        if not self.needs_prompt:
            return
        messages, roles = sorted(set(self.messages)), sorted(set(self.roles))
        yield struct.pack("<B?II", 2, self.skip_special_tokens, len(messages), len(roles))
        yield from (struct.pack("<i", message) for message in messages)
        yield from (struct.pack("<I", len(role.encode())) + role.encode() for role in roles)


Positions = PositionScope | PositionRange | str | int | range | Sequence[str | int | range | PositionRange]
"""Positions as users write them; see `scope_from`."""


def scope_from(value: Any) -> PositionScope | None:
    """A scope as users write it.

    None means all rows. Otherwise "prompt", "generated", generated tokens as a slice such as "generated[0:8]" or
    "generated[3]", a message such as "messages[-1]", messages of a role such as "roles[user]", "skip_special_tokens", a
    position, a `range` or a PositionRange, or several of these in a sequence; or a PositionScope.
    Raises InvalidRequest for anything else, and for a selection of nothing.
    """
    if value is None or isinstance(value, PositionScope):
        return value
    if isinstance(value, (str, int, np.integer, range, PositionRange)):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{value!r} does not name positions", reason="BAD_POSITION")
    items: Sequence[Any] = tuple(value)
    words = [item for item in items if isinstance(item, str)]
    messages = [int(match[1]) for match in map(_MESSAGE.fullmatch, words) if match]
    roles = [match[1] for match in map(_ROLE.fullmatch, words) if match]
    named = ("prompt", "generated", NOT_SPECIAL)
    slices = [
        _slice(word) for word in words if not (word in named or _MESSAGE.fullmatch(word) or _ROLE.fullmatch(word))
    ]
    ranges = []
    for index, item in enumerate(item for item in items if not isinstance(item, str)):
        with within(f"ranges[{index}]"):
            ranges.append(_range_from(item))
    return PositionScope(
        prompt="prompt" in words,
        generated="generated" in words,
        ranges=tuple(ranges),
        generated_ranges=tuple(slices),
        messages=tuple(messages),
        roles=tuple(roles),
        skip_special_tokens=NOT_SPECIAL in words,
    )


def words_of(scope: PositionScope) -> list[str]:
    """What a scope selects besides `ranges`, as words that `scope_from` reads."""
    words = [name for name in ("prompt", "generated", NOT_SPECIAL) if getattr(scope, name)]
    words += [f"messages[{message}]" for message in scope.messages] + [f"roles[{role}]" for role in scope.roles]
    return words + [slice_text(item) for item in scope.generated_ranges]


def slice_text(item: PositionRange) -> str:
    """A generated range as text that `scope_from` reads."""
    return f"generated[{item.first}:{'' if item.last is None else item.last + 1}]"


def _position(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InvalidRequest(f"{value!r} is not an integer", reason="BAD_POSITION", field=name)
    if not -OPEN_END <= value < OPEN_END:
        raise InvalidRequest(
            f"position {value} is outside -{OPEN_END}..{OPEN_END - 1}", reason="OUT_OF_RANGE", field=name
        )
    return int(value)


def _slice(word: str) -> PositionRange:
    match = _SLICE.fullmatch(word)
    if match is None:
        raise InvalidRequest(
            f"{word!r} is not 'prompt', 'generated', a slice such as 'generated[0:8]' without negative numbers, "
            "'messages[-1]', 'roles[user]' or 'skip_special_tokens'",
            reason="BAD_POSITION",
        )
    single, start, stop = match.groups()
    if single is not None:
        return PositionRange(int(single), int(single))
    first = int(start or 0)
    if not stop:
        return PositionRange(first)
    if int(stop) <= first:
        raise InvalidRequest(f"{word!r} is empty", reason="EMPTY_POSITIONS")
    return PositionRange(first, int(stop) - 1)


def _ranges(value: Any, name: str) -> tuple[PositionRange, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(f"{type(value).__name__} is not a sequence of PositionRanges", field=name)
    items = tuple(value)
    for index, item in enumerate(items):
        if not isinstance(item, PositionRange):
            raise InvalidRequest(f"{type(item).__name__} is not a PositionRange", field=f"{name}[{index}]")
    check_length(items, MAX_RANGES, "ranges", name)
    return items


def _range_from(item: Any) -> PositionRange:
    if isinstance(item, PositionRange):
        return item
    if not isinstance(item, range):
        position = _position(item, "")
        return PositionRange(position, position)
    if item.step != 1 or not item:
        raise InvalidRequest(f"{item!r} is empty or has a step", reason="EMPTY_POSITIONS")
    if item[0] < 0 <= item[-1]:
        raise InvalidRequest(
            f"{item!r} counts from the prompt's end and from its beginning: say what is meant by "
            f"PositionRange({item[0]}, {item[-1]}) or by two ranges",
            reason="BAD_POSITION",
        )
    return PositionRange(item[0], item[-1])


def _canonical(ranges: Iterable[PositionRange]) -> list[tuple[int, int | None]]:
    """The ranges in one order, without repetition; those with both ends on the same side are united."""
    known: dict[bool, list[Span]] = {True: [], False: []}  # is the range counted from the prompt's end? -> spans
    mixed = set()
    for item in ranges:
        last = OPEN_END - 1 if item.last is None else item.last
        if (item.first < 0) == (last < 0):
            known[item.first < 0].append((item.first, last + 1))
        else:
            mixed.add((item.first, item.last))
    whole = [(first, None if end == OPEN_END else end - 1) for first, end in united(known[True]) + united(known[False])]
    return whole + sorted(mixed, key=lambda pair: (pair[0], OPEN_END if pair[1] is None else pair[1]))


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
            "(prompt tokens + max_tokens - 1; the prompt's for max_tokens=0)",
            reason="OUT_OF_RANGE",
        )
    return absolute


def _reversed(first: int, last: int) -> InvalidRequest:
    return InvalidRequest(f"positions {first} to {last} are reversed", reason="EMPTY_POSITIONS")
