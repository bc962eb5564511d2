"""Checks against the model: what it cannot serve is refused with the field and the number, before any work."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import DTYPES
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.checks import (
    check_capture,
    check_prompt_length,
    check_request,
    check_served,
    check_steering,
    kept_tokens,
)
from steer_service.core.errors import InvalidRequest, NotFound, SteerError
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec

TINY = ModelInfo(
    name="tiny",
    architecture="TinyForCausalLM",
    layer_count=4,
    hidden_size=3,
    vocab_size=100,
    max_model_len=16,
    dtype="float32",
    max_programs=2,
    max_operations=5,
    max_operations_per_layer=2,
)
UP = [0.0, 3.0, 4.0]
PROMPT = TokenPrompt(token_ids=(1, 2, 3))


def at(layer: int, *operations: Any) -> SteeringSpec:
    return SteeringSpec({layer: LayerSteeringSpec(operations)})


def refusal(request: GenerateRequest, info: ModelInfo = TINY) -> SteerError:
    with pytest.raises(SteerError) as raised:
        check_request(request, info)
    return raised.value


@pytest.mark.parametrize(
    "prompt", [PROMPT, TextPrompt(text="Hello"), ChatPrompt(messages=(ChatMessage(role="user", content="Hi"),))]
)
def test_a_request_that_fits_passes(prompt: Any) -> None:
    spec = SteeringSpec({0: LayerSteeringSpec((AddSpec(UP), AblationSpec(UP))), 3: LayerSteeringSpec((AddSpec(UP),))})

    check_request(GenerateRequest(prompt=prompt, steering=spec, capture=CaptureSpec(layers=(3, 0)), model="tiny"), TINY)


def test_an_unknown_model_is_not_found() -> None:
    error = refusal(GenerateRequest(prompt=PROMPT, model="other"))

    assert isinstance(error, NotFound)
    assert (error.reason, error.field) == ("UNKNOWN_MODEL", "model")


@given(st.integers(0, 10))
def test_a_steered_layer_must_exist(layer: int) -> None:
    request = GenerateRequest(prompt=PROMPT, steering=at(layer, AddSpec(UP)))

    if layer < TINY.layer_count:
        check_request(request, TINY)
    else:
        error = refusal(request)
        assert error.message == f"Layer index {layer} out of range [0, 4). Model tiny has 4 layers."
        assert (error.reason, error.field) == ("UNKNOWN_LAYER", f"steering.layers[{layer}]")


def test_a_layer_that_does_nothing_must_exist_as_well() -> None:
    assert (
        refusal(GenerateRequest(prompt=PROMPT, steering=SteeringSpec({4: LayerSteeringSpec()}))).reason
        == "UNKNOWN_LAYER"
    )


@given(st.lists(st.integers(0, 10), min_size=1, max_size=5))
def test_a_captured_layer_must_exist(layers: list[int]) -> None:
    spec = CaptureSpec(layers=tuple(layers))
    bad = [(place, layer) for place, layer in enumerate(spec.layers) if layer >= TINY.layer_count]

    if not bad:
        check_capture(spec, TINY)
    else:
        error = refusal(GenerateRequest(prompt=PROMPT, capture=spec))
        assert error.message == (
            f"Capture layer index {bad[0][1]} is out of range. Model has 4 layers (valid range: 0-3)"
        )
        assert (error.reason, error.field) == ("UNKNOWN_LAYER", f"capture.layers[{bad[0][0]}]")


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (AddSpec([1.0] * 4), "Steering"),
        (ProjectionCapSpec([1.0] * 4, min=0.0), "Projection cap"),
        (AblationSpec([1.0] * 4), "Ablation"),
    ],
)
def test_a_vector_must_have_the_width_of_the_model(operation: Any, name: str) -> None:
    error = refusal(GenerateRequest(prompt=PROMPT, steering=at(2, AddSpec(UP), operation)))

    assert error.message == f"{name} vector dimension mismatch at layer 2: expected 3, got 4."
    assert (error.reason, error.field) == ("WRONG_WIDTH", "steering.layers[2].operations[1].vector")


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [
        ("float16", 65_519.0, 65_520.0),
        ("bfloat16", 3.394e38, 3.397e38),
        ("float32", 3.4028235e38, 3.40283e38),
    ],
)
def test_numbers_must_be_finite_in_the_dtype_of_the_model(dtype: str, fits: float, too_large: float) -> None:
    info = replace(TINY, dtype=dtype)
    for sign in (1, -1):
        check_steering(at(0, AddSpec(UP, sign * fits / 4)), info)
        check_steering(at(0, AblationSpec(UP, sign * fits)), info)
        check_steering(at(0, ProjectionCapSpec(UP, min=-fits, max=fits)), info)
        for operation, field in [
            (AddSpec(UP, sign * too_large / 4), "vector"),
            (AblationSpec(UP, sign * too_large), "scale"),
            (ProjectionCapSpec(UP, min=sign * too_large), "min"),
            (ProjectionCapSpec(UP, max=sign * too_large), "max"),
        ]:
            error = refusal(GenerateRequest(prompt=PROMPT, steering=at(0, operation)), info)
            assert f"not finite in the model's dtype {dtype}" in error.message
            assert (error.reason, error.field) == ("NON_FINITE", f"steering.layers[0].operations[0].{field}")


@given(st.floats(1e-3, 1e38), st.floats(-1e6, 1e6), st.sampled_from(sorted(DTYPES)))
def test_an_add_is_refused_exactly_when_what_it_adds_is_not_finite(size: float, scale: float, dtype: str) -> None:
    add = AddSpec([0.0, size, -size / 2], scale)
    with np.errstate(over="ignore"):
        is_finite = bool(np.isfinite(add.materialize().astype(DTYPES[dtype])).all())

    if is_finite:
        check_steering(at(0, add), replace(TINY, dtype=dtype))
    else:
        with pytest.raises(InvalidRequest, match="scale \\* vector is not finite"):
            check_steering(at(0, add), replace(TINY, dtype=dtype))


def test_the_length_of_a_direction_does_not_matter_to_its_dtype() -> None:
    half = replace(TINY, dtype="float16")

    check_steering(at(0, AblationSpec([1e30, 0.0, 0.0]), ProjectionCapSpec([1e-30, 0.0, 0.0], max=1.0)), half)


def test_too_many_operations_at_one_layer_are_refused() -> None:
    error = refusal(GenerateRequest(prompt=PROMPT, steering=at(1, *[AddSpec(UP)] * 3)))

    assert isinstance(error, InvalidRequest)
    assert "3 operations at one layer, at most 2" in error.message
    assert (error.reason, error.field) == ("PROGRAM_TOO_LARGE", "steering.layers[1]")


def test_too_many_operations_altogether_are_refused() -> None:
    spec = SteeringSpec({layer: LayerSteeringSpec((AddSpec(UP), AddSpec(UP))) for layer in range(3)})

    error = refusal(GenerateRequest(prompt=PROMPT, steering=spec))

    assert isinstance(error, InvalidRequest)
    assert "holds 6 operations, at most 5" in error.message
    assert (error.reason, error.field) == ("PROGRAM_TOO_LARGE", "steering")


@given(st.lists(st.integers(0, 200), min_size=1, max_size=10))
def test_every_token_must_be_in_the_vocabulary(token_ids: list[int]) -> None:
    request = GenerateRequest(prompt=TokenPrompt(token_ids=tuple(token_ids)))

    if max(token_ids) < TINY.vocab_size:
        check_request(request, TINY)
    else:
        error = refusal(request)
        assert error.message == f"token id {max(token_ids)} is outside 0..99"
        assert (error.reason, error.field) == ("BAD_TOKEN", "prompt.token_ids")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (SamplingOptions(stop_token_ids=(5, 100)), "sampling.stop_token_ids[1]"),
        (SamplingOptions(logit_bias={99: 1.0, 100: 1.0}), "sampling.logit_bias[100]"),
    ],
)
def test_sampling_options_name_tokens_of_the_vocabulary(options: SamplingOptions, field: str) -> None:
    error = refusal(GenerateRequest(prompt=PROMPT, sampling=options))

    assert error.message == "token id 100 is outside 0..99"
    assert (error.reason, error.field) == ("BAD_TOKEN", field)


@given(st.integers(0, 40), st.booleans())
def test_a_prompt_leaves_room_for_one_token_unless_nothing_is_generated(count: int, is_rows_only: bool) -> None:
    if 0 < count < TINY.max_model_len + is_rows_only:
        check_prompt_length(count, TINY, is_rows_only=is_rows_only)
        return
    with pytest.raises(InvalidRequest) as raised:
        check_prompt_length(count, TINY, is_rows_only=is_rows_only)
    assert raised.value.reason == ("EMPTY_PROMPT" if count == 0 else "PROMPT_TOO_LONG")
    assert ("or set truncate_prompt_tokens" in raised.value.message) == (count > 0)
    assert raised.value.field == "prompt"


@pytest.mark.parametrize(
    ("given", "rows_only", "generating"), [(0, 16, 15), (16, 16, 15), (15, 15, 15), (9, 9, 9), (99, 16, 15)]
)
def test_a_prompt_may_have_what_the_engine_takes_and_the_limit_holds(
    given: int, rows_only: int, generating: int
) -> None:
    info = replace(TINY, max_prompt_tokens=given)
    for is_rows_only, most in ((True, rows_only), (False, generating)):
        assert kept_tokens(-1, info, is_rows_only=is_rows_only) == most
        check_prompt_length(most, info, is_rows_only=is_rows_only)
        with pytest.raises(InvalidRequest) as raised:
            check_prompt_length(most + 1, info, is_rows_only=is_rows_only)
        assert raised.value.reason == "PROMPT_TOO_LONG"
        assert ("needs one token more" in raised.value.message) == (rows_only < 16)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_captures_come_in_the_model_s_type_or_float32(dtype: str | None) -> None:
    check_capture(CaptureSpec(layers=(0,), dtype=dtype), replace(TINY, dtype="bfloat16"))


def test_captures_in_another_type_are_refused_with_the_reason() -> None:
    request = GenerateRequest(prompt=PROMPT, capture=CaptureSpec(layers=(0,), dtype="float16"))

    error = refusal(request, replace(TINY, dtype="bfloat16"))

    assert error.message == "the residual stream of tiny is captured as bfloat16 or float32, not as float16"
    assert (error.reason, error.field) == ("UNSUPPORTED_DTYPE", "capture.dtype")


def test_a_long_token_prompt_is_refused_with_both_numbers() -> None:
    error = refusal(GenerateRequest(prompt=TokenPrompt(token_ids=(1,) * 16)))

    assert "has 16 tokens" in error.message
    assert "limit of 16" in error.message


def test_every_name_of_the_model_is_served_and_others_are_not() -> None:
    info = replace(TINY, aliases=("mine", "other"), adapters=("sea",))
    for name in ("", "tiny", "mine", "other", "sea"):
        check_served(name, info, field="model")
    with pytest.raises(NotFound, match="'tiny', 'mine', 'other', 'sea' is"):
        check_served("land", info, field="model")
