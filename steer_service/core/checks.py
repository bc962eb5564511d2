"""Checks a request against the model that is to serve it, before any work is done."""

import math
from collections.abc import Iterable

import numpy as np

from steer_service.core.arrays import OVERFLOWS_AT, PLAIN_SQUARES, Float32Array
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, NotFound, Unsupported, within, within_each
from steer_service.core.number_limits import MODEL_SAMPLING_LIMITS
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import AS_MANY_AS_FIT, GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddScaling, AddSpec, ProjectionCapSpec, SteeringOp, SteeringSpec


def check_request(request: GenerateRequest, info: ModelInfo) -> None:
    """Raises a SteerError that names the field of `request` that the model cannot serve, if there is one."""
    check_served(request.model, info, field="model")
    check_kept(request.truncate_prompt_tokens, info)
    if isinstance(request.prompt, TokenPrompt):
        is_rows_only = request.sampling.is_rows_only
        check_token_prompt(request.prompt, request.truncate_prompt_tokens, info, is_rows_only=is_rows_only)
    with within("sampling"):
        check_sampling(request.sampling, info)
    if request.steering is not None:
        with within("steering"):
            check_steering(request.steering, info)
    if request.capture is not None:
        with within("capture"):
            check_capture(request.capture, info)


def check_kept(keep: int | None, info: ModelInfo) -> None:
    """Raises InvalidRequest if `truncate_prompt_tokens` keeps more tokens than the model's limit."""
    if (keep or 0) > info.max_model_len:
        raise InvalidRequest(
            f"{keep} is more than the model's limit of {info.max_model_len} tokens",
            reason="OUT_OF_RANGE",
            field="truncate_prompt_tokens",
        )


def check_token_prompt(prompt: TokenPrompt, keep: int | None, info: ModelInfo, *, is_rows_only: bool) -> None:
    """Raises InvalidRequest for too many token ids, and for one outside the vocabulary.

    `keep`: the request's `truncate_prompt_tokens`. Ids that it cuts off may be anything and as many as there are.
    """
    kept = kept_tokens(keep, info, is_rows_only=is_rows_only)
    if kept is None:
        kept = len(prompt.token_ids)
        check_prompt_length(kept, info, is_rows_only=is_rows_only)
    check_token_ids(prompt.token_ids[-kept:], info)


def check_served(name: str, info: ModelInfo, *, field: str) -> None:
    """Raises NotFound, about `field`, unless `name` is one of the model's or of its adapters', or ""."""
    names = (info.name, *info.aliases, *info.adapters)
    if name and name not in names:
        served = ", ".join(map(repr, names))
        raise NotFound(f"model {name!r} is not served here; {served} is", reason="UNKNOWN_MODEL", field=field)


def check_priority(request: GenerateRequest, *, has_priority: bool) -> None:
    """Raises Unsupported for a request with a priority on a backend that has none."""
    if request.priority is not None and not has_priority:
        raise Unsupported(
            "requests run in the order of their arrival; priorities need an engine with --scheduling-policy priority",
            reason="NO_PRIORITY",
            field="priority",
        )


def check_structured(request: GenerateRequest, *, is_served: bool) -> None:
    """Raises Unsupported for a request with structured outputs on a backend that has none."""
    if request.sampling.structured_outputs is not None and not is_served:
        raise Unsupported(
            "structured outputs need the engine on vLLM",
            reason="NO_STRUCTURED_OUTPUTS",
            field="sampling.structured_outputs",
        )


def check_token_ids(token_ids: tuple[int, ...], info: ModelInfo, *, field: str = "prompt.token_ids") -> None:
    """Raises InvalidRequest, about `field`, for a token id outside the vocabulary."""
    largest = max(token_ids)
    if largest >= info.vocab_size:
        raise InvalidRequest(f"token id {largest} is outside 0..{info.vocab_size - 1}", reason="BAD_TOKEN", field=field)


def check_sampling(options: SamplingOptions, info: ModelInfo) -> None:
    """Raises InvalidRequest for an option that is outside its range on this model, or names an unknown token."""
    for name, limit in MODEL_SAMPLING_LIMITS.items():
        value = getattr(options, name)
        if value is not None and value > limit.most_on(info):
            raise InvalidRequest(
                f"{value} is outside {limit.least}..{limit.most_on(info)} on this model",
                reason="OUT_OF_RANGE",
                field=name,
            )
    named = {f"stop_token_ids[{index}]": token for index, token in enumerate(options.stop_token_ids)}
    named |= {f"allowed_token_ids[{index}]": token for index, token in enumerate(options.allowed_token_ids or ())}
    named |= {f"logit_bias[{token}]": token for token in options.logit_bias}
    for field, token in named.items():
        if token >= info.vocab_size:
            raise InvalidRequest(
                f"token id {token} is outside 0..{info.vocab_size - 1}", reason="BAD_TOKEN", field=field
            )


def check_allowed(token_ids: Iterable[int], allowed: frozenset[int] | None) -> None:
    """Raises InvalidRequest if a generated token is not allowed: what was allowed was excluded in another way."""
    if allowed is not None and not allowed.issuperset(token_ids):
        raise no_token_left()


def no_token_left() -> InvalidRequest:
    """The error for options that together exclude every token."""
    return InvalidRequest(
        "no token is left to choose: the allowed ones are excluded by bad_words, min_tokens or stop tokens",
        reason="NO_TOKEN_LEFT",
        field="sampling.allowed_token_ids",
    )


SHORTEN = "shorten it, or set truncate_prompt_tokens"
"""What to do about a prompt that is too long."""


def check_prompt_length(token_count: int, info: ModelInfo, *, is_rows_only: bool = False) -> None:
    """Raises InvalidRequest for a prompt that is empty or leaves no room for one generated token.

    `is_rows_only`: nothing is generated, and no room is needed.
    """
    if token_count == 0:
        raise InvalidRequest("the prompt has no tokens", reason="EMPTY_PROMPT", field="prompt")
    if token_count > info.most_prompt_tokens(is_rows_only=is_rows_only):
        limit = described_limit(info, is_rows_only=is_rows_only)
        raise InvalidRequest(
            f"the prompt has {token_count} tokens, more than {limit}; {SHORTEN}",
            reason="PROMPT_TOO_LONG",
            field="prompt",
        )


def described_limit(info: ModelInfo, *, is_rows_only: bool) -> str:
    """The limit of a prompt's tokens, in words, with what else counts."""
    most, whole = info.max_prompt_tokens, info.max_model_len
    if most < whole:
        return (
            f"the {most} that this engine takes, which needs one token more, of {whole} that the model or the KV cache "
            "has room for"
        )
    room = "" if is_rows_only else ", which includes at least one generated token (none with max_tokens=0)"
    return f"the model's limit of {whole}{room}"


def kept_tokens(keep: int | None, info: ModelInfo, *, is_rows_only: bool) -> int | None:
    """The most tokens that `truncate_prompt_tokens` leaves of a prompt; None if it is not cut."""
    return info.most_prompt_tokens(is_rows_only=is_rows_only) if keep == AS_MANY_AS_FIT else keep


def check_steering(spec: SteeringSpec, info: ModelInfo) -> None:
    """Raises a SteerError for a spec whose layers, hidden size, values or number of operations the model refuses."""
    total = 0
    with np.errstate(over="ignore"), within_each("layers", spec.layers.items()) as layers:
        for layer, layer_spec in layers:
            if layer >= info.layer_count:  # here and for captures, in the words of the in-process steerllm
                raise InvalidRequest(
                    f"Layer index {layer} out of range [0, {info.layer_count}). "
                    f"Model {info.name} has {info.layer_count} layers.",
                    reason="UNKNOWN_LAYER",
                )
            if len(layer_spec.operations) > info.max_operations_per_layer:
                raise InvalidRequest(
                    f"{len(layer_spec.operations)} operations at one layer, at most {info.max_operations_per_layer}",
                    reason="PROGRAM_TOO_LARGE",
                )
            with within_each("operations", enumerate(layer_spec.operations)) as operations:
                for _, operation in operations:
                    _check_operation(operation, layer, info)
            total += len(layer_spec.operations)
    if total > info.max_operations:
        raise InvalidRequest(
            f"the program holds {total} operations, at most {info.max_operations}", reason="PROGRAM_TOO_LARGE"
        )


def wrong_width(vector: Float32Array, info: ModelInfo, what: str) -> InvalidRequest:
    """The error, which begins with `what`, for a vector whose size is not the hidden size of the model."""
    return InvalidRequest(
        f"{what}: expected {info.hidden_size}, got {vector.size}.", reason="WRONG_WIDTH", field="vector"
    )


def check_capture(spec: CaptureSpec, info: ModelInfo) -> None:
    """Raises InvalidRequest for a layer the model does not have, or a dtype that it cannot return."""
    if spec.dtype not in (None, info.dtype, "float32"):
        raise InvalidRequest(
            f"the residual stream of {info.name} is captured as {info.dtype} or float32, not as {spec.dtype}",
            reason="UNSUPPORTED_DTYPE",
            field="dtype",
        )
    for index, layer in enumerate(spec.layers):
        if layer >= info.layer_count:
            raise InvalidRequest(
                f"Capture layer index {layer} is out of range. Model has {info.layer_count} layers "
                f"(valid range: 0-{info.layer_count - 1})",
                reason="UNKNOWN_LAYER",
                field=f"layers[{index}]",
            )


def _check_operation(operation: SteeringOp, layer: int, info: ModelInfo) -> None:
    if operation.vector.size != info.hidden_size:
        raise wrong_width(operation.vector, info, f"{_called(operation)} vector dimension mismatch at layer {layer}")
    match operation:
        case AddSpec(scaling=AddScaling.RELATIVE):
            _check_number(operation.scale, "scale", info)
        case AddSpec():
            if not _stays_below(OVERFLOWS_AT[info.dtype], operation):
                raise InvalidRequest(
                    f"scale * vector is not finite in the model's dtype {info.dtype}",
                    reason="NON_FINITE",
                    field="vector",
                )
        case ProjectionCapSpec():
            _check_number(operation.min, "min", info)
            _check_number(operation.max, "max", info)
        case AblationSpec():
            _check_number(operation.scale, "scale", info)


def _stays_below(limit: float, operation: AddSpec) -> bool:
    """True if `scale * vector` is below `limit` in every element."""
    scale, vector = abs(operation.scale), operation.vector
    square = float(np.dot(vector, vector))
    if PLAIN_SQUARES[0] <= square <= PLAIN_SQUARES[1] and scale * math.sqrt(square) < limit / 2:
        return True  # no element exceeds the norm, which is cheap to compute
    return scale * float(np.abs(vector).max()) < limit


def _check_number(value: float | None, name: str, info: ModelInfo) -> None:
    if value is not None and abs(value) >= OVERFLOWS_AT[info.dtype]:
        raise InvalidRequest(
            f"{value} is not finite in the model's dtype {info.dtype}", reason="NON_FINITE", field=name
        )


def _called(operation: SteeringOp) -> str:
    if isinstance(operation, AddSpec):
        return "Steering"
    return "Projection cap" if isinstance(operation, ProjectionCapSpec) else "Ablation"
