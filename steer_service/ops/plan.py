"""The rows that one step's forward pass steers and captures, built once per step and read at every layer.

T: rows of the step; N: rows of the plan (of requests that are steered or captured); R: their requests; L: layers;
E: edges of spans; S: slots; K: operations of one layer; W: rows of the bank; D: hidden size; C: coefficients.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from steer_service.core.layer_change import CHANGE_COLUMNS
from steer_service.core.spans import EVERYWHERE, Spans

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
    steered: Spans | None = None
    """Positions of the rows that are steered. Default: all."""
    scopes: tuple[Spans, ...] = ()
    """Positions of each scope of the program, all within `steered`. Default: each operation acts on every steered row.
    """
    captured: Spans | None = None
    """Positions of the rows that are captured; they lie one after the other, in ascending order. Default: all."""
    row_limit: int
    """Rows at or beyond this position are not captured: the region ends there."""
    captures_float32: bool = False
    """Captured rows are float32 even if the model's dtype has 16 bits. Default: they have the model's dtype."""
    reports_change: bool = False
    """How much each layer changes its rows is recorded. Default: it is not."""
    _steered_E: npt.NDArray[np.int64] = field(init=False, repr=False)
    _captured_E: npt.NDArray[np.int64] = field(init=False, repr=False)
    _scopes_E: tuple[npt.NDArray[np.int64], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_steered_E", _edges(self.steered))
        object.__setattr__(self, "_captured_E", _edges(self.captured))
        object.__setattr__(self, "_scopes_E", tuple(map(_edges, self.scopes)))


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
    has_steered_spans: bool
    """Whether any request is steered at only some of its rows."""
    has_scopes: bool
    """Whether operations of any request act on different rows."""
    has_captured_spans: bool
    """Whether any request is captured at only some of its rows."""
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
            has_steered_spans=any(request.steered is not None for request in requests),
            has_scopes=any(request.scopes for request in requests),
            has_captured_spans=any(request.captured is not None for request in requests),
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
        if self.has_steered_spans:
            is_inside_N, _ = _locate([request._steered_E for request in self.requests], self.requests_N, positions_N)
            slots_N = np.where(is_inside_N, slots_N, NO_SLOT).astype(np.int32)
        if self.has_captured_spans:
            edges = [request._captured_E for request in self.requests]
            is_inside_N, ordinals_N = _locate(edges, self.requests_N, positions_N)
            capture_rows_N = np.where(is_inside_N, ordinals_N, NOT_CAPTURED)
        capture_rows_N = np.where(positions_N < self.limits_N, capture_rows_N, NOT_CAPTURED)
        return StepPlan(
            rows=rows,
            requests=self.requests,
            rows_N=self.rows_N,
            requests_N=self.requests_N,
            slots_N=slots_N,
            scopes_N=self._scopes(positions_N) if self.has_scopes else None,
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

    def _scopes(self, positions_N: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """`StepPlan.scopes_N` of rows at these positions."""
        scopes_N = np.zeros(len(positions_N), np.uint64)
        for number in range(max(len(request.scopes) for request in self.requests)):
            edges = [
                request._scopes_E[number] if number < len(request.scopes) else _NO_EDGES for request in self.requests
            ]
            is_inside_N, _ = _locate(edges, self.requests_N, positions_N)
            scopes_N |= is_inside_N.astype(np.uint64) << np.uint64(number)
        has_scopes_R = np.array([bool(request.scopes) for request in self.requests])
        return np.where(has_scopes_R[self.requests_N], scopes_N, ALL_SCOPES)


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


_NO_EDGES = np.empty(0, np.int64)


def _places(rows: Sequence[RequestRows]) -> list[tuple[int, int]]:
    return [(part.first_row, part.row_count) for part in rows]


def _edges(spans: Spans | None) -> npt.NDArray[np.int64]:
    """Begin and end of each span, in ascending order."""
    return np.array(EVERYWHERE if spans is None else spans, dtype=np.int64).reshape(-1)


def _locate(
    edges: Sequence[npt.NDArray[np.int64]], requests_N: npt.NDArray[Any], positions_N: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """For each row: whether it is inside its request's spans and, if so, the number of their rows before it.

    One search for all requests: the edges of request r are shifted by r * 2**32, which no position reaches.
    """
    counts_R = np.array([len(part) for part in edges])
    edges_E = np.concatenate(edges)
    shifted_E = edges_E + (np.arange(len(edges)) << 32).repeat(counts_R)
    found_N = shifted_E.searchsorted(positions_N + (requests_N.astype(np.int64) << 32), side="right")
    lengths_E = edges_E[1::2] - edges_E[::2]  # every request has an even number of edges
    before_E = lengths_E.cumsum() - lengths_E  # rows of all spans before each, earlier requests' included
    first_span_R = (counts_R.cumsum() - counts_R) // 2
    is_inside_N = found_N % 2 == 1
    if not len(lengths_E):
        return is_inside_N, found_N
    span_N = np.maximum(found_N - 1, 0) // 2
    before_request_N = before_E[np.minimum(first_span_R, len(before_E) - 1)][requests_N]
    return is_inside_N, before_E[span_N] - before_request_N + positions_N - edges_E[::2][span_N]
