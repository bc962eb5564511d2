"""What travels from a worker that does not share the server's memory."""

import numpy as np

from steer_service.core.capture import CaptureSite
from steer_service.core.span_table import SpanTable
from steer_service.core.spans import EVERYWHERE
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.region import STEERED, Region, RegionLayout
from steer_service.engine.remote_workers import RegionSnapshot, apply_snapshot, take_snapshot
from steer_service.shm.segments import private_segment

LAYOUT = RegionLayout(
    stages=2,
    rows=5,
    sites=(CaptureSite.AFTER,),
    layers=(0, 2),
    captured=SpanTable.of(EVERYWHERE),
    hidden_size=3,
    dtype="float32",
    reported=(1, 2),
)


def test_marks_rows_and_changes_of_a_workers_own_layers_reach_the_servers_region() -> None:
    theirs, mine = (Region(LAYOUT, private_segment(LAYOUT.size)) for _ in range(2))
    counters = FailureCounters.private(workers=2, slots=1)
    theirs.mark(1, 0, np.full(4, STEERED, np.uint8))
    theirs.rows(CaptureSite.AFTER, 2)[:] = 7.0
    for layer in LAYOUT.reported:
        theirs.changes(layer)[:] = np.arange(10).reshape(5, 2) + layer

    snapshot = take_snapshot(theirs, counters, worker=1, stage=1, layers=(2, 3), rows=4)
    apply_snapshot(RegionSnapshot.from_rpc(snapshot.to_rpc()), mine, counters)

    assert mine.marks_ST.tolist() == [[0] * 5, [STEERED] * 4 + [0]]
    assert mine.rows(CaptureSite.AFTER, 2)[:, 0].tolist() == [7.0] * 4 + [0.0]
    assert mine.changes(2).tolist() == [[2, 3], [4, 5], [6, 7], [8, 9], [0, 0]]
    assert not mine.changes(1).any()
