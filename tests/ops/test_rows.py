"""A kernel against the reference: the right rows, the right numbers, and nothing else touched.

T: rows of the step; D: hidden size. The CPU's kernel here; test_cuda.py runs this file with the GPU's.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.spans import OPEN_END
from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec
from steer_service.ops.reference import apply_operation
from tests.ops.step import BITS, SENTINEL, Case, ParsedPrompt, Step, bits, cases, other_rows

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""The relative error of one rounding to the stream's dtype, beside those of computing in float32."""


@given(cases())
def test_steered_rows_are_the_reference_rounded_once(case: Case) -> None:
    step = case.run()

    for one in case.asked:
        for row in filter(one.steers, one.rows):
            x_D = case.wide_TD()[row].double()
            largest = float(x_D.norm())
            for operation in one.operations_at(row):
                x_D = apply_operation(x_D[None], operation)[0]
                largest = max(largest, float(x_D.norm()))
            error_D = (step.stream_TD[row].double() - x_D).abs() - ROUNDING[case.hidden_TD.dtype] * x_D.abs()
            assert float(error_D.clamp(min=0).norm()) <= 1e-5 * largest
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
def test_captures_hold_the_rows_before_and_after_steering_at_their_places(case: Case) -> None:
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
def test_a_row_that_is_not_finite_is_reported_and_left_as_it_was_and_changes_no_other(
    case: Case, data: st.DataObject
) -> None:
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


@pytest.mark.parametrize("dtype", BITS)
def test_a_row_that_steering_drives_to_infinity_is_left_unsteered(dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    residual_TD = torch.tensor([[huge, 1.0], [1.0, 2.0]]).to(dtype)
    hidden_TD = torch.ones_like(residual_TD)
    add = AddSpec([0.9 * min(huge, 1e19), 0.0])

    step = Step(hidden_TD, residual_TD, [ParsedPrompt(rows=range(2), operations=[add], captured=True)])

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

    step = Step(hidden_TD, None, [ParsedPrompt(rows=range(1), operations=[AddSpec(vector)])])

    assert step.plan.bad_N.tolist() == [is_bad]
    assert bool(step.hidden_TD.any()) != bool(is_bad)


@pytest.mark.parametrize("dtype", BITS)
def test_with_norms_zeros_stay_zeros_and_a_row_that_loses_its_direction_is_bad(dtype: torch.dtype) -> None:
    hidden_TD = torch.zeros((3, 5), dtype=dtype)
    hidden_TD[1:, 2] = 2.0
    hidden_TD[2, 3] = 1.0
    axis = np.eye(5)[2]
    relative, limited = AddSpec(axis, 1.0, scaling="relative"), AddSpec(axis, 9.0, max_relative_change=1.0)
    asked = [ParsedPrompt(rows=range(3), operations=[relative, limited, AblationSpec(axis, keep_norm=True)])]

    step = Step(hidden_TD, None, asked)

    assert step.plan.bad_N.tolist() == [0, 1, 0]
    assert torch.equal(step.hidden_TD[:2], hidden_TD[:2])
    along = 2 + 5**0.5
    along += min(9.0, np.hypot(along, 1))
    np.testing.assert_allclose(step.hidden_TD[2].float(), [0, 0, 0, np.hypot(along, 1), 0], rtol=1e-2)


@pytest.mark.parametrize("dtype", BITS)
def test_the_check_looks_at_every_row_of_a_request_with_a_slot_and_writes_nothing(dtype: torch.dtype) -> None:
    hidden_TD = torch.ones((6, 5), dtype=dtype)
    hidden_TD[[1, 3, 5], 2] = torch.nan
    asked = [
        ParsedPrompt(rows=range(4), operations=[AddSpec(np.ones(5))], steered_at=((0, 1), (3, OPEN_END))),
        ParsedPrompt(rows=range(4, 6), captured=True),
    ]

    quiet, checked = Step(hidden_TD, None, asked), Step(hidden_TD, None, asked, checks=True)

    assert quiet.plan.bad_N.tolist() == [0, 0, 0, 1, 0, 0]
    assert checked.plan.bad_N.tolist() == [0, 1, 0, 1, 0, 0]
    assert np.array_equal(bits(checked.hidden_TD), bits(quiet.hidden_TD))


def test_the_check_needs_no_program_at_its_layer() -> None:
    hidden_TD = torch.tensor([[1e19, 1.0], [2e19, 1.0]])
    nothing = [AddSpec([1.0, 0.0], 0.0)]

    step = Step(hidden_TD, torch.zeros_like(hidden_TD), [ParsedPrompt(rows=range(2), operations=nothing)], checks=True)

    assert step.plan.bad_N.tolist() == [0, 1]
    assert torch.equal(step.hidden_TD, hidden_TD)


def test_a_row_that_rounding_drives_to_infinity_is_left_unsteered() -> None:
    largest = torch.finfo(torch.bfloat16).max
    hidden_TD = torch.tensor([[largest, 0.0]], dtype=torch.bfloat16)

    step = Step(hidden_TD, None, [ParsedPrompt(rows=range(1), operations=[AddSpec([largest * 2**-8, 0.0])])])

    assert step.plan.bad_N.tolist() == [1]
    assert step.hidden_TD.tolist() == hidden_TD.tolist()


@pytest.mark.parametrize("dtype", BITS)
def test_a_row_that_the_model_itself_made_nan_is_captured_as_it_is(dtype: torch.dtype) -> None:
    hidden_TD = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], dtype=dtype)

    step = Step(hidden_TD, torch.ones_like(hidden_TD), [ParsedPrompt(rows=range(1), captured=True)])

    assert str(step.captured[0].tolist()) == "[[nan, inf, -inf, 2.0]]"
    assert not step.plan.bad_N.any()


@pytest.mark.parametrize("dtype", BITS)
def test_a_broken_stream_is_not_repaired_by_a_cap(dtype: torch.dtype) -> None:
    hidden_TD = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0]], dtype=dtype)
    cap = ProjectionCapSpec([1.0, 0.0], min=-1.0, max=1.0)

    step = Step(hidden_TD, None, [ParsedPrompt(rows=range(2), operations=[cap])])

    assert step.plan.bad_N.tolist() == [1, 1]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_the_kernel_rounds_rows_as_torch_does(half: str) -> None:
    dtype = getattr(torch, half)
    exact = torch.linspace(-3.0, 3.0, 997) ** 9 * 1e-2

    step = Step(torch.zeros((1, 997), dtype=dtype), None, [ParsedPrompt(rows=range(1), operations=[AddSpec(exact)])])

    assert torch.equal(step.hidden_TD[0], exact.to(dtype))


@given(cases())
def test_sums_are_rounded_as_torch_rounds_them(case: Case) -> None:
    rows = range(len(case.hidden_TD))

    step = Step(case.hidden_TD, case.residual_TD, [ParsedPrompt(rows=rows, captured=True)])

    assert torch.equal(step.captured[0], case.wide_TD().to(case.hidden_TD.dtype))


@given(cases())
def test_a_row_gets_the_same_bits_beside_any_neighbours(case: Case) -> None:
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

    step = Step(hidden_TD, residual_TD, [ParsedPrompt(rows=range(1), operations=operations)])

    assert torch.equal(step.stream_TD, residual_TD)
