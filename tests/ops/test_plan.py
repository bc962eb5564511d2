"""A step's plan: every row of every planned request once, and the layers at which something happens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan

LAYERS = 4


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[RequestRows], list[PlannedRequest]]:
    rows, requests, next_row = [], [], 0
    for index in range(draw(st.integers(1, 6))):
        first_row = next_row + draw(st.integers(0, 3))  # rows in between belong to requests that are not planned
        count = draw(st.integers(1, 5))
        rows.append(RequestRows(f"request-{index}", first_row, count, draw(st.integers(0, 1000))))
        requests.append(draw(planned()))
        next_row = first_row + count
    return rows, requests


@st.composite
def planned(draw: st.DrawFn) -> PlannedRequest:
    flags = st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)
    slot = draw(st.integers(NO_SLOT, 7))
    return PlannedRequest(
        slot=slot,
        steers_L=np.array(draw(flags)) & (slot != NO_SLOT),
        captures_L=np.array(draw(flags), np.int64) * draw(st.integers(1, 2**47)),
        row_limit=draw(st.integers(1, 1200)),
    )


@given(steps())
def test_every_row_of_every_request_is_planned_once_with_its_position(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    rows, requests = step
    plan = build_plan(rows, requests)

    want = [
        (part.first_row + offset, index, part.first_position + offset)
        for index, part in enumerate(rows)
        for offset in range(part.row_count)
    ]
    assert list(zip(plan.rows_N, plan.requests_N, plan.positions_N, strict=True)) == want
    assert plan.slots_R.tolist() == [request.slot for request in requests]
    assert plan.limits_R.tolist() == [request.row_limit for request in requests]
    assert plan.bad_N.tolist() == [0] * len(want)


@given(steps())
def test_a_plan_wants_exactly_the_layers_at_which_a_request_does_something(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    rows, requests = step
    plan = build_plan(rows, requests)

    for layer in range(LAYERS):
        assert plan.wanted_L[layer] == any(one.steers_L[layer] or one.captures_L[layer] for one in requests)
        assert plan.captures_LR[layer].tolist() == [one.captures_L[layer] for one in requests]


@given(steps())
def test_what_the_kernel_reads_lies_as_the_kernel_expects_it(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    plan = build_plan(*step)

    for array in (plan.rows_N, plan.requests_N, plan.positions_N, plan.slots_R, plan.limits_R):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    assert plan.captures_LR.dtype == np.int64
    assert plan.captures_LR[0].flags.c_contiguous
    assert plan.bad_N.dtype == np.uint8


def plan_wanting(*layers: int) -> StepPlan:
    request = PlannedRequest(
        slot=0,
        steers_L=np.isin(np.arange(LAYERS), layers),
        captures_L=np.zeros(LAYERS, np.int64),
        row_limit=8,
    )
    return build_plan([RequestRows("a", 0, 2, 0)], [request])


def test_a_wanted_layer_that_was_not_reached_is_told() -> None:
    plan = plan_wanting(1, 3)
    plan.visited.add(3)

    assert plan.unvisited(range(LAYERS)) == [1]


def test_layers_held_by_another_stage_need_not_be_reached() -> None:
    plan = plan_wanting(1, 3)
    plan.visited.add(1)

    assert plan.unvisited([0, 1]) == []
