"""Spans as arrays say the same as the spans, and so do their bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.span_table import FEW_EDGES, ScopeTable, SpanTable
from steer_service.core.spans import EVERYWHERE, OPEN_END, Spans, count_rows


def spans_between(edges: set[int]) -> Spans:
    """Spans between these edges; the last is open if their number is odd."""
    return tuple(zip(sorted(edges)[::2], [*sorted(edges), OPEN_END][1::2], strict=False))


SPANS = (st.sets(st.integers(0, 300), max_size=9) | st.sets(st.integers(0, 300), min_size=FEW_EDGES + 1)).map(
    spans_between
)


@given(SPANS, st.integers(0, 310))
def test_rows_before_a_position_are_counted(spans: Spans, end: int) -> None:
    assert SpanTable.of(spans).count(end) == count_rows(spans, end)


@given(SPANS)
def test_spans_come_back_from_their_bytes(spans: Spans) -> None:
    table = SpanTable.of(spans)

    assert SpanTable.from_bytes(table.to_bytes()) == table
    assert len(table.to_bytes()) == 8 * len(spans)
    assert table.is_everywhere == (spans == EVERYWHERE)
    assert list(zip(table.edges_E[::2].tolist(), table.edges_E[1::2].tolist(), strict=True)) == list(spans)


@given(st.lists(SPANS, max_size=5), st.integers(0, 310))
def test_a_row_has_the_bit_of_each_scope_that_includes_it(scopes: list[Spans], position: int) -> None:
    table = ScopeTable.of(scopes)

    wanted = sum(1 << number for number, spans in enumerate(scopes) if spans and _holds(spans, position))
    before = [mask for edge, mask in zip(table.edges_E, table.masks_E, strict=True) if edge <= position]
    assert (before[-1] if before else 0) == wanted
    assert (np.diff(table.edges_E) > 0).all()
    assert ScopeTable.from_bytes(table.to_bytes()) == table


def test_a_position_of_64_scopes_has_64_bits() -> None:
    table = ScopeTable.of([((3, 5),)] * 63 + [EVERYWHERE])

    assert table.edges_E.tolist() == [0, 3, 5, OPEN_END]
    assert table.masks_E.tolist() == [1 << 63, 2**64 - 1, 1 << 63, 0]


def test_scopes_that_are_cut_alike_have_few_edges() -> None:
    cut = [(*((2 * place, 2 * place + 1) for place in range(1000)), (3000 + number, OPEN_END)) for number in range(32)]

    assert len(ScopeTable.of(cut).to_bytes()) < 12 * 2100


@given(SPANS, st.integers(0, 310), st.integers(1, 20))
def test_near_spans_hold_the_same_rows(spans: Spans, first: int, count: int) -> None:
    table, scopes = SpanTable.of(spans), ScopeTable.of([spans])
    edges_E, before_S = table.near(first, first + count)
    near_E, masks_E = scopes.near(first, first + count)

    for position in range(first, first + count):
        place = edges_E.searchsorted(position, side="right") - 1
        assert (place % 2 == 0) == _holds(spans, position)
        if place % 2 == 0:
            assert before_S[place // 2] + position - edges_E[place] == count_rows(spans, position)
        edge = near_E.searchsorted(position, side="right") - 1
        assert (edge >= 0 and masks_E[edge] == 1) == _holds(spans, position)


def _holds(spans: Spans, position: int) -> bool:
    return any(first <= position < end for first, end in spans)
