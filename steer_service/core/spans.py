"""Spans of positions: which rows of one sequence are meant, once everything about it is known."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import MAX_SPANS, MAX_SPANS_OF_SCOPE

OPEN_END = 2**31 - 1
"""End of a span that continues to the end of the sequence."""

Span = tuple[int, int]
"""Consecutive positions: the first, and the one after the last or OPEN_END."""

Spans = tuple[Span, ...]
"""Ascending, without overlap, none empty."""

EVERYWHERE: Spans = ((0, OPEN_END),)
"""All rows."""

NOWHERE: Spans = ()
"""No row."""

_FIRST, _END = itemgetter(0), itemgetter(1)


def count_rows(spans: Spans, end: int) -> int:
    """How many rows of positions 0..end-1 the spans hold."""
    inside = clipped(spans, end)
    return sum(end for _, end in inside) - sum(first for first, _ in inside)


def clipped(spans: Spans, end: int) -> Spans:
    """The part of the spans at positions 0..end-1."""
    return between(spans, 0, end)


def between(spans: Spans, first: int, end: int) -> Spans:
    """The part of the spans at positions first..end-1; takes no longer for spans outside of it."""
    if first >= end:
        return NOWHERE
    inside = spans[bisect_right(spans, first, key=_END) : bisect_left(spans, end, key=_FIRST)]
    if not inside or (inside[0][0] >= first and inside[-1][1] <= end):
        return inside
    return tuple((max(start, first), min(last, end)) for start, last in inside)


def united(spans: Iterable[Span]) -> Spans:
    """Spans in any order, which may overlap, as the same positions in ascending order."""
    edges_S2 = pairs_of(spans)
    if len(edges_S2) < 2:
        return _tuples(edges_S2[:, 0], edges_S2[:, 1])
    firsts_S, ends_S = edges_S2[edges_S2[:, 0].argsort(kind="stable")].T
    ends_S = np.maximum.accumulate(ends_S)
    is_gap_S = firsts_S[1:] > ends_S[:-1]
    return _tuples(firsts_S[np.append(True, is_gap_S)], ends_S[np.append(is_gap_S, True)])


def without(spans: Spans, is_left_out: npt.NDArray[np.bool_], before: int = 0) -> Spans:
    """`spans` without the positions at which the mask is True; those beyond it stay.

    Raises what `check_count` raises, before it makes spans that are too many.
    """
    end = len(is_left_out)
    is_kept = np.concatenate([[False], mask_of(spans, end) & ~is_left_out, [False]])
    changes = np.flatnonzero(is_kept[1:] != is_kept[:-1])
    after = between(spans, end, OPEN_END)
    firsts, ends = changes[::2], changes[1::2]
    if len(ends) and after and ends[-1] == after[0][0]:
        firsts, ends, after = firsts[:-1], ends[:-1], ((int(firsts[-1]), after[0][1]), *after[1:])
    check_count(len(firsts) + len(after), before)
    return _tuples(firsts, ends) + after


def positions_of(spans: Spans) -> npt.NDArray[np.int32]:
    """Every position of spans that end, ascending, shape [rows]."""
    firsts_S, ends_S = pairs_of(spans).T
    lengths_S = ends_S - firsts_S
    before_S = lengths_S.cumsum() - lengths_S
    positions: npt.NDArray[np.int64] = np.arange(lengths_S.sum()) + (firsts_S - before_S).repeat(lengths_S)
    return positions.astype(np.int32)


def mask_of(spans: Spans, end: int) -> npt.NDArray[np.bool_]:
    """Which of positions 0..end-1 the spans hold, shape [end]."""
    mask = np.zeros(end, np.bool_)
    mask[positions_of(clipped(spans, end))] = True
    return mask


def spans_of(positions: npt.NDArray[np.int32]) -> Spans:
    """The spans of ascending positions: what `positions_of` takes back."""
    if not len(positions):
        return NOWHERE
    is_gap = np.diff(positions) != 1
    return _tuples(positions[np.append(True, is_gap)], positions[np.append(is_gap, True)] + 1)


def check_count(count: int, before: int = 0) -> None:
    """Raises InvalidRequest (TOO_MANY_ENTRIES) if one scope may not have so many spans.

    `before`: those of the scopes before it in the same spec.
    """
    for parts, most in ((count, MAX_SPANS_OF_SCOPE), (before + count, MAX_SPANS)):
        if parts > most:
            raise InvalidRequest(
                f"the positions have {parts} parts that are not consecutive, at most {most}", reason="TOO_MANY_ENTRIES"
            )


def pairs_of(spans: Iterable[Span]) -> npt.NDArray[np.int64]:
    """First and end of each span, shape [spans, 2]."""
    return np.fromiter(chain.from_iterable(spans), np.int64).reshape(-1, 2)


def _tuples(firsts: npt.NDArray[Any], ends: npt.NDArray[Any]) -> Spans:
    return tuple(zip(firsts.tolist(), ends.tolist(), strict=True))
