"""Converts vLLM's errors to this project's.

A text of vLLM may hold a prompt, a stop string or a path. It is passed on only if it matches a pattern that consists of
fixed words and numbers. Of other refusals, the option that vLLM names is passed on.

Relies on (vLLM 0.24 to 0.33): the errors of `AsyncLLM.generate`, and `parameter` of those about an option.
tests/engine/test_seams.py and tests/engine/test_vllm_errors.py notice a change.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, SteerError
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.vllm_patches.compat import OVERLOADED, REFUSED
from steer_service.shm.pool import RETRY_AFTER_S

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|inf|nan)"

_BOUND = rf"(?:{_NUMBER}|[\[(]{_NUMBER}, {_NUMBER}[\])]|max_tokens={_NUMBER}|zero)"

_RULE = (
    r"(?:in|at least|at most|greater than|less than|greater than or equal to|less than or equal to) "
    rf"{_BOUND}|(?:non-negative|a finite number|an integer)(?: or {_BOUND})?|{_BOUND} \(disable\), or at least {_BOUND}"
)

KNOWN_TEXTS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?P<option>[a-z_]+) must be (?:{_RULE}), got {_NUMBER}\.?",
        rf"Requested sample (?P<option>logprobs) of {_NUMBER}, which is greater than max allowed: {_NUMBER}",
        (
            rf"The decoder prompt \(length {_NUMBER}\)(?: plus the number of requested output tokens \(at least 1\))? "
            rf"is longer than the maximum model length of {_NUMBER}\."
        ),
    )
)
"""Texts of vLLM that hold fixed words and numbers only. What follows such a text is left out."""

_OPTIONS = frozenset(field.name for field in dataclasses.fields(SamplingOptions))


@contextmanager
def vllm_errors(counters: FailureCounters | None = None) -> Iterator[None]:
    """Within the block, raises errors of vLLM as a SteerError. `counters`: have the fault of which the engine died."""
    try:
        yield
    except SteerError:
        raise
    except EngineDeadError as error:
        if counters is not None:
            counters.check_faults()
        raise EngineFailed("the engine died; requests in flight are lost", reason="ENGINE_DIED") from error
    except REFUSED as error:
        raise refusal(error) from error
    except OVERLOADED as error:
        raise Overloaded("the engine has no room for this request now", retry_after_s=RETRY_AFTER_S) from error
    except Exception as error:  # vLLM's RPC raises plain Exception
        raise EngineFailed("the engine failed on this request") from error


def refusal(error: Exception) -> InvalidRequest:
    """The error for a request that vLLM refuses, with nothing in it that the request or the server holds."""
    text, option = str(error.args[0] if error.args else ""), str(getattr(error, "parameter", None) or "")
    message = "the engine refuses this request"
    for known in KNOWN_TEXTS:
        match = known.match(text)
        if match is not None:
            message, option = match[0], match.groupdict().get("option") or option
            break
    if option not in _OPTIONS:
        return InvalidRequest(message, reason="REFUSED_BY_ENGINE")
    return InvalidRequest(message, reason="REFUSED_BY_ENGINE", field=f"sampling.{option}")
