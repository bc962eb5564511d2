"""The steered and captured requests that this worker runs, each with its region.

Relies on (vLLM 0.24 to 0.33): `scheduled_new_reqs` with the `sampling_params` of each request, and
`finished_req_ids` of a `SchedulerOutput`. tests/engine/test_seams.py notices a change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name
from steer_service.core.capture import CaptureSite
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerRequest
from steer_service.engine.region import Region, RegionLayout
from steer_service.engine.remote_workers import RegionSnapshot, take_snapshot
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.facts import WorkerFacts
from steer_service.ops.cuda_tables import LINE
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows
from steer_service.shm.segments import Segment, SegmentDirectory, private_segment


@dataclass(frozen=True, slots=True)
class TrackedRequest:
    """A steered or captured request that this worker runs."""

    request: WorkerRequest
    planned: PlannedRequest
    region: Region | None


class TrackedRequests:
    """Follows vLLM's schedule: maps a request's region at its first step and forgets the request when it finishes."""

    def __init__(self, facts: WorkerFacts, bank: ProgramBank, segments: SegmentDirectory) -> None:
        self.keeps_regions = False
        """True if this worker does not share the server's memory and keeps regions itself, see `remote_workers`."""
        self.marks: Segment | None = None
        """The mark memory; None if this worker does not share the server's memory."""
        self._facts = facts
        self._bank = bank
        self._segments = segments
        self._tracked: dict[str, TrackedRequest] = {}
        self._kept: dict[str, Region] = {}  # name -> region

    def update(self, scheduler_output: Any) -> None:
        """Forgets finished requests and tracks those that start in this step."""
        for request_id in scheduler_output.finished_req_ids:
            self._tracked.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            request = WorkerRequest.from_extra_args(params.extra_args if params is not None else None)
            if request is not None and not self._is_tracked(
                new.req_id, request
            ):  # the V2 runner gets resumed requests again
                self._tracked[new.req_id] = self._track(request)

    def __getitem__(self, request_id: str) -> TrackedRequest:
        return self._tracked[request_id]

    def rows_of(self, batch: Sequence[RequestRows]) -> list[RequestRows]:
        """The rows of a batch that belong to tracked requests."""
        return [part for part in batch if part.request_id in self._tracked]

    def staged_bytes(self, rows: Mapping[str, int], layers: int) -> int:
        """Most bytes that the step stages on a rank with so many layers; `rows`: the rows of each request.

        The same on all ranks, whether they write rows or not.
        """
        staged = 0
        for request_id, count in rows.items():
            if (tracked := self._tracked.get(request_id)) is not None and tracked.request.layers:
                request = tracked.request
                piece = min(count, request.rows) * self._facts.hidden_size * dtype_from_name(request.dtype).itemsize
                pieces = len(request.sites) * min(len(request.layers), layers)
                staged += pieces * -(-piece // LINE) * LINE
        return staged

    def snapshot(self, name: str, rows: int, counters: FailureCounters) -> RegionSnapshot | None:
        """A kept region, with its rows and changes among the first `rows`; None if this worker does not keep it."""
        region = self._kept.get(name)
        if region is None:
            return None
        layers = self._facts.layers if self._facts.writes_rows and rows else ()
        return take_snapshot(region, counters, self._facts.number, self._facts.stage, layers, rows)

    def free_region(self, name: str) -> None:
        """Frees a region, if this worker keeps it."""
        self._kept.pop(name, None)

    def _is_tracked(self, request_id: str, request: WorkerRequest) -> bool:
        tracked = self._tracked.get(request_id)
        return tracked is not None and tracked.request == request

    def _track(self, request: WorkerRequest) -> TrackedRequest:
        layer_count = self._facts.layer_count
        region = self._map_region(request)
        steers_L = np.zeros(layer_count, bool)
        if request.slot != NO_SLOT:
            steers_L = self._bank.op_counts_LS[:, request.slot] > 0
        planned = PlannedRequest(
            slot=request.slot,
            steers_L=steers_L,
            before_L=self._addresses(region, CaptureSite.BEFORE),
            after_L=self._addresses(region, CaptureSite.AFTER),
            steered=None if request.steered.is_everywhere else request.steered,
            scopes=request.scopes,
            captured=None if request.captured.is_everywhere else request.captured,
            row_limit=request.rows,
            captures_float32=request.dtype != self._facts.dtype,
            reports_change=bool(request.reported) and self._facts.writes_rows,
        )
        return TrackedRequest(request, planned, region)

    def _map_region(self, request: WorkerRequest) -> Region | None:
        """The request's region; None if its segment is gone, because the request was cancelled after it was scheduled.

        Such a request is still steered, since other requests may reuse its keys and values. It fails, because its
        receipt finds no marks.
        """
        layout = RegionLayout(
            stages=request.stages,
            rows=request.rows,
            sites=request.sites,
            layers=request.layers,
            captured=request.captured,
            hidden_size=self._facts.hidden_size,
            dtype=request.dtype,
            reported=request.reported,
        )
        if self.keeps_regions:
            region = self._kept[request.region] = Region(layout, private_segment(layout.size))
            return region
        if self.marks is not None and request.segment == self.marks.name:
            return Region(layout, self.marks, request.offset)
        try:
            return Region(layout, self._segments.open(request.segment, layout.size))
        except OSError:
            return None

    def _addresses(self, region: Region | None, site: CaptureSite) -> npt.NDArray[np.int64]:
        held = frozenset(self._facts.layers) if self._facts.writes_rows else frozenset()
        if region is None:
            return np.zeros(self._facts.layer_count, np.int64)
        return region.addresses(site, self._facts.layer_count, held)
