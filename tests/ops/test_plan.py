"""A step's plan: every row of every planned request once, and the layers at which something happens."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.span_table import ScopeTable, SpanTable
from steer_service.core.spans import OPEN_END, Spans
from steer_service.ops.plan import NO_SLOT, NOT_CAPTURED, PlannedRequest, Planner, RequestRows, StepPlan, build_plan

LAYERS = 4
LAST = LAYERS - 1


def spans_from(edges: list[int]) -> Spans:
    """Spans between these edges; the last is open if their number is odd."""
    return tuple(zip(sorted(edges)[::2], [*sorted(edges), OPEN_END][1::2], strict=False))


GIVEN_SPANS = st.lists(st.integers(0, 1010), unique=True, max_size=9).map(spans_from)
TABLES = st.none() | GIVEN_SPANS.map(SpanTable.of)


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
        before_L=np.array(draw(flags), np.int64) * draw(st.integers(1, 2**47)),
        after_L=np.array(draw(flags), np.int64) * draw(st.integers(1, 2**47)),
        steered=draw(TABLES),
        scopes=draw(st.none() | st.lists(GIVEN_SPANS, min_size=2, max_size=5).map(ScopeTable.of)),
        captured=draw(TABLES),
        row_limit=draw(st.integers(1, 1200)),
        captures_float32=draw(st.booleans()),
    )


@given(steps())
def test_every_row_of_every_request_is_planned_once_with_its_position(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    rows, requests = step
    plan = build_plan(rows, requests, check_layer=LAST)

    want = [(part.first_row + offset, index) for index, part in enumerate(rows) for offset in range(part.row_count)]
    assert list(zip(plan.rows_N, plan.requests_N, strict=True)) == want
    assert plan.slots_R.tolist() == [request.slot for request in requests]
    assert plan.captures_float32_R.tolist() == [request.captures_float32 for request in requests]
    assert plan.bad_N.tolist() == [0] * len(want)


def positions_of(table: SpanTable | None) -> list[int]:
    """Written out, as far as these tests look."""
    edges = [0, OPEN_END] if table is None else table.edges_E.tolist()
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    return [at for at in range(1200) if any(first <= at < end for first, end in spans)]


def mask_at(table: ScopeTable | None, position: int) -> int:
    """The scopes that include a position."""
    if table is None:
        return 2**64 - 1
    known = zip(table.edges_E.tolist(), table.masks_E.tolist(), strict=True)
    return int([0, *(mask for edge, mask in known if edge <= position)][-1])


@given(steps())
def test_rows_are_steered_within_the_scope_of_their_request_and_captured_in_order(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    rows, requests = step
    plan = build_plan(rows, requests, check_layer=LAST)

    slots, ordinals = [], []
    for part, request in zip(rows, requests, strict=True):
        steered, captured = positions_of(request.steered), positions_of(request.captured)
        for at in range(part.first_position, part.first_position + part.row_count):
            slots.append(request.slot if at in steered else NO_SLOT)
            is_captured = at in captured and at < request.row_limit
            ordinals.append(captured.index(at) if is_captured else NOT_CAPTURED)
    assert plan.slots_N.tolist() == slots
    assert plan.capture_rows_N.tolist() == ordinals


@given(steps(), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_a_planner_makes_the_same_plans_as_a_new_one(
    step: tuple[list[RequestRows], list[PlannedRequest]], changes: list[int]
) -> None:
    """Steps of one batch: positions advance; a request gets another row, is replaced, or is gone."""
    rows, requests = step
    planner = Planner(LAST)
    for change in changes:
        assert same_plan(planner.plan(rows, requests), build_plan(rows, requests, check_layer=LAST))
        rows = [dataclasses.replace(part, first_position=part.first_position + part.row_count) for part in rows]
        match change:
            case 1:
                rows[-1] = dataclasses.replace(rows[-1], row_count=rows[-1].row_count + 1)
            case 2:
                requests = [dataclasses.replace(requests[0], slot=NO_SLOT), *requests[1:]]
            case 3 if len(rows) > 1:
                rows, requests = rows[:-1], requests[:-1]


def same_plan(left: StepPlan, right: StepPlan) -> bool:
    for name in (field.name for field in dataclasses.fields(StepPlan)):
        ours, theirs = getattr(left, name), getattr(right, name)
        is_same = ours.dtype == theirs.dtype and (ours == theirs).all() if hasattr(ours, "dtype") else ours == theirs
        if not is_same:
            return False
    return True


def test_results_of_one_step_are_not_in_the_next() -> None:
    rows, requests, planner = [RequestRows("a", 0, 2, 0)], [planned_at(0)], Planner(LAST)
    first = planner.plan(rows, requests)
    first.bad_N[:] = 1
    first.visited.add(0)
    second = planner.plan(rows, requests)
    assert second.bad_N.tolist() == [0, 0]
    assert not second.visited


def test_many_spans_and_the_largest_positions_are_located() -> None:
    spans = SpanTable.of(tuple((2 * index, 2 * index + 1) for index in range(1024)))
    captured = SpanTable.of(((5, 6), (OPEN_END - 3, OPEN_END)))
    request = dataclasses.replace(planned_at(), steered=spans, captured=captured)
    rows = [RequestRows("a", 0, 2, 2045), RequestRows("b", 2, 2, OPEN_END - 3)]

    plan = build_plan(rows, [request, dataclasses.replace(request, steered=None)], check_layer=LAST)

    assert plan.slots_N.tolist() == [NO_SLOT, 0, 0, 0]
    assert plan.capture_rows_N.tolist() == [NOT_CAPTURED, NOT_CAPTURED, 1, 2]


@given(st.lists(st.integers(0, 400), unique=True, min_size=150, max_size=200), steps())
def test_rows_among_many_spans_are_located_as_among_few(
    edges: list[int], step: tuple[list[RequestRows], list[PlannedRequest]]
) -> None:
    spans = spans_from(edges)
    many = SpanTable.of(spans)
    scopes = ScopeTable.of([spans, spans[::2], spans[1::3]])
    rows = [dataclasses.replace(part, first_position=part.first_position // 3) for part in step[0]]
    requests = [dataclasses.replace(one, steered=many, captured=many, scopes=scopes) for one in step[1]]
    plan = build_plan(rows, requests, check_layer=LAST)

    positions = [part.first_position + place for part in rows for place in range(part.row_count)]
    inside = positions_of(many)
    assert [slot != NO_SLOT for slot in plan.slots_N] == [
        at in inside and requests[index].slot != NO_SLOT for at, index in zip(positions, plan.requests_N, strict=True)
    ]
    assert plan.capture_rows_N.tolist() == [
        inside.index(at) if at in inside and at < requests[index].row_limit else NOT_CAPTURED
        for at, index in zip(positions, plan.requests_N, strict=True)
    ]
    assert plan.scopes_N is not None
    assert plan.scopes_N.tolist() == [mask_at(scopes, at) for at in positions]


@given(steps())
def test_a_plan_wants_exactly_the_layers_at_which_a_request_does_something(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    rows, requests = step
    plan = build_plan(rows, requests, check_layer=LAST)

    for layer in range(LAYERS):
        is_checked = layer == LAST and any(one.slot != NO_SLOT for one in requests)
        does_something = any(one.steers_L[layer] or one.before_L[layer] or one.after_L[layer] for one in requests)
        assert plan.wanted_L[layer] == (is_checked or does_something)
        assert plan.before_LR[layer].tolist() == [one.before_L[layer] for one in requests]
        assert plan.after_LR[layer].tolist() == [one.after_L[layer] for one in requests]


@given(steps())
def test_tables_have_the_memory_layout_that_the_kernel_expects(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    plan = build_plan(*step, check_layer=LAST)

    for array in (plan.rows_N, plan.requests_N, plan.slots_N, plan.capture_rows_N, plan.slots_R):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
    for array in (plan.before_LR, plan.after_LR):
        assert array.dtype == np.int64
        assert array[0].flags.c_contiguous
    assert plan.captures_float32_R.dtype == np.bool_
    assert plan.bad_N.dtype == np.uint8


@given(steps())
def test_a_row_has_the_bit_of_each_scope_that_includes_it(
    step: tuple[list[RequestRows], list[PlannedRequest]],
) -> None:
    rows, requests = step
    plan = build_plan(rows, requests, check_layer=LAST)

    if all(request.scopes is None for request in requests):
        assert plan.scopes_N is None
        return
    masks = iter(plan.scopes_N.tolist())
    for part, request in zip(rows, requests, strict=True):
        for position in range(part.first_position, part.first_position + part.row_count):
            assert next(masks) == mask_at(request.scopes, position)
    assert plan.scopes_N.dtype == np.uint64


def planned_at(*layers: int) -> PlannedRequest:
    """A request that is steered at these layers."""
    nowhere_L = np.zeros(LAYERS, np.int64)
    return PlannedRequest(
        slot=0,
        steers_L=np.isin(np.arange(LAYERS), layers),
        before_L=nowhere_L,
        after_L=nowhere_L,
        row_limit=OPEN_END,
    )


def plan_wanting(*layers: int) -> StepPlan:
    return build_plan([RequestRows("a", 0, 2, 0)], [planned_at(*layers)], check_layer=LAST)


def test_a_wanted_layer_that_was_not_reached_is_reported() -> None:
    plan = plan_wanting(1, 3)
    plan.visited.add(3)

    assert plan.unvisited(range(LAYERS)) == [1]


def test_layers_held_by_another_stage_need_not_be_reached() -> None:
    plan = plan_wanting(1, 3)
    plan.visited.add(1)

    assert plan.unvisited([0, 1]) == []
