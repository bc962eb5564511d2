"""Marks and changes that a worker writes to the regions of its requests."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.layer_change import LayerChange
from steer_service.core.span_table import SpanTable
from steer_service.core.spans import EVERYWHERE
from steer_service.engine.output_rows import RegionRows
from steer_service.engine.region import NON_FINITE, Region, RegionLayout
from steer_service.engine.worker.row_marks import RowMarks
from steer_service.ops.plan import PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.shm.segments import private_segment

LAYERS = 4
LAYOUT = RegionLayout(
    stages=2,
    rows=6,
    sites=(),
    layers=(),
    captured=SpanTable.of(EVERYWHERE),
    hidden_size=2,
    dtype="float32",
    reported=(1, 3),
)


@dataclass(frozen=True)
class Tracked:
    """What RowMarks reads of a tracked request."""

    region: Region


def step(first_position: int, values: list[float]) -> StepPlan:
    """A step of one request, in which every layer changed each row by its value plus the number of the layer."""
    nowhere_L = np.zeros(LAYERS, np.int64)
    request = PlannedRequest(
        slot=0,
        steers_L=np.ones(LAYERS, bool),
        before_L=nowhere_L,
        after_L=nowhere_L,
        row_limit=6,
        reports_change=True,
    )
    plan = build_plan([RequestRows("a", 0, len(values), first_position)], [request], check_layer=LAYERS - 1)
    assert plan.changes_NLC is not None
    plan.changes_NLC[..., 0] = np.array(values)[:, None] + np.arange(LAYERS)
    plan.changes_NLC[..., 1] = 1.0
    return plan


def reported(region: Region, rows: int) -> tuple[LayerChange, ...]:
    return RegionRows(region, (1, 3), lambda _: None).changes(rows)


def test_each_stage_writes_the_changes_at_its_own_layers() -> None:
    region = Region(LAYOUT, private_segment(LAYOUT.size))
    requests: Any = {"a": Tracked(region)}

    RowMarks(0, [0, 1]).write(step(0, [1.0, 2.0]), requests)
    assert reported(region, 6) == (LayerChange(layer=1, positions=2, largest=3.0, mean=2.5), LayerChange(layer=3))
    RowMarks(1, [2, 3]).write(step(0, [5.0]), requests)

    first, second = reported(region, 6)
    assert first == LayerChange(layer=1, positions=2, largest=3.0, mean=2.5)
    assert second == LayerChange(layer=3, positions=1, largest=8.0, mean=8.0)


def test_a_row_that_is_computed_again_counts_once() -> None:
    region = Region(LAYOUT, private_segment(LAYOUT.size))
    marks, requests = RowMarks(0, range(LAYERS)), {"a": Tracked(region)}

    marks.write(step(0, [1.0, 2.0, 3.0]), requests)  # type: ignore[arg-type]
    marks.write(step(1, [5.0, 6.0]), requests)  # type: ignore[arg-type]

    assert reported(region, 6)[0] == LayerChange(layer=1, positions=3, largest=7.0, mean=5.0)


def test_rows_beyond_the_output_do_not_count() -> None:
    region = Region(LAYOUT, private_segment(LAYOUT.size))
    RowMarks(0, range(LAYERS)).write(step(3, [1.0, 2.0, 3.0, 4.0]), {"a": Tracked(region)})  # type: ignore[arg-type]

    assert reported(region, 5)[0] == LayerChange(layer=1, positions=2, largest=3.0, mean=2.5)
    assert reported(region, 6)[0].positions == 3


@pytest.mark.parametrize(("layers", "where"), [((7,), " after layer 7"), ((3, 5, 9), " after layers 3..9"), ((), "")])
def test_a_row_that_is_not_finite_is_said_with_the_steered_layers_and_the_remedy(
    layers: tuple[int, ...], where: str
) -> None:
    region = Region(LAYOUT, private_segment(LAYOUT.size))
    region.mark(0, 2, np.array([NON_FINITE], np.uint8))
    rows = RegionRows(region, layers, lambda _: None)
    rows.check_finite(2, prefix_failed=False)

    with pytest.raises(InvalidRequest) as raised:
        rows.check_finite(4, prefix_failed=False)

    said = f"the residual stream was not finite at position 2, under steering{where}; lower the scale"
    assert raised.value.message.startswith(said)
    assert raised.value.reason == "STEERING_NONFINITE"


def test_an_output_that_never_ran_reports_nothing() -> None:
    rows = RegionRows(None, (1, 3), lambda _: None)

    assert rows.changes(0) == (LayerChange(layer=1), LayerChange(layer=3))
