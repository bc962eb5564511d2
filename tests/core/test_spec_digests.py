"""Copies, equality and digests of specs: when two of them steer alike."""

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import MAX_POSITION_ENTRIES
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from tests.core.spec_cases import UP, effect, numbers, operations, specs, vectors
from tests.wire import strategies


@given(specs)
def test_a_clone_is_equal_and_shares_no_memory(spec: SteeringSpec) -> None:
    clone = spec.clone()

    assert clone == spec
    assert clone is not spec
    for layer, part in spec.layers.items():
        for mine, theirs in zip(part.operations, clone.layers[layer].operations, strict=True):
            assert not np.shares_memory(mine.vector, theirs.vector)


@given(specs)
def test_a_spec_survives_copying_and_pickling(spec: SteeringSpec) -> None:
    for other in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec
        assert other.digest() == spec.digest()


@given(st.data())
def test_digests_are_equal_exactly_when_the_effects_are(data: st.DataObject) -> None:
    one = data.draw(specs)
    drawn = data.draw(specs)
    other = data.draw(st.sampled_from([drawn, SteeringSpec({**drawn.layers, **one.layers}), one.clone()]))

    assert (one.digest() == other.digest()) == (effect(one) == effect(other))


@given(specs)
def test_equal_specs_have_equal_hashes_and_digests(spec: SteeringSpec) -> None:
    clone = spec.clone()

    assert (hash(clone), clone.digest()) == (hash(spec), spec.digest())
    assert len({spec, clone}) == 1


@given(specs, st.randoms())
def test_the_order_in_which_layers_are_given_does_not_matter(spec: SteeringSpec, random: Any) -> None:
    items = list(spec.layers.items())
    random.shuffle(items)

    assert SteeringSpec(dict(items)) == spec
    assert SteeringSpec(dict(items)).digest() == spec.digest()


@given(specs, st.integers(41, 60), vectors)
def test_empty_layers_do_not_change_the_digest(spec: SteeringSpec, layer: int, vector: np.ndarray) -> None:
    for empty in (LayerSteeringSpec(), LayerSteeringSpec((AddSpec(vector, 0.0),))):
        assert SteeringSpec({**spec.layers, layer: empty}).digest() == spec.digest()


@given(operations, operations)
def test_the_order_of_operations_matters(first: SteeringOp, second: SteeringOp) -> None:
    one = SteeringSpec({0: LayerSteeringSpec((first, second, AblationSpec(UP)))})
    other = SteeringSpec({0: LayerSteeringSpec((second, first, AblationSpec(UP)))})

    assert (one.digest() == other.digest()) == (first == second)


@given(operations, st.data())
def test_every_field_matters(operation: SteeringOp, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(operation)]))
    value = data.draw(vectors if name == "vector" else numbers)
    try:
        other = dataclasses.replace(operation, **{name: value})
    except InvalidRequest:
        return  # the new bound lies beyond the other one
    before = getattr(operation, name)
    same = before.tobytes() == value.tobytes() if name == "vector" else before == value

    assert (operation == other) == same
    one, changed = (SteeringSpec({0: LayerSteeringSpec((op, AblationSpec(UP)))}) for op in (operation, other))
    assert (one.digest() == changed.digest()) == same


def test_the_layer_and_the_kind_of_operation_matter() -> None:
    digests = {
        SteeringSpec.simple_add(0, UP).digest(),
        SteeringSpec.simple_add(1, UP).digest(),
        SteeringSpec.simple_ablation(0, UP, scale=5.0).digest(),
        SteeringSpec.simple_cap(0, UP, min=5.0).digest(),
        SteeringSpec.simple_cap(0, UP, max=5.0).digest(),
        SteeringSpec().digest(),
    }

    assert len(digests) == 6


def test_moving_an_operation_to_the_next_layer_changes_the_digest() -> None:
    one, two = AddSpec(UP), AblationSpec(UP)

    together = SteeringSpec({0: LayerSteeringSpec((one, two))})
    apart = SteeringSpec({0: LayerSteeringSpec((one,)), 1: LayerSteeringSpec((two,))})

    assert together.digest() != apart.digest()


def test_zero_has_no_sign_in_numbers() -> None:
    assert AblationSpec(UP, 0.0) == AblationSpec(UP, -0.0)
    assert hash(AblationSpec(UP, 0.0)) == hash(AblationSpec(UP, -0.0))
    assert AddSpec(UP, 0.0) == AddSpec(UP, -0.0)
    assert ProjectionCapSpec(UP, min=0.0) == ProjectionCapSpec(UP, min=-0.0)
    assert ProjectionCapSpec(UP, max=0.0) == ProjectionCapSpec(UP, max=-0.0)


def test_an_operation_equals_only_its_own_kind() -> None:
    assert AddSpec(UP, 0.5) != AblationSpec(UP, 0.5)
    assert AddSpec(UP) != "AddSpec"


@given(specs, strategies.scopes)
def test_the_rows_are_part_of_a_spec_but_not_of_its_program(spec: SteeringSpec, scope: PositionScope) -> None:
    narrowed = dataclasses.replace(spec, positions=scope)

    assert narrowed != spec
    assert (narrowed.digest() == spec.digest()) == spec.is_empty()
    assert narrowed.program_digest() == spec.program_digest() == spec.digest()
    for other in (narrowed.clone(), copy.deepcopy(narrowed), pickle.loads(pickle.dumps(narrowed))):
        assert other == narrowed
        assert (hash(other), other.digest()) == (hash(narrowed), narrowed.digest())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (-1, PositionRange(-1, -1)),
        ([0, 1, 2], range(3)),
        ([7, 3], [3, 7]),
        (["prompt", 5], [5, "prompt", 5]),
        ([PositionRange(4), 9], PositionRange(4)),
        ([-3, -1, -2], range(-3, 0)),
    ],
)
def test_the_same_rows_written_in_another_way_have_the_same_digest(one: Any, other: Any) -> None:
    assert (
        SteeringSpec.simple_add(1, UP, positions=one).digest()
        == SteeringSpec.simple_add(1, UP, positions=other).digest()
    )


def test_other_rows_have_another_digest() -> None:
    words: list[Any] = [None, "prompt", "generated", 0, -1, range(4), PositionRange(0)]

    assert len({SteeringSpec.simple_add(1, UP, positions=one).digest() for one in words}) == len(words)


def at(*scopes: Any, positions: Any = None) -> SteeringSpec:
    """One addition and one ablation after layer 1, at these positions."""
    add, ablate = AddSpec(UP, positions=scopes[0]), AblationSpec(UP, positions=scopes[1])
    return SteeringSpec({1: LayerSteeringSpec((add, ablate))}, positions=positions)


def test_operations_of_one_scope_are_a_spec_of_that_scope() -> None:
    spec = at(None, None, positions=[3, 4])

    for same in (at([4, 3], None, positions=range(3, 5)), at([3, 4], range(3, 5), positions="prompt")):
        assert same.digest() == spec.digest()
        assert same.program_digest() == spec.program_digest() == at(None, None).digest()


def test_positions_of_operations_are_part_of_the_digest_and_their_numbers_of_the_program() -> None:
    specs = [at(3, 4), at(4, 3), at(3, None), at(None, 3), at(3, 3), at(None, None), at(3, None, positions=4)]

    assert specs[0].digest() == specs[-1].digest()
    assert len({spec.digest() for spec in specs}) == len(specs) - 1
    programs = [spec.program_digest() for spec in specs]
    assert programs == [programs[0]] * 4 + [programs[5]] * 2 + [programs[0]]
    assert programs[0] != programs[5]


def test_scopes_are_numbered_by_their_first_operation() -> None:
    add = AddSpec(UP)
    layers = {
        2: LayerSteeringSpec((add, dataclasses.replace(add, positions=-1), dataclasses.replace(add, positions=[5, 6]))),
        4: LayerSteeringSpec((dataclasses.replace(add, positions=range(5, 7)), add)),
        7: LayerSteeringSpec((AddSpec(UP, 0.0, positions=9),)),
    }
    scopes = SteeringSpec(layers, positions="prompt").numbered_scopes()

    assert list(scopes.paths) == ["positions", "layers[2].operations[1].positions", "layers[2].operations[2].positions"]
    assert scopes.numbers == {2: (0, 1, 2), 4: (2, 0)}


def test_all_positions_of_a_spec_name_a_limited_number_of_ranges_messages_and_roles() -> None:
    def spec(more: int) -> SteeringSpec:
        many = PositionScope(ranges=[PositionRange(2 * place, 2 * place) for place in range(1024)])
        few = PositionScope(generated_ranges=[PositionRange(1)] * 500, messages=range(500), roles=("user",) * more)
        operations = [AddSpec(UP, positions=many)] * (MAX_POSITION_ENTRIES // 1024 - 1)
        return SteeringSpec({0: LayerSteeringSpec(operations)}, positions=few)

    assert len(spec(24).numbered_scopes().paths) == 1
    with pytest.raises(InvalidRequest, match=f"name {MAX_POSITION_ENTRIES + 1} ranges, messages and roles") as raised:
        spec(25)
    assert (raised.value.reason, raised.value.field) == ("TOO_MANY_ENTRIES", "layers")


def test_a_spec_has_at_most_64_different_positions() -> None:
    def spec(count: int) -> SteeringSpec:
        return SteeringSpec({0: LayerSteeringSpec([AddSpec(UP, positions=place) for place in range(count)])})

    assert len(spec(64).numbered_scopes().paths) == 64
    with pytest.raises(InvalidRequest, match="65 different positions, at most 64") as raised:
        spec(65)
    assert (raised.value.field, raised.value.reason) == ("layers", "PROGRAM_TOO_LARGE")


def test_an_operation_differs_by_its_positions_and_takes_them_in_any_form() -> None:
    for operation in (AddSpec(UP), AblationSpec(UP), ProjectionCapSpec(UP, min=0.0)):
        narrowed = dataclasses.replace(operation, positions=[-1, "generated[0:2]"])

        assert narrowed != operation
        assert narrowed == dataclasses.replace(operation, positions=["generated[:2]", -1])
        assert narrowed.clone() == copy.deepcopy(narrowed) == pickle.loads(pickle.dumps(narrowed)) == narrowed
    with pytest.raises(InvalidRequest) as raised:
        SteeringSpec({0: LayerSteeringSpec([AddSpec(UP, positions="all")])})
    assert raised.value.field == "positions"


def test_every_constructor_takes_positions() -> None:
    scope = PositionScope(generated=True, ranges=(PositionRange(-1, -1),))
    words = ["generated", -1]
    made = [
        SteeringSpec.simple_add(1, UP, positions=words),
        SteeringSpec.simple_cap(1, UP, max=1.0, positions=words),
        SteeringSpec.simple_ablation(1, UP, positions=words),
        SteeringSpec(layers={1: LayerSteeringSpec((AddSpec(UP),))}, positions=words),
    ]

    assert [spec.positions for spec in made] == [scope] * 4


@pytest.mark.parametrize(
    ("words", "field"), [("all", "positions"), ([], "positions"), ([0, 0.5], "positions.ranges[1]")]
)
def test_bad_positions_are_refused_by_their_field(words: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        SteeringSpec.simple_add(1, UP, positions=words)
    assert raised.value.field == field


def test_the_digest_of_a_literal_spec_never_changes() -> None:
    spec = SteeringSpec(
        {
            2: LayerSteeringSpec((AddSpec([0.5, -1.0], 2.0), AblationSpec([1.0, 0.0]))),
            7: LayerSteeringSpec((ProjectionCapSpec([0.0, 1.0], min=-1.5), ProjectionCapSpec([1.0, 1.0], max=3.0))),
        }
    )

    assert spec.digest() == "91e037261b60957720fad7bc0e6e3515a96569a2925bec0a2d485a5b983089c2"
    assert SteeringSpec().digest() == "9385396965d676af7d667324bb603f117eeacdc8ec179dc763821031acb73188"
    chosen = dataclasses.replace(spec, positions=["prompt", range(20, 30), -1, PositionRange(-2, 40)])
    assert chosen.digest() == "3fb038cd50d7039e77bea8915bbc481bc8a2e3c2335c38a1fcfc4a95f42ce86b"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_relative_change": 0.0}, "max_relative_change"),
        ({"max_relative_change": -1.0}, "max_relative_change"),
        ({"max_relative_change": np.inf}, "max_relative_change"),
        ({"max_relative_change": 1e39}, "max_relative_change"),
        ({"keep_norm": 1}, "keep_norm"),
        ({"scaling": "half"}, "scaling"),
    ],
    ids=str,
)
def test_bad_norms_are_refused_by_their_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        AddSpec(UP, **options)
    assert raised.value.field == field


def test_a_small_relative_addition_has_an_effect_and_an_almost_zero_one_has_none() -> None:
    assert not AddSpec(UP, 1e-4, scaling="relative").is_negligible()
    assert AddSpec(np.array(UP) * 1e30, 1e-13, scaling="relative").is_negligible()
    assert not AddSpec(np.array(UP) * 1e30, 1e-13, keep_norm=True).is_negligible()
