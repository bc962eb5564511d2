"""Hook points: the residual stream by default; others are refused before any work."""

import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.hook_point import HookPoint
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import SteeringSpec
from steer_service.wire import generation_pb2, steering_pb2
from steer_service.wire.hook_point_pb2 import HOOK_POINT_RESIDUAL_STREAM, HOOK_POINT_UNSPECIFIED
from steer_service.wire.request import request_from_proto, request_to_proto
from tests.wire.request_messages import add, captured, inline

PRESENT = add(inline())
ABSENT = add(steering_pb2.Vector(digest=b"x" * 32))
"""An operation whose vector is not stored."""


def hooked(*hooks: int, operation: steering_pb2.SteeringOperation = PRESENT) -> generation_pb2.GenerateRequest:
    """A request that steers layer 5 once at each of these hook points."""
    entries = [steering_pb2.LayerSteeringSpec(layer=5, operations=[operation], hook=hook) for hook in hooks]
    return generation_pb2.GenerateRequest(text="hi", steering=steering_pb2.SteeringSpec(layers=entries))


@pytest.mark.parametrize("number", [HOOK_POINT_UNSPECIFIED, HOOK_POINT_RESIDUAL_STREAM])
def test_the_default_is_the_residual_stream(number: int) -> None:
    steering = request_from_proto(hooked(number)).steering
    capture = request_from_proto(captured(hook=number)).capture

    assert steering is not None
    assert capture is not None
    assert steering.layers[5].hook is capture.hook is HookPoint.RESIDUAL_STREAM


def test_a_client_says_which_hook_point_it_means() -> None:
    spec = SteeringSpec.simple_add(1, [1.0, 2.0])
    request = GenerateRequest(prompt=TextPrompt(text="hi"), steering=spec, capture=CaptureSpec(layers=(1,)))
    message = request_to_proto(request)

    assert message.steering.layers[0].hook == message.capture.hook == HOOK_POINT_RESIDUAL_STREAM


@pytest.mark.parametrize("number", [2, 99, -1])
def test_an_unknown_hook_point_is_refused_by_its_field(number: int) -> None:
    with pytest.raises(Unsupported) as steering:
        request_from_proto(hooked(number))
    with pytest.raises(Unsupported) as capture:
        request_from_proto(captured(hook=number))

    assert (steering.value.reason, steering.value.field) == ("UNKNOWN_HOOK_POINT", "steering.layers[5].hook")
    assert (capture.value.reason, capture.value.field) == ("UNKNOWN_HOOK_POINT", "capture.hook")


def test_an_unknown_hook_point_is_refused_before_vectors_are_asked_for() -> None:
    with pytest.raises(Unsupported) as refused:
        request_from_proto(hooked(0, 99, operation=ABSENT))
    assert (refused.value.reason, refused.value.field) == ("UNKNOWN_HOOK_POINT", "steering.layers[5].hook")


def test_two_names_of_one_hook_point_at_a_layer_are_one_too_many() -> None:
    with pytest.raises(InvalidRequest) as refused:
        request_from_proto(hooked(HOOK_POINT_UNSPECIFIED, HOOK_POINT_RESIDUAL_STREAM))
    assert (refused.value.reason, refused.value.field) == ("DUPLICATE_LAYER", "steering.layers[5]")
