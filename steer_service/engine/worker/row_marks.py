"""Writes to each request's region what was done to its rows.

N: rows of the plan; L: layers of the model; C: columns.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from steer_service.engine.region import CAPTURED, COMPUTED, NON_FINITE, REUSED, STEERED, Region
from steer_service.engine.worker.requests import TrackedRequests
from steer_service.ops.plan import NO_SLOT, NOT_CAPTURED, RequestRows, StepPlan


class RowMarks:
    """Writes the marks of one pipeline stage, and the changes at its layers."""

    def __init__(self, stage: int, layers: Sequence[int]) -> None:
        self._stage = stage
        self._layers = frozenset(layers)
        self._ends: dict[str, int] = {}  # request -> position after the last row that was computed

    def write(self, plan: StepPlan, requests: TrackedRequests) -> None:
        """Marks the rows of a step that has run."""
        bits_N = marks_of(plan)
        start = 0
        for part in plan.rows:
            end = start + part.row_count
            region = requests[part.request_id].region
            if region is not None:
                self._mark_reused(part, region)
                bits = bits_N[start:end]
                region.mark(
                    self._stage, part.first_position, bits if region.layout.layers else bits & ~np.uint8(CAPTURED)
                )
                if region.layout.reported and plan.changes_NLC is not None:
                    self._write_changes(part, region, plan.changes_NLC[start:end])
            start = end

    def _write_changes(self, part: RequestRows, region: Region, changes_NLC: npt.NDArray[np.float32]) -> None:
        """A row that is computed again overwrites what was recorded of it; rows beyond the region are dropped."""
        first, end = part.first_position, min(part.first_position + part.row_count, region.layout.rows)
        for layer in region.layout.reported:
            if layer in self._layers and first < end:
                region.changes(layer)[first:end] = changes_NLC[: end - first, layer]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forgets finished requests."""
        for request_id in request_ids:
            self._ends.pop(request_id, None)

    def _mark_reused(self, part: RequestRows, region: Region) -> None:
        """Marks skipped rows: a request may reuse a prefix when it starts, and more of it when it resumes."""
        end = self._ends.get(part.request_id, 0)
        if part.first_position > end:
            region.mark(self._stage, end, np.full(part.first_position - end, REUSED, np.uint8))
        self._ends[part.request_id] = max(end, part.first_position + part.row_count)


def marks_of(plan: StepPlan) -> npt.NDArray[np.uint8]:
    """The marks of each row of the plan, shape [rows of the plan]; CAPTURED if a capture would include the row."""
    is_steered_N, is_captured_N = plan.slots_N != NO_SLOT, plan.capture_rows_N != NOT_CAPTURED
    done_N = COMPUTED | is_steered_N * STEERED | is_captured_N * CAPTURED
    return np.where(plan.bad_N, NON_FINITE, done_N).astype(np.uint8)
