"""Options that choose among tokens: which are allowed, which words are not, and what is refused of them."""

from typing import Any

import pytest

from steer_service.core.checks import check_allowed
from steer_service.core.errors import InvalidRequest
from steer_service.core.sampling_options import SamplingOptions


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a", "b" * 257]}, "bad_words[1]"),
        ({"bad_words": ["a"] * 65}, "bad_words"),
        ({"bad_words": 3}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": range(1025)}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": "12"}, "allowed_token_ids"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingOptions(**options)
    assert refused.value.field == field


def test_one_bad_word_may_be_given_alone() -> None:
    assert SamplingOptions(bad_words="word").bad_words == ("word",)  # type: ignore[arg-type]
    assert SamplingOptions(bad_words=None).bad_words == ()  # type: ignore[arg-type]


def test_a_token_that_was_not_allowed_is_noticed() -> None:
    check_allowed([3, 4, 3], frozenset((3, 4)))
    check_allowed([5], None)
    with pytest.raises(InvalidRequest) as refused:
        check_allowed([3, 0], frozenset((3, 4)))
    assert refused.value.reason == "NO_TOKEN_LEFT"
