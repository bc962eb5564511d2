"""Constraints of structured outputs: their forms, their limits, and what is refused of them."""

import json
from typing import Any

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}


def nested(levels: int) -> dict[str, Any]:
    return {"properties": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize("given", [SCHEMA, json.dumps(SCHEMA, indent=4)])
def test_a_schema_is_given_as_a_mapping_or_as_text(given: Any) -> None:
    options = SamplingOptions(structured_outputs={"json": given})  # type: ignore[arg-type]
    assert options.structured_outputs == StructuredOutputs(json=json.dumps(SCHEMA, separators=(",", ":")))


@pytest.mark.parametrize(
    "fits",
    [
        {"regex": "a" * 4096},
        {"grammar": "x" * 65536},
        {"choice": ["x"] * 1024},
        {"json": nested(64)},
        {"json": {"description": "x" * (65536 - len('{"description":""}'))}},
    ],
)
def test_the_largest_constraints_are_accepted(fits: dict[str, Any]) -> None:
    StructuredOutputs.of(fits)


@pytest.mark.parametrize(
    ("given", "field", "reason"),
    [
        ({}, "structured_outputs", "BAD_CONSTRAINT"),
        ({"json": SCHEMA, "regex": "a"}, "structured_outputs", "BAD_CONSTRAINT"),
        ({"structural_tag": "a"}, "structured_outputs", "BAD_CONSTRAINT"),
        ("a", "structured_outputs", "BAD_CONSTRAINT"),
        ({"json": "no JSON"}, "structured_outputs.json", "BAD_JSON"),
        ({"json": [SCHEMA]}, "structured_outputs.json", "BAD_JSON"),
        ({"json": '{"minimum": 1e999}'}, "structured_outputs.json", "BAD_JSON"),
        ({"json": {"description": "x" * 65536}}, "structured_outputs.json", "OUT_OF_RANGE"),
        ({"json": nested(65)}, "structured_outputs.json", "OUT_OF_RANGE"),
        ({"regex": ""}, "structured_outputs.regex", "OUT_OF_RANGE"),
        ({"regex": "é" * 2049}, "structured_outputs.regex", "OUT_OF_RANGE"),
        ({"regex": "a\0"}, "structured_outputs.regex", "BAD_TEXT"),
        ({"regex": 3}, "structured_outputs.regex", "BAD_TEXT"),
        ({"grammar": "x" * 65537}, "structured_outputs.grammar", "OUT_OF_RANGE"),
        ({"choice": []}, "structured_outputs.choice", "OUT_OF_RANGE"),
        ({"choice": ["a"] * 1025}, "structured_outputs.choice", "TOO_MANY_ENTRIES"),
        ({"choice": ["a", ""]}, "structured_outputs.choice[1]", "OUT_OF_RANGE"),
        ({"choice": ["x" * 40_000, "y" * 40_000]}, "structured_outputs.choice", "OUT_OF_RANGE"),
        ({"choice": "yes"}, "structured_outputs.choice", "BAD_TEXT"),
        ({"choice": [1]}, "structured_outputs.choice[0]", "BAD_TEXT"),
    ],
)
def test_what_is_no_constraint_is_refused_by_name(given: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingOptions(structured_outputs=given)
    assert (refused.value.field, refused.value.reason) == (field, reason)


def test_nothing_may_follow_a_structured_output() -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingOptions(structured_outputs={"regex": "a"}, ignore_eos=True)  # type: ignore[arg-type]
    assert refused.value.field == "ignore_eos"
