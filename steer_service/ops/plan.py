"""The rows that one step's forward pass steers and captures, built once per step and read at every layer.

T: rows of the step; N: rows of the plan (of requests that are steered or captured); R: their requests; L: layers;
E: edges of spans; S: slots; K: operations of one layer; W: rows of the bank; D: hidden size; C: coefficients.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from steer_service.core.layer_change import CHANGE_COLUMNS
from steer_service.core.span_table import FEW_EDGES, ScopeTable, SpanTable
from steer_service.core.spans import EVERYWHERE

T = TypeVar("T", SpanTable, ScopeTable)

NO_SLOT = -1
NOT_CAPTURED = -1
ALL_SCOPES = np.uint64(2**64 - 1)
"""The mask of a row at which all operations of its program act."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedRequest:
    """The facts about a steered or captured request that stay the same while it runs."""

    slot: int
    """Its program's place in the bank, or NO_SLOT."""
    steers_L: npt.NDArray[np.bool_]
    """Shape [layers]: True where its program has operations."""
    before_L: npt.NDArray[np.int64]
    """Shape [layers]: address of the first row captured before steering, 0 where nothing is captured."""
    after_L: npt.NDArray[np.int64]
    """Shape [layers]: address of the first row captured after steering, 0 where nothing is captured."""
    steered: SpanTable | None = None
    """Positions of the rows that are steered. Default: all."""
    scopes: ScopeTable | None = None
    """Positions of each scope of the program, all within `steered`. Default: each operation acts on every steered row.
    """
    captured: SpanTable | None = None
    """Positions of the rows that are captured; they lie one after the other, in ascending order. Default: all."""
    row_limit: int
    """Rows at or beyond this position are not captured: the region ends there."""
    captures_float32: bool = False
    """Captured rows are float32 even if the model's dtype has 16 bits. Default: they have the model's dtype."""
    reports_change: bool = False
    """How much each layer changes its rows is recorded. Default: it is not."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of one request in a step: consecutive rows, consecutive positions."""

    request_id: str
    """The engine's id."""
    first_row: int
    """Row of the step's tensors where it starts."""
    row_count: int
    """The number of its rows."""
    first_position: int
    """Position in its sequence of the first row."""


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """The rows to steer and capture in one step."""

    rows: Sequence[RequestRows]
    """One entry per request of the plan, in the plan's order."""
    requests: Sequence[PlannedRequest]
    """The same requests."""
    rows_N: npt.NDArray[np.int32]
    """Row of the step's tensors."""
    requests_N: npt.NDArray[np.int32]
    """Index of the row's request in this plan."""
    slots_N: npt.NDArray[np.int32]
    """Slot of the program that steers the row, NO_SLOT for rows that are not in its request's scope."""
    scopes_N: npt.NDArray[np.uint64] | None
    """Bit s: the operations of scope s act on the row. None: all act on every row with a slot."""
    capture_rows_N: npt.NDArray[np.int32]
    """Place of the row among the captured rows of its request, or NOT_CAPTURED."""
    slots_R: npt.NDArray[np.int32]
    """Slot of each request."""
    captures_float32_R: npt.NDArray[np.bool_]
    """Whether each request's captured rows are float32, for any dtype of the model."""
    reports_change_R: npt.NDArray[np.bool_]
    """Whether the changes of each request's rows are recorded."""
    before_LR: npt.NDArray[np.int64]
    """Address of each request's first row captured before steering at each layer; 0 for none."""
    after_LR: npt.NDArray[np.int64]
    """Address of each request's first row captured after steering at each layer; 0 for none."""
    wanted_L: npt.NDArray[np.bool_]
    """Layers at which this plan steers, captures or checks rows."""
    check_layer: int
    """The layer at which every row of a request with a slot is checked, even if it is not steered there."""
    bad_N: npt.NDArray[np.uint8]
    """Filled by the kernel: rows that went bad, see docs/numerics.md."""
    changes_NLC: npt.NDArray[np.float32] | None
    """Filled by the kernel for requests that report: see `core.layer_change`. None: no request of the plan does."""
    visited: set[int] = field(default_factory=set)
    """Filled by the hook: wanted layers whose forward pass has run."""

    def unvisited(self, attached: Sequence[int]) -> list[int]:
        """Wanted layers among `attached` that the forward pass did not reach."""
        return [layer for layer in attached if self.wanted_L[layer] and layer not in self.visited]


class HostBank(Protocol):
    """The programs in the slots of a plan, in the host's memory; `engine.slots.ProgramBank` is one. C-contiguous."""

    op_rows_LSK: npt.NDArray[np.int32]
    """Rows of `directions_WD` and `coefficients_WC`, in the order in which they run."""
    op_counts_LS: npt.NDArray[np.int32]
    """The number of operations per layer and slot."""
    directions_WD: npt.NDArray[np.float32]
    """One direction per operation."""
    coefficients_WC: npt.NDArray[np.float32]
    """Coefficients per operation, see `ops.program`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchLayout:
    """The part of a plan that is the same for all steps with the same requests and rows at other positions."""

    requests: Sequence[PlannedRequest]
    """The requests of the plan."""
    places: Sequence[tuple[int, int]]
    """Of each request: its first row in the step's tensors, and the number of its rows."""
    check_layer: int
    """See StepPlan, also for the fields below without a docstring."""
    rows_N: npt.NDArray[np.int32]
    requests_N: npt.NDArray[np.int32]
    offsets_N: npt.NDArray[np.int64]
    """The place of each row among the rows of its request in this step, from 0."""
    slots_N: npt.NDArray[np.int32]
    """Slot of each row's request."""
    limits_N: npt.NDArray[np.int64]
    """`row_limit` of each row's request."""
    slots_R: npt.NDArray[np.int32]
    captures_float32_R: npt.NDArray[np.bool_]
    reports_change_R: npt.NDArray[np.bool_]
    before_LR: npt.NDArray[np.int64]
    after_LR: npt.NDArray[np.int64]
    wanted_L: npt.NDArray[np.bool_]
    steered: "_Lookup | None"
    """Where each request is steered; None: all of them at all of their rows."""
    scopes: "_Lookup | None"
    """The scopes of each request's program; None: all operations of each act on the same rows."""
    captured: "_Lookup | None"
    """Where each request is captured; None: all of them at all of their rows."""
    has_reports: bool
    """Whether the changes of any request are recorded."""

    @classmethod
    def of(cls, rows: Sequence[RequestRows], requests: Sequence[PlannedRequest], check_layer: int) -> "BatchLayout":
        """The layout of a step in which `requests[i]` has the rows `rows[i]`; both may not be empty."""
        firsts_R, counts_R, slots_R, limits_R, captures_float32_R = np.array(
            [
                (part.first_row, part.row_count, request.slot, request.row_limit, request.captures_float32)
                for part, request in zip(rows, requests, strict=True)
            ]
        ).T
        ends_R = counts_R.cumsum()
        requests_N = np.arange(len(rows)).repeat(counts_R)
        offsets_N = np.arange(ends_R[-1]) - (ends_R - counts_R)[requests_N]
        steers_RL, before_RL, after_RL = (
            np.array([getattr(request, name) for request in requests]) for name in ("steers_L", "before_L", "after_L")
        )
        wanted_L = (steers_RL | (before_RL != 0) | (after_RL != 0)).any(axis=0)
        wanted_L[check_layer] |= slots_R.max() > NO_SLOT
        return cls(
            requests=requests,
            places=_places(rows),
            check_layer=check_layer,
            rows_N=(firsts_R[requests_N] + offsets_N).astype(np.int32),
            requests_N=requests_N.astype(np.int32),
            offsets_N=offsets_N,
            slots_N=slots_R[requests_N].astype(np.int32),
            limits_N=limits_R[requests_N],
            slots_R=slots_R.astype(np.int32),
            captures_float32_R=captures_float32_R.astype(np.bool_),
            reports_change_R=np.array([request.reports_change for request in requests], np.bool_),
            before_LR=np.ascontiguousarray(before_RL.T),
            after_LR=np.ascontiguousarray(after_RL.T),
            wanted_L=wanted_L,
            steered=_lookup([request.steered for request in requests], _EVERYWHERE, rows),
            scopes=_lookup([request.scopes for request in requests], _ALL_SCOPES, rows),
            captured=_lookup([request.captured for request in requests], _EVERYWHERE, rows),
            has_reports=any(request.reports_change for request in requests),
        )

    def fits(self, rows: Sequence[RequestRows], requests: Sequence[PlannedRequest]) -> bool:
        """Whether this step differs from others of this layout only in the positions of its rows."""
        return (
            len(requests) == len(self.requests)
            and all(map(operator.is_, requests, self.requests))
            and _places(rows) == self.places
        )

    def plan(self, rows: Sequence[RequestRows]) -> StepPlan:
        """The plan of a step with these rows, which fit."""
        positions_R = np.array([part.first_position for part in rows])
        positions_N = positions_R[self.requests_N] + self.offsets_N
        slots_N, capture_rows_N = self.slots_N, positions_N
        if self.steered is not None:
            is_inside_N, _ = self._locate(self.steered, positions_R, positions_N)
            slots_N = np.where(is_inside_N, slots_N, NO_SLOT).astype(np.int32)
        if self.captured is not None:
            is_inside_N, ordinals_N = self._locate(self.captured, positions_R, positions_N)
            capture_rows_N = np.where(is_inside_N, ordinals_N, NOT_CAPTURED)
        capture_rows_N = np.where(positions_N < self.limits_N, capture_rows_N, NOT_CAPTURED)
        return StepPlan(
            rows=rows,
            requests=self.requests,
            rows_N=self.rows_N,
            requests_N=self.requests_N,
            slots_N=slots_N,
            scopes_N=self._scopes(self.scopes, positions_R, positions_N) if self.scopes is not None else None,
            capture_rows_N=capture_rows_N.astype(np.int32),
            slots_R=self.slots_R,
            captures_float32_R=self.captures_float32_R,
            reports_change_R=self.reports_change_R,
            before_LR=self.before_LR,
            after_LR=self.after_LR,
            wanted_L=self.wanted_L,
            check_layer=self.check_layer,
            bad_N=np.zeros(len(self.rows_N), dtype=np.uint8),
            changes_NLC=self._changes() if self.has_reports else None,
        )

    def _changes(self) -> npt.NDArray[np.float32]:
        return np.zeros((len(self.rows_N), len(self.wanted_L), CHANGE_COLUMNS), np.float32)

    def _locate(
        self, lookup: "_Lookup", positions_R: npt.NDArray[np.int64], positions_N: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """For each row: whether it is inside its request's spans and, if so, the number of their rows before it."""
        near = lookup.near(positions_R)
        found_N = near.found(self.requests_N, positions_N)
        is_inside_N = found_N % 2 == 0  # every request has an even number of edges
        if not len(near.values):
            return is_inside_N, found_N
        span_N = np.maximum(found_N, 0) // 2
        return is_inside_N, near.values[span_N] + positions_N - near.edges_E[::2][span_N]

    def _scopes(
        self, lookup: "_Lookup", positions_R: npt.NDArray[np.int64], positions_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint64]:
        """`StepPlan.scopes_N` of rows at these positions."""
        near = lookup.near(positions_R)
        found_N = near.found(self.requests_N, positions_N)
        if not len(near.values):
            return np.zeros(len(found_N), np.uint64)
        return np.where(found_N >= near.first_R[self.requests_N], near.values[np.maximum(found_N, 0)], np.uint64(0))


class _NearEdges:
    """Edges of all requests of a step: at least those that are near their rows."""

    def __init__(self, parts: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]) -> None:
        """`parts`: of each request, what `near` of its table returned."""
        counts_R = np.array([len(edges) for edges, _ in parts])
        self.edges_E: npt.NDArray[np.int64] = np.concatenate([edges for edges, _ in parts])
        self.values: npt.NDArray[Any] = np.concatenate([values for _, values in parts])
        """What the tables say of their spans or edges."""
        self.first_R: npt.NDArray[np.int64] = counts_R.cumsum() - counts_R
        """Index of each request's first edge."""
        # One search for all requests: the edges of request r are shifted by r * 2**32, which no position reaches.
        self._shifted_E = self.edges_E + (np.arange(len(parts)) << 32).repeat(counts_R)

    def found(
        self, requests_N: npt.NDArray[np.int32], positions_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.signedinteger[Any]]:
        """For each row: index of the last edge at or before it, perhaps of an earlier request; -1 for none."""
        return self._shifted_E.searchsorted(positions_N + (requests_N.astype(np.int64) << 32), side="right") - 1


class _Lookup:
    """Tables of all requests of a layout. Unless one is long, their edges are put together once for all steps."""

    def __init__(self, tables: Sequence[SpanTable | ScopeTable], rows: Sequence[RequestRows]) -> None:
        self._tables = tables
        self._counts = [part.row_count for part in rows]
        is_long = any(len(table.edges_E) > FEW_EDGES for table in tables)
        self._all = None if is_long else _NearEdges([table.near(0, 0) for table in tables])

    def near(self, positions_R: npt.NDArray[np.int64]) -> _NearEdges:
        """The edges that a step needs in which the rows of each request begin at these positions."""
        if self._all is not None:
            return self._all
        firsts = zip(self._tables, positions_R.tolist(), self._counts, strict=True)
        return _NearEdges([table.near(first, first + count) for table, first, count in firsts])


class Planner:
    """Makes the plan of each step; while only positions change, as in decoding, it reuses the layout."""

    def __init__(self, check_layer: int) -> None:
        self._check_layer = check_layer
        self._layout: BatchLayout | None = None

    def plan(self, rows: Sequence[RequestRows], requests: Sequence[PlannedRequest]) -> StepPlan:
        """The plan of a step; see `build_plan`."""
        if self._layout is None or not self._layout.fits(rows, requests):
            self._layout = BatchLayout.of(rows, requests, self._check_layer)
        return self._layout.plan(rows)


def build_plan(rows: Sequence[RequestRows], requests: Sequence[PlannedRequest], *, check_layer: int) -> StepPlan:
    """The plan of a step in which `requests[i]` has the rows `rows[i]`; both may not be empty.

    `check_layer` is the last layer at which this rank sees the residual stream.
    """
    return BatchLayout.of(rows, requests, check_layer).plan(rows)


_EVERYWHERE = SpanTable.of(EVERYWHERE)
_ALL_SCOPES = ScopeTable(np.zeros(1, np.int64), np.array([ALL_SCOPES]))


def _lookup(tables: Sequence[T | None], default: T, rows: Sequence[RequestRows]) -> _Lookup | None:
    """The tables of all requests, some of which have the default; None if all have."""
    if all(table is None for table in tables):
        return None
    return _Lookup([table if table is not None else default for table in tables], rows)


def _places(rows: Sequence[RequestRows]) -> list[tuple[int, int]]:
    return [(part.first_row, part.row_count) for part in rows]
