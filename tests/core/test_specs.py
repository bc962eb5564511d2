"""What specs refuse, and what they mean."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from tests.core.spec_cases import MAKERS, UNNORMALIZED, UP, bounds, each_operation, numbers, vectors


@each_operation
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_vector_with_nan_or_inf_is_refused(name: str, bad: float) -> None:
    for make in (MAKERS[name], UNNORMALIZED[name]):
        with pytest.raises(ValueError, match=f"{name} vector contains NaN or Inf values") as raised:
            make([1.0, bad, 2.0])
        assert (raised.value.reason, raised.value.field) == ("NON_FINITE", "vector")


@each_operation
@pytest.mark.parametrize("zero", [[], [0.0, 0.0], [-0.0], [1e-45] * 3, np.full(4096, 1e-45), torch.zeros(3)], ids=str)
def test_a_vector_without_a_direction_is_refused(name: str, zero: object) -> None:
    with pytest.raises(ValueError, match=rf"{name} vector has zero norm \(cannot be normalized\)") as raised:
        MAKERS[name](zero)
    assert (raised.value.reason, raised.value.field) == ("ZERO_NORM", "vector")


@each_operation
def test_normalising_a_vector_without_a_direction_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Cannot normalize zero vector"):
        UNNORMALIZED[name]([0.0, 0.0])


@each_operation
@pytest.mark.parametrize("bad", [[[1.0, 2.0]], 1.0, ["a"], [True, True], "ab", None])
def test_a_vector_that_is_not_one_row_of_numbers_is_refused(name: str, bad: object) -> None:
    for make in (MAKERS[name], UNNORMALIZED[name]):
        with pytest.raises(InvalidRequest) as raised:
            make(bad)
        assert raised.value.field == "vector"


@each_operation
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_tiny_and_huge_vectors_keep_their_direction(name: str, size: float) -> None:
    given_vector = np.array([3.0, 4.0]) * size

    assert MAKERS[name](given_vector).vector == pytest.approx(given_vector, rel=1e-6)
    assert UNNORMALIZED[name](given_vector).vector == pytest.approx([0.6, 0.8], rel=1e-6)


@each_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_taken_as_they_are(name: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor(UP, dtype=dtype, requires_grad=True)

    assert MAKERS[name](tensor) == MAKERS[name](UP)
    assert UNNORMALIZED[name](tensor) == UNNORMALIZED[name](UP)


@each_operation
def test_a_callers_array_changed_later_does_not_matter(name: str) -> None:
    mine = np.array(UP, dtype=np.float32)
    operation = MAKERS[name](mine)

    mine[:] = 7.0

    assert operation.vector.tolist() == UP


@each_operation
def test_a_spec_cannot_be_changed(name: str) -> None:
    operation = MAKERS[name](UP)

    with pytest.raises(ValueError, match="read-only"):
        operation.vector[0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        operation.vector = np.ones(3)


@pytest.mark.parametrize("kind", [AddSpec, AblationSpec])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_refused(kind: Any, bad: float) -> None:
    for make in (kind, kind.from_unnormalized):
        with pytest.raises(InvalidRequest, match=r"scale is -?(nan|inf), expected a finite number") as raised:
            make(UP, scale=bad)
        assert (raised.value.reason, raised.value.field) == ("NON_FINITE", "scale")


@pytest.mark.parametrize("kind", [AddSpec, AblationSpec])
@pytest.mark.parametrize("bad", ["2", b"2", None, True, [1.0, 2.0], 10**400, 1j])
def test_a_scale_that_is_not_a_number_is_refused(kind: Any, bad: object) -> None:
    with pytest.raises(InvalidRequest, match="is not a number") as raised:
        kind(UP, scale=bad)
    assert raised.value.field == "scale"


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bound_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is -?(nan|inf), expected a finite number") as raised:
        ProjectionCapSpec(UP, **{name: bad})
    assert raised.value.field == name


def test_a_cap_without_a_bound_is_refused() -> None:
    for make in (ProjectionCapSpec, ProjectionCapSpec.from_unnormalized, lambda v: SteeringSpec.simple_cap(0, v)):
        with pytest.raises(ValueError, match="ProjectionCapSpec requires at least one of min or max to be set"):
            make(UP)


def test_a_cap_without_a_bound_is_told_before_its_vector() -> None:
    with pytest.raises(ValueError, match="at least one of min or max"):
        ProjectionCapSpec([np.nan])


def test_inverted_bounds_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"min 2\.0 is greater than max 1\.0") as raised:
        ProjectionCapSpec(UP, min=2, max=1)
    assert (raised.value.reason, raised.value.field) == ("INVERTED_BOUNDS", "min")


def test_equal_bounds_pin_the_projection() -> None:
    cap = ProjectionCapSpec(UP, min=1.0, max=1.0)

    assert (cap.min, cap.max) == (1.0, 1.0)


@pytest.mark.parametrize("number", [2, np.float32(2.0), np.int64(2), torch.tensor(2.0)])
def test_every_kind_of_number_is_kept_as_a_float(number: Any) -> None:
    operation = AddSpec(UP, scale=number)

    assert type(operation.scale) is float
    assert operation.scale == 2.0


def test_defaults_are_those_users_know() -> None:
    assert AddSpec(UP).scale == 1.0
    assert AblationSpec(UP).scale == 0.0
    assert SteeringSpec.simple_ablation(0, UP) == SteeringSpec.simple_ablation(0, UP, scale=0.0)
    assert SteeringSpec().layers == {}
    assert LayerSteeringSpec().operations == ()


@given(vectors, numbers)
def test_folding_the_norm_into_the_scale_adds_the_same(vector: np.ndarray, scale: float) -> None:
    folded = AddSpec.from_unnormalized(vector, scale)

    assert np.linalg.norm(folded.vector) == pytest.approx(1.0, rel=1e-6)
    assert folded.materialize() == pytest.approx(AddSpec(vector, scale).materialize(), rel=1e-5, abs=1e-30)


@given(vectors, numbers)
def test_an_add_is_rounded_once_from_the_exact_product(vector: np.ndarray, scale: float) -> None:
    added = AddSpec(vector, scale).materialize()

    assert added.dtype == np.float32
    assert added.tolist() == [float(np.float32(float(x) * scale)) for x in vector]


def test_direct_construction_keeps_the_length_of_the_vector() -> None:
    assert AddSpec(UP, scale=2.0).materialize().tolist() == [0.0, 6.0, 8.0]


@given(vectors, bounds)
def test_bounds_and_ablation_scales_refer_to_the_unit_direction(vector: np.ndarray, bounds: list[float]) -> None:
    cap = ProjectionCapSpec.from_unnormalized(vector, min=bounds[0], max=bounds[1])
    ablation = AblationSpec.from_unnormalized(vector, scale=bounds[0])

    assert np.linalg.norm(cap.vector) == pytest.approx(1.0, rel=1e-6)
    assert [cap.min, cap.max] == bounds
    assert (ablation.scale, ablation.vector.tolist()) == (bounds[0], cap.vector.tolist())


def test_a_scale_that_overflows_with_the_norm_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="scale is inf"):
        AddSpec.from_unnormalized([1e30], scale=1e300)


def test_operations_keep_their_order_whatever_sequence_they_come_in() -> None:
    first, second = AddSpec(UP), AblationSpec(UP)

    assert LayerSteeringSpec([first, second]).operations == (first, second)
    assert LayerSteeringSpec((second, first)).operations == (second, first)


@pytest.mark.parametrize("bad", [AddSpec(UP), 3, None, iter([]), {"a": 1}], ids=lambda bad: type(bad).__name__)
def test_operations_must_be_a_sequence(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="operations must be a sequence of operations") as raised:
        LayerSteeringSpec(bad)
    assert raised.value.field == "operations"


def test_what_is_not_an_operation_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidRequest, match="str is not an AddSpec") as raised:
        LayerSteeringSpec((AddSpec(UP), "add"))
    assert raised.value.field == "operations[1]"


def test_layers_are_kept_in_ascending_order() -> None:
    some = LayerSteeringSpec((AddSpec(UP),))

    assert list(SteeringSpec({7: some, 2: some, 5: some}).layers) == [2, 5, 7]


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (-1, "layer -1 is negative; layers count from 0: counted from the end it is layer_count - 1"),
        (2**31, "layer 2147483648 is outside 0..2147483647"),
        (1.0, "layer 1.0 is not an integer"),
        ("3", "layer '3' is not an integer"),
        (True, "layer True is not an integer"),
        (None, "layer None is not an integer"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(layer: Any, rule: str) -> None:
    with pytest.raises(InvalidRequest, match=rule) as raised:
        SteeringSpec({layer: LayerSteeringSpec()})
    assert raised.value.field.startswith("layers")


def test_numpy_integers_are_layers() -> None:
    assert [type(layer) for layer in SteeringSpec({np.int64(3): LayerSteeringSpec()}).layers] == [int]


@pytest.mark.parametrize("bad", [AddSpec(UP), (AddSpec(UP),), None], ids=lambda bad: type(bad).__name__)
def test_a_layer_maps_to_a_layer_spec(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not a LayerSteeringSpec") as raised:
        SteeringSpec({4: bad})
    assert raised.value.field == "layers[4]"


@pytest.mark.parametrize("bad", [[], None, AddSpec(UP)], ids=lambda bad: type(bad).__name__)
def test_layers_must_be_a_mapping(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="layers must map layer numbers to specs"):
        SteeringSpec(bad)


def test_a_million_layers_are_refused_by_their_number() -> None:
    empty = LayerSteeringSpec()

    with pytest.raises(InvalidRequest, match="1000000 layers, at most 4096") as raised:
        SteeringSpec(dict.fromkeys(range(10**6), empty))
    assert raised.value.field == "layers"


def test_a_mapping_changed_later_does_not_matter() -> None:
    layers = {1: LayerSteeringSpec((AddSpec(UP),))}
    spec = SteeringSpec(layers)

    layers.clear()

    assert list(spec.layers) == [1]
    with pytest.raises(TypeError, match="does not support item assignment"):
        spec.layers[2] = LayerSteeringSpec()


@pytest.mark.parametrize(
    ("simple", "operation"),
    [
        (SteeringSpec.simple_add(3, UP, scale=2.0), AddSpec.from_unnormalized(UP, scale=2.0)),
        (SteeringSpec.simple_cap(3, UP, max=1.0), ProjectionCapSpec.from_unnormalized(UP, max=1.0)),
        (SteeringSpec.simple_ablation(3, UP, scale=0.5), AblationSpec.from_unnormalized(UP, scale=0.5)),
    ],
)
def test_a_simple_spec_is_one_normalised_operation_at_one_layer(simple: SteeringSpec, operation: SteeringOp) -> None:
    assert simple == SteeringSpec({3: LayerSteeringSpec((operation,))})


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-12, -1e-12, 1e-13])
def test_an_add_of_almost_no_scale_is_empty(scale: float) -> None:
    spec = SteeringSpec({0: LayerSteeringSpec((AddSpec(UP, scale),))})

    assert spec.is_empty()
    assert spec.active_layers() == {}


def test_a_tiny_scale_on_a_huge_vector_is_not_empty() -> None:
    assert not SteeringSpec({0: LayerSteeringSpec((AddSpec([1e20], 1e-12),))}).is_empty()


@pytest.mark.parametrize(
    "operation",
    [AddSpec(UP, 2e-12), AblationSpec(UP, 1.0), ProjectionCapSpec(UP, min=-1e30), AddSpec([1e-20])],
)
def test_whatever_might_matter_is_not_empty(operation: SteeringOp) -> None:
    assert not LayerSteeringSpec((operation,)).is_empty()
    assert not LayerSteeringSpec((AddSpec(UP, 0.0), operation)).is_empty()


def test_no_layers_and_no_operations_are_empty() -> None:
    assert LayerSteeringSpec().is_empty()
    assert SteeringSpec().is_empty()
    assert SteeringSpec({0: LayerSteeringSpec(), 9: LayerSteeringSpec()}).is_empty()


def test_active_layers_leave_out_the_empty_ones() -> None:
    some = LayerSteeringSpec((AddSpec(UP),))

    assert list(SteeringSpec({5: some, 1: some, 3: LayerSteeringSpec()}).active_layers()) == [1, 5]
