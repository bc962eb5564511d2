"""The options of the calls, in one place: their keywords, and the requests that a call makes of them.

A keyword that every call takes, for all its prompts alike, is one line in `RequestKeywords`. One that may differ from
prompt to prompt stands in `StreamKeywords` and `ManyKeywords`, and in `requests_from`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, TypeVar

from steer_service.core.capture import CaptureSpec, Pooling
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_kind, check_timeout
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt, only_for_text, prompt_from
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingKeywords, SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.prompt_progress import PromptProgress

Prompts = str | Prompt | Sequence[str | Prompt | Sequence[int]]
"""One prompt or several, as users write them."""

Sampling = SamplingOptions | Sequence[SamplingOptions] | None
"""The options of all prompts of a call, or a list with those of each; None: they are given as keywords."""

Value = TypeVar("Value")


class RequestKeywords(SamplingKeywords, total=False):
    """Keywords of every call, for all its prompts: the fields of SamplingOptions, and of GenerateRequest.

    Only `timeout_s` is not part of the request: the seconds after which the call raises DeadlineExceeded.
    """

    time_budget_s: float | None
    cache_salt: str
    truncate_prompt_tokens: int | None
    timeout_s: float | None
    priority: int | None
    stream_interval: int | None


class StreamKeywords(RequestKeywords, total=False):
    """Keywords of `stream`; `add_special_tokens` is that of TextPrompt."""

    steering_spec: SteeringSpec | None
    model: str
    request_id: str
    add_special_tokens: bool | None


class StreamEventsKeywords(StreamKeywords, total=False):
    """Keywords of `stream_events`: either a whole `capture`, or its layers, dtype and pooling."""

    capture_layers: int | Sequence[int] | None
    capture_dtype: str | None
    capture_pooling: Pooling | str | None
    capture: CaptureSpec | None


class RunKeywords(TypedDict, total=False):
    """Keywords of calls with many requests: how they are run; see `many_prompts.ManyOptions`."""

    max_concurrency: int | None
    retry_timeout_s: float | None
    progress: PromptProgress


class ManyKeywords(RequestKeywords, RunKeywords, total=False):
    """Keywords of `generate` and `chat`: where a list may be given, it has one value for each prompt."""

    steering_spec: SteeringSpec | Sequence[SteeringSpec | None] | None
    capture_layers: int | Sequence[int] | None
    capture_dtype: str | None
    capture_pooling: Pooling | str | None
    capture: CaptureSpec | Sequence[CaptureSpec | None] | None
    model: str | Sequence[str]
    request_id: str | Sequence[str]


class GenerateKeywords(ManyKeywords, total=False):
    """Keywords of `generate`; `add_special_tokens` is that of TextPrompt."""

    add_special_tokens: bool | None


class ChatKeywords(ManyKeywords, total=False):
    """Keywords of `chat`: those of its own are fields of ChatPrompt; see there for their meaning."""

    continue_final_message: bool
    add_generation_prompt: bool | None
    chat_template_kwargs: JsonObject | None
    tools: Sequence[JsonObject] | None


class ScoreKeywords(RunKeywords, total=False):
    """Keywords of `score`, for all answers alike; see `generate` for their meaning."""

    steering_spec: SteeringSpec | None
    add_special_tokens: bool | None
    model: str
    cache_salt: str
    priority: int | None
    timeout_s: float | None


SHARED = frozenset(RequestKeywords.__annotations__) - frozenset(SamplingKeywords.__annotations__) - {"timeout_s"}
"""Keywords that are fields of GenerateRequest, the same for all prompts."""


def check_known(keywords: Mapping[str, object], known: type) -> None:
    """Raises InvalidRequest for a keyword that `known`, the TypedDict of a call, does not have."""
    unknown = sorted(set(keywords) - set(known.__annotations__))
    if unknown:
        raise InvalidRequest(
            f"{', '.join(unknown)} is not an option of this call; there are {', '.join(known.__annotations__)}",
            field=unknown[0],
        )


def requests_from(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    capture: CaptureSpec | Sequence[CaptureSpec | None] | None,
    keywords: Mapping[str, Any],
    *,
    is_single: bool = False,
) -> list[GenerateRequest]:
    """The request of each prompt; `is_single` if the call was given one prompt and no list.

    Raises InvalidRequest, a ValueError, for what breaks a rule: `field` is the name of the keyword, with the number of
    the prompt if the keyword was given as a list.
    """
    if keywords.get("timeout_s") is not None:
        check_timeout(keywords["timeout_s"], "timeout_s")
    options = _sampling_from(sampling, keywords)
    request_id = keywords.get("request_id", "")
    if len(prompts) > 1 and isinstance(request_id, str) and request_id:
        raise InvalidRequest(
            f"one id for {len(prompts)} prompts; expected a list with one for each", field="request_id"
        )
    ids = _of_each(request_id, str, "request_id", len(prompts), is_single)
    seen: set[str] = set()
    for index, one in enumerate(ids):
        if one and one in seen:
            raise InvalidRequest(
                f"{one!r} is also the id of another prompt of this call",
                reason="DUPLICATE_REQUEST_ID",
                field=f"request_id[{index}]",
            )
        seen.add(one)
    none = type(None)
    columns = {
        "sampling": _of_each(options, SamplingOptions, "sampling", len(prompts), is_single),
        "steering": _of_each(
            keywords.get("steering_spec"), (SteeringSpec, none), "steering_spec", len(prompts), is_single
        ),
        "capture": _of_each(capture, (CaptureSpec, none), "capture", len(prompts), is_single),
        "model": _of_each(keywords.get("model", ""), str, "model", len(prompts), is_single),
        "request_id": ids,
    }
    shared = {name: keywords[name] for name in SHARED if name in keywords}
    return [
        GenerateRequest(prompt=prompt, **shared, **{field: column[index] for field, column in columns.items()})
        for index, prompt in enumerate(prompts)
    ]


def is_list(value: object) -> bool:
    """True for what has a value for each prompt."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _of_each(value: Any, kinds: type | tuple[type, ...], name: str, count: int, is_single: bool) -> list[Any]:
    """`value` for each of `count` prompts; its elements if it is a list."""
    if not is_list(value):
        check_kind(value, kinds, name)
        return [value] * count
    for index, one in enumerate(value):
        check_kind(one, kinds, f"{name}[{index}]")
    if is_single:
        raise InvalidRequest(f"a list of {len(value)} for a single prompt; a list needs a list of prompts", field=name)
    if len(value) != count:
        raise InvalidRequest(f"{len(value)} values for {count} prompts; expected one for each", field=name)
    return list(value)


def _sampling_from(sampling: Sampling, keywords: Mapping[str, Any]) -> SamplingOptions | Sequence[SamplingOptions]:
    given = {name: value for name, value in keywords.items() if name in SamplingKeywords.__annotations__}
    if sampling is None:
        return SamplingOptions(**given)
    if any(value is not None for value in given.values()):
        raise InvalidRequest("Provide either sampling or sampling keyword overrides, not both.", field="sampling")
    return sampling


def capture_from(keywords: Mapping[str, Any]) -> CaptureSpec | Sequence[CaptureSpec | None] | None:
    """The captures of a call: either its `capture`, or a spec of its `capture_layers`; raises InvalidRequest."""
    capture: CaptureSpec | Sequence[CaptureSpec | None] | None = keywords.get("capture")
    layers, dtype, pooling = (keywords.get(f"capture_{name}") for name in ("layers", "dtype", "pooling"))
    if layers is None:
        for name, value in (("dtype", dtype), ("pooling", pooling)):
            if value is not None:
                raise InvalidRequest(
                    f"it goes with capture_layers; a whole capture has its own {name}", field=f"capture_{name}"
                )
        return capture
    if capture is not None:
        raise InvalidRequest("Provide either capture_layers or a whole capture, not both.", field="capture")
    with within("capture"):
        return CaptureSpec(layers=layers, dtype=dtype, pooling=Pooling.NONE if pooling is None else pooling)


def is_one_prompt(prompts: Any) -> bool:
    """True for what is a prompt and not a list of them."""
    return isinstance(prompts, (str, TextPrompt, TokenPrompt, ChatPrompt))


def prompts_from(prompts: Any, add_special_tokens: bool | None = None) -> list[Prompt]:
    """One prompt or several, as users write them, as a list; raises InvalidRequest (`prompt`)."""
    if is_one_prompt(prompts):
        return [one_prompt_from(prompts, add_special_tokens)]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts are a text or a list, got {type(prompts).__name__}", field="prompt")
    return [one_prompt_from(prompt, add_special_tokens) for prompt in prompts]


def one_prompt_from(value: Any, add_special_tokens: bool | None = None) -> Prompt:
    """A prompt as users write it, token ids too; raises InvalidRequest (`prompt`)."""
    with within("prompt"):
        prompt = prompt_from(value)
        if add_special_tokens is None:
            return prompt
        if not isinstance(prompt, TextPrompt):
            raise only_for_text()
        return replace(prompt, add_special_tokens=add_special_tokens)
