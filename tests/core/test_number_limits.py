"""Every number of a request is in one table, which the checks and the documentation follow."""

import dataclasses
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.checks import check_request
from steer_service.core.errors import InvalidRequest
from steer_service.core.number_limits import LIMITS, SAMPLING_LIMITS, NumberLimit, limits_as_markdown
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.testing.fake_backend import FAKE_MODEL

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
    fields = {limit.field for limit in LIMITS}

    assert set(numbers_of(GenerateRequest)) <= fields
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


def test_the_documentation_has_the_table() -> None:
    assert limits_as_markdown() in DOCUMENT.read_text()
