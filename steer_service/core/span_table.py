"""Long lists of spans as arrays: what each step looks rows up in, and what travels to the workers.

S: spans; E: edges of spans, ascending; N: rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from steer_service.core.spans import EVERYWHERE, Spans, pairs_of

FEW_EDGES = 64
"""Edges up to which a step looks through all of them: to find the near ones takes longer."""


@dataclass(frozen=True, slots=True, eq=False)
class SpanTable:
    """Spans of positions."""

    edges_E: npt.NDArray[np.int64]
    """The first position of each span, and the one after its last, in turn."""
    before_S: npt.NDArray[np.int64] = field(init=False)
    """How many rows come before each span."""

    def __post_init__(self) -> None:
        lengths_S = self.edges_E[1::2] - self.edges_E[::2]
        object.__setattr__(self, "before_S", lengths_S.cumsum() - lengths_S)

    @classmethod
    def of(cls, spans: Spans) -> Self:
        """The table of `spans`."""
        return cls(pairs_of(spans).reshape(-1))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The table that `to_bytes` wrote."""
        return cls(np.frombuffer(data, "<i4").astype(np.int64))

    def to_bytes(self) -> bytes:
        """The edges, 4 bytes each."""
        return self.edges_E.astype("<i4").tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpanTable) and np.array_equal(self.edges_E, other.edges_E)

    @property
    def is_everywhere(self) -> bool:
        """True if all rows are meant."""
        return self.edges_E.tolist() == [*EVERYWHERE[0]] if len(self.edges_E) == 2 else False

    def count(self, end: int) -> int:
        """How many rows of positions 0..end-1 the spans hold."""
        edges = int(self.edges_E.searchsorted(end))  # that are below `end`
        if not edges:
            return 0
        span = (edges - 1) // 2
        return int(self.before_S[span] + min(self.edges_E[2 * span + 1], end) - self.edges_E[2 * span])

    def near(self, first: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`edges_E` and `before_S` of enough of the spans to look up positions first..end-1."""
        if len(self.edges_E) <= FEW_EDGES:
            return self.edges_E, self.before_S
        start, stop = self.edges_E.searchsorted(first, side="right") // 2, (self.edges_E.searchsorted(end) + 1) // 2
        return self.edges_E[2 * start : 2 * stop], self.before_S[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class ScopeTable:
    """Which of up to 64 scopes include each row."""

    edges_E: npt.NDArray[np.int64]
    """The positions at which that changes."""
    masks_E: npt.NDArray[np.uint64]
    """Bit s: scope s includes the rows from this edge to the next. Before the first edge, none does."""

    @classmethod
    def of(cls, scopes: Sequence[Spans]) -> Self:
        """The table of these scopes."""
        parts = [pairs_of(spans).reshape(-1) for spans in scopes]
        edges_E = np.concatenate([np.empty(0, np.int64), *parts])
        bits_E = (np.uint64(1) << np.arange(len(parts), dtype=np.uint64)).repeat([len(part) for part in parts])
        order_E = edges_E.argsort(kind="stable")
        edges_E, masks_E = edges_E[order_E], np.bitwise_xor.accumulate(bits_E[order_E])
        is_last_E = np.append(edges_E[1:] != edges_E[:-1], True)[: len(edges_E)]  # of those at one position
        return cls(edges_E[is_last_E], masks_E[is_last_E])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The table that `to_bytes` wrote."""
        edges = len(data) // 12
        return cls(np.frombuffer(data, "<i4", offset=8 * edges).astype(np.int64), np.frombuffer(data, "<u8", edges))

    def to_bytes(self) -> bytes:
        """The masks, 8 bytes each, and the edges, 4 bytes each."""
        return self.masks_E.astype("<u8").tobytes() + self.edges_E.astype("<i4").tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScopeTable) and self.to_bytes() == other.to_bytes()

    def near(self, first: int, end: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """`edges_E` and `masks_E` of enough of the edges to look up positions first..end-1."""
        if len(self.edges_E) <= FEW_EDGES:
            return self.edges_E, self.masks_E
        start = max(int(self.edges_E.searchsorted(first, side="right")) - 1, 0)
        stop = int(self.edges_E.searchsorted(end))
        return self.edges_E[start:stop], self.masks_E[start:stop]
