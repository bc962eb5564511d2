"""Layers in the fields of errors: entries of a list on the wire, layers in Python."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.wire.field_paths import entries_named, name_layer

LAYERS = [7, 3, 7]


def refuse(error: InvalidRequest) -> None:
    with entries_named() as layers:
        layers.extend(LAYERS)
        raise error


@pytest.mark.parametrize(
    ("in_python", "on_the_wire", "reason"),
    [
        ("steering.layers[3].operations[0].vector", "steering.layers[1].operations[0].vector", "WRONG_WIDTH"),
        ("steering.layers[7]", "steering.layers[0]", "UNKNOWN_LAYER"),
        ("steering.layers[7]", "steering.layers[2]", "DUPLICATE_LAYER"),
        ("steering.layers", "steering.layers", "MISSING_FIELD"),
        ("steering", "steering", "STEERING_NONFINITE"),
        ("capture.layers[1]", "capture.layers[1]", "UNKNOWN_LAYER"),
        ("", "", "ENGINE_DIED"),
    ],
)
def test_a_path_goes_to_the_wire_and_back(in_python: str, on_the_wire: str, reason: str) -> None:
    error = InvalidRequest("wrong", reason=reason, field=in_python)

    with pytest.raises(InvalidRequest):
        refuse(error)
    sent = error.field
    name_layer(error, LAYERS)

    assert (sent, error.field) == (on_the_wire, in_python)


def test_a_path_of_another_request_stays() -> None:
    error = InvalidRequest("wrong", field="steering.layers[9]")
    with pytest.raises(InvalidRequest):
        refuse(error)
    name_layer(error, LAYERS)
    assert error.field == "steering.layers[9]"
