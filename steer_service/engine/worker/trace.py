"""A log of what a worker did to which rows, for tests and debugging; written only if `steer_trace` names a path.

Each worker has a file, with one JSON object per line and step; `read_trace` reads all files. A line is written before
the step's tokens are visible.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.spans import Spans, spans_of
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.requests import TrackedRequests
from steer_service.ops.plan import NO_SLOT, NOT_CAPTURED, RequestRows, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRows:
    """What one step did to the rows of one steered or captured request."""

    output: str
    """Request id and output index, as `<id>/<index>`."""
    first_position: int
    """Position of the first row."""
    row_count: int
    """The number of consecutive positions that were computed."""
    digest: str
    """Digest of the program that was in the request's slot during the step; "" for a request without a slot."""
    steered: Spans
    """Positions that were steered."""
    steered_layers: tuple[int, ...]
    """Layers whose hook ran the program on these rows."""
    captured: Spans
    """Positions that were captured."""
    captured_layers: tuple[int, ...]
    """Layers whose hook wrote captured rows to the request's region."""
    bad_positions: tuple[int, ...]
    """Positions of rows that were not finite and stayed unsteered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """One forward pass of one worker."""

    worker: int
    """The worker's number among all workers of all replicas."""
    batch: tuple[tuple[str, int, int], ...]
    """Every request of the batch, steered or not: vLLM's id, first position, row count."""
    done: tuple[TracedRows, ...]
    """What was done to the steered and captured requests."""


class TraceFile:
    """The file of one worker."""

    def __init__(self, prefix: str, worker: int) -> None:
        self._worker = worker
        self._file = open(f"{prefix}.{worker}", "w", buffering=1)  # noqa: SIM115  # open until the worker ends

    def write(self, batch: Sequence[RequestRows], done: Sequence[TracedRows]) -> None:
        """Appends one step."""
        rows = tuple((part.request_id, part.first_position, part.row_count) for part in batch)
        self._file.write(json.dumps(asdict(TracedStep(worker=self._worker, batch=rows, done=tuple(done)))) + "\n")

    def close(self) -> None:
        """Closes the file; a worker keeps it open as long as it lives."""
        self._file.close()


class StepTrace:
    """Writes each step of one worker to its file."""

    def __init__(self, file: TraceFile, bank: ProgramBank) -> None:
        self._file = file
        self._bank = bank

    def write(self, batch: Sequence[RequestRows], plan: StepPlan, requests: TrackedRequests) -> None:
        """Appends a step whose plan has run."""
        self._file.write(batch, [self._traced(plan, index, requests) for index in range(len(plan.rows))])

    def write_idle(self, batch: Sequence[RequestRows]) -> None:
        """Appends a step without steered or captured rows."""
        self._file.write(batch, ())

    def _traced(self, plan: StepPlan, index: int, requests: TrackedRequests) -> TracedRows:
        part, slot = plan.rows[index], int(plan.slots_R[index])
        is_mine_N = plan.requests_N == index

        def positions(is_chosen_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
            return (np.flatnonzero(is_chosen_N[is_mine_N]) + part.first_position).astype(np.int32)

        return TracedRows(
            output=requests[part.request_id].request.output,
            first_position=part.first_position,
            row_count=part.row_count,
            digest=self._bank.digest_of(slot) if slot != NO_SLOT else "",
            steered=spans_of(positions(plan.slots_N != NO_SLOT)),
            captured=spans_of(positions(plan.capture_rows_N != NOT_CAPTURED)),
            steered_layers=tuple(
                layer for layer in sorted(plan.visited) if slot != NO_SLOT and self._bank.op_counts_LS[layer, slot]
            ),
            captured_layers=tuple(
                layer for layer in sorted(plan.visited) if plan.before_LR[layer, index] or plan.after_LR[layer, index]
            ),
            bad_positions=tuple(positions(plan.bad_N != 0).tolist()),
        )


def read_trace(prefix: Path) -> Iterator[TracedStep]:
    """The steps of all workers whose files begin with `prefix`, each worker's in order."""
    for path in sorted(prefix.parent.glob(prefix.name + ".*")):
        for line in path.read_text().splitlines():
            yield _step_from(json.loads(line))


def _step_from(line: dict[str, Any]) -> TracedStep:
    batch = tuple((request_id, first, count) for request_id, first, count in line["batch"])
    return TracedStep(worker=line["worker"], batch=batch, done=tuple(_rows_from(rows) for rows in line["done"]))


def _rows_from(rows: dict[str, Any]) -> TracedRows:
    for name in ("steered_layers", "captured_layers", "bad_positions"):
        rows[name] = tuple(rows[name])
    for name in ("steered", "captured"):
        rows[name] = tuple((first, end) for first, end in rows[name])
    return TracedRows(**rows)
