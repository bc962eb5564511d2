"""What a worker really did, step by step, for tests and for finding faults; written only if `steer_trace` names a file.

One JSON object a line, one line a step, one file a worker; `read_trace` reads them all. A line is written before the
step's tokens are visible.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steer_service.core.positions import Spans
from steer_service.ops.plan import RequestRows


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRows:
    """What one step did to the rows of one request that is steered or captured."""

    output: str
    """Request id and output index, as `<id>/<index>`."""
    first_position: int
    """Position of the first row."""
    row_count: int
    """Consecutive positions that were computed."""
    digest: str
    """Digest of the program that stood in the request's slot during the step; "" for a request without one."""
    steered: Spans
    """Those of the rows that went through the program."""
    steered_layers: tuple[int, ...]
    """Layers whose hook ran this program on them."""
    captured: Spans
    """Those of the rows that were captured."""
    captured_layers: tuple[int, ...]
    """Layers whose hook wrote them to the request's region."""
    bad_positions: tuple[int, ...]
    """Rows that were not finite and stayed unsteered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """One forward pass of one worker."""

    worker: int
    """The worker's number, replicas counted one after another."""
    batch: tuple[tuple[str, int, int], ...]
    """Every request of the batch, steered or not: vLLM's id, first position, row count."""
    done: tuple[TracedRows, ...]
    """What was done to those that are steered or captured."""


class TraceFile:
    """The file of one worker."""

    def __init__(self, prefix: str, worker: int) -> None:
        self._worker = worker
        self._file = open(f"{prefix}.{worker}", "w", buffering=1)  # noqa: SIM115  # for as long as the worker lives

    def write(self, batch: Sequence[RequestRows], done: Sequence[TracedRows]) -> None:
        """Appends one step."""
        rows = tuple((part.request_id, part.first_position, part.row_count) for part in batch)
        self._file.write(json.dumps(asdict(TracedStep(worker=self._worker, batch=rows, done=tuple(done)))) + "\n")


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
