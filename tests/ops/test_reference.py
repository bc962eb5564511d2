"""The reference operations against formulas written down a second time, in numpy and float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.ops.reference import apply_operation, apply_operations
from tests.ops.strategies import NUMBERS, SEEDS, WIDTHS, operation_lists, operations, vectors

ROWS = 5


def stream(seed: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, width)) * 3.0


def by_formula(x_TD: np.ndarray, operation: SteeringOp) -> np.ndarray:
    v_D = np.asarray(operation.vector, dtype=np.float64)
    if isinstance(operation, AddSpec):
        return x_TD + operation.scale * v_D
    unit_D = v_D / np.sqrt((v_D * v_D).sum())
    p_T1 = (x_TD * unit_D).sum(axis=1, keepdims=True)
    if isinstance(operation, AblationSpec):
        return x_TD + (operation.scale - 1.0) * p_T1 * unit_D
    lowest = -np.inf if operation.min is None else operation.min
    highest = np.inf if operation.max is None else operation.max
    return x_TD + (np.minimum(np.maximum(p_T1, lowest), highest) - p_T1) * unit_D


@given(WIDTHS, SEEDS, st.data())
def test_every_operation_is_its_formula_in_float64(width: int, seed: int, data: st.DataObject) -> None:
    x_TD, operation = stream(seed, width), data.draw(operations(width))

    got = apply_operation(torch.from_numpy(x_TD), operation)

    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), by_formula(x_TD, operation), rtol=1e-12, atol=1e-12)


@given(WIDTHS, SEEDS, st.data())
def test_a_list_is_its_operations_one_after_the_other(width: int, seed: int, data: st.DataObject) -> None:
    x_TD, listed = stream(seed, width), data.draw(operation_lists(width))
    want_TD, largest = x_TD, np.abs(x_TD).max()
    for operation in listed:
        want_TD = by_formula(want_TD, operation)
        largest = max(largest, np.abs(want_TD).max())

    got = apply_operations(torch.from_numpy(x_TD), listed)

    np.testing.assert_allclose(got.numpy(), want_TD, rtol=0, atol=1e-12 * largest)


@given(WIDTHS, SEEDS, st.data())
def test_float32_stays_float32_and_agrees_with_float64(width: int, seed: int, data: st.DataObject) -> None:
    x_TD, operation = torch.from_numpy(stream(seed, width)).float(), data.draw(operations(width))

    got, want = apply_operation(x_TD, operation), apply_operation(x_TD.double(), operation)

    assert got.dtype == torch.float32
    scale = max(float(x_TD.norm(dim=1).max()), float(want.norm(dim=1).max()))
    assert float((got.double() - want).norm(dim=1).max()) <= 1e-6 * scale


@given(WIDTHS, SEEDS, st.data())
def test_the_stream_given_is_not_changed(width: int, seed: int, data: st.DataObject) -> None:
    x_TD = torch.from_numpy(stream(seed, width))
    before = x_TD.clone()

    apply_operations(x_TD, data.draw(operation_lists(width, least=1)))

    assert torch.equal(x_TD, before)


@given(WIDTHS, SEEDS, st.data())
def test_ablation_leaves_its_share_of_the_projection(width: int, seed: int, data: st.DataObject) -> None:
    x_TD, vector, share = stream(seed, width), data.draw(vectors(width)), data.draw(NUMBERS)
    unit_D = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))

    got = apply_operation(torch.from_numpy(x_TD), AblationSpec(vector, share)).numpy()

    np.testing.assert_allclose(got @ unit_D, share * (x_TD @ unit_D), atol=1e-11)


@given(WIDTHS, SEEDS, st.data())
def test_a_cap_puts_the_projection_within_its_bounds_and_changes_nothing_else(
    width: int, seed: int, data: st.DataObject
) -> None:
    x_TD, vector = stream(seed, width), data.draw(vectors(width))
    low, high = sorted([data.draw(NUMBERS), data.draw(NUMBERS)])
    unit_D = vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))

    got = apply_operation(torch.from_numpy(x_TD), ProjectionCapSpec(vector, low, high)).numpy()

    assert (got @ unit_D >= low - 1e-11).all()
    assert (got @ unit_D <= high + 1e-11).all()
    rest = np.eye(width) - np.outer(unit_D, unit_D)
    np.testing.assert_allclose(got @ rest, x_TD @ rest, atol=1e-11)


def test_order_matters() -> None:
    x_TD = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    add, ablate = AddSpec([2.0, 0.0]), AblationSpec([1.0, 0.0])

    assert apply_operations(x_TD, [add, ablate]).tolist() == [[0.0, 1.0]]
    assert apply_operations(x_TD, [ablate, add]).tolist() == [[2.0, 1.0]]


def test_no_operations_change_nothing() -> None:
    x_TD = torch.tensor([[1.0, -2.0]])

    assert apply_operations(x_TD, []) is x_TD


@pytest.mark.parametrize(
    "operation",
    [
        AddSpec([1.0, -2.0, 0.5], -0.7),
        AblationSpec([1.0, -2.0, 0.5], 0.3),
        ProjectionCapSpec([1.0, -2.0, 0.5], min=-0.1, max=0.1),  # the rows below project to -1.9 and 0.0
    ],
    ids=lambda operation: type(operation).__name__,
)
def test_every_operation_has_the_right_gradient(operation: SteeringOp) -> None:
    x_TD = torch.tensor([[0.5, 2.0, -1.5], [2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x: apply_operation(x, operation), (x_TD,))


def test_a_gradient_flows_through_a_list() -> None:
    x_TD = torch.ones((2, 2), requires_grad=True)

    apply_operations(x_TD, [AddSpec([1.0, 1.0]), AblationSpec([1.0, 0.0])]).sum().backward()

    assert x_TD.grad is not None
    assert x_TD.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]


ROWS_TD = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-6.0, 8.0]], dtype=torch.float64)
"""Rows of norm 5, 0 and 10."""


def after(operation: SteeringOp) -> list[list[float]]:
    return apply_operation(ROWS_TD, operation).tolist()


def test_a_relative_addition_is_as_long_as_its_scale_says_of_each_row() -> None:
    assert after(AddSpec([0.0, 7.0], 0.5, scaling="relative")) == [[3.0, 6.5], [0.0, 0.0], [-6.0, 13.0]]


def test_a_change_is_shortened_to_the_limit_and_keeps_its_direction() -> None:
    assert after(AddSpec([0.0, 2.0], -2.0, max_relative_change=0.5)) == [[3.0, 1.5], [0.0, 0.0], [-6.0, 4.0]]
    assert after(AblationSpec([0.0, 1.0], max_relative_change=0.4)) == [[3.0, 2.0], [0.0, 0.0], [-6.0, 4.0]]
    cap = ProjectionCapSpec([0.0, 3.0], max=3.0, max_relative_change=0.1)
    assert after(cap) == [[3.0, 3.5], [0.0, 0.0], [-6.0, 7.0]]


def test_a_kept_norm_is_that_of_the_row_before() -> None:
    assert after(AblationSpec([0.0, 1.0], keep_norm=True)) == [[5.0, 0.0], [0.0, 0.0], [-10.0, 0.0]]
    assert after(AddSpec([0.0, 1.0], -4.0, keep_norm=True))[0] == [5.0, 0.0]


def test_the_limit_comes_before_the_kept_norm() -> None:
    operation = AddSpec([0.0, 1.0], 100.0, max_relative_change=0.8, keep_norm=True)

    assert after(operation)[0] == pytest.approx([5.0 * 3 / 73**0.5, 5.0 * 8 / 73**0.5])


def test_a_row_that_becomes_zero_cannot_keep_another_norm() -> None:
    rows = apply_operation(torch.tensor([[0.0, 2.0]]), AblationSpec([0.0, 1.0], keep_norm=True))

    assert rows.isnan().all()


@given(WIDTHS, SEEDS, st.data())
def test_norms_are_what_they_should_be_for_every_operation(width: int, seed: int, data: st.DataObject) -> None:
    x_TD, operation = torch.from_numpy(stream(seed, width)), data.draw(operations(width))
    limit = data.draw(st.floats(0.01, 4.0))
    norm_T = x_TD.norm(dim=1)

    plain_TD, limited_TD, kept_TD = (
        apply_operation(x_TD, replace(operation, **options))
        for options in ({}, {"max_relative_change": limit}, {"keep_norm": True})
    )

    assert bool(((limited_TD - x_TD).norm(dim=1) <= limit * norm_T * (1 + 1e-9)).all())
    is_within_T = (plain_TD - x_TD).norm(dim=1) < limit * norm_T
    torch.testing.assert_close(limited_TD[is_within_T], plain_TD[is_within_T])
    has_direction_T = plain_TD.norm(dim=1) > 1e-6 * norm_T
    torch.testing.assert_close(kept_TD[has_direction_T].norm(dim=1), norm_T[has_direction_T])


@pytest.mark.parametrize(
    "options", [{"scaling": "relative"}, {"max_relative_change": 0.1}, {"keep_norm": True}], ids=str
)
def test_gradients_pass_through_norms(options: dict[str, Any]) -> None:
    x_TD = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    operation = AddSpec(np.arange(1.0, 6.0), 0.7, **options)

    assert torch.autograd.gradcheck(lambda rows_TD: apply_operation(rows_TD, operation), (x_TD,))
