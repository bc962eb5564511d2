"""What a client learns of vLLM's errors: the option and the numbers, and no word of a prompt or of the server."""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, SteerError
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.vllm_errors import vllm_errors
from steer_service.engine.vllm_patches.compat import OVERLOADED, REFUSED

SECRET = "my password is swordfish, and it is in /home/me/secret.txt"


def converted(act: Callable[[], Any], counters: FailureCounters | None = None) -> SteerError:
    with pytest.raises(SteerError) as raised, vllm_errors(counters):
        act()
    return raised.value


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"temperature": -1.0}, "temperature", "temperature must be non-negative, got -1.0."),
        ({"temperature": float("inf")}, "temperature", "temperature must be a finite number, got inf."),
        ({"top_p": 1.5}, "top_p", "top_p must be in (0, 1], got 1.5."),
        ({"top_k": -7}, "top_k", "top_k must be 0 (disable), or at least 1, got -7."),
        ({"min_p": 2.0}, "min_p", "min_p must be in [0, 1], got 2.0."),
        ({"presence_penalty": 3.0}, "presence_penalty", "presence_penalty must be in [-2, 2], got 3.0."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"max_tokens": 1, "min_tokens": 5}, "min_tokens", "less than or equal to max_tokens=1, got 5."),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "must be greater than zero, got 0.0."),
        ({"logprobs": -5}, "logprobs", "logprobs must be non-negative or -1, got -5."),
    ],
)
def test_what_vllm_says_of_an_option_is_passed_on(options: dict[str, Any], field: str, words: str) -> None:
    error = converted(lambda: SamplingParams(**options))

    assert isinstance(error, InvalidRequest)
    assert words in error.message
    assert (error.reason, error.field) == ("REFUSED_BY_ENGINE", f"sampling.{field}")


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words": [SECRET, ""]},
        {"stop": [SECRET], "detokenize": False},
        {"stop_token_ids": [SECRET]},
    ],
)
def test_what_vllm_quotes_of_a_request_is_not_passed_on(options: dict[str, Any]) -> None:
    error = converted(lambda: SamplingParams(**options))

    assert not set(SECRET.split()[1:]) & set(str(error).split())
    assert error.message == "the engine refuses this request"


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"temperature must be non-negative, got {SECRET}",
        f"temperature must be {SECRET}, got 1.0.",
        f"Requested sample logprobs of 30, which is greater than max allowed: {SECRET}",
        f"{SECRET} temperature must be non-negative, got -1.0.",
        "",
    ],
)
def test_a_text_that_is_not_known_is_left_out(text: str) -> None:
    error = converted(raising(REFUSED[0](text)))

    assert "swordfish" not in str(error)
    assert "/home" not in str(error)


def test_what_follows_a_known_text_is_left_out() -> None:
    error = converted(raising(REFUSED[0](f"temperature must be non-negative, got -1.0. {SECRET}")))

    assert error.message == "temperature must be non-negative, got -1.0."


@pytest.mark.skipif(not OVERLOADED, reason="this vLLM has no error for overload")
def test_overload_may_be_retried_and_says_nothing_of_the_server() -> None:
    error = converted(raising(OVERLOADED[0](SECRET, 503)))

    assert isinstance(error, Overloaded)
    assert error.retry_after_s is not None
    assert "swordfish" not in str(error)


def test_an_engine_that_died_of_a_fault_says_which() -> None:
    counters = FailureCounters.private(workers=2, slots=1)
    assert converted(raising(EngineDeadError()), counters).reason == "ENGINE_DIED"
    counters.report_fault(1, "TAP_MISSED")

    error = converted(raising(EngineDeadError()), counters)

    assert isinstance(error, EngineFailed)
    assert (error.reason, "worker 1" in error.message, "TAP_MISSED" in error.message) == ("ENGINE_DIED", True, True)


@pytest.mark.parametrize("kind", [RuntimeError, EngineGenerateError, Exception])
def test_any_other_error_is_the_engines_and_its_text_stays_here(kind: type[Exception]) -> None:
    error = converted(raising(kind(SECRET)))

    assert isinstance(error, EngineFailed)
    assert error.message == "the engine failed on this request"
