"""Requests as messages: what fits comes back, what does not is refused with the path of its field."""

import hashlib
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import vector_digest
from steer_service.core.capture import CaptureSpec
from steer_service.core.checks import check_request
from steer_service.core.errors import InvalidRequest, MissingVectors, SteerError, Unsupported
from steer_service.core.prompt import TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.testing.fake_backend import FAKE_MODEL
from steer_service.wire import capture_pb2, generation_pb2, position_pb2, steering_pb2
from steer_service.wire.request import request_from_proto, request_to_proto
from steer_service.wire.steering import named_vectors
from steer_service.wire.tensor_pb2 import DTYPE_UNSPECIFIED
from steer_service.wire.tensors import tensor_to_proto
from tests.wire import strategies
from tests.wire.request_messages import UNSET, add, captured, inline, steered


@given(strategies.requests)
def test_a_request_comes_back_equal(request):
    message = generation_pb2.GenerateRequest.FromString(request_to_proto(request).SerializeToString())
    assert request_from_proto(message) == request


@given(strategies.requests, st.data())
def test_a_request_whose_vectors_are_named_comes_back_equal(request, data):
    spec = request.steering or SteeringSpec()
    stored = dict(zip(spec.vector_digests(), spec.vectors(), strict=True))
    named = data.draw(st.sets(st.sampled_from(sorted(stored)))) if stored else set()
    message = generation_pb2.GenerateRequest.FromString(request_to_proto(request, named).SerializeToString())
    assert named_vectors(message.steering).keys() == named
    assert request_from_proto(message, stored) == request


def test_a_vector_is_named_by_the_hash_of_its_little_endian_float32():
    vector = np.array([1.0, -2.5], dtype=np.float32)
    assert hashlib.sha256(b"\x00\x00\x80\x3f\x00\x00\x20\xc0").hexdigest() == vector_digest(vector).hex()
    assert vector_digest(vector[::-1]) == vector_digest(vector[::-1].copy()) != vector_digest(vector)


def test_every_vector_that_is_named_and_not_stored_is_listed_once_in_order():
    first, second, there = (bytes([number]) * 32 for number in range(3))
    vectors = [steering_pb2.Vector(digest=digest) for digest in (there, second, first, second)]
    with pytest.raises(MissingVectors, match="2 of 3 vectors") as caught:
        request_from_proto(steered(*map(add, vectors)), {there: np.ones(4, np.float32)})
    assert (caught.value.digests, caught.value.count) == ((second, first), 2)
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_VECTOR", "steering.layers[5].operations[1].vector")


def test_steering_keeps_its_digest_and_the_order_of_its_operations():
    spec = SteeringSpec(layers={3: LayerSteeringSpec([AddSpec([1.0, 2.0], 2.0), AddSpec([3.0, 4.0], -1.0)])})
    back = request_from_proto(request_to_proto(GenerateRequest(prompt=TextPrompt(text="hi"), steering=spec)))
    assert back.steering is not None
    assert back.steering.digest() == spec.digest()
    assert back.steering.layers[3].operations == spec.layers[3].operations


def test_unset_fields_mean_the_defaults_of_the_contract():
    steering = steered(
        add(inline()),
        steering_pb2.SteeringOperation(ablation=steering_pb2.AblationSpec(vector=inline())),
        steering_pb2.SteeringOperation(projection_cap=steering_pb2.ProjectionCapSpec(vector=inline(), max=0.0)),
    )
    added, ablation, cap = request_from_proto(steering).steering.layers[5].operations
    assert (added.scale, ablation.scale, cap.min, cap.max) == (1.0, 0.0, None, 0.0)
    assert request_from_proto(captured()).capture == CaptureSpec(layers=(0,))
    assert request_from_proto(generation_pb2.GenerateRequest(text="hi")).sampling == SamplingOptions()


@pytest.mark.parametrize("flag", [True, False])
def test_only_texts_have_special_tokens_to_add(flag):
    message = generation_pb2.GenerateRequest(text="hi", add_special_tokens=flag)
    assert request_from_proto(message).prompt == TextPrompt(text="hi", add_special_tokens=flag)
    tokens = generation_pb2.TokenIds(ids=[1])
    with pytest.raises(InvalidRequest) as refused:
        request_from_proto(generation_pb2.GenerateRequest(token_ids=tokens, add_special_tokens=flag))
    assert refused.value.field == "add_special_tokens"


def test_zero_is_not_unset():
    message = generation_pb2.GenerateRequest(
        text="hi", sampling=generation_pb2.SamplingOptions(temperature=0, seed=0, top_k=0, logprobs=0)
    )
    sampling = request_from_proto(message).sampling
    assert (sampling.temperature, sampling.seed, sampling.top_k, sampling.logprobs) == (0, 0, 0, 0)


WIDTH = 576


def whole_program() -> SteeringSpec:
    """Three operations on each of 30 layers."""
    chance = np.random.default_rng(0)
    layers = {
        layer: LayerSteeringSpec(
            (
                AddSpec(chance.standard_normal(WIDTH), 0.5),
                ProjectionCapSpec(chance.standard_normal(WIDTH), min=-1.0, max=1.0),
                AblationSpec(chance.standard_normal(WIDTH), 0.5),
            )
        )
        for layer in range(30)
    }
    return SteeringSpec(layers=layers)


def whole_message() -> generation_pb2.GenerateRequest:
    return request_to_proto(GenerateRequest(prompt=TokenPrompt(token_ids=(1, 2)), steering=whole_program()))


def test_a_program_on_every_layer_comes_back_with_its_digest():
    back = request_from_proto(whole_message()).steering
    assert back == whole_program()
    assert back.digest() == whole_program().digest()
    assert not any(op.vector.flags.writeable for layer in back.layers.values() for op in layer.operations)


def test_a_program_on_every_layer_is_read_and_checked_quickly():
    """About 5100 calls, in a millisecond; with a copy and a check for each vector twice as many, in four."""
    info = replace(FAKE_MODEL, layer_count=30, hidden_size=WIDTH, max_operations=90)
    data = whole_message().SerializeToString()

    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(event) if event in ("call", "c_call") else None)
    try:
        check_request(request_from_proto(generation_pb2.GenerateRequest.FromString(data)), info)
    finally:
        sys.setprofile(None)
    assert len(calls) < 7000  # a count, since a time depends on what else the machine does


@pytest.mark.parametrize(
    ("number", "reason"), [(np.nan, "NON_FINITE"), (-np.inf, "NON_FINITE"), (0.0, "ZERO_NORM"), (1e-45, "ZERO_NORM")]
)
def test_one_bad_vector_among_many_is_named(number, reason):
    message = whole_message()
    body = message.steering.layers[17].operations[2].ablation
    body.vector.CopyFrom(inline(np.full(WIDTH, number, np.float32).tobytes(), (WIDTH,)))
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(message)
    assert (caught.value.field, caught.value.reason) == ("steering.layers[17].operations[2].vector", reason)


def test_vectors_of_other_types_widths_and_sizes_come_back_among_many():
    odd = {"huge": np.full(WIDTH, 1e38), "tiny": np.full(WIDTH, 1e-37), "narrow": np.ones(3)}
    for vector in odd.values():
        spec = SteeringSpec(layers={**whole_program().layers, 8: LayerSteeringSpec((AddSpec(vector),))})
        assert (
            request_from_proto(request_to_proto(GenerateRequest(prompt=TextPrompt(text="a"), steering=spec))).steering
            == spec
        )
    message = whole_message()
    half = np.ones(WIDTH, np.float16)
    message.steering.layers[8].operations[0].add.vector.inline.CopyFrom(tensor_to_proto(half))
    assert request_from_proto(message).steering.layers[8].operations[0] == AddSpec(half, 0.5)


def test_a_missing_operation_among_many_is_named():
    message = whole_message()
    message.steering.layers[4].operations[1].Clear()
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(message)
    assert (caught.value.field, caught.value.reason) == ("steering.layers[4].operations[1]", "MISSING_FIELD")


def test_a_nan_is_not_taken_for_an_unknown_field():
    message = whole_message()
    message.steering.layers[7].operations[0].add.scale = math.nan
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(message)
    assert caught.value.field == "steering.layers[7].operations[0].scale"


def scoped(*ranges: tuple[int, int | None]) -> generation_pb2.GenerateRequest:
    scope = position_pb2.PositionScope(
        ranges=[position_pb2.PositionRange(first=first, last=last) for first, last in ranges]
    )
    return generation_pb2.GenerateRequest(text="hi", steering=steering_pb2.SteeringSpec(positions=scope))


BAD = {
    "no prompt": (generation_pb2.GenerateRequest(), "prompt", "MISSING_FIELD"),
    "empty text": (generation_pb2.GenerateRequest(text=""), "prompt.text", "EMPTY_PROMPT"),
    "no token": (
        generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds()),
        "prompt.token_ids",
        "EMPTY_PROMPT",
    ),
    "no message": (
        generation_pb2.GenerateRequest(chat=generation_pb2.ChatPrompt()),
        "prompt.messages",
        "EMPTY_PROMPT",
    ),
    "no role": (
        generation_pb2.GenerateRequest(
            chat=generation_pb2.ChatPrompt(
                messages=[generation_pb2.ChatMessage(role="user"), generation_pb2.ChatMessage(content="hi")]
            )
        ),
        "prompt.messages[1].role",
        "INVALID_REQUEST",
    ),
    "no outputs": (
        generation_pb2.GenerateRequest(text="hi", sampling=generation_pb2.SamplingOptions(n=0)),
        "sampling.n",
        "OUT_OF_RANGE",
    ),
    "NaN temperature": (
        generation_pb2.GenerateRequest(text="hi", sampling=generation_pb2.SamplingOptions(temperature=float("nan"))),
        "sampling.temperature",
        "OUT_OF_RANGE",
    ),
    "bad id": (generation_pb2.GenerateRequest(text="hi", request_id="a\nb"), "request_id", "BAD_REQUEST_ID"),
    "no layer": (steered(add(inline()), layer=None), "steering.layers", "MISSING_FIELD"),
    "no operation": (steered(add(inline()), UNSET), "steering.layers[5].operations[1]", "MISSING_FIELD"),
    "no vector": (steered(add(steering_pb2.Vector())), "steering.layers[5].operations[0].vector", "MISSING_FIELD"),
    "too few bytes": (steered(add(inline(b"\0"))), "steering.layers[5].operations[0].vector", "BAD_SHAPE"),
    "empty vector": (steered(add(inline(b"", (0,)))), "steering.layers[5].operations[0].vector", "BAD_SHAPE"),
    "huge shape": (steered(add(inline(b"", (2**62,)))), "steering.layers[5].operations[0].vector", "BAD_SHAPE"),
    "two dimensions": (
        steered(add(inline(shape=(2, 2)))),
        "steering.layers[5].operations[0].vector",
        "BAD_SHAPE",
    ),
    "no dtype": (
        steered(add(inline(dtype=DTYPE_UNSPECIFIED))),
        "steering.layers[5].operations[0].vector",
        "UNKNOWN_DTYPE",
    ),
    "NaN": (
        steered(add(inline(np.array([1, np.nan, 0, 0], np.float32).tobytes()))),
        "steering.layers[5].operations[0].vector",
        "NON_FINITE",
    ),
    "zero norm": (steered(add(inline(bytes(16)))), "steering.layers[5].operations[0].vector", "ZERO_NORM"),
    "half a digest": (
        steered(add(steering_pb2.Vector(digest=bytes(16)))),
        "steering.layers[5].operations[0].vector",
        "BAD_DIGEST",
    ),
    "no bound": (
        steered(steering_pb2.SteeringOperation(projection_cap=steering_pb2.ProjectionCapSpec(vector=inline()))),
        "steering.layers[5].operations[0].min",
        "NO_BOUND",
    ),
    "inverted bounds": (
        steered(
            steering_pb2.SteeringOperation(
                projection_cap=steering_pb2.ProjectionCapSpec(vector=inline(), min=1.0, max=-1.0)
            )
        ),
        "steering.layers[5].operations[0].min",
        "INVERTED_BOUNDS",
    ),
    "infinite scale": (
        steered(
            steering_pb2.SteeringOperation(ablation=steering_pb2.AblationSpec(vector=inline(), scale=float("inf")))
        ),
        "steering.layers[5].operations[0].scale",
        "NON_FINITE",
    ),
    "duplicate layer": (
        generation_pb2.GenerateRequest(
            text="hi", steering=steering_pb2.SteeringSpec(layers=[steering_pb2.LayerSteeringSpec(layer=5)] * 2)
        ),
        "steering.layers[5]",
        "DUPLICATE_LAYER",
    ),
    "no positions": (scoped(), "steering.positions", "EMPTY_POSITIONS"),
    "reversed positions": (scoped((0, None), (5, 4)), "steering.positions.ranges[1]", "EMPTY_POSITIONS"),
    "a position without a number": (scoped((0, 2**31 - 1)), "steering.positions.ranges[0].last", "OUT_OF_RANGE"),
    "too many ranges": (scoped(*[(0, 1)] * 1025), "steering.positions.ranges", "TOO_MANY_ENTRIES"),
    "no captured positions": (
        captured(positions=position_pb2.PositionScope()),
        "capture.positions",
        "EMPTY_POSITIONS",
    ),
    "live and held": (
        captured(delivery=capture_pb2.CAPTURE_DELIVERY_HELD, timing=capture_pb2.CAPTURE_TIMING_LIVE),
        "capture.is_live",
        "BAD_DELIVERY",
    ),
    "tiny chunks": (captured(max_chunk_bytes=0), "capture.max_chunk_bytes", "OUT_OF_RANGE"),
    "huge chunks": (captured(max_chunk_bytes=2**21), "capture.max_chunk_bytes", "OUT_OF_RANGE"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_request_is_refused_with_the_path_of_its_field(name):
    message, field, reason = BAD[name]
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(message)
    assert (caught.value.field, caught.value.reason) == (field, reason)


@pytest.mark.parametrize("budget", [Duration(), Duration(seconds=-1), Duration(seconds=86_400, nanos=1)])
def test_a_time_budget_outside_its_bounds_is_refused(budget):
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(generation_pb2.GenerateRequest(text="hi", time_budget=budget))
    assert (caught.value.field, caught.value.reason) == ("time_budget", "OUT_OF_RANGE")


@pytest.mark.parametrize("field", ["site", "delivery", "timing", "dtype", "hook"])
def test_an_enum_value_that_is_not_known_is_refused_by_its_field(field):
    with pytest.raises((Unsupported, InvalidRequest)) as caught:
        request_from_proto(captured(**{field: 99}))
    assert caught.value.field == f"capture.{field}"


@given(st.binary(max_size=200))
def test_any_bytes_become_a_request_or_a_typed_error(data):
    message = generation_pb2.GenerateRequest()
    try:
        message.MergeFromString(data)
    except Exception:  # not a protobuf message at all: gRPC refuses it before any code of ours
        return
    try:
        request_from_proto(message)
    except SteerError:
        return  # any other error fails the test


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1])
def test_tools_and_tool_calls_have_a_limit_together(size):
    arguments = '{"a":"' + "b" * (65536 - 8) + '"}'
    calls = [generation_pb2.ToolCall(name="f", arguments=arguments)] * 15
    tool = '{"a":"' + "b" * (size - 15 * 65536 - 8) + '"}'
    turns = [
        generation_pb2.ChatMessage(role="user", content="hi"),
        generation_pb2.ChatMessage(role="assistant", tool_calls=calls),
    ]
    message = generation_pb2.GenerateRequest(chat=generation_pb2.ChatPrompt(messages=turns, tools=[tool]))
    if size == 1 << 20:
        assert len(request_from_proto(message).prompt.messages[1].tool_calls) == 15
        return
    with pytest.raises(InvalidRequest) as caught:
        request_from_proto(message)
    assert (caught.value.field, caught.value.reason) == ("prompt.tools", "OUT_OF_RANGE")
