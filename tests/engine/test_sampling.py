"""Sampling options in force, and what vLLM is told about them."""

import asyncio
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.logprobs import Logprob
from vllm.sampling_params import RequestOutputKind

from steer_service.core.errors import InvalidRequest
from steer_service.core.sampling_options import DEFAULT_MAX_TOKENS, DEFAULTS, SamplingOptions, effective_options
from steer_service.engine.sampling import LOGPROBS_AT_ONCE, prompt_logprobs, vllm_params
from steer_service.testing.fake_backend import FakeTexts

ROOM = 1000
NO_DEFAULT = {"seed", "logprobs", "prompt_logprobs", "allowed_token_ids", "structured_outputs"}
WITHOUT_DEFAULT = {*NO_DEFAULT, "stop", "stop_token_ids", "logit_bias", "bad_words"}
FULL = SamplingOptions(
    n=2,
    max_tokens=40,
    min_tokens=3,
    temperature=0.7,
    top_p=0.9,
    top_k=50,
    min_p=0.1,
    seed=1234,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.25,
    ignore_eos=True,
    skip_special_tokens=False,
    logprobs=5,
    prompt_logprobs=4,
    stop=("END", "\n\n"),
    stop_token_ids=(7, 8),
    include_stop=True,
    logit_bias={3: -2.5},
    bad_words=("bad",),
    allowed_token_ids=(3, 4),
)


def options_in_range() -> st.SearchStrategy[SamplingOptions]:
    return st.builds(
        SamplingOptions,
        n=st.none() | st.integers(1, 8),
        max_tokens=st.none() | st.integers(100, 2000),
        min_tokens=st.none() | st.integers(0, 100),
        temperature=st.none() | st.floats(0.0, 2.0),
        top_k=st.none() | st.integers(0, 100),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        ignore_eos=st.none() | st.booleans(),
    )


def seed_of(seed: int | None, index: int = 0) -> int | None:
    options = effective_options(SamplingOptions(seed=seed), 1, ROOM)
    told = vllm_params(options, index, extra_args=None, skip_cached=False).seed
    return None if told is None else int(told)


@given(options_in_range(), st.integers(1, ROOM - 1))
def test_everything_with_a_default_is_filled_in_and_nothing_asked_for_is_changed(
    asked: SamplingOptions, prompt_tokens: int
) -> None:
    options = effective_options(asked, prompt_tokens, ROOM)

    for name in SamplingOptions.__dataclass_fields__:
        if name not in WITHOUT_DEFAULT:
            assert getattr(options, name) is not None
        if getattr(asked, name) is not None and name not in {"max_tokens", "min_tokens"}:
            assert getattr(options, name) == getattr(asked, name)


@given(options_in_range(), st.integers(1, ROOM - 1))
def test_no_more_tokens_are_asked_for_than_there_is_room(asked: SamplingOptions, prompt_tokens: int) -> None:
    options = effective_options(asked, prompt_tokens, ROOM)

    wanted = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    assert options.max_tokens == min(wanted, ROOM - prompt_tokens)
    assert options.min_tokens == min(asked.min_tokens or 0, options.max_tokens)


def test_every_option_has_a_default_or_is_known_to_have_none() -> None:
    assert {field.name for field in fields(DEFAULTS) if not getattr(DEFAULTS, field.name)} >= WITHOUT_DEFAULT
    assert {field.name for field in fields(DEFAULTS) if getattr(DEFAULTS, field.name) is None} == NO_DEFAULT


def test_more_tokens_at_least_than_at_most_by_default_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"min_tokens {DEFAULT_MAX_TOKENS + 1} is greater than max_tokens"):
        effective_options(SamplingOptions(min_tokens=DEFAULT_MAX_TOKENS + 1), 1, ROOM)


def test_every_option_reaches_vllm() -> None:
    params = vllm_params(FULL, 0, extra_args={"steer": {"slot": 1}}, skip_cached=True)

    assert (params.n, params.max_tokens, params.min_tokens) == (1, 40, 3)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 50, 0.1)
    assert params.seed == 1234
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.25)
    assert (params.ignore_eos, params.logprobs, params.stop_token_ids) == (True, 5, [7, 8])
    assert params.logit_bias == {3: -2.5}
    assert (params.bad_words, params.allowed_token_ids) == (["bad"], [3, 4])
    assert params.extra_args == {"steer": {"slot": 1}}
    assert params.skip_reading_prefix_cache is True
    assert params.output_kind is RequestOutputKind.DELTA
    assert (params.detokenize, params.stop) == (False, [])  # the text is made in runtime/output_text.py


def test_defaults_are_vllms_neutral_values() -> None:
    params = vllm_params(effective_options(SamplingOptions(), 1, ROOM), 0, extra_args=None, skip_cached=False)

    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.seed is None
    assert params.logprobs is None
    assert params.logit_bias is None
    assert (params.bad_words, params.allowed_token_ids) == ([], None)
    assert params.extra_args is None
    assert params.skip_reading_prefix_cache is False


def test_the_prompt_is_scored_once_and_without_the_prefix_cache() -> None:
    first, second = (vllm_params(FULL, index, extra_args=None, skip_cached=False) for index in range(2))

    assert (first.prompt_logprobs, first.skip_reading_prefix_cache) == (4, True)
    assert (second.prompt_logprobs, second.skip_reading_prefix_cache) == (None, False)


async def test_the_scores_of_a_long_prompt_leave_turns_to_other_tasks() -> None:
    top, tokens = 3, 5000
    likely = [{7: Logprob(-1.0, 2), 8: Logprob(-0.5, 1), 9: Logprob(-2.0, 3), 10: Logprob(-9.0, 40)}] * (tokens - 1)
    turns = 0

    async def neighbour() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    running = asyncio.ensure_future(neighbour())
    scores = await prompt_logprobs([10] * tokens, [None, *likely], top, FakeTexts())
    running.cancel()

    assert turns >= tokens * (1 + top) // LOGPROBS_AT_ONCE
    assert (scores.first_position, len(scores.logprobs)) == (1, tokens - 1)
    assert (scores.logprobs[0].token_id, scores.logprobs[0].rank) == (10, 40)
    assert [entry.token_id for entry in scores.logprobs[-1].top] == [8, 7, 9]
    assert [entry.rank for entry in scores.logprobs[-1].top] == [1, 2, 3]


def test_each_output_is_one_request_of_its_own() -> None:
    assert [vllm_params(FULL, index, extra_args=None, skip_cached=False).n for index in range(3)] == [1, 1, 1]


@given(st.integers(-(2**63), 2**63 - 1))
def test_outputs_of_a_seeded_request_are_seeded_each_in_its_own_way(seed: int) -> None:
    seeds = [seed_of(seed, index) for index in range(8)]

    assert None not in seeds
    assert len(set(seeds)) == 8
    assert all(one is not None and -(2**63) <= one < 2**63 for one in seeds)
    assert seeds == [seed_of(seed, index) for index in range(8)]


@pytest.mark.parametrize("seed", [0, 1, 41, -5, 2**63 - 10])
def test_output_i_has_the_seed_plus_i(seed: int) -> None:
    assert [seed_of(seed, index) for index in range(4)] == [seed, seed + 1, seed + 2, seed + 3]


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (-3, 2), (2**63 - 1, 1)])
def test_a_seed_that_vllm_would_ignore_still_counts(seed: int, index: int) -> None:
    assert seed_of(seed, index) is not None


def test_a_missing_seed_stays_missing() -> None:
    assert seed_of(None, 3) is None


def test_greedy_options_are_taken() -> None:
    params = vllm_params(replace(FULL, temperature=0.0), 0, extra_args=None, skip_cached=False)

    assert params.temperature == 0.0
