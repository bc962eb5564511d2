"""The scan of a request's bytes: what it refuses without parsing, and that it refuses nothing that is right."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.errors import InvalidRequest, SteerError, Unsupported
from steer_service.core.number_limits import MAX_POSITION_ENTRIES
from steer_service.testing.fake_backend import FAKE_MODEL
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, position_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.generation_pb2 import GenerateRequest
from steer_service.wire.message_scan import LIMITS, FieldLimits, model_limits, parsed, scan
from steer_service.wire.request import request_to_proto
from tests.wire.strategies import requests

MODEL_LIMITS = model_limits(FAKE_MODEL)

PROGRAM = 7, 1
"""Path of a layer: GenerateRequest.steering, SteeringSpec.layers."""

HOSTILE: dict[str, tuple[bytes, tuple[int, ...], str, str]] = {
    # bytes of one entry, the fields it is in, the field of the error, its reason
    "layers to capture": (b"\x08\x01", (8,), "capture.layers", "TOO_MANY_ENTRIES"),
    "ranges to capture": (b"\x1a\x00", (8, 3), "capture.positions.ranges", "TOO_MANY_ENTRIES"),
    "ranges to steer": (b"\x1a\x00", (7, 2), "steering.positions.ranges", "TOO_MANY_ENTRIES"),
    "messages to steer": (b"\x28\x01", (7, 2), "steering.positions.messages", "TOO_MANY_ENTRIES"),
    "roles to capture": (b"\x32\x00", (8, 3), "capture.positions.roles", "TOO_MANY_ENTRIES"),
    "messages": (b"\x0a\x00", (5,), "prompt.messages", "TOO_MANY_ENTRIES"),
    "layers to steer": (b"\x0a\x00", (7,), "steering.layers", "TOO_MANY_ENTRIES"),
    "operations": (b"\x12\x00", PROGRAM, "steering.layers[0].operations", "PROGRAM_TOO_LARGE"),
    "dimensions": (
        b"\x10\x01",
        (*PROGRAM, 2, 1, 1, 1),
        "steering.layers[0].operations[0].vector.shape",
        "TOO_MANY_ENTRIES",
    ),
    "token ids": (b"\x08\x01", (4,), "prompt", "PROMPT_TOO_LONG"),
    "stop strings": (b"\x7a\x00", (6,), "sampling.stop", "TOO_MANY_ENTRIES"),
    "stop tokens": (b"\x80\x01\x01", (6,), "sampling.stop_token_ids", "TOO_MANY_ENTRIES"),
    "tool calls": (b"\x22\x00", (5, 1), "prompt.messages[0].tool_calls", "TOO_MANY_ENTRIES"),
    "bad words": (b"\xaa\x01\x00", (6,), "sampling.bad_words", "TOO_MANY_ENTRIES"),
    "allowed tokens": (b"\xb0\x01\x01", (6,), "sampling.allowed_token_ids", "TOO_MANY_ENTRIES"),
    "choices": (b"\x0a\x00", (6, 20, 4), "sampling.structured_outputs.choice", "TOO_MANY_ENTRIES"),
    "biases": (b"\x92\x01\x00", (6,), "sampling.logit_bias", "TOO_MANY_ENTRIES"),
    "a text": (b"\x1a\x01a", (), "prompt.text", "DUPLICATE_FIELD"),
}
"""Entries of each field that can be given often."""

PACKED = {
    "layers to capture": (1, (8,), "capture.layers"),
    "messages to steer": (5, (7, 2), "steering.positions.messages"),
    "dimensions": (2, (*PROGRAM, 2, 1, 1, 1), "steering.layers[0].operations[0].vector.shape"),
    "token ids": (1, (4,), "prompt"),
    "stop tokens": (16, (6,), "sampling.stop_token_ids"),
    "allowed tokens": (22, (6,), "sampling.allowed_token_ids"),
}


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def read(data: bytes, limits: FieldLimits) -> GenerateRequest:
    """The message, read as the server reads it."""
    scan(GenerateRequest.DESCRIPTOR, data, limits)
    return parsed(GenerateRequest, data)


def inside(path: tuple[int, ...], data: bytes) -> bytes:
    """`data` as the contents of a message in a message, and so on; `path` has their field numbers, from outside."""
    for number in reversed(path):
        data = varint(number << 3 | 2) + varint(len(data)) + data
    return data


def refusal(data: bytes) -> SteerError:
    with pytest.raises(SteerError) as caught:
        read(data, MODEL_LIMITS)
    return caught.value


@pytest.mark.parametrize("name", HOSTILE)
def test_a_field_with_too_many_entries_is_refused_by_name(name: str) -> None:
    entry, path, field, reason = HOSTILE[name]
    error = refusal(inside(path, entry * 100_000))
    assert (type(error), error.field, error.reason) == (InvalidRequest, field, reason)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("value", [b"\x01", b"\xff\xff\xff\xff\x0f"])
def test_packed_entries_are_counted(name: str, value: bytes) -> None:
    number, path, field = PACKED[name]
    assert refusal(inside((*path, number), value * 100_000)).field == field


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (4096, lambda count: GenerateRequest(text="a", capture=capture_pb2.CaptureSpec(layers=[1] * count))),
        (4096, lambda count: GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[300] * count))),
        (1024, lambda count: one_layer([steering_pb2.SteeringOperation()] * count)),
    ],
)
def test_exactly_as_many_entries_as_allowed_are_parsed(most: int, message: Callable[[int], GenerateRequest]) -> None:
    data = message(most).SerializeToString()
    assert read(data, MODEL_LIMITS) == message(most)
    assert refusal(message(most + 1).SerializeToString())


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, None)], ids=["equal operations", "of two sizes"])
@pytest.mark.parametrize(("count", "is_refused"), [(512, False), (513, True)])
def test_operations_of_all_layers_count_together(
    scales: tuple[float | None, ...], count: int, is_refused: bool
) -> None:
    operations = [steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(scale=scale)) for scale in scales]
    layer = steering_pb2.LayerSteeringSpec(operations=(operations * count)[:count])
    data = GenerateRequest(steering=steering_pb2.SteeringSpec(layers=[layer, layer])).SerializeToString()
    if is_refused:
        assert refusal(data).reason == "PROGRAM_TOO_LARGE"
    else:
        read(data, MODEL_LIMITS)


def test_tool_calls_of_all_messages_count_together() -> None:
    turn = generation_pb2.ChatMessage(role="assistant", tool_calls=[generation_pb2.ToolCall(name="f")] * 128)
    for messages, is_refused in ((8, False), (9, True)):
        data = GenerateRequest(chat=generation_pb2.ChatPrompt(messages=[turn] * messages)).SerializeToString()
        if is_refused:
            assert refusal(data).field == "prompt.messages[8].tool_calls"
        else:
            read(data, MODEL_LIMITS)


def one_layer(operations: list[steering_pb2.SteeringOperation]) -> GenerateRequest:
    layer = steering_pb2.LayerSteeringSpec(layer=1, operations=operations)
    return GenerateRequest(text="a", steering=steering_pb2.SteeringSpec(layers=[layer]))


def test_an_operation_that_differs_from_its_equals_in_one_place_is_looked_at() -> None:
    """Operations of equal size are compared with the one before; only their contents may differ."""
    inline = steering_pb2.Vector(inline={"dtype": 1, "shape": [64], "data": bytes(256)})
    operation = steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(vector=inline, scale=1.0)).SerializeToString()
    place = operation.index(b"\x12\x01\x40")  # the shape, one packed entry
    for changed in (b"\x7a\x01\x40", b"\x12\x01\xc0"):
        other = operation[:place] + changed + operation[place + 3 :]
        layer = b"\x08\x01" + inside((2,), operation) + inside((2,), other)
        data = b"\x1a\x01a" + inside((7, 1), layer)
        if changed[0] == 0x7A:
            assert refusal(data).reason == "UNKNOWN_FIELD"
        else:
            assert refusal(data).reason == "MALFORMED"  # found by the parser: the varint does not end


def test_a_field_of_a_later_revision_is_refused_by_its_number() -> None:
    """Dropping an option that this server does not know would answer another request than was asked."""
    later = GenerateRequest(text="hi").SerializeToString() + b"\xf8\x7f\x01"
    error = refusal(later)
    assert (type(error), error.reason, error.field) == (Unsupported, "UNKNOWN_FIELD", "")
    assert "2047" in str(error)


def test_unknown_fields_deep_in_the_steering_are_refused() -> None:
    data = inside((7, 1), inside((2,), b"") + inside((2,), b"\xf8\x7f\x01"))
    assert refusal(data).field == "steering.layers[0].operations[1]"


def test_a_refusal_names_the_entry_among_equal_ones() -> None:
    """Entries that are equal to the one before are not looked at, but they count."""
    turn = inside((1,), b"\x0a\x04user")
    data = inside((5,), turn * 3 + inside((1,), b"\x0a\x04user\x0a\x04user"))
    error = refusal(data)
    assert (error.reason, error.field) == ("DUPLICATE_FIELD", "prompt.messages[3].role")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ((7, 1, 2, 2), "steering.layers[0].operations[0]"),
        ((7, 1, 2, 3, 1), "steering.layers[0].operations[0].vector"),
        ((7, 1, 2, 3, 1, 1), "steering.layers[0].operations[0].vector"),
        ((4,), "prompt.token_ids"),
        ((5,), "prompt"),
        ((6, 18), "sampling.logit_bias"),
        ((6, 20), "sampling.structured_outputs"),
    ],
)
def test_a_path_is_that_of_the_checks_after_parsing(path: tuple[int, ...], field: str) -> None:
    """Without the kinds of prompts, operations and vectors."""
    assert refusal(inside(path, b"\xf8\x7f\x01")).field == field


def test_the_prompts_of_the_tokenizer_are_named_as_those_of_requests() -> None:
    twice = {tokenizer_pb2.TokenizeRequest: b"\x12\x01a" * 2, tokenizer_pb2.RenderRequest: b"\x12\x01a" * 2}
    for kind, data in twice.items():
        with pytest.raises(InvalidRequest) as raised:
            scan(kind.DESCRIPTOR, data, MODEL_LIMITS)
        assert raised.value.field == "prompt.text"


@pytest.mark.parametrize("data", [b"\xff", b"\x00", b"\x1a", b"\x1a\x05a", b"\x1a\xff\xff\xff\xff\x0f", b"\x1b\x1c"])
def test_bytes_that_are_no_message_are_malformed_or_unknown(data: bytes) -> None:
    assert refusal(data).reason in ("MALFORMED", "UNKNOWN_FIELD")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(SteerError):
        read(data, MODEL_LIMITS)


@given(requests, st.randoms(use_true_random=False))
def test_right_requests_pass_and_damaged_ones_are_typed_errors(request, random) -> None:
    data = request_to_proto(request).SerializeToString()
    generous = dict.fromkeys([*LIMITS, *MODEL_LIMITS], 10_000)
    assert read(data, generous) == GenerateRequest.FromString(data)
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    with contextlib.suppress(SteerError):
        read(bytes(damaged), generous)


def test_every_repeated_field_of_a_request_has_a_limit() -> None:
    limits = MODEL_LIMITS.keys()
    for file in (generation_pb2, steering_pb2, capture_pb2, tokenizer_pb2, info_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert repeated_fields(method.input_type) <= limits, method.full_name


def repeated_fields(message: Descriptor) -> set[str]:
    mine = {field.full_name for field in message.fields if field.is_repeated}
    return mine.union(*(repeated_fields(field.message_type) for field in message.fields if field.message_type))


def test_the_parts_at_the_top_are_measured() -> None:
    vector = steering_pb2.Vector(inline={"dtype": 1, "shape": [8], "data": np.ones(8, np.float32).tobytes()})
    request = one_layer([steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(vector=vector))])
    lengths = scan(GenerateRequest.DESCRIPTOR, request.SerializeToString(), MODEL_LIMITS)
    assert lengths == {"text": 1, "steering": request.steering.ByteSize()}


@pytest.mark.parametrize(
    ("name", "entry"), [("ranges", position_pb2.PositionRange(first=1)), ("messages", 1), ("messages", -4096)]
)
def test_the_entries_of_the_positions_of_all_operations_are_counted_together(name: str, entry: object) -> None:
    """Each may have 1024; a thousand operations that have them would take seconds to parse."""
    positions = position_pb2.PositionScope(**{name: [entry] * 1024})  # type: ignore[arg-type]
    operation = steering_pb2.SteeringOperation(positions=positions)

    def request(operations: int) -> bytes:
        layer = steering_pb2.LayerSteeringSpec(operations=[operation] * operations)
        return GenerateRequest(steering=steering_pb2.SteeringSpec(layers=[layer])).SerializeToString()

    allowed = MAX_POSITION_ENTRIES // 1024
    read(request(allowed), MODEL_LIMITS)
    with pytest.raises(InvalidRequest, match=f"more than {MAX_POSITION_ENTRIES} entries") as raised:
        read(request(allowed + 5), MODEL_LIMITS)  # the scan leaves those of a capture to be counted later
    assert (raised.value.reason, raised.value.field) == (
        "TOO_MANY_ENTRIES",
        f"steering.layers[0].operations[20].positions.{name}",
    )
