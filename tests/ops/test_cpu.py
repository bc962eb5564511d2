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

from steer_service.core.arrays import OVERFLOWS_AT, dtype_from_name
from steer_service.core.positions import OPEN_END, Spans
from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.engine.bank import BankSize, ProgramBank, ProgramLoad
from steer_service.ops.cpu import KERNELS, narrow_bfloat16, narrow_float16, widen_bfloat16, widen_float16
from steer_service.ops.plan import NO_SLOT, PlannedRequest, RequestRows, StepPlan, build_plan
from steer_service.ops.program import compile_program, program_to_bytes
from steer_service.ops.reference import apply_operation
from tests.ops.strategies import SEEDS, WIDTHS, operation_lists

LAYER = 0
SENTINEL = 7.0
"""What capture memory holds before anything is captured."""

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Equal bits tell more than equal numbers: NaN equals itself, and 0.0 is not -0.0."""

DTYPES = st.sampled_from(list(BITS))
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The relative error of one rounding to the stream's dtype, beside those of computing in float32."""


@dataclass(frozen=True)
class Asked:
    """One request of a case, and what the kernel is to do for it."""

    rows: range
    operations: Sequence[SteeringOp] = ()
    first_position: int = 0
    captured: bool = False
    row_limit: int = 1000
    steered_at: Spans | None = None
    captured_at: Spans | None = None
    is_wide: bool = False

    def position(self, row: int) -> int:
        return self.first_position + row - self.rows.start

    def steers(self, row: int) -> bool:
        return not self.is_idle() and is_within(self.position(row), self.steered_at)

    def is_idle(self) -> bool:
        """True if its program has no operation that can change the stream, and so none at this layer."""
        return LayerSteeringSpec(operations=self.operations).is_empty()

    def captured_rows(self) -> list[int]:
        """Rows of the step that are captured, in order."""
        positions = {row: self.position(row) for row in self.rows if self.captured}
        return [row for row, at in positions.items() if at < self.row_limit and is_within(at, self.captured_at)]

    def captured_before(self) -> int:
        """How many rows of its captured positions lie before this step."""
        return sum(is_within(at, self.captured_at) for at in range(self.first_position))


def is_within(position: int, spans: Spans | None) -> bool:
    return spans is None or any(first <= position < end for first, end in spans)


class Step:
    """One layer of one step: runs the kernel in place and keeps what it needs to look at the outcome."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        residual_TD: torch.Tensor | None,
        asked: Sequence[Asked],
        *,
        checks: bool = False,
    ) -> None:
        self.hidden_TD, self.residual_TD = hidden_TD.clone(), None if residual_TD is None else residual_TD.clone()
        width = hidden_TD.shape[1]
        self.before, self.captured = (
            [
                torch.full(
                    (one.first_position + len(one.rows), width),
                    SENTINEL,
                    dtype=torch.float32 if one.is_wide else hidden_TD.dtype,
                )
                for one in asked
            ]
            for _ in range(2)
        )
        bank = bank_with([one.operations for one in asked], width)
        self.plan = plan_of(asked, self.before, self.captured, check_layer=LAYER if checks else LAYER + 1)
        self.bad_count = KERNELS[str(hidden_TD.dtype).removeprefix("torch.")](
            self.hidden_TD.data_ptr(),
            0 if self.residual_TD is None else self.residual_TD.data_ptr(),
            *hidden_TD.shape,
            self.plan.rows_N,
            self.plan.requests_N,
            self.plan.slots_N,
            self.plan.capture_rows_N,
            self.plan.slots_R,
            self.plan.wide_R,
            self.plan.before_LR[LAYER],
            self.plan.after_LR[LAYER],
            bank.op_rows_LSK[LAYER],
            bank.op_counts_LS[LAYER],
            bank.directions_WD,
            bank.coefficients_WC,
            self.plan.check_layer == LAYER,
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


def plan_of(
    asked: Sequence[Asked], before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], check_layer: int
) -> StepPlan:
    rows = [
        RequestRows(f"request-{index}", one.rows.start, len(one.rows), one.first_position)
        for index, one in enumerate(asked)
    ]
    requests = [
        PlannedRequest(
            slot=index if one.operations else NO_SLOT,
            steers_L=np.array([bool(one.operations), False]),
            before_L=np.array([before[index].data_ptr() if one.captured else 0, 0], np.int64),
            after_L=np.array([after[index].data_ptr() if one.captured else 0, 0], np.int64),
            steered=one.steered_at,
            captured=one.captured_at,
            row_limit=one.row_limit,
            is_wide=one.is_wide,
        )
        for index, one in enumerate(asked)
    ]
    return build_plan(rows, requests, check_layer=check_layer)


SPANS = st.none() | st.lists(st.integers(0, 14), unique=True, max_size=6).map(
    lambda edges: tuple(zip(sorted(edges)[::2], [*sorted(edges), OPEN_END][1::2], strict=False))
)
"""Some positions up to 14, perhaps none, perhaps all from some position on."""


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
                steered_at=draw(SPANS),
                captured_at=draw(SPANS),
                is_wide=draw(st.booleans()),
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
    steered = {row for one in case.asked for row in one.rows if one.steers(row)}
    return [row for row in range(len(case.hidden_TD)) if row not in steered]


@given(cases())
def test_steered_rows_are_the_reference_rounded_once(case: Case) -> None:
    step = case.run()

    for one in case.asked:
        for row in filter(one.steers, one.rows):
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
            rows = [row for row in one.rows if one.steers(row)]
            assert not bits(step.hidden_TD)[rows].any()


@given(cases())
def test_captures_hold_what_this_layer_made_and_what_the_next_layer_sees_at_the_rows_places(case: Case) -> None:
    step = case.run()

    for index, one in enumerate(case.asked):
        made, seen = torch.full_like(step.before[index], SENTINEL), torch.full_like(step.captured[index], SENTINEL)
        for place, row in enumerate(one.captured_rows(), start=one.captured_before()):
            made[place] = case.wide_TD()[row]  # rounded by the assignment if it is not wide
            seen_D = step.hidden_TD[row].float()
            if step.residual_TD is not None:
                seen_D = seen_D + step.residual_TD[row].float()
            seen[place] = seen_D
        assert np.array_equal(bits(step.before[index]), bits(made))
        assert np.array_equal(bits(step.captured[index]), bits(seen))


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
    huge = torch.finfo(dtype).max
    residual_TD = torch.tensor([[huge, 1.0], [1.0, 2.0]]).to(dtype)
    hidden_TD = torch.ones_like(residual_TD)
    add = AddSpec([0.9 * min(huge, 1e19), 0.0])

    step = Step(hidden_TD, residual_TD, [Asked(rows=range(2), operations=[add], captured=True)])

    assert step.bad_count == 1
    assert step.plan.bad_N.tolist() == [1, 0]
    assert step.residual_TD is not None
    assert bits(step.residual_TD)[0].tolist() == bits(residual_TD)[0].tolist()
    assert step.hidden_TD.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert step.residual_TD[1].isfinite().all()
    assert step.captured[0][0].tolist() == (hidden_TD.float() + residual_TD.float()).to(dtype)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("element", "is_bad"), [(1.8e19, 0), (1.9e19, 1)])
def test_a_row_whose_squares_overflow_would_vanish_in_the_next_norm_and_is_bad(
    dtype: torch.dtype, element: float, is_bad: int
) -> None:
    hidden_TD = torch.zeros((1, 37), dtype=dtype)
    vector = np.eye(37)[5] * element

    step = Step(hidden_TD, None, [Asked(rows=range(1), operations=[AddSpec(vector)])])

    assert step.plan.bad_N.tolist() == [is_bad]
    assert bool(step.hidden_TD.any()) != bool(is_bad)


@pytest.mark.parametrize("dtype", BITS)
def test_the_check_looks_at_every_row_of_a_request_with_a_slot_and_writes_nothing(dtype: torch.dtype) -> None:
    hidden_TD = torch.ones((6, 5), dtype=dtype)
    hidden_TD[[1, 3, 5], 2] = torch.nan
    asked = [
        Asked(rows=range(4), operations=[AddSpec(np.ones(5))], steered_at=((0, 1), (3, OPEN_END))),
        Asked(rows=range(4, 6), captured=True),
    ]

    quiet, checked = Step(hidden_TD, None, asked), Step(hidden_TD, None, asked, checks=True)

    assert quiet.plan.bad_N.tolist() == [0, 0, 0, 1, 0, 0]
    assert checked.plan.bad_N.tolist() == [0, 1, 0, 1, 0, 0]
    assert (quiet.bad_count, checked.bad_count) == (1, 2)
    assert np.array_equal(bits(checked.hidden_TD), bits(quiet.hidden_TD))


def test_the_check_needs_no_program_at_its_layer() -> None:
    hidden_TD = torch.tensor([[1e19, 1.0], [2e19, 1.0]])
    nothing = [AddSpec([1.0, 0.0], 0.0)]

    step = Step(hidden_TD, torch.zeros_like(hidden_TD), [Asked(rows=range(2), operations=nothing)], checks=True)

    assert step.plan.bad_N.tolist() == [0, 1]
    assert torch.equal(step.hidden_TD, hidden_TD)


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


# -- 16-bit floats -----------------------------------------------------------------------------------------------------

HALVES = {
    "bfloat16": (dtype_from_name("bfloat16"), widen_bfloat16, narrow_bfloat16),
    "float16": (dtype_from_name("float16"), widen_float16, narrow_float16),
}


def narrowed(numbers: npt.NDArray[np.float32], half: str) -> npt.NDArray[np.uint16]:
    return np.array([HALVES[half][2](number) for number in numbers], np.uint16)


def narrowed_by_numpy(numbers: npt.NDArray[np.float32], half: str) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore", under="ignore"):
        return numbers.astype(HALVES[half][0]).view(np.uint16)


@pytest.mark.parametrize("half", HALVES)
def test_all_65536_numbers_are_widened_as_numpy_does_and_come_back(half: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    dtype, widen, _ = HALVES[half]
    got = np.array([widen(pattern) for pattern in patterns], np.float32)
    want = patterns.view(dtype).astype(np.float32)
    is_nan = np.isnan(want)

    assert np.array_equal(np.isnan(got), is_nan)
    assert np.array_equal(got[~is_nan].view(np.uint32), want[~is_nan].view(np.uint32))
    assert np.array_equal(narrowed(got, half)[~is_nan], patterns[~is_nan])
    assert np.isnan(narrowed(got, half)[is_nan].view(dtype).astype(np.float32)).all()


@pytest.mark.parametrize("half", HALVES)
def test_every_tie_and_both_its_neighbours_are_rounded_as_numpy_does(half: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        numbers = patterns.view(HALVES[half][0]).astype(np.float64)
    steps = np.stack([numbers[:-1], numbers[1:]])[:, np.isfinite(numbers[:-1]) & np.isfinite(numbers[1:])]
    ties = steps.mean(axis=0).astype(np.float32)
    ties = np.append(ties, OVERFLOWS_AT[half] * np.array([1, -1])).astype(np.float32)
    for exact in (ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))):
        assert np.array_equal(narrowed(exact, half), narrowed_by_numpy(exact, half))


@settings(max_examples=500)
@given(st.sampled_from(list(HALVES)), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_float32_is_rounded_as_numpy_does(half: str, patterns: list[int]) -> None:
    exact = np.array(patterns, np.uint32).view(np.float32)
    is_nan = np.isnan(exact)

    got, want = narrowed(exact, half), narrowed_by_numpy(exact, half)

    assert np.array_equal(got[~is_nan], want[~is_nan])
    assert np.isnan(got[is_nan].view(HALVES[half][0]).astype(np.float32)).all()


@pytest.mark.parametrize("half", HALVES)
def test_the_kernel_rounds_rows_as_torch_does(half: str) -> None:
    dtype = getattr(torch, half)
    exact = torch.linspace(-3.0, 3.0, 997) ** 9 * 1e-2

    step = Step(torch.zeros((1, 997), dtype=dtype), None, [Asked(rows=range(1), operations=[AddSpec(exact)])])

    assert torch.equal(step.hidden_TD[0], exact.to(dtype))


# -- rows and neighbours -----------------------------------------------------------------------------------------------


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
