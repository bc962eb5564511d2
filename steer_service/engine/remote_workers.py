"""Workers that do not see the server's memory, as on another host: what they mark and capture travels by RPC.

They keep each output's region in memory of their own until the front end, which asks for it as often as it has to know,
says that it may go. What the front end has then is the same as if they had written it there.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.core.positions import count_rows
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.region import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionSnapshot:
    """What one worker has of one output's region, as plain data."""

    worker: int
    """Its number among all workers."""
    stage: int
    """Its pipeline stage."""
    marks: bytes
    """That stage's marks of all rows."""
    rows: tuple[tuple[str, int, bytes], ...]
    """(site, layer, bytes) of the captured rows that it has, as far as they were asked for."""
    failures: tuple[int, ...]
    """Its row of the failure counters."""

    def to_rpc(self) -> dict[str, Any]:
        """The form in which `collective_rpc` returns it."""
        return {
            "worker": self.worker,
            "stage": self.stage,
            "marks": self.marks,
            "rows": [list(entry) for entry in self.rows],
            "failures": list(self.failures),
        }

    @classmethod
    def from_rpc(cls, snapshot: dict[str, Any]) -> "RegionSnapshot":
        """The snapshot that `to_rpc` wrote."""
        rows = tuple((site, layer, data) for site, layer, data in snapshot["rows"])
        return cls(**{**snapshot, "rows": rows, "failures": tuple(snapshot["failures"])})


def take_snapshot(
    region: Region, counters: FailureCounters, worker: int, stage: int, layers: tuple[int, ...], rows: int
) -> RegionSnapshot:
    """What a worker sends: its marks, and of `layers` the captured rows among the first `rows`."""
    layout = region.layout
    count = count_rows(layout.captured, min(rows, layout.rows))
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
        failures=tuple(counters.counts_RS[worker].tolist()),
    )


def apply_snapshot(snapshot: RegionSnapshot, region: Region, counters: FailureCounters) -> None:
    """Puts what a worker sent where the front end looks for it."""
    for site, layer, data in snapshot.rows:
        target = region.rows(CaptureSite(site), layer).reshape(-1).view(np.uint8)
        target[: len(data)] = np.frombuffer(data, np.uint8)
    counters.counts_RS[snapshot.worker] = snapshot.failures
    region.marks_ST[snapshot.stage] |= np.frombuffer(snapshot.marks, np.uint8)
