"""Numbers of a request, lists and texts are in one table, which the checks and the documentation follow."""

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.checks import check_request
from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import (
    LENGTHS,
    NUMBERS,
    SAMPLING_LIMITS,
    NumberLimit,
    lengths_as_markdown,
    numbers_as_markdown,
)
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt, ToolCall
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.testing.fake_backend import FAKE_MODEL
from steer_service.wire import message_scan

DOCUMENT = Path(__file__).parents[2] / "docs" / "limits.md"
ODD = replace(FAKE_MODEL, vocab_size=12, max_logprobs=5, max_temperature=2.0, layer_count=2)
SCALARS = [limit for name, limit in SAMPLING_LIMITS.items() if name.isidentifier()]


def numbers_of(kind: Any) -> list[str]:
    """Fields of a dataclass that are numbers."""
    hints = typing.get_type_hints(kind)
    return [field.name for field in dataclasses.fields(kind) if set(_arms(hints[field.name])) & {int, float}]


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def test_every_number_of_the_sampling_options_has_a_limit() -> None:
    assert set(numbers_of(SamplingOptions)) == {limit.field.removeprefix("sampling.") for limit in SCALARS}


def test_every_number_of_captures_and_positions_has_a_limit() -> None:
    fields = {limit.field for limit in NUMBERS}

    assert {name.removesuffix("_s") for name in numbers_of(GenerateRequest)} <= fields
    assert {f"capture.{name}" for name in numbers_of(CaptureSpec)} <= fields
    for ranges in ("ranges", "generated_ranges"):
        assert {f"positions.{ranges}[].{name}" for name in numbers_of(PositionRange)} <= fields


@pytest.mark.parametrize("limit", SCALARS, ids=lambda limit: limit.field)
def test_the_ends_of_a_range_are_accepted_and_what_is_beyond_is_not(limit: NumberLimit) -> None:
    name = limit.field.removeprefix("sampling.")
    least = np.nextafter(limit.least, 1) if limit.is_above else limit.least
    for value in (least, limit.most):
        options = {"min_tokens": 0, "max_tokens": 2**31 - 1, name: value}
        assert getattr(SamplingOptions(**options), name) == value
    too_low = limit.least - 1 if not limit.is_above else limit.least
    for value in (too_low, type(limit.least)(limit.most * 2 + 1)):
        with pytest.raises(InvalidRequest) as raised:
            SamplingOptions(**{name: value})
        assert raised.value.field == name


@pytest.mark.parametrize(
    ("field", "fits", "too_much"),
    [
        ("logprobs", 5, 6),
        ("prompt_logprobs", 5, 6),
        ("temperature", 2.0, 2.5),
        ("stop_token_ids", [11], [12]),
        ("allowed_token_ids", [11], [12]),
        ("logit_bias", {11: 1.0}, {12: 1.0}),
    ],
)
def test_limits_of_the_model_are_checked(field: str, fits: Any, too_much: Any) -> None:
    def check(value: Any) -> None:
        sampling = SamplingOptions(**{field: value})
        check_request(GenerateRequest(prompt=TokenPrompt(token_ids=[11]), sampling=sampling), ODD)

    check(fits)
    with pytest.raises(InvalidRequest) as raised:
        check(too_much)
    assert raised.value.field.startswith(f"sampling.{field}")


def test_log_probabilities_are_limited_by_a_small_vocabulary() -> None:
    limit = SAMPLING_LIMITS["logprobs"]

    assert [limit.most_on(replace(ODD, max_logprobs=20, vocab_size=size)) for size in (12, 20, 32_000)] == [12, 20, 20]


def test_log_probabilities_reach_the_engines_own_limit() -> None:
    info = replace(ODD, max_logprobs=1000, vocab_size=32_000)

    check_request(GenerateRequest(prompt=TokenPrompt(token_ids=[11]), sampling=SamplingOptions(logprobs=1000)), info)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=TextPrompt(text="a"), **fields)


WITH_NUMBER: dict[str, Callable[[Any], object]] = {
    "prompt.token_ids[]": lambda n: TokenPrompt(token_ids=[n]),
    "sampling.stop_token_ids[]": lambda n: SamplingOptions(stop_token_ids=[n]),
    "sampling.allowed_token_ids[]": lambda n: SamplingOptions(allowed_token_ids=[n]),
    "sampling.logit_bias{}": lambda n: SamplingOptions(logit_bias={n: 1.0}),
    "sampling.logit_bias[]": lambda n: SamplingOptions(logit_bias={1: n}),
    "steering.layers{}": lambda n: SteeringSpec(layers={n: LayerSteeringSpec()}),
    "steering.layers[].operations[].max_relative_change": lambda n: AddSpec([1.0], max_relative_change=n),
    "capture.layers[]": lambda n: CaptureSpec(layers=[n]),
    "capture.max_chunk_bytes": lambda n: CaptureSpec(layers=[0], max_chunk_bytes=n),
    "priority": lambda n: request(priority=n),
    "stream_interval": lambda n: request(stream_interval=n),
    "truncate_prompt_tokens": lambda n: request(truncate_prompt_tokens=n),
    "time_budget": lambda n: request(time_budget_s=n),
    "positions.ranges[].first": lambda n: PositionRange(n),
    "positions.ranges[].last": lambda n: PositionRange(1 - 2**31 if n < 0 else 0, n),
    "positions.generated_ranges[].first": lambda n: PositionScope(generated_ranges=[PositionRange(n)]),
    "positions.generated_ranges[].last": lambda n: PositionScope(generated_ranges=[PositionRange(0, n)]),
    "positions.messages[]": lambda n: PositionScope(messages=[n]),
}
"""Number outside of the single sampling options -> something that has it."""


def test_every_number_of_the_table_is_tested() -> None:
    assert {limit.field for limit in NUMBERS} == WITH_NUMBER.keys() | {limit.field for limit in SCALARS}


@pytest.mark.parametrize("field", WITH_NUMBER)
def test_a_number_is_accepted_at_the_ends_of_its_range_and_not_beyond(field: str) -> None:
    (limit,) = (one for one in NUMBERS if one.field == field)
    build = WITH_NUMBER[field]

    assert build(np.nextafter(limit.least, 1) if limit.is_above else limit.least)
    assert build(limit.most)
    for beyond in (limit.least if limit.is_above else limit.least - 1, limit.most * (1 + 2**-20) + 1):
        with pytest.raises(InvalidRequest):
            build(type(limit.most)(beyond))


USER = ChatMessage(role="user")


def chat(**fields: Any) -> ChatPrompt:
    return ChatPrompt(**{"messages": [USER], **fields})


def json_of(size: int) -> str:
    return '{"a":"' + "b" * (size - len('{"a":""}')) + '"}'


WITH_LENGTH: dict[str, Callable[[int], object]] = {
    "request_id": lambda n: GenerateRequest(prompt=TextPrompt(text="a"), request_id="a" * n),
    "model": lambda n: GenerateRequest(prompt=TextPrompt(text="a"), model="a" * n),
    "cache_salt": lambda n: GenerateRequest(prompt=TextPrompt(text="a"), cache_salt="a" * n),
    "prompt.messages": lambda n: chat(messages=[USER] * n),
    "prompt.messages[].role": lambda n: ChatMessage(role="a" * n),
    "prompt.messages[].name": lambda n: ChatMessage(role="user", name="a" * n),
    "prompt.messages[].tool_call_id": lambda n: ChatMessage(role="tool", tool_call_id="a" * n),
    "prompt.messages[].tool_calls": lambda n: ChatMessage(role="assistant", tool_calls=[ToolCall(name="f")] * n),
    "prompt.messages[].tool_calls[].id": lambda n: ToolCall(name="f", id="a" * n),
    "prompt.messages[].tool_calls[].name": lambda n: ToolCall(name="a" * n),
    "prompt.chat_template_kwargs": lambda n: chat(chat_template_kwargs=json_of(n)),
    "prompt.tools": lambda n: chat(tools=[{}] * n),
    "prompt.tools[]": lambda n: chat(tools=[json_of(n)]),
    "sampling.stop": lambda n: SamplingOptions(stop=["a"] * n),
    "sampling.stop[]": lambda n: SamplingOptions(stop=["a" * n]),
    "sampling.stop_token_ids": lambda n: SamplingOptions(stop_token_ids=[1] * n),
    "sampling.logit_bias": lambda n: SamplingOptions(logit_bias=dict.fromkeys(range(n), 1.0)),
    "sampling.bad_words": lambda n: SamplingOptions(bad_words=["a"] * n),
    "sampling.bad_words[]": lambda n: SamplingOptions(bad_words=["a" * n]),
    "sampling.allowed_token_ids": lambda n: SamplingOptions(allowed_token_ids=[1] * n),
    "sampling.structured_outputs.json": lambda n: SamplingOptions(structured_outputs={"json": json_of(n)}),
    "sampling.structured_outputs.regex": lambda n: SamplingOptions(structured_outputs={"regex": "a" * n}),
    "sampling.structured_outputs.grammar": lambda n: SamplingOptions(structured_outputs={"grammar": "a" * n}),
    "sampling.structured_outputs.choice": lambda n: SamplingOptions(structured_outputs={"choice": ["a"] * n}),
    "capture.release_token": lambda n: CaptureSpec(layers=[0], release_token=b"a" * n),
    "positions.ranges": lambda n: PositionScope(ranges=[PositionRange(0)] * n),
    "positions.generated_ranges": lambda n: PositionScope(generated_ranges=[PositionRange(0)] * n),
    "positions.messages": lambda n: PositionScope(messages=[0] * n),
    "positions.roles": lambda n: PositionScope(roles=["user"] * n),
    "positions.roles[]": lambda n: PositionScope(roles=["a" * n]),
}
"""List or text -> something that has it, with a length."""

TESTED_ELSEWHERE = {
    "prompt.text",
    "prompt.token_ids",
    "steering.layers",
    "steering.layers[].operations",
    "steering.layers[].operations[].vector",
    "steering.layers[].operations[].positions",
    "capture.layers",
    "steering.positions.entries",
    "positions",
    "detokenize.token_ids",
}
"""Limits of a model, of a whole spec, or of what is read from the wire only."""


def test_every_list_and_text_of_the_table_is_tested() -> None:
    fields = {limit.field.removesuffix(".length") for limit in LENGTHS}
    assert fields == WITH_LENGTH.keys() | TESTED_ELSEWHERE


@pytest.mark.parametrize("field", WITH_LENGTH)
def test_a_list_or_text_has_at_most_its_length(field: str) -> None:
    (limit,) = (one for one in LENGTHS if one.field == f"{field}.length")
    build, last_name = WITH_LENGTH[field], re.split(r"[.\[]", field.removesuffix("[]"))[-1]

    assert build(int(limit.most))
    for length in [int(limit.most) + 1] + ([int(limit.least) - 1] if limit.least > 0 else []):
        with pytest.raises(InvalidRequest) as raised:
            build(length)
        assert last_name in raised.value.field
        if limit.unit == "entries" and length > limit.most:
            assert raised.value.reason == "TOO_MANY_ENTRIES"


LISTS_ON_THE_WIRE = {
    "CaptureSpec.layers": "capture.layers",
    "ChatPrompt.messages": "prompt.messages",
    "ChatPrompt.tools": "prompt.tools",
    "Choices.texts": "sampling.structured_outputs.choice",
    "PositionScope.generated_ranges": "positions.generated_ranges",
    "PositionScope.messages": "positions.messages",
    "PositionScope.ranges": "positions.ranges",
    "PositionScope.roles": "positions.roles",
    "SamplingOptions.allowed_token_ids": "sampling.allowed_token_ids",
    "SamplingOptions.bad_words": "sampling.bad_words",
    "SamplingOptions.logit_bias": "sampling.logit_bias",
    "SamplingOptions.stop": "sampling.stop",
    "SamplingOptions.stop_token_ids": "sampling.stop_token_ids",
}


def test_every_list_on_the_wire_is_in_the_table() -> None:
    """But a tensor's shape, and lists whose limit on the wire is that of all messages or of a capture's layers."""
    most = {limit.field.removesuffix(".length"): limit.most for limit in LENGTHS}

    others = {"ChatMessage.tool_calls", "FetchCaptureRequest.layers", "Tensor.shape"}
    wire = {name.removeprefix("steer.v1."): limit for name, limit in message_scan.LIMITS.items()}
    assert {name: wire[name] for name in wire.keys() - others} == {
        name: most[field] for name, field in LISTS_ON_THE_WIRE.items()
    }


def test_the_documentation_has_the_tables() -> None:
    text = DOCUMENT.read_text()

    assert numbers_as_markdown() in text
    assert lengths_as_markdown() in text
