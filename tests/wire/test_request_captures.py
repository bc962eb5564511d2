"""The capture of a request as a message: which rows it means and how they travel."""

import pytest

from steer_service.core.capture import CaptureDelivery, CaptureSite, CaptureSpec
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import SteeringSpec
from steer_service.wire import capture_pb2, generation_pb2, position_pb2
from steer_service.wire.request import request_from_proto, request_to_proto
from steer_service.wire.tensor_pb2 import DTYPE_F32
from tests.wire.request_messages import captured


def test_positions_of_a_capture_come_back_equal():
    spec = CaptureSpec(layers=(1,), site=CaptureSite.BOTH, positions=["prompt", -1, range(3, 5)], dtype="float32")
    message = request_to_proto(GenerateRequest(prompt=TextPrompt(text="hi"), capture=spec)).capture
    assert (message.site, message.dtype) == (capture_pb2.CAPTURE_SITE_BOTH, DTYPE_F32)
    assert message.positions == position_pb2.PositionScope(
        prompt=True,
        ranges=[position_pb2.PositionRange(first=-1, last=-1), position_pb2.PositionRange(first=3, last=4)],
    )


def test_an_unset_delivery_means_inline_after_the_last_token():
    silent = request_from_proto(captured()).capture
    said = captured(delivery=capture_pb2.CAPTURE_DELIVERY_INLINE, timing=capture_pb2.CAPTURE_TIMING_AFTER_FINISH)
    assert request_from_proto(said).capture == silent
    assert (silent.delivery, silent.is_live, silent.shared_memory_session) == (CaptureDelivery.INLINE, False, b"")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"timing": capture_pb2.CAPTURE_TIMING_LIVE}, {"is_live": True}),
        ({"delivery": capture_pb2.CAPTURE_DELIVERY_HELD}, {"delivery": "held"}),
        (
            {"delivery": capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_PREFERRED, "shared_memory_session": b"x"},
            {"delivery": "shared_memory_preferred", "shared_memory_session": b"x"},
        ),
        ({"delivery": capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED}, {"delivery": "shared_memory_required"}),
    ],
)
def test_delivery_and_timing_of_a_capture_come_back_equal(fields, expected):
    spec = CaptureSpec(layers=(0,), **expected)
    assert request_from_proto(captured(**fields)).capture == spec
    message = request_to_proto(GenerateRequest(prompt=TextPrompt(text="hi"), capture=spec)).capture
    assert all(getattr(message, name) == value for name, value in fields.items())


def test_a_request_message_cannot_name_the_client_that_it_counts_for():
    message = request_to_proto(GenerateRequest(prompt=TextPrompt(text="hi"), client_id="somebody"))
    assert b"somebody" not in message.SerializeToString()
    assert request_from_proto(message).client_id == ""


def test_an_unset_scope_means_every_position():
    spec = SteeringSpec.simple_add(1, [1.0, 2.0])
    request = GenerateRequest(prompt=TextPrompt(text="hi"), steering=spec, capture=CaptureSpec(layers=(1,)))
    message = request_to_proto(request)
    assert not message.steering.HasField("positions")
    assert not message.capture.HasField("positions")


def test_a_captured_layer_counts_once_on_the_wire_too():
    message = generation_pb2.GenerateRequest(text="hi", capture=capture_pb2.CaptureSpec(layers=[2, 0, 2]))
    assert request_from_proto(message).capture == CaptureSpec(layers=(2, 0))
