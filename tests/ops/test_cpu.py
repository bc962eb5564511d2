"""The CPU kernels against the reference: the right rows, the right numbers, and nothing else touched.

T: rows of the step; D: hidden size. One layer of a step, planned and loaded as the worker does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.engine.bank import BankSize, ProgramBank, ProgramLoad
from steer_service.ops.cpu import KERNELS
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.program import compile_program, program_to_bytes
from steer_service.ops.reference import apply_operation
from tests.ops.strategies import SEEDS, WIDTHS, operation_lists

LAYER = 0
SENTINEL = 7.0
"""What capture memory holds before anything is captured."""

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
"""Equal bits tell more than equal numbers: NaN equals itself, and 0.0 is not -0.0."""

DTYPES = st.sampled_from(list(BITS))
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}
"""The relative error of one rounding to the stream's dtype, beside those of computing in float32."""


@dataclass(frozen=True)
class Asked:
    """One request of a case, and what the kernel is to do for it."""

    rows: range
    operations: Sequence[SteeringOp] = ()
    first_position: int = 0
    captured: bool = False
    row_limit: int = 1000

    def captures(self, row: int) -> bool:
        return self.captured and self.first_position + row - self.rows.start < self.row_limit


class Step:
    """One layer of one step: runs the kernel in place and keeps what it needs to look at the outcome."""

    def __init__(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, asked: Sequence[Asked]) -> None:
        self.hidden_TD, self.residual_TD = hidden_TD.clone(), None if residual_TD is None else residual_TD.clone()
        width = hidden_TD.shape[1]
        self.captured = [
            torch.full((one.first_position + len(one.rows), width), SENTINEL, dtype=hidden_TD.dtype) for one in asked
        ]
        bank = bank_with([one.operations for one in asked], width)
        self.plan = plan_of(asked, self.captured)
        self.bad_count = KERNELS[str(hidden_TD.dtype).removeprefix("torch.")](
            self.hidden_TD.data_ptr(),
            0 if self.residual_TD is None else self.residual_TD.data_ptr(),
            *hidden_TD.shape,
            self.plan.rows_N,
            self.plan.requests_N,
            self.plan.positions_N,
            self.plan.slots_R,
            self.plan.limits_R,
            self.plan.captures_LR[LAYER],
            bank.op_rows_LSK[LAYER],
            bank.op_counts_LS[LAYER],
            bank.directions_WD,
            bank.coefficients_WC,
            self.plan.bad_N,
        )

    @property
    def stream_TD(self) -> torch.Tensor:
        """The tensor that holds steered rows."""
        return self.hidden_TD if self.residual_TD is None else self.residual_TD


def bank_with(programs: Sequence[Sequence[SteeringOp]], width: int) -> ProgramBank:
    """A bank whose slot i holds program i; the slots were in use before, in another order."""
    size = BankSize(slots=len(programs), rows=4 * len(programs), operations_per_layer=4)
    bank = ProgramBank(size, layers=[LAYER], layer_count=1, hidden_size=width)
    for slot in reversed(range(len(programs))):
        bank.load(program_load(slot, [AddSpec(np.full(width, 1e6, np.float32))] * (1 + slot % 4)))
    for slot, operations in enumerate(programs):
        bank.load(program_load(slot, operations))
    return bank


def program_load(slot: int, operations: Sequence[SteeringOp]) -> ProgramLoad:
    program = compile_program(SteeringSpec(layers={LAYER: LayerSteeringSpec(operations=operations)}))
    return ProgramLoad(slot=slot, digest=program.digest, data=program_to_bytes(program))


def plan_of(asked: Sequence[Asked], captured: Sequence[torch.Tensor]) -> StepPlan:
    rows = [
        RequestRows(f"request-{index}", one.rows.start, len(one.rows), one.first_position)
        for index, one in enumerate(asked)
    ]
    requests = [
        PlannedRequest(
            slot=index if one.operations else NO_SLOT,
            steers_L=np.array([bool(one.operations)]),
            captures_L=np.array([memory.data_ptr() if one.captured else 0], np.int64),
            row_limit=one.row_limit,
        )
        for index, (one, memory) in enumerate(zip(asked, captured, strict=True))
    ]
    return build_plan(rows, requests)


@st.composite
def requests(draw: st.DrawFn, width: int) -> list[Asked]:
    """Requests over some of the rows of a step, in batch order."""
    asked, next_row = [], 0
    for _ in range(draw(st.integers(1, 5))):
        first_row = next_row + draw(st.integers(0, 2))
        count = draw(st.integers(1, 4))
        first_position = draw(st.integers(0, 9))
        asked.append(
            Asked(
                rows=range(first_row, first_row + count),
                operations=draw(operation_lists(width)),
                first_position=first_position,
                captured=draw(st.booleans()),
                row_limit=first_position + draw(st.integers(0, 5)),
            )
        )
        next_row = first_row + count
    return asked


@dataclass(frozen=True)
class Case:
    """Tensors of a step and the requests in it."""

    hidden_TD: torch.Tensor
    residual_TD: torch.Tensor | None
    asked: list[Asked]

    def run(self) -> Step:
        return Step(self.hidden_TD, self.residual_TD, self.asked)

    def wide_TD(self) -> torch.Tensor:
        """The stream before steering, as the contract has it: the sum in float32."""
        return self.hidden_TD.float() if self.residual_TD is None else self.hidden_TD.float() + self.residual_TD.float()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width, dtype, seed = draw(WIDTHS), draw(DTYPES), draw(SEEDS)
    asked = draw(requests(width))
    generator = torch.Generator().manual_seed(seed)
    shape = (asked[-1].rows.stop + draw(st.integers(0, 2)), width)  # rows at the end: padding
    hidden_TD = torch.randn(shape, generator=generator).to(dtype)
    residual_TD = (torch.randn(shape, generator=generator) * 5).to(dtype) if draw(st.booleans()) else None
    return Case(hidden_TD, residual_TD, asked)


def bits(tensor: torch.Tensor) -> npt.NDArray[np.int64]:
    return tensor.view(BITS[tensor.dtype]).numpy().astype(np.int64)


def other_rows(case: Case) -> list[int]:
    steered = {row for one in case.asked if one.operations and not is_idle(one) for row in one.rows}
    return [row for row in range(len(case.hidden_TD)) if row not in steered]


def is_idle(one: Asked) -> bool:
    """True if its program has no operation that can change the stream, and so none at this layer."""
    return LayerSteeringSpec(operations=one.operations).is_empty()


@given(cases())
def test_steered_rows_are_the_reference_rounded_once(case: Case) -> None:
    step = case.run()

    for one in case.asked:
        for row in one.rows if not is_idle(one) else ():
            x_D = case.wide_TD()[row].double()
            largest = float(x_D.norm())
            for operation in one.operations:
                x_D = apply_operation(x_D[None], operation)[0]
                largest = max(largest, float(x_D.norm()))
            error_D = (step.stream_TD[row].double() - x_D).abs() - ROUNDING[case.hidden_TD.dtype] * x_D.abs()
            assert float(error_D.clamp(min=0).norm()) <= 1e-5 * largest
    assert step.bad_count == 0
    assert not step.plan.bad_N.any()


@given(cases())
def test_rows_that_are_not_steered_keep_their_bits(case: Case) -> None:
    step, rows = case.run(), other_rows(case)

    assert np.array_equal(bits(step.hidden_TD)[rows], bits(case.hidden_TD)[rows])
    if case.residual_TD is not None and step.residual_TD is not None:
        assert np.array_equal(bits(step.residual_TD)[rows], bits(case.residual_TD)[rows])


@given(cases())
def test_a_steered_row_lies_in_the_residual_and_hidden_is_zero(case: Case) -> None:
    step = case.run()

    if step.residual_TD is not None:
        for one in case.asked:
            rows = [] if is_idle(one) else list(one.rows)
            assert not bits(step.hidden_TD)[rows].any()


@given(cases())
def test_captures_hold_what_the_next_layer_sees_at_the_rows_place(case: Case) -> None:
    step = case.run()

    for one, memory in zip(case.asked, step.captured, strict=True):
        want = torch.full_like(memory, SENTINEL)
        for row in one.rows:
            if one.captures(row):
                seen_D = step.hidden_TD[row].float()
                if step.residual_TD is not None:
                    seen_D = seen_D + step.residual_TD[row].float()
                want[one.first_position + row - one.rows.start] = seen_D.to(memory.dtype)
        assert np.array_equal(bits(memory), bits(want))


@given(cases(), st.data())
def test_a_row_that_is_not_finite_is_reported_left_as_it_was_and_harms_nobody(case: Case, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(case.hidden_TD) - 1))
    broken_TD = case.hidden_TD.clone()
    broken_TD[row, data.draw(st.integers(0, broken_TD.shape[1] - 1))] = data.draw(
        st.sampled_from([torch.nan, torch.inf, -torch.inf])
    )
    whole, broken = case.run(), Case(broken_TD, case.residual_TD, case.asked).run()

    others = [other for other in range(len(broken_TD)) if other != row]
    assert np.array_equal(bits(broken.hidden_TD)[others], bits(whole.hidden_TD)[others])
    assert np.array_equal(bits(broken.stream_TD)[others], bits(whole.stream_TD)[others])
    assert np.array_equal(bits(broken.hidden_TD)[row], bits(broken_TD)[row])
    if case.residual_TD is not None:
        assert np.array_equal(bits(broken.stream_TD)[row], bits(case.residual_TD)[row])
    reported = broken.plan.rows_N[broken.plan.bad_N != 0].tolist()
    assert reported == ([] if row in other_rows(case) else [row])
    assert broken.bad_count == len(reported)


@pytest.mark.parametrize("dtype", BITS)
def test_a_row_that_steering_drives_to_infinity_is_left_unsteered(dtype: torch.dtype) -> None:
    residual_TD = torch.tensor([[3e38, 1.0], [1.0, 2.0]]).to(dtype)
    hidden_TD = torch.ones_like(residual_TD)

    step = Step(hidden_TD, residual_TD, [Asked(rows=range(2), operations=[AddSpec([3e38, 0.0])])])

    assert step.bad_count == 1
    assert step.plan.bad_N.tolist() == [1, 0]
    assert step.residual_TD is not None
    assert bits(step.residual_TD)[0].tolist() == bits(residual_TD)[0].tolist()
    assert step.hidden_TD.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert step.residual_TD[1].isfinite().all()


def test_a_row_that_rounding_drives_to_infinity_is_left_unsteered() -> None:
    largest = torch.finfo(torch.bfloat16).max
    hidden_TD = torch.tensor([[largest, 0.0]], dtype=torch.bfloat16)

    step = Step(hidden_TD, None, [Asked(rows=range(1), operations=[AddSpec([largest * 2**-8, 0.0])])])

    assert step.plan.bad_N.tolist() == [1]
    assert step.hidden_TD.tolist() == hidden_TD.tolist()


@pytest.mark.parametrize("dtype", BITS)
def test_a_row_that_the_model_itself_made_nan_is_captured_as_it_is(dtype: torch.dtype) -> None:
    hidden_TD = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], dtype=dtype)

    step = Step(hidden_TD, torch.ones_like(hidden_TD), [Asked(rows=range(1), captured=True)])

    assert str(step.captured[0].tolist()) == "[[nan, inf, -inf, 2.0]]"
    assert step.bad_count == 0


@pytest.mark.parametrize("dtype", BITS)
def test_a_broken_stream_is_not_repaired_by_a_cap(dtype: torch.dtype) -> None:
    hidden_TD = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0]], dtype=dtype)
    cap = ProjectionCapSpec([1.0, 0.0], min=-1.0, max=1.0)

    step = Step(hidden_TD, None, [Asked(rows=range(2), operations=[cap])])

    assert step.plan.bad_N.tolist() == [1, 1]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_bfloat16_is_rounded_to_nearest_even_as_torch_does(patterns: list[int]) -> None:
    exact = np.array(patterns, np.uint32)
    ties_and_next_to_ties = exact & 0xFFFF0000 | 0x8000, exact & 0xFFFF0000 | 0x7FFF
    exact = np.concatenate([exact, *ties_and_next_to_ties]).view(np.float32)
    exact = np.append(exact[np.isfinite(exact)], np.float32(1.0))  # a direction of nothing but zeros is refused
    want_D = torch.from_numpy(exact).to(torch.bfloat16)
    fits_D = want_D.isfinite().numpy()

    hidden_TD = torch.zeros((1, int(fits_D.sum())), dtype=torch.bfloat16)
    step = Step(hidden_TD, None, [Asked(rows=range(1), operations=[AddSpec(exact[fits_D])])])

    assert torch.equal(step.hidden_TD[0], want_D[fits_D])


@given(cases())
def test_sums_are_rounded_as_torch_rounds_them(case: Case) -> None:
    rows = range(len(case.hidden_TD))

    step = Step(case.hidden_TD, case.residual_TD, [Asked(rows=rows, captured=True)])

    assert torch.equal(step.captured[0], case.wide_TD().to(case.hidden_TD.dtype))


@given(cases())
def test_a_row_gets_the_same_bits_whoever_its_neighbours_are(case: Case) -> None:
    together = case.run()

    for one in case.asked:
        alone = Step(case.hidden_TD, case.residual_TD, [one])
        rows = list(one.rows)
        assert np.array_equal(bits(alone.hidden_TD)[rows], bits(together.hidden_TD)[rows])
        assert np.array_equal(bits(alone.stream_TD)[rows], bits(together.stream_TD)[rows])


def test_an_ablation_of_scale_one_and_a_wide_cap_change_nothing() -> None:
    residual_TD = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    hidden_TD = torch.zeros_like(residual_TD)
    vector = np.ones(64, np.float32)
    operations = [AblationSpec(vector, 1.0), ProjectionCapSpec(vector, min=-1e6, max=1e6)]

    step = Step(hidden_TD, residual_TD, [Asked(rows=range(1), operations=operations)])

    assert torch.equal(step.stream_TD, residual_TD)
