"""What a kernel records of the change of each row, against float64.

The CPU's kernel here; test_cuda_kernel.py runs this file with the GPU's.

T: rows of the step; D: hidden size; N: rows of the plan; L: layers; C: columns.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from steer_service.core.layer_change import ACTED, CAPPED, IDLE
from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.ops.reference import apply_operation, is_outside_bounds
from tests.ops.step import LAYER, Case, ParsedPrompt, Step, bits, cases

NEAR = 1e-6
"""Of a projection to a bound, in units of the row: closer, float32 decides."""


def expected(x_D: torch.Tensor, operations: list[SteeringOp]) -> tuple[float, set[float]]:
    """The relative change of a row in float64, and the states that may be recorded of it."""
    y_TD, states = x_D[None].double(), {ACTED}
    before = float(y_TD.norm())
    for operation in operations:
        if isinstance(operation, ProjectionCapSpec):
            near = [
                bool(is_outside_bounds(y_TD, replace(operation, **moved_bounds(operation, by))))
                for by in (-NEAR * before, NEAR * before)
            ]
            states = {CAPPED} if all(near) else states | {CAPPED} if any(near) else states
        y_TD = apply_operation(y_TD, operation)
    return float((y_TD - x_D.double()).norm()) / before, states


def moved_bounds(cap: ProjectionCapSpec, by: float) -> dict[str, float | None]:
    """The bounds of a cap, further apart by twice `by`."""
    low = None if cap.min is None else cap.min - by
    high = None if cap.max is None else cap.max + by
    if low is not None and high is not None and low > high:
        low = high = (low + high) / 2
    return {"min": low, "max": high}


@given(cases())
def test_the_change_of_each_row_is_that_of_the_reference(case: Case) -> None:
    step = case.run()

    changes_NLC = step.plan.changes_NLC
    if not any(one.reports_change for one in case.asked):
        assert changes_NLC is None
        return
    assert changes_NLC is not None
    for row, (relative, state) in zip(step.plan.rows_N, changes_NLC[:, LAYER], strict=True):
        (one,) = [one for one in case.asked if row in one.rows]
        if not (one.reports_change and one.steers(row)):
            assert (relative, state) == (0.0, IDLE)
            continue
        change, states = expected(case.wide_TD()[row], one.operations_at(row))
        assert state in states
        assert abs(relative - change) <= 1e-5 * (1.0 + change)
    assert not changes_NLC[:, LAYER + 1 :].any()


@given(cases())
def test_a_report_changes_no_row(case: Case) -> None:
    silent = Case(case.hidden_TD, case.residual_TD, [replace(one, reports_change=False) for one in case.asked])
    mine, theirs = case.run(), silent.run()

    assert np.array_equal(bits(mine.stream_TD), bits(theirs.stream_TD))
    assert np.array_equal(bits(mine.hidden_TD), bits(theirs.hidden_TD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("operation", "relative", "state"),
    [
        (AddSpec([3.0, 4.0]), 2.0, ACTED),
        (AddSpec([3.0, 4.0], 0.5, scaling="relative"), 0.5, ACTED),
        (AddSpec([3.0, 4.0], max_relative_change=0.125), 0.125, ACTED),
        (AblationSpec([1.0, 0.0], 1.0), 0.0, ACTED),
        (AblationSpec([1.0, 0.0]), 0.6, ACTED),
        (ProjectionCapSpec([1.0, 0.0], max=1.0), 0.2, CAPPED),
        (ProjectionCapSpec([1.0, 0.0], min=1.0, max=2.0), 0.0, ACTED),
        (AddSpec([1e-4, 0.0]), 0.4e-4, ACTED),  # less than a step of bfloat16: it is the row before its rounding
    ],
    ids=str,
)
def test_the_change_is_in_units_of_the_row_and_from_before_its_rounding(
    dtype: torch.dtype, operation: SteeringOp, relative: float, state: float
) -> None:
    stream_TD = torch.tensor([[1.5, 2.0]]).to(dtype)
    step = Step(stream_TD, None, [ParsedPrompt(range(1), [operation], reports_change=True)])

    assert step.plan.changes_NLC is not None
    assert step.plan.changes_NLC[0, LAYER] == pytest.approx([relative, state], rel=1e-5, abs=1e-7)


def test_a_row_of_zeros_has_no_relative_change() -> None:
    step = Step(torch.zeros(1, 2), None, [ParsedPrompt(range(1), [AddSpec([3.0, 4.0])], reports_change=True)])

    assert step.plan.changes_NLC is not None
    relative, state = step.plan.changes_NLC[0, LAYER]
    assert np.isnan(relative)
    assert state == ACTED
