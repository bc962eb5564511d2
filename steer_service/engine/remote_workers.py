"""Workers that do not share the server's memory, as on another host: their marks and captured rows travel by RPC.

Such a worker keeps each output's region in its own memory. The API server process fetches snapshots, copies them to its
own region, and lets the worker free the region when the output ends.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.collective_rpc`. tests/engine/test_seams.py notices a change.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.region import Region, region_name

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM  # the workers import this file too


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionSnapshot:
    """A copy of one output's region on one worker, as plain data."""

    worker: int
    """The worker's number among all workers."""
    stage: int
    """The worker's pipeline stage."""
    marks: bytes
    """The stage's marks of all rows."""
    rows: tuple[tuple[str, int, bytes], ...]
    """(site, layer, bytes) of the requested captured rows, for the layers of this worker."""
    changes: tuple[tuple[int, bytes], ...]
    """(layer, bytes) of the recorded changes of the requested rows, for the layers of this worker."""
    failures: tuple[int, ...]
    """The worker's row of the failure counters."""
    fault: str
    """The worker's fault; "" if it has none."""

    def to_rpc(self) -> dict[str, Any]:
        """The form in which `collective_rpc` returns it."""
        return {
            "worker": self.worker,
            "stage": self.stage,
            "marks": self.marks,
            "rows": [list(entry) for entry in self.rows],
            "changes": [list(entry) for entry in self.changes],
            "failures": list(self.failures),
            "fault": self.fault,
        }

    @classmethod
    def from_rpc(cls, snapshot: dict[str, Any]) -> "RegionSnapshot":
        """The snapshot that `to_rpc` wrote."""
        rows = tuple((site, layer, data) for site, layer, data in snapshot["rows"])
        changes = tuple((layer, data) for layer, data in snapshot["changes"])
        return cls(**{**snapshot, "rows": rows, "changes": changes, "failures": tuple(snapshot["failures"])})


def take_snapshot(
    region: Region, counters: FailureCounters, worker: int, stage: int, layers: tuple[int, ...], rows: int
) -> RegionSnapshot:
    """A worker's marks, and the captured rows and changes of `layers` among the first `rows`."""
    layout = region.layout
    count = layout.captured.count(min(rows, layout.rows))
    return RegionSnapshot(
        worker=worker,
        stage=stage,
        marks=region.marks_ST[stage].tobytes(),
        rows=tuple(
            (site.value, layer, region.rows(site, layer)[:count].tobytes())
            for site in layout.sites
            for layer in layout.layers
            if layer in layers
        ),
        changes=tuple((layer, region.changes(layer)[:rows].tobytes()) for layer in layout.reported if layer in layers),
        failures=tuple(counters.counts_RS[worker].tolist()),
        fault=counters.fault_of(worker),
    )


def apply_snapshot(snapshot: RegionSnapshot, region: Region, counters: FailureCounters) -> None:
    """Copies a worker's snapshot to this process's region and counters."""
    for site, layer, data in snapshot.rows:
        target = region.rows(CaptureSite(site), layer).reshape(-1).view(np.uint8)
        target[: len(data)] = np.frombuffer(data, np.uint8)
    for layer, data in snapshot.changes:
        changes = region.changes(layer).reshape(-1).view(np.uint8)
        changes[: len(data)] = np.frombuffer(data, np.uint8)
    counters.counts_RS[snapshot.worker] = snapshot.failures
    counters.report_fault(snapshot.worker, snapshot.fault)
    region.marks_ST[snapshot.stage] |= np.frombuffer(snapshot.marks, np.uint8)


class RemoteRegions:
    """Fetches and frees the regions that remote workers keep."""

    def __init__(self, llm: "AsyncLLM", counters: FailureCounters) -> None:
        self._llm = llm
        self._counters = counters
        self._freeing: set[asyncio.Task[None]] = set()

    async def fetch(self, region: Region, rows: int) -> None:
        """Copies the workers' marks, and their captured rows and changes among the first `rows`, to `region`."""
        for snapshot in await self._llm.collective_rpc(
            "fetch_region", args=(region_name(region.name, region.offset), rows)
        ):
            if snapshot is not None:
                apply_snapshot(RegionSnapshot.from_rpc(snapshot), region, self._counters)

    def free(self, region: Region) -> None:
        """Lets the workers free a region, without waiting for it."""
        freeing = asyncio.ensure_future(self._free(region_name(region.name, region.offset)))
        self._freeing.add(freeing)  # the loop itself holds tasks only weakly
        freeing.add_done_callback(self._freeing.discard)

    async def _free(self, name: str) -> None:
        with suppress(Exception):  # an engine that died holds no region
            await self._llm.collective_rpc("free_region", args=(name,))
