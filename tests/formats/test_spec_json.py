"""A steering spec as JSON: there and back, and nothing passed over."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.core.positions import PositionRange, scope_from
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.formats.safetensors_file import write_tensors
from steer_service.formats.spec_json import spec_from_json, spec_from_text, spec_to_json
from tests.wire import strategies

LARGE = 2.0**100

numbers = st.floats(-LARGE, LARGE)
vectors = st.lists(st.floats(-LARGE, LARGE, width=32), min_size=1, max_size=8).filter(
    lambda v: max(map(abs, v)) > 1e-30
)
operations = st.one_of(
    st.builds(AddSpec, vector=vectors, scale=numbers),
    st.builds(AblationSpec, vector=vectors, scale=numbers),
    st.builds(ProjectionCapSpec, vector=vectors, min=numbers),
    st.builds(ProjectionCapSpec, vector=vectors, max=numbers),
    st.builds(ProjectionCapSpec, vector=vectors, min=st.floats(-LARGE, 0), max=st.floats(0, LARGE)),
)
layers = st.dictionaries(
    st.integers(0, 200), st.lists(operations, max_size=4).map(lambda ops: LayerSteeringSpec(operations=ops))
)
specs = st.builds(SteeringSpec, layers=layers, positions=st.none() | strategies.scopes, report_change=st.booleans())


@given(specs)
def test_a_spec_survives_the_way_through_json(spec: SteeringSpec) -> None:
    again = spec_from_text(json.dumps(spec_to_json(spec)))

    assert again == spec
    assert again.digest() == spec.digest()


def test_what_is_left_out_has_the_defaults_of_the_specs() -> None:
    document = {"layers": {"5": [{"op": "add", "vector": [1, 2]}, {"op": "ablation", "vector": [1, 2]}]}}

    assert spec_from_json(document).layers[5].operations == (AddSpec(vector=[1, 2]), AblationSpec(vector=[1, 2]))


def test_a_layer_may_name_what_its_operations_act_on() -> None:
    operations = [{"op": "add", "vector": [1, 2]}]
    layer = {"hook": "residual_stream", "operations": operations}

    assert spec_from_json({"layers": {"5": layer}}) == spec_from_json({"layers": {"5": operations}})


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("prompt", "prompt"),
        (-1, -1),
        ({"first": 3}, PositionRange(3)),
        ({"last": -1}, PositionRange(0, -1)),
        ({}, PositionRange(0)),
        (["generated", 0, {"first": -4, "last": -2}], ["generated", 0, range(-4, -1)]),
        (["generated[0:8]", -1], ["generated[0:8]", -1]),
        (None, None),
    ],
    ids=str,
)
def test_positions_are_words_numbers_and_ranges(written: Any, words: Any) -> None:
    text = json.dumps({"layers": {}, "positions": written})

    assert spec_from_text(text).positions == scope_from(words)


def test_a_vector_may_lie_in_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([1.0, -2.0]))
    document = {"layers": {"0": [{"op": "cap", "vector": {"file": "v.npy"}, "min": 0}]}}

    [operation] = spec_from_json(document, tmp_path).layers[0].operations

    assert operation == ProjectionCapSpec(vector=[1.0, -2.0], min=0.0)


def test_a_vector_may_lie_among_others_in_a_file_of_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "v.safetensors", {"a": np.float32([1, 2]), "b": np.float32([3, 4])}, {})
    vector = {"file": "v.safetensors", "tensor": "b"}

    [operation] = spec_from_json({"layers": {"0": [{"op": "add", "vector": vector}]}}, tmp_path).layers[0].operations

    assert operation == AddSpec(vector=[3, 4])
    for wrong, field in [({"tensor": "c"}, "tensor"), ({"file": "no"}, "file")]:
        with pytest.raises(InvalidRequest) as caught:
            spec_from_text(one({"op": "add", "vector": vector | wrong}), tmp_path)
        assert caught.value.field == f"steering.layers[1].operations[0].vector.{field}"
        assert caught.value.reason == "BAD_VECTOR"


@given(specs)
def test_vectors_can_be_put_elsewhere_each_under_a_name_of_its_own(spec: SteeringSpec) -> None:
    elsewhere: dict[str, np.ndarray] = {}

    document = spec_to_json(spec, lambda name, vector: elsewhere.setdefault(name, vector).tolist())

    operations = [operation for layer in spec.layers.values() for operation in layer.operations]
    assert spec_from_json(document) == spec
    assert [vector.tolist() for vector in elsewhere.values()] == [op.vector.tolist() for op in operations]


def one(operation: Any) -> str:
    return json.dumps({"layers": {"1": [operation]}})


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("{", "steering", "BAD_JSON"),
        ("[]", "steering", "BAD_JSON"),
        ("{}", "steering.layers", "BAD_JSON"),
        ('{"layers": {}, "more": 1}', "steering.more", "BAD_JSON"),
        ('{"layers": []}', "steering.layers", "BAD_JSON"),
        ('{"layers": {"x": []}}', "steering.layers", "BAD_LAYER"),
        ('{"layers": {"-1": []}}', "steering.layers[-1]", "UNKNOWN_LAYER"),
        ('{"layers": {"05": []}}', "steering.layers", "BAD_LAYER"),
        ('{"layers": {"5": [], "5": []}}', "steering", "BAD_JSON"),
        ('{"layers": {"1": 7}}', "steering.layers[1]", "BAD_JSON"),
        ('{"layers": {"1": {}}}', "steering.layers[1].operations", "BAD_JSON"),
        ('{"layers": {"1": {"operations": [], "site": 1}}}', "steering.layers[1].site", "BAD_JSON"),
        ('{"layers": {"1": {"operations": [], "hook": "mlp"}}}', "steering.layers[1].hook", "UNKNOWN_HOOK_POINT"),
        (one(3), "steering.layers[1].operations[0]", "BAD_JSON"),
        (one({"vector": [1]}), "steering.layers[1].operations[0].op", "BAD_JSON"),
        (one({"op": ["add"], "vector": [1]}), "steering.layers[1].operations[0].op", "BAD_JSON"),
        (one({"op": "add"}), "steering.layers[1].operations[0].vector", "BAD_JSON"),
        (one({"op": "add", "vector": [1], "min": 1}), "steering.layers[1].operations[0].min", "BAD_JSON"),
        (one({"op": "add", "vector": [1], "scale": "2"}), "steering.layers[1].operations[0].scale", "BAD_JSON"),
        (one({"op": "add", "vector": "v.npy"}), "steering.layers[1].operations[0].vector", "BAD_JSON"),
        (one({"op": "add", "vector": ["a"]}), "steering.layers[1].operations[0].vector", "BAD_VECTOR"),
        (one({"op": "add", "vector": [[1]]}), "steering.layers[1].operations[0].vector", "BAD_SHAPE"),
        (one({"op": "add", "vector": [0]}), "steering.layers[1].operations[0].vector", "ZERO_NORM"),
        (one({"op": "add", "vector": [float("nan")]}), "steering.layers[1].operations[0].vector", "NON_FINITE"),
        (one({"op": "add", "vector": [1], "scale": 10**400}), "steering.layers[1].operations[0].scale", "NON_FINITE"),
        ('{"layers": {}, "positions": "all"}', "steering.positions", "BAD_POSITION"),
        ('{"layers": {}, "positions": []}', "steering.positions", "EMPTY_POSITIONS"),
        ('{"layers": {}, "positions": [1.5]}', "steering.positions", "BAD_POSITION"),
        ('{"layers": {}, "positions": [true]}', "steering.positions", "BAD_POSITION"),
        ('{"layers": {}, "positions": [[0, 3]]}', "steering.positions", "BAD_POSITION"),
        ('{"layers": {}, "positions": 1e400}', "steering.positions", "BAD_POSITION"),
        ('{"layers": {}, "positions": {"from": 3}}', "steering.positions.from", "BAD_JSON"),
        ('{"layers": {}, "positions": {"first": 3, "last": 2}}', "steering.positions", "EMPTY_POSITIONS"),
        (
            one({"op": "add", "vector": {"file": "no.npy"}}),
            "steering.layers[1].operations[0].vector.file",
            "BAD_VECTOR",
        ),
        (one({"op": "cap", "vector": [1]}), "steering.layers[1].operations[0].min", "NO_BOUND"),
        (
            one({"op": "cap", "vector": [1], "min": 2, "max": 1}),
            "steering.layers[1].operations[0].min",
            "INVERTED_BOUNDS",
        ),
    ],
)
def test_a_document_that_is_not_understood_is_refused(text: str, field: str, reason: str) -> None:
    with pytest.raises(SteerError) as raised:
        spec_from_text(text)

    assert (raised.value.field, raised.value.reason) == (field, reason)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([object()]), allow_pickle=True)

    with pytest.raises(InvalidRequest, match=r"v\.npy is not a readable NumPy file"):
        spec_from_text(one({"op": "add", "vector": {"file": "v.npy"}}), tmp_path)
