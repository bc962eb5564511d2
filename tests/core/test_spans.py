"""Spans and the positions in them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.spans import OPEN_END, clipped, count_rows, mask_of, positions_of, spans_of, united


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
