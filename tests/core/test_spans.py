"""Spans and the positions in them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import MAX_SPANS, MAX_SPANS_OF_SCOPE
from steer_service.core.spans import (
    EVERYWHERE,
    OPEN_END,
    Spans,
    between,
    clipped,
    count_rows,
    mask_of,
    positions_of,
    spans_of,
    united,
    without,
)


@given(st.sets(st.integers(0, 50)), st.integers(0, 60))
def test_spans_hold_exactly_their_positions(chosen: set[int], end: int) -> None:
    positions = np.array(sorted(chosen), dtype=np.int32)
    spans = spans_of(positions)

    assert positions_of(spans).tolist() == positions.tolist()
    assert positions_of(spans).dtype == np.int32
    assert united(spans) == spans
    assert positions_of(clipped(spans, end)).tolist() == [place for place in positions if place < end]
    assert mask_of(spans, end).tolist() == [place in chosen for place in range(end)]
    assert (
        count_rows(spans, end) == count_rows(clipped(spans, end), OPEN_END) == sum(place < end for place in positions)
    )


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair)))))
def test_united_spans_hold_each_position_once(spans: list[tuple[int, int]]) -> None:
    expected = sorted({place for first, end in spans for place in range(first, end)})

    assert positions_of(united(spans)).tolist() == expected
    assert united(spans) == spans_of(np.array(expected, dtype=np.int32))


@st.composite
def given_spans(draw: st.DrawFn) -> Spans:
    """Spans up to position 40; the last may be open."""
    edges = sorted(draw(st.sets(st.integers(0, 40), max_size=12)))
    return tuple(zip(edges[::2], [*edges, OPEN_END][1::2], strict=False))


@given(given_spans(), st.integers(0, 45), st.integers(0, 45))
def test_the_part_between_two_positions_has_those_positions(spans: Spans, first: int, end: int) -> None:
    part = between(spans, first, end)

    assert all(begin < after for begin, after in part)
    wanted = np.flatnonzero(mask_of(spans, end))
    assert positions_of(part).tolist() == wanted[wanted >= first].tolist()


@given(given_spans(), st.lists(st.booleans(), max_size=45))
def test_spans_without_positions_keep_all_others(spans: Spans, left_out: list[bool]) -> None:
    kept = without(spans, np.array(left_out, np.bool_))

    wanted = mask_of(spans, 50)
    wanted[: len(left_out)][left_out] = False
    assert mask_of(kept, 50).tolist() == wanted.tolist()
    assert kept == united(kept)
    assert [end for _, end in kept if end > 50] == [end for _, end in spans if end > 50]


def test_spans_without_positions_are_counted_as_they_are_made() -> None:
    every_other = np.arange(2 * MAX_SPANS_OF_SCOPE) % 2 == 0

    assert len(without(EVERYWHERE, every_other)) == MAX_SPANS_OF_SCOPE  # the last one is open
    with pytest.raises(InvalidRequest, match=f"{MAX_SPANS_OF_SCOPE + 1} parts.* at most {MAX_SPANS_OF_SCOPE}"):
        without(EVERYWHERE, np.append(every_other, True))
    with pytest.raises(InvalidRequest, match=f"{MAX_SPANS + 1} parts.* at most {MAX_SPANS}"):
        without(EVERYWHERE, every_other, before=MAX_SPANS - MAX_SPANS_OF_SCOPE + 1)
