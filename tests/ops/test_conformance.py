"""Ten thousand hostile cases on every backend of this machine, in every dtype, none outside the published tolerance."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.ops.reference import apply_operations
from tests.ops.conformance import (
    DTYPES,
    KINDS,
    Backend,
    CaseShape,
    OperationShape,
    Verdict,
    check,
    check_case,
    kernel,
    random_operation,
    reference,
    truth_of,
)
from tests.ops.kernels import CASES
from tests.ops.strategies import SEEDS

WIDTHS = (1, 2, 3, 16, 37, 64, 200)

SPECIAL_SCALES = (0.0, 1.0, -1.0, 1.0 + 1e-7, 2.0)
POOL = [random_operation(np.random.default_rng(index), KINDS[index % len(KINDS)]) for index in range(3000)]
POOL += [replace(shape, scale=SPECIAL_SCALES[index % 5]) for index, shape in enumerate(POOL[:300])]
"""Operations to draw whole, as drawing each of their numbers would take longer than all else."""

OPERATIONS_OF_A_CASE = st.lists(st.sampled_from(POOL), max_size=6).map(tuple)
LOADS = 5
"""Cases with the same list of operations, each with vectors, width and stream of its own: drawing takes long, too."""


def check_cases(operations: tuple[OperationShape, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(LOADS):
        magnitudes = tuple(10.0 ** rng.uniform(-3, 3, size=2))
        check_case(CaseShape(int(rng.choice(WIDTHS)), int(rng.integers(2**32)), magnitudes, operations))


@pytest.mark.timeout(7200)  # with all cases in an interpreter it takes half an hour, and more on a busy machine
@settings(max_examples=CASES // LOADS, database=None, suppress_health_check=list(HealthCheck))
@given(OPERATIONS_OF_A_CASE, SEEDS)
def test_every_backend_keeps_the_contract_in_every_dtype(operations: tuple[OperationShape, ...], seed: int) -> None:
    check_cases(operations, seed)


def test_rows_whose_direction_is_lost_again_and_again_have_a_truth_that_is_finite() -> None:
    huge = OperationShape(
        kind="add",
        relation="fresh",
        norm=1.7e14,
        scale=2.0,
        bounds="inside",
        is_relative=False,
        limit=9.8,
        keep_norm=True,
        rows="all",
    )
    small = replace(huge, relation="near", norm=2.7, scale=3.3, bounds="min inside", limit=1.8, rows="last")
    check_cases((huge, small, small, small, small, small), seed=0)


@pytest.mark.extended
@pytest.mark.timeout(7200)
@settings(max_examples=10_000 // LOADS, database=None, suppress_health_check=list(HealthCheck))
@given(OPERATIONS_OF_A_CASE, SEEDS)
def test_every_backend_keeps_the_contract_in_10_000_cases(operations: tuple[OperationShape, ...], seed: int) -> None:
    check_cases(operations, seed)


STREAM_TD = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 64))).float()
VECTORS = np.random.default_rng(1).normal(size=(3, 64))
OPERATIONS = [AddSpec(VECTORS[0]), ProjectionCapSpec(VECTORS[1], max=-2.0), AblationSpec(VECTORS[2], 0.5)]


def in_another_order(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    return reference(stream_TD, operations[::-1])


def without_the_last(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    return reference(stream_TD, operations[:-1])


def rounded_between_operations(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    rows_TD = stream_TD
    for operation in operations:
        rows_TD = reference(rows_TD.bfloat16(), [operation])[0]
    return rows_TD.float(), np.zeros(len(rows_TD), bool)


def a_thousandth_off(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    rows_TD, bad_T = reference(stream_TD, operations)
    return rows_TD * 1.001, bad_T


def bad_without_reason(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    return stream_TD, np.ones(len(stream_TD), bool)


def never_bad(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> Verdict:
    return apply_operations(stream_TD, operations), np.zeros(len(stream_TD), bool)


@pytest.mark.parametrize(
    "backend", [in_another_order, without_the_last, rounded_between_operations, a_thousandth_off, bad_without_reason]
)
def test_a_backend_that_does_something_else_fails(backend: Backend) -> None:
    truth = truth_of(STREAM_TD.double().numpy(), OPERATIONS)

    assert (check(reference, STREAM_TD, OPERATIONS, truth) <= 1.0).all()
    with pytest.raises(AssertionError):
        check(backend, STREAM_TD, OPERATIONS, truth)


BEYOND = 2.0**66
"""A norm whose square float32 does not hold."""


@pytest.mark.parametrize("backend", [reference, kernel])
@pytest.mark.parametrize(
    ("row", "operations"),
    [
        ([3.0, 4.0], [AddSpec([BEYOND, 0.0], keep_norm=True)]),
        ([3.0, 4.0], [AddSpec([BEYOND, 0.0]), AblationSpec([1.0, 0.0], keep_norm=True)]),
        ([3.0, 4.0], [AddSpec([BEYOND, 0.0]), AblationSpec([1.0, 0.0], max_relative_change=0.1)]),
        ([3.0, 4.0], [AddSpec([BEYOND, 0.0]), ProjectionCapSpec([1.0, 0.0], max=1.0, max_relative_change=0.1)]),
        ([3.0, 4.0], [AddSpec([BEYOND, 0.0]), AddSpec([-1.0, 0.0], scaling="relative")]),
    ],
    ids=["kept", "kept before", "limited", "limited cap", "relative"],
)
def test_a_row_whose_norm_float32_does_not_hold_is_bad(
    backend: Backend, row: list[float], operations: list[SteeringOp]
) -> None:
    stream_TD = torch.tensor([row])
    rows_TD, bad_T = backend(stream_TD, operations)

    assert bad_T.tolist() == [True]
    assert torch.equal(rows_TD, stream_TD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backend_that_steers_a_bad_row_fails(dtype: str) -> None:
    stream_TD = STREAM_TD.to(DTYPES[dtype])
    huge = [AddSpec(VECTORS[0] * 1e20)]
    truth = truth_of(stream_TD.double().numpy(), huge)

    assert np.isnan(check(kernel, stream_TD, huge, truth)).all()
    with pytest.raises(AssertionError):
        check(never_bad, stream_TD, huge, truth)
