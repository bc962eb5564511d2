"""Positions: what a user may write, which rows it means, and when two scopes are the same."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import MAX_RANGES, PositionRange, PositionScope, scope_from
from steer_service.core.spans import EVERYWHERE, OPEN_END, clipped, positions_of, spans_of

PROMPT, ROWS = 10, 30
"""A prompt of ten tokens in a request of at most thirty rows."""

places = st.integers(-12, 34)
ranges = st.tuples(places, st.none() | places).filter(lambda pair: _is_range(*pair)).map(lambda p: PositionRange(*p))
forward = st.integers(0, 22)
generated_ranges = st.builds(PositionRange, forward) | st.tuples(forward, forward).map(sorted).map(
    lambda pair: PositionRange(*pair)
)
scopes = (
    st.tuples(st.booleans(), st.booleans(), st.lists(ranges, max_size=4), st.lists(generated_ranges, max_size=3))
    .filter(any)
    .map(lambda parts: PositionScope(prompt=parts[0], generated=parts[1], ranges=parts[2], generated_ranges=parts[3]))
)


def _is_range(first: int, last: int | None) -> bool:
    return last is None or (first < 0) != (last < 0) or first <= last


def rows_of(scope: PositionScope, prompt: int = PROMPT, rows: int = ROWS) -> set[int] | None:
    """The rows a scope means, one by one, straight from the words of the contract; None where it is refused."""
    found = set(range(prompt)) if scope.prompt else set()
    if scope.generated:
        found |= set(range(prompt, rows))
    for item in scope.generated_ranges:
        end = rows if item.last is None else prompt + item.last + 1
        found |= set(range(prompt + item.first, min(end, rows)))
    for item in scope.ranges:
        ends = [item.first, rows - 1 if item.last is None else item.last]
        first, last = (end + prompt if end < 0 else end for end in ends)
        if not 0 <= first < rows or not first <= last < rows:
            return None
        found |= set(range(first, last + 1))
    return found


def is_refused(scope: PositionScope, prompt: int, rows: int) -> bool:
    """Whether the request is refused: for a range that it cannot have, or since nothing is selected."""
    return not rows_of(scope, prompt, rows)


@given(scopes, st.integers(1, 14), st.integers(0, 20))
def test_a_scope_means_the_rows_its_words_say(scope: PositionScope, prompt: int, more: int) -> None:
    expected = rows_of(scope, prompt, prompt + more)

    if is_refused(scope, prompt, prompt + more):
        with pytest.raises(InvalidRequest) as raised:
            scope.resolve(prompt, prompt + more)
        assert raised.value.field == "generated" or raised.value.field.startswith(("ranges[", "generated_ranges["))
        return
    spans = scope.resolve(prompt, prompt + more)
    assert set(positions_of(clipped(spans, prompt + more)).tolist()) == expected
    assert all(end < following for (_, end), (following, _) in pairwise(spans))


@pytest.mark.parametrize(
    ("scope", "spans"),
    [
        (PositionScope(prompt=True), ((0, 10),)),
        (PositionScope(generated=True), ((10, OPEN_END),)),
        (PositionScope(prompt=True, generated=True), EVERYWHERE),
        (PositionScope(ranges=(PositionRange(-1, -1),)), ((9, 10),)),
        (PositionScope(ranges=(PositionRange(-10, 0),)), ((0, 1),)),
        (PositionScope(ranges=(PositionRange(0, -1),)), ((0, 10),)),
        (PositionScope(ranges=(PositionRange(-2, 12),)), ((8, 13),)),
        (PositionScope(ranges=(PositionRange(29, 29),)), ((29, 30),)),
        (PositionScope(ranges=(PositionRange(last=3), PositionRange(4, 5))), ((0, 6),)),
        (PositionScope(prompt=True, ranges=(PositionRange(20),)), ((0, 10), (20, OPEN_END))),
        (PositionScope(generated_ranges=[PositionRange(0, 7)]), ((10, 18),)),
        (PositionScope(generated_ranges=[PositionRange(3), PositionRange(0, 0)]), ((10, 11), (13, OPEN_END))),
        (PositionScope(generated_ranges=[PositionRange(15, 99)]), ((25, 110),)),
        (PositionScope(prompt=True, generated_ranges=[PositionRange(0, OPEN_END - 1)]), EVERYWHERE),
    ],
    ids=str,
)
def test_examples_of_scopes(scope: PositionScope, spans: Any) -> None:
    assert scope.resolve(PROMPT, ROWS) == spans


@pytest.mark.parametrize(
    ("item", "reason", "said"),
    [
        (PositionRange(-11, -1), "OUT_OF_RANGE", "position -11 lies before the beginning of a prompt of 10 tokens"),
        (PositionRange(30, 30), "OUT_OF_RANGE", "position 30 lies beyond the request, which has at most 30 rows"),
        (PositionRange(30), "OUT_OF_RANGE", "position 30 lies beyond the request"),
        (PositionRange(0, 30), "OUT_OF_RANGE", "position 30 lies beyond the request"),
        (PositionRange(-1, 8), "EMPTY_POSITIONS", "positions 9 to 8 are reversed"),
        (PositionRange(9, -2), "EMPTY_POSITIONS", "positions 9 to 8 are reversed"),
    ],
    ids=str,
)
def test_a_range_that_the_request_cannot_have_is_refused(item: PositionRange, reason: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as raised:
        PositionScope(ranges=(PositionRange(0), item)).resolve(PROMPT, ROWS)
    assert (raised.value.field, raised.value.reason) == ("ranges[1]", reason)


def test_one_token_has_no_generated_row() -> None:
    with pytest.raises(InvalidRequest, match="never fed to the model") as raised:
        PositionScope(generated=True).resolve(PROMPT, PROMPT)
    assert raised.value.field == "generated"
    assert PositionScope(generated=True).resolve(PROMPT, PROMPT + 1) == ((PROMPT, OPEN_END),)


def test_generated_rows_beyond_the_request_are_refused_where_nothing_else_is_selected() -> None:
    beyond = PositionScope(generated_ranges=[PositionRange(20, 24)])

    with pytest.raises(InvalidRequest, match="at most 20 rows of generated tokens") as raised:
        beyond.resolve(PROMPT, ROWS)
    assert (raised.value.field, raised.value.reason) == ("generated_ranges[0]", "EMPTY_POSITIONS")
    assert beyond.resolve(PROMPT, ROWS + 1) == ((30, 35),)


@pytest.mark.parametrize("words", [["generated", -1], ["generated[0:8]", -1], ["generated[0]", "prompt"]], ids=str)
def test_a_union_with_one_empty_part_is_served(words: Any) -> None:
    scope = scope_from(words)

    assert clipped(scope.resolve(PROMPT, PROMPT), PROMPT)[-1] == ((9, 10) if -1 in words else (0, 10))


def test_in_a_sequence_of_the_longest_length_a_generated_range_is_still_a_span() -> None:
    scope = PositionScope(generated_ranges=[PositionRange(OPEN_END - 2, OPEN_END - 1)])

    assert scope.resolve(PROMPT, OPEN_END) == ((OPEN_END - 1, OPEN_END),)


@given(scopes, st.integers(1, 14), st.integers(0, 20))
def test_in_a_sequence_that_has_ended_a_scope_means_the_same_and_generated_may_be_none(
    scope: PositionScope, prompt: int, more: int
) -> None:
    expected = rows_of(scope, prompt, prompt + more)

    if expected is None:
        with pytest.raises(InvalidRequest) as raised:
            scope.resolve_within(prompt, prompt + more)
        assert raised.value.field.startswith("ranges[")
        return
    spans = scope.resolve_within(prompt, prompt + more)
    assert set(positions_of(spans).tolist()) == expected
    assert spans == spans_of(positions_of(spans))


@pytest.mark.parametrize(
    ("ends", "field", "reason"),
    [
        ((1.5, None), "first", "BAD_POSITION"),
        ((True, None), "first", "BAD_POSITION"),
        (("1", None), "first", "BAD_POSITION"),
        ((None, None), "first", "BAD_POSITION"),
        ((0, 2.0), "last", "BAD_POSITION"),
        ((OPEN_END, None), "first", "OUT_OF_RANGE"),
        ((-OPEN_END - 1, None), "first", "OUT_OF_RANGE"),
        ((0, OPEN_END), "last", "OUT_OF_RANGE"),
        ((5, 4), "", "EMPTY_POSITIONS"),
        ((-1, -2), "", "EMPTY_POSITIONS"),
    ],
    ids=repr,
)
def test_what_is_no_range_is_refused(ends: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        PositionRange(*ends)
    assert (raised.value.field, raised.value.reason) == (field, reason)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, ""),
        ({"prompt": 1}, "prompt"),
        ({"generated": "yes"}, "generated"),
        ({"ranges": PositionRange(0)}, "ranges"),
        ({"ranges": "prompt"}, "ranges"),
        ({"ranges": None}, "ranges"),
        ({"ranges": [PositionRange(0), 3]}, "ranges[1]"),
        ({"ranges": [PositionRange(0)] * (MAX_RANGES + 1)}, "ranges"),
        ({"generated_ranges": "prompt"}, "generated_ranges"),
        ({"generated_ranges": [PositionRange(0), 3]}, "generated_ranges[1]"),
        ({"generated_ranges": [PositionRange(0)] * (MAX_RANGES + 1)}, "generated_ranges"),
        ({"generated_ranges": [PositionRange(-1)]}, "generated_ranges[0].first"),
        ({"generated_ranges": [PositionRange(0), PositionRange(0, -1)]}, "generated_ranges[1].last"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_scope_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        PositionScope(**fields)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("words", "scope"),
    [
        ("prompt", PositionScope(prompt=True)),
        ("generated", PositionScope(generated=True)),
        (["generated", "prompt"], PositionScope(prompt=True, generated=True)),
        (0, PositionScope(ranges=(PositionRange(0, 0),))),
        (-1, PositionScope(ranges=(PositionRange(-1, -1),))),
        (np.int64(7), PositionScope(ranges=(PositionRange(7, 7),))),
        (range(3, 6), PositionScope(ranges=(PositionRange(3, 5),))),
        (range(-4, 0), PositionScope(ranges=(PositionRange(-4, -1),))),
        (PositionRange(5), PositionScope(ranges=(PositionRange(5),))),
        (
            ["prompt", 20, range(22, 24)],
            PositionScope(prompt=True, ranges=(PositionRange(20, 20), PositionRange(22, 23))),
        ),
        (np.array([4, 2]), PositionScope(ranges=(PositionRange(4, 4), PositionRange(2, 2)))),
        ("generated[0:8]", PositionScope(generated_ranges=(PositionRange(0, 7),))),
        ("generated[:8]", PositionScope(generated_ranges=(PositionRange(0, 7),))),
        ("generated[4:]", PositionScope(generated_ranges=(PositionRange(4),))),
        ("generated[:]", PositionScope(generated_ranges=(PositionRange(),))),
        (
            ["generated[3]", -1],
            PositionScope(generated_ranges=(PositionRange(3, 3),), ranges=(PositionRange(-1, -1),)),
        ),
        (PositionScope(prompt=True), PositionScope(prompt=True)),
        (None, None),
    ],
    ids=str,
)
def test_positions_may_be_said_in_short(words: Any, scope: PositionScope | None) -> None:
    assert scope_from(words) == scope


@pytest.mark.parametrize(
    ("words", "field", "reason"),
    [
        ("all", "", "BAD_POSITION"),
        (["prompt", "rest"], "", "BAD_POSITION"),
        ("generated[-8:]", "", "BAD_POSITION"),
        ("generated[0:8:2]", "", "BAD_POSITION"),
        ("generated[]", "", "BAD_POSITION"),
        ("prompt[0:8]", "", "BAD_POSITION"),
        ("generated[" + "9" * 5000 + "]", "", "BAD_POSITION"),
        ("generated[8:8]", "", "EMPTY_POSITIONS"),
        ("generated[99999999999]", "first", "OUT_OF_RANGE"),
        (1.0, "", "BAD_POSITION"),
        (b"ab", "", "BAD_POSITION"),
        ({"prompt": False}, "", "BAD_POSITION"),
        (True, "ranges[0]", "BAD_POSITION"),
        ([0, 1.5], "ranges[1]", "BAD_POSITION"),
        (["prompt", (0, 3)], "ranges[0]", "BAD_POSITION"),
        ([PositionScope(prompt=True)], "ranges[0]", "BAD_POSITION"),
        ([None], "ranges[0]", "BAD_POSITION"),
        (2**40, "ranges[0]", "OUT_OF_RANGE"),
        (range(5, 5), "ranges[0]", "EMPTY_POSITIONS"),
        (range(0, 10, 2), "ranges[0]", "EMPTY_POSITIONS"),
        (range(-3, 2), "ranges[0]", "BAD_POSITION"),
        ([], "", "EMPTY_POSITIONS"),
    ],
    ids=repr,
)
def test_words_that_name_no_positions_are_refused(words: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        scope_from(words)
    assert (raised.value.field, raised.value.reason) == (field, reason)


@given(scopes, scopes, st.integers(1, 14), st.integers(1, 20))
def test_scopes_of_equal_bytes_mean_the_same_rows(
    one: PositionScope, other: PositionScope, prompt: int, more: int
) -> None:
    rows = [rows_of(scope, prompt, prompt + more) for scope in (one, other)]
    if one.canonical_bytes() == other.canonical_bytes() and None not in rows:
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("generated[:]", "generated"),
        (["generated[0:4]", "generated[2:]"], "generated"),
        (["generated", "generated[3]"], "generated"),
        (["generated[4:6]", "generated[0:4]"], "generated[:6]"),
    ],
    ids=str,
)
def test_the_same_rows_of_the_answer_have_the_same_bytes(words: Any, same: str) -> None:
    assert scope_from(words).canonical_bytes() == scope_from(same).canonical_bytes()


@given(scopes, st.randoms())
def test_order_repetition_and_cuts_do_not_change_the_bytes(scope: PositionScope, random: Any) -> None:
    parts = [part for item in scope.ranges for part in (item, *_cut(item, random))]
    random.shuffle(parts)

    other = replace(scope, ranges=tuple(parts), generated_ranges=scope.generated_ranges[::-1] * 2)

    assert other.canonical_bytes() == scope.canonical_bytes()


def _cut(item: PositionRange, random: Any) -> list[PositionRange]:
    if item.last is None or (item.first < 0) != (item.last < 0) or item.first == item.last:
        return []
    middle = random.randint(item.first, item.last - 1)
    return [PositionRange(item.first, middle), PositionRange(middle + 1, item.last)]


def test_different_rows_have_different_bytes() -> None:
    words = [
        "prompt",
        "generated",
        ["prompt", "generated"],
        0,
        -1,
        [0, 2],
        range(3),
        PositionRange(0),
        PositionRange(-1),
    ]
    words += [PositionRange(0, -1), PositionRange(-1, 0), PositionRange(-2, 5), [0, "prompt"]]
    words += ["generated[0]", "generated[1:]", ["generated[0]", 0], ["generated[0]", "prompt"], ["generated", 0]]

    assert len({scope_from(one).canonical_bytes() for one in words}) == len(words)
