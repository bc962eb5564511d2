"""Compiled programs: what is stored, rounded once, and the same again after a trip as bytes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.ops.program import (
    LayerProgram,
    compile_program,
    program_from_bytes,
    program_to_bytes,
    unit_direction,
)
from steer_service.ops.reference import apply_operations
from tests.ops.strategies import SEEDS, WIDTHS, operation_lists

INF = math.inf


def spec_of(layers: dict[int, list[SteeringOp]]) -> SteeringSpec:
    return SteeringSpec(
        layers={layer: LayerSteeringSpec(operations=operations) for layer, operations in layers.items()}
    )


def compiled(*operations: SteeringOp) -> LayerProgram:
    return compile_program(spec_of({0: list(operations)})).layers[0]


def specs(width: int) -> st.SearchStrategy[SteeringSpec]:
    return st.dictionaries(st.integers(0, 40), operation_lists(width), max_size=4).map(spec_of)


@given(WIDTHS, st.data())
def test_a_program_is_the_same_after_a_trip_as_bytes(width: int, data: st.DataObject) -> None:
    program = compile_program(data.draw(specs(width)))

    again = program_from_bytes(program_to_bytes(program), width)

    assert again.digest == program.digest
    assert again.operation_count == program.operation_count
    assert list(again.layers) == list(program.layers)
    for layer, part in program.layers.items():
        assert again.layers[layer].directions.tobytes() == part.directions.tobytes()
        assert again.layers[layer].coefficients.tobytes() == part.coefficients.tobytes()
        assert again.layers[layer].directions.shape == (len(part.coefficients), width)


@given(WIDTHS, st.data())
def test_equal_specs_give_equal_bytes(width: int, data: st.DataObject) -> None:
    spec = data.draw(specs(width))

    assert program_to_bytes(compile_program(spec)) == program_to_bytes(compile_program(spec.clone()))


@given(WIDTHS, st.data())
def test_the_primitive_equals_the_operations_on_a_programs_rows(width: int, data: st.DataObject) -> None:
    operations = data.draw(operation_lists(width, least=1))
    stream_D = np.random.default_rng(data.draw(SEEDS)).normal(size=width)
    largest = np.linalg.norm(stream_D)

    x_D = stream_D
    for part in compile_program(spec_of({7: operations})).layers.values():
        for direction_D, (a, b, low, high, *_) in zip(
            part.directions, part.coefficients.astype(np.float64), strict=True
        ):
            p = x_D @ direction_D.astype(np.float64)
            x_D = x_D + (np.clip(a * p + b, low, high) - p) * direction_D.astype(np.float64)
            largest = max(largest, np.linalg.norm(x_D), abs(p) * np.linalg.norm(direction_D))

    want_D = apply_operations(torch.from_numpy(stream_D)[None], operations)[0].numpy()
    np.testing.assert_allclose(x_D, want_D, rtol=0, atol=2e-6 * largest)


@given(WIDTHS, SEEDS, st.floats(-1e6, 1e6))
def test_the_direction_of_an_add_is_its_product_rounded_once(width: int, seed: int, scale: float) -> None:
    vector = np.random.default_rng(seed).normal(size=width).astype(np.float32) + np.float32(1e-3)
    once = np.array([float(element) * scale for element in vector]).astype(np.float32)

    program = compile_program(spec_of({0: [AddSpec(vector, scale), AblationSpec(vector)]}))

    assert program.layers[0].directions[0].tolist() == once.tolist()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_caps_and_ablations_get_unit_directions_however_long_the_vector_is(size: float) -> None:
    vector = (np.random.default_rng(0).normal(size=64) * size).astype(np.float32)

    directions = compiled(ProjectionCapSpec(vector, max=1.0), AblationSpec(vector)).directions.astype(np.float64)

    exact = vector.astype(np.float64) / math.hypot(*vector.astype(np.float64))
    np.testing.assert_allclose(directions, [exact, exact], rtol=6e-8)  # one rounding to float32
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0, rtol=1e-7)


def test_a_direction_is_a_unit_vector_of_float32() -> None:
    assert unit_direction(np.array([3.0, 4.0], np.float32)).tolist() == [np.float32(0.6), np.float32(0.8)]
    assert unit_direction(np.array([3.0, 4.0], np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("operation", "coefficients"),
    [
        (AddSpec([2.0], 3.0), [1.0, 1.0, -INF, INF, 0.0, 0.0, INF, 0.0]),
        (ProjectionCapSpec([2.0], min=-0.5), [1.0, 0.0, -0.5, INF, 0.0, 0.0, INF, 0.0]),
        (ProjectionCapSpec([2.0], max=0.25), [1.0, 0.0, -INF, 0.25, 0.0, 0.0, INF, 0.0]),
        (ProjectionCapSpec([2.0], min=0.0, max=0.0), [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, INF, 0.0]),
        (AblationSpec([2.0]), [0.0, 0.0, -INF, INF, 0.0, 0.0, INF, 0.0]),
        (AblationSpec([2.0], -1.5), [-1.5, 0.0, -INF, INF, 0.0, 0.0, INF, 0.0]),
        (AddSpec([2.0], 3.0, scaling="relative"), [1.0, 3.0, -INF, INF, 0.0, 1.0, INF, 0.0]),
        (AddSpec([2.0], 3.0, max_relative_change=0.5), [1.0, 6.0, -INF, INF, 0.0, 0.0, 0.5, 0.0]),
        (AblationSpec([2.0], keep_norm=True), [0.0, 0.0, -INF, INF, 0.0, 0.0, INF, 1.0]),
    ],
    ids=repr,
)
def test_each_operation_has_its_coefficients(operation: SteeringOp, coefficients: list[float]) -> None:
    part = compiled(operation)

    assert part.coefficients.tolist() == [coefficients]
    assert part.coefficients.dtype == part.directions.dtype == np.float32


def test_operations_keep_their_order() -> None:
    part = compiled(AblationSpec([1.0, 0.0]), AddSpec([0.0, 1.0], 2.0), ProjectionCapSpec([0.0, 3.0], max=1.0))

    assert part.directions.tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]
    assert part.coefficients[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_layers_that_do_nothing_are_left_out() -> None:
    program = compile_program(spec_of({9: [AddSpec([1.0])], 1: [], 3: [AddSpec([1.0], 0.0)], 5: [AblationSpec([1.0])]}))

    assert list(program.layers) == [5, 9]
    assert program.operation_count == 2


def test_a_program_that_does_nothing_travels_too() -> None:
    program = compile_program(SteeringSpec())

    again = program_from_bytes(program_to_bytes(program), hidden_size=8)

    assert again.layers == {}
    assert again.operation_count == 0
    assert again.digest == SteeringSpec().digest()


def test_a_program_carries_the_digest_of_its_spec() -> None:
    spec = SteeringSpec.simple_add(3, [1.0, 2.0], 0.5)

    assert compile_program(spec).digest == spec.digest()
