"""What one step's forward pass must do to which rows, built once per step and read at every layer.

T: rows of the step; N: rows of the plan (of requests that are steered or captured); R: their requests; L: layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

NO_SLOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """What does not change about a steered or captured request while it runs."""

    slot: int
    """Its program's place in the bank, or NO_SLOT."""
    steers_L: npt.NDArray[np.bool_]
    """Shape [layers]: where its program does something."""
    captures_L: npt.NDArray[np.int64]
    """Shape [layers]: address of the first captured row of each layer, 0 where nothing is captured."""
    row_limit: int
    """Rows at or beyond this position are not captured: the region ends there."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of one request in a step: consecutive rows, consecutive positions."""

    request_id: str
    """The engine's id."""
    first_row: int
    """Row of the step's tensors where it starts."""
    row_count: int
    """How many."""
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
    positions_N: npt.NDArray[np.int32]
    """Position in the sequence."""
    slots_R: npt.NDArray[np.int32]
    """Slot of each request."""
    limits_R: npt.NDArray[np.int32]
    """Row limit of each request."""
    captures_LR: npt.NDArray[np.int64]
    """Address of each request's first captured row at each layer; 0 for none."""
    wanted_L: npt.NDArray[np.bool_]
    """Layers at which this plan does anything."""
    bad_N: npt.NDArray[np.uint8]
    """Filled by the kernel: rows that were not finite after steering."""
    visited: set[int] = field(default_factory=set)
    """Filled by the tap: wanted layers whose forward pass has run."""

    def unvisited(self, attached: Sequence[int]) -> list[int]:
        """Layers of `attached` that this plan wanted and the forward pass did not reach."""
        return [layer for layer in attached if self.wanted_L[layer] and layer not in self.visited]


def build_plan(rows: Sequence[RequestRows], requests: Sequence[PlannedRequest]) -> StepPlan:
    """The plan of a step in which `requests[i]` has the rows `rows[i]`; both may not be empty."""
    counts = np.array([part.row_count for part in rows])
    ends = np.cumsum(counts)
    offsets_N = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    requests_N = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
    captures_LR = np.ascontiguousarray(np.stack([request.captures_L for request in requests], axis=1))
    return StepPlan(
        rows=rows,
        requests=requests,
        rows_N=_per_row([part.first_row for part in rows], counts, offsets_N),
        requests_N=requests_N,
        positions_N=_per_row([part.first_position for part in rows], counts, offsets_N),
        slots_R=np.array([request.slot for request in requests], dtype=np.int32),
        limits_R=np.array([request.row_limit for request in requests], dtype=np.int32),
        captures_LR=captures_LR,
        wanted_L=np.logical_or.reduce([request.steers_L for request in requests]) | (captures_LR != 0).any(axis=1),
        bad_N=np.zeros(len(requests_N), dtype=np.uint8),
    )


def _per_row(firsts: Sequence[int], counts: npt.NDArray[Any], offsets_N: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    return (np.repeat(np.array(firsts), counts) + offsets_N).astype(np.int32)
