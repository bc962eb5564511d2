"""Operations of a steering spec as messages: what this server does not know is refused by its field."""

import pytest

from steer_service.core.errors import Unsupported
from steer_service.core.specs import AddScaling, AddSpec
from steer_service.wire import steering_pb2
from steer_service.wire.request import request_from_proto
from tests.wire.request_messages import inline, steered


def scaled(scaling: int) -> steering_pb2.SteeringOperation:
    return steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(vector=inline(), scaling=scaling))


@pytest.mark.parametrize(
    ("number", "scaling"), [(0, AddScaling.ABSOLUTE), (1, AddScaling.ABSOLUTE), (2, AddScaling.RELATIVE)]
)
def test_an_addition_is_absolute_unless_it_says_otherwise(number: int, scaling: AddScaling) -> None:
    steering = request_from_proto(steered(scaled(number))).steering

    assert steering is not None
    operation = steering.layers[5].operations[0]
    assert isinstance(operation, AddSpec)
    assert operation.scaling is scaling


@pytest.mark.parametrize("number", [3, 99, -1])
def test_an_unknown_scaling_is_refused_by_its_field(number: int) -> None:
    with pytest.raises(Unsupported, match=f"the scaling {number} is not known") as refused:
        request_from_proto(steered(scaled(1), scaled(number)))
    assert (refused.value.reason, refused.value.field) == (
        "UNKNOWN_SCALING",
        "steering.layers[5].operations[1].scaling",
    )
