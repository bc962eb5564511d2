"""Spans of positions: which rows of one sequence are meant, once everything about it is known."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

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


def count_rows(spans: Spans, end: int) -> int:
    """How many rows of positions 0..end-1 the spans hold."""
    return sum(max(0, min(last, end) - first) for first, last in spans)


def clipped(spans: Spans, end: int) -> Spans:
    """The part of the spans at positions 0..end-1."""
    return tuple((first, min(last, end)) for first, last in spans if first < end)


def between(spans: Spans, first: int, end: int) -> Spans:
    """The part of the spans at positions first..end-1."""
    parts = ((max(start, first), min(last, end)) for start, last in spans)
    return tuple(part for part in parts if part[0] < part[1])


def united(spans: Iterable[Span]) -> Spans:
    """Spans in any order, which may overlap, as the same positions in ascending order."""
    result: list[Span] = []
    for first, end in sorted(spans):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return tuple(result)


def positions_of(spans: Spans) -> npt.NDArray[np.int32]:
    """Every position of spans that end, ascending, shape [rows]."""
    return np.concatenate([np.empty(0, np.int32), *(np.arange(*span, dtype=np.int32) for span in spans)])


def mask_of(spans: Spans, end: int) -> npt.NDArray[np.bool_]:
    """Which of positions 0..end-1 the spans hold, shape [end]."""
    mask = np.zeros(end, np.bool_)
    mask[positions_of(clipped(spans, end))] = True
    return mask


def spans_of(positions: npt.NDArray[np.int32]) -> Spans:
    """The spans of ascending positions: what `positions_of` takes back."""
    if not len(positions):
        return NOWHERE
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(positions, cuts))
