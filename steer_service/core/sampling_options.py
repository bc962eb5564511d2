"""How tokens are chosen and when to stop, and the default of every option."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_length, check_text, check_token_ids, is_number
from steer_service.core.number_limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SAMPLING_LIMITS,
    NumberLimit,
)
from steer_service.core.structured_outputs import StructuredOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen and when to stop. None means the server's default, which Started reports."""

    n: int | None = None
    """Outputs per prompt, 1..8. Default 1."""
    max_tokens: int | None = None
    """Most tokens to generate. Default 256; never beyond the model's limit.

    0 computes the prompt's rows only: each output ends with FinishReason.LENGTH and without a token, as many rows as
    the prompt has tokens are steered and captured, and the prompt may have `max_prompt_tokens` of the model."""
    min_tokens: int | None = None
    """Stop conditions are ignored before this many tokens. Default 0."""
    temperature: float | None = None
    """Softmax temperature; 0 is greedy. At most `ModelInfo.max_temperature`. Default 1."""
    top_p: float | None = None
    """Nucleus mass, in (0, 1]. Default 1."""
    top_k: int | None = None
    """Most likely tokens kept; 0 keeps all. Default 0."""
    min_p: float | None = None
    """Least probability relative to the likeliest token, in [0, 1]. Default 0."""
    seed: int | None = None
    """Seed of this request's sampling, a signed 64-bit integer. Default: none; the result is not repeatable."""
    presence_penalty: float | None = None
    """In [-2, 2]. Default 0."""
    frequency_penalty: float | None = None
    """In [-2, 2]. Default 0."""
    repetition_penalty: float | None = None
    """Above 0, at most 2. Default 1."""
    ignore_eos: bool | None = None
    """True: generation continues after the end-of-sequence token. Default False."""
    skip_special_tokens: bool | None = None
    """True: special tokens are left out of the text. Default True."""
    logprobs: int | None = None
    """Return log-probabilities of the chosen token and of this many likeliest tokens. Default: none.

    It is at most `ModelInfo.max_logprobs` and `ModelInfo.vocab_size`."""
    prompt_logprobs: int | None = None
    """Return log-probabilities of the prompt's tokens and, at each, of this many likeliest tokens. Default: none.

    Limits as for `logprobs`. The whole prompt is computed, without the prefix cache."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; left out of the text unless `include_stop`."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output."""
    include_stop: bool | None = None
    """True: the stop string stays in the text. Default False."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit, each in [-100, 100]."""
    bad_words: tuple[str, ...] = ()
    """Words that are not generated, at most 64 of 1..256 characters each.

    A word counts as it is and after a space. Of its tokens, the last one is not chosen after the others."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be generated, 1..1024 of them. Default: all."""
    structured_outputs: StructuredOutputs | None = None
    """What the text must be like, such as `{"json": schema}` or `{"choice": ["yes", "no"]}`. Default: anything."""

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "skip_special_tokens", "include_stop"):
            _check_flag(self, name)
        for name, limit in SAMPLING_LIMITS.items():
            if name.isidentifier():
                _check_range(self, name, limit)
        if self.max_tokens is not None and self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is greater than max_tokens {self.max_tokens}", field="min_tokens"
            )
        self._check_stops()
        self._check_logit_bias()
        bad_words = _texts(self.bad_words, "bad_words", most=MAX_BAD_WORDS, longest=MAX_BAD_WORD_LENGTH)
        object.__setattr__(self, "bad_words", bad_words)
        self._check_allowed_token_ids()
        self._check_structured_outputs()

    @property
    def is_rows_only(self) -> bool:
        """True if nothing is generated: only the prompt's rows are computed."""
        return self.max_tokens == 0

    def _check_stops(self) -> None:
        stop = _texts(self.stop, "stop", most=MAX_STOP_STRINGS, longest=MAX_STOP_LENGTH)
        object.__setattr__(self, "stop", stop)
        tokens = () if self.stop_token_ids is None else self.stop_token_ids
        object.__setattr__(self, "stop_token_ids", check_token_ids(tokens, "stop_token_ids"))
        check_length(self.stop_token_ids, MAX_STOP_TOKEN_IDS, "stop tokens", "stop_token_ids")

    def _check_logit_bias(self) -> None:
        biases = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, Mapping):
            raise InvalidRequest(
                f"logit_bias must map token ids to numbers, got {type(biases).__name__}", field="logit_bias"
            )
        check_length(biases, MAX_LOGIT_BIAS, "biases", "logit_bias")
        tokens = check_token_ids(tuple(biases), "logit_bias")
        for token, bias in zip(tokens, biases.values(), strict=True):
            if not is_number(bias) or not -100.0 <= bias <= 100.0:  # also refuses NaN
                raise InvalidRequest(f"bias {bias!r} is outside -100..100", field=f"logit_bias[{token}]")
        object.__setattr__(self, "logit_bias", dict(zip(tokens, map(float, biases.values()), strict=True)))

    def _check_allowed_token_ids(self) -> None:
        if self.allowed_token_ids is None:
            return
        allowed = check_token_ids(self.allowed_token_ids, "allowed_token_ids")
        object.__setattr__(self, "allowed_token_ids", allowed)
        check_length(allowed, MAX_ALLOWED_TOKEN_IDS, "allowed tokens", "allowed_token_ids")
        if not allowed:
            raise InvalidRequest("no token is allowed; None allows all of them", field="allowed_token_ids")

    def _check_structured_outputs(self) -> None:
        if self.structured_outputs is None:
            return
        with within("structured_outputs"):
            object.__setattr__(self, "structured_outputs", StructuredOutputs.of(self.structured_outputs))
        if self.ignore_eos:
            raise InvalidRequest(
                "structured outputs end with the end-of-sequence token; nothing may follow it", field="ignore_eos"
            )

    def __hash__(self) -> int:
        return hash((self.max_tokens, self.temperature, self.seed, self.stop))


class SamplingKeywords(TypedDict, total=False):
    """The fields of SamplingOptions as keywords of a call; see there for their meaning."""

    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    logit_bias: Mapping[int, float] | None
    bad_words: str | Sequence[str] | None
    allowed_token_ids: Sequence[int] | None
    structured_outputs: StructuredOutputs | Mapping[str, object] | None


def _texts(given: object, name: str, *, most: int, longest: int) -> tuple[str, ...]:
    """The strings of an option that takes one string or several; raises InvalidRequest for anything else."""
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, Sequence | None) or isinstance(texts, bytes):
        raise InvalidRequest(f"expected strings, got {type(texts).__name__}", reason="BAD_TEXT", field=name)
    texts = tuple(texts or ())
    check_length(texts, most, "strings", name)
    for index, text in enumerate(texts):
        check_text(text, f"{name}[{index}]")
        if not 1 <= len(text) <= longest:
            raise InvalidRequest(
                f"the string has {len(text)} characters, expected 1..{longest}", field=f"{name}[{index}]"
            )
    return texts


def _check_range(options: SamplingOptions, name: str, limit: NumberLimit) -> None:
    value = getattr(options, name)
    if value is None:
        return
    if isinstance(limit.least, int) and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
        raise InvalidRequest(f"{value!r} is not an integer", reason="OUT_OF_RANGE", field=name)
    if not is_number(value):
        raise InvalidRequest(f"{value!r} is not a number", reason="OUT_OF_RANGE", field=name)
    is_enough = limit.least < value if limit.is_above else limit.least <= value
    if not (is_enough and value <= limit.most):  # also refuses NaN
        bounds = f"above {limit.least} and at most {limit.most}" if limit.is_above else f"{limit.least}..{limit.most}"
        raise InvalidRequest(f"{value} is outside {bounds}", reason="OUT_OF_RANGE", field=name)
    object.__setattr__(options, name, type(limit.least)(value))  # NumPy's numbers cannot be serialized


def _check_flag(options: SamplingOptions, name: str) -> None:
    value = getattr(options, name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{value!r} is not True or False", field=name)


DEFAULT_MAX_TOKENS = 256
DEFAULT_TEMPERATURE = 1.0


DEFAULTS = SamplingOptions(
    n=1,
    max_tokens=DEFAULT_MAX_TOKENS,
    min_tokens=0,
    temperature=DEFAULT_TEMPERATURE,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    ignore_eos=False,
    skip_special_tokens=True,
    include_stop=False,
)
"""The value of each option that is None; `seed`, `logprobs` and `prompt_logprobs` have no default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """The defaults of a backend."""

    options: SamplingOptions = DEFAULTS
    """The value of each option that is None."""
    source: str = ""
    """Where they come from: "model" or "file", or "" for those of the contract."""


OUR_DEFAULTS = SamplingDefaults()
"""Those of the contract."""


def effective_options(
    asked: SamplingOptions, prompt_tokens: int, max_model_len: int, defaults: SamplingOptions = DEFAULTS
) -> SamplingOptions:
    """`asked` with every default filled in and `max_tokens` limited to the room that the prompt leaves."""
    filled = {
        name: getattr(defaults, name)
        for name in SamplingOptions.__dataclass_fields__
        if getattr(asked, name) is None and getattr(defaults, name) is not None
    }
    options = replace(asked, **filled)
    room = max_model_len - prompt_tokens
    assert options.max_tokens is not None
    assert options.min_tokens is not None
    if options.max_tokens <= room:
        return options
    return replace(options, max_tokens=room, min_tokens=min(options.min_tokens, room))
