"""What only the GPU's kernel has: tables that stay on the device and are filled for each step. Run by test_cuda.py.

T: rows of the step; D: hidden size.
"""

import numpy as np
import pytest
import torch

from bench.kernel_gpu import PROGRAMS, Case, check
from steer_service.core.errors import EngineFailed
from steer_service.ops.cuda_kernel import steer_and_capture
from steer_service.ops.cuda_tables import BankTables, StepTables
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from tests.ops.kernels import KERNEL
from tests.ops.step import bits

DEVICE = "cuda" if KERNEL == "cuda" else "cpu"
ROWS, WIDTH, LAYERS = 8, 40, 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def bank() -> BankTables:
    """Slot 0 adds 1 at every layer, slot 1 makes rows infinite at layer 1, slot 2 does nothing."""
    op_rows_LSK = torch.zeros((LAYERS, 3, 2), dtype=torch.int32)
    op_rows_LSK[1, 1, 0] = 1
    op_counts_LS = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.int32)
    directions_WD = torch.ones((2, WIDTH))
    directions_WD[1] = 3e38
    coefficients_WC = torch.tensor([[1.0, 1.0, -torch.inf, torch.inf, 0.0, 0.0, torch.inf, 0.0]] * 2)
    return BankTables(
        op_rows_LSK=op_rows_LSK.to(DEVICE),
        op_counts_LS=op_counts_LS.to(DEVICE),
        directions_WD=directions_WD.to(DEVICE),
        coefficients_WC=coefficients_WC.to(DEVICE),
    )


def tables(dtype: torch.dtype, staging: int = 1 << 16) -> StepTables:
    return StepTables(rows=ROWS, requests=4, layers=LAYERS, width=WIDTH, dtype=dtype, staging=staging, device=DEVICE)


def planned(
    slot: int,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    *,
    captures_float32: bool = False,
    reports_change: bool = False,
) -> PlannedRequest:
    """A request; what is captured goes to tensors of shape [LAYERS, positions, WIDTH]."""
    before_L, after_L = (
        np.array([0 if rows is None else rows[layer].data_ptr() for layer in range(LAYERS)]) for rows in (before, after)
    )
    return PlannedRequest(
        slot=slot,
        steers_L=np.full(LAYERS, slot != NO_SLOT),
        before_L=before_L,
        after_L=after_L,
        row_limit=1000,
        captures_float32=captures_float32,
        reports_change=reports_change,
    )


def plan_of(*requests: tuple[RequestRows, PlannedRequest]) -> StepPlan:
    rows, what = zip(*requests, strict=True)
    return build_plan(rows, what, check_layer=LAYERS - 1)


def forward(stream_TD: torch.Tensor, step: StepTables, programs: BankTables) -> None:
    """All layers of a model whose blocks change nothing, in place."""
    for layer in range(LAYERS):
        steer_and_capture(stream_TD, None, layer, programs, step, checks=layer == LAYERS - 1)


def stream(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(ROWS, device=DEVICE, dtype=torch.float32).repeat(WIDTH, 1).T.to(dtype).contiguous()


@DTYPES
def test_rows_of_no_request_keep_their_bits(dtype: torch.dtype) -> None:
    step, stream_TD = tables(dtype), stream(dtype)
    stream_TD[[0, 3, 7], 1] = torch.tensor([torch.nan, torch.inf, -0.0], dtype=dtype, device=DEVICE)
    before_TD = stream_TD.clone()

    plan = plan_of((RequestRows("steered", 1, 2, 0), planned(0)), (RequestRows("idle", 4, 2, 0), planned(2)))
    forward(stream_TD, step, bank())
    assert np.array_equal(bits(stream_TD.cpu()), bits(before_TD.cpu()))  # tables that were never filled
    staged = step.fill(plan)
    forward(stream_TD, step, bank())
    step.collect(plan, staged)

    others = [0, 3, 4, 5, 6, 7]
    assert np.array_equal(bits(stream_TD.cpu())[others], bits(before_TD.cpu())[others])
    assert torch.equal(stream_TD[1:3], before_TD[1:3] + LAYERS)
    assert not plan.bad_N.any()
    assert not step.bad_T.any()


@DTYPES
def test_a_step_does_what_it_is_filled_with_and_nothing_of_the_step_before(dtype: torch.dtype) -> None:
    step, programs = tables(dtype), bank()
    first_TD, second_TD, third_TD = (stream(dtype) for _ in range(3))

    step.fill(plan_of((RequestRows("first", 0, 6, 0), planned(1))))
    forward(first_TD, step, programs)
    plan = plan_of((RequestRows("second", 5, 3, 0), planned(0)))
    staged = step.fill(plan)
    forward(second_TD, step, programs)
    step.collect(plan, staged)
    step.clear()
    forward(third_TD, step, programs)

    assert torch.equal(second_TD[:5], stream(dtype)[:5])
    assert torch.equal(second_TD[5:], stream(dtype)[5:] + LAYERS)
    assert not plan.bad_N.any()
    assert torch.equal(third_TD, stream(dtype))


@DTYPES
def test_bad_rows_are_flagged_and_left_and_their_neighbours_are_steered(dtype: torch.dtype) -> None:
    step, stream_TD = tables(dtype), stream(dtype)
    stream_TD[5, 3] = torch.nan
    plan = plan_of(
        (RequestRows("bad", 0, 2, 0), planned(1)),
        (RequestRows("good", 2, 2, 0), planned(0)),
        (RequestRows("broken by the model", 5, 1, 0), planned(2)),
    )

    staged = step.fill(plan)
    forward(stream_TD, step, bank())
    step.collect(plan, staged)

    assert plan.bad_N.tolist() == [1, 1, 0, 0, 1]
    assert torch.equal(stream_TD[:2], stream(dtype)[:2])
    assert torch.equal(stream_TD[2:4], stream(dtype)[2:4] + LAYERS)


@DTYPES
def test_captures_of_all_layers_sites_and_types_reach_their_places(dtype: torch.dtype) -> None:
    step, stream_TD = tables(dtype), stream(dtype)
    own, wide = (torch.full((2, LAYERS, 6, WIDTH), 7.0, dtype=kind) for kind in (dtype, torch.float32))
    plan = plan_of(
        (RequestRows("in the middle of its prompt", 0, 3, 2), planned(0, own[0], own[1])),
        (RequestRows("after only", 4, 2, 0), planned(NO_SLOT, None, wide[1], captures_float32=True)),
    )

    staged = step.fill(plan)
    forward(stream_TD, step, bank())
    step.collect(plan, staged)

    rows = stream(dtype).cpu()
    for layer in range(LAYERS):
        assert torch.equal(own[0, layer, 2:5], rows[:3] + layer)
        assert torch.equal(own[1, layer, 2:5], rows[:3] + layer + 1)
        assert torch.equal(wide[1, layer, :2], rows[4:6].float())
    assert bool((own[:, :, [0, 1, 5]] == 7.0).all())
    assert bool((wide[0] == 7.0).all())
    assert bool((wide[1, :, 2:] == 7.0).all())


def test_changes_are_those_of_each_layer_and_of_the_last_step_alone() -> None:
    step, programs, seen = tables(torch.float32), bank(), []
    for first_row, slots in ((1, (0, 2)), (0, (2, 0))):
        plan = plan_of(
            *(
                (RequestRows(f"{slot}", first_row + 2 * place, 2, 0), planned(slot, reports_change=True))
                for place, slot in enumerate(slots)
            ),
            (RequestRows("silent", 6, 1, 0), planned(0)),
        )
        staged = step.fill(plan)
        forward(stream(torch.float32), step, programs)
        step.collect(plan, staged)
        assert plan.changes_NLC is not None
        seen.append(plan.changes_NLC)

    first, second = seen  # row r holds r + layer, and 1 is added at each layer
    for rows_N, changes_NLC in (([1, 2], first[:2]), ([2, 3], second[2:4])):
        want_NL = 1.0 / (np.array(rows_N)[:, None] + np.arange(LAYERS))
        assert np.allclose(changes_NLC[..., 0], want_NL)
        assert (changes_NLC[..., 1] == 1.0).all()
    assert not first[2:].any()
    assert not second[[0, 1, 4]].any()


def test_more_than_the_staging_buffer_holds_is_refused() -> None:
    captured = torch.zeros((LAYERS, 3, WIDTH))
    plan = plan_of((RequestRows("captured", 0, 3, 0), planned(NO_SLOT, None, captured)))
    needed = LAYERS * 3 * WIDTH * 4

    assert len(tables(torch.float32, needed).fill(plan)) == LAYERS
    with pytest.raises(EngineFailed, match=f"captures {needed} bytes, the staging buffer holds {needed - 16}"):
        tables(torch.float32, needed - 16).fill(plan)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_cases_of_the_benchmark_do_what_they_say(program: str) -> None:
    check(Case(rows=20, width=WIDTH, program=program), DEVICE)


@pytest.mark.skipif(KERNEL != "cuda", reason="only a GPU records graphs")
def test_a_recorded_graph_does_what_the_tables_hold_when_it_is_replayed() -> None:
    step, programs, stream_TD = tables(torch.bfloat16), bank(), stream(torch.bfloat16)
    forward(stream_TD, step, programs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(stream_TD, step, programs)

    step.fill(plan_of((RequestRows("first", 1, 2, 0), planned(0))))
    graph.replay()
    step.fill(plan_of((RequestRows("second", 2, 2, 0), planned(0))))
    graph.replay()

    steps_T = torch.tensor([0, 1, 2, 1, 0, 0, 0, 0], device=DEVICE)
    assert torch.equal(stream_TD, stream(torch.bfloat16) + (LAYERS * steps_T)[:, None])
