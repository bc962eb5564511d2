"""One generation request and the events a backend answers it with.

A backend yields, in this order: Started; TokenDeltas of all outputs, interleaved; per output the CaptureLabels of its
captured rows, its CaptureBlocks or one CaptureHeld, and one OutputFinished; Completed, exactly once and last. Of every
layer and site that is captured inline at least one block comes, without rows where none was captured; those of a live
capture come between the TokenDeltas, each after the labels of its rows. A failure raises a SteerError instead of ending
early; what was held is then for whoever took it to release.
"""

import enum
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.capture import (
    CaptureDelivery,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import Spans
from steer_service.core.specs import SteeringSpec
from steer_service.core.stored_capture import HeldCapture

MAX_OUTPUTS = 8
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_ROLE_LENGTH = 64
MAX_NAME_LENGTH = 256
MAX_TOKEN_ID = 2**31 - 1
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """A prompt as text; the server's tokenizer adds the special tokens that it adds by default."""

    text: str
    """At least one character."""

    def __post_init__(self) -> None:
        _check_text(self.text, "text")
        if not self.text:
            raise InvalidRequest("the prompt is empty", reason="EMPTY_PROMPT", field="text")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """A prompt as token ids, fed to the model as they are."""

    token_ids: tuple[int, ...]
    """At least one id, each within the model's vocabulary."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _token_ids(self.token_ids, "token_ids"))
        if not self.token_ids:
            raise InvalidRequest("the prompt is empty", reason="EMPTY_PROMPT", field="token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    """Who speaks: `system`, `user`, `assistant` or whatever the model's template knows."""
    content: str
    """What is said; may be empty."""

    def __post_init__(self) -> None:
        _check_text(self.role, "role")
        _check_text(self.content, "content")
        if not 1 <= len(self.role) <= MAX_ROLE_LENGTH:
            raise InvalidRequest(f"a role has {len(self.role)} characters, expected 1..{MAX_ROLE_LENGTH}", field="role")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A prompt as a conversation, rendered by the model's own chat template."""

    messages: tuple[ChatMessage, ...]
    """At least one turn, oldest first."""
    continue_final_message: bool = False
    """True: the last message, an assistant's, is a beginning that the model goes on with (a prefill)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        for index, message in enumerate(self.messages):
            if not isinstance(message, ChatMessage):
                raise InvalidRequest(f"{type(message).__name__} is not a ChatMessage", field=f"messages[{index}]")
        if not self.messages:
            raise InvalidRequest("the conversation is empty", reason="EMPTY_PROMPT", field="messages")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(f"{len(self.messages)} messages, at most {MAX_MESSAGES}", field="messages")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidRequest(
                f"continue_final_message needs a last message from the assistant, got {self.messages[-1].role!r}",
                field="continue_final_message",
            )


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen and when to stop; None everywhere means the server's default, which Started echoes."""

    n: int | None = None
    """Outputs per prompt, 1..8. Default 1."""
    max_tokens: int | None = None
    """Tokens to generate at most, at least 1. Default 256, never beyond the model's limit."""
    min_tokens: int | None = None
    """Tokens before which no stop condition counts. Default 0."""
    temperature: float | None = None
    """Softmax temperature; 0 is greedy. Default 1."""
    top_p: float | None = None
    """Nucleus mass, in (0, 1]. Default 1."""
    top_k: int | None = None
    """Most likely tokens kept; 0 keeps all. Default 0."""
    min_p: float | None = None
    """Least probability relative to the likeliest token, in [0, 1]. Default 0."""
    seed: int | None = None
    """Seed of this request's sampling, a signed 64-bit integer. Default: none, not repeatable."""
    presence_penalty: float | None = None
    """In [-2, 2]. Default 0."""
    frequency_penalty: float | None = None
    """In [-2, 2]. Default 0."""
    repetition_penalty: float | None = None
    """Above 0, at most 2. Default 1."""
    ignore_eos: bool | None = None
    """True: goes on after the end-of-sequence token. Default False."""
    skip_special_tokens: bool | None = None
    """True: special tokens do not appear in text. Default True."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and this many likeliest ones, 0..20. Default: none at all."""
    stop: tuple[str, ...] = ()
    """Strings that end the output; not part of it unless asked."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output."""
    include_stop: bool | None = None
    """True: the stop string stays in the text. Default False."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit, each in [-100, 100]."""

    def __post_init__(self) -> None:
        for name in ("ignore_eos", "skip_special_tokens", "include_stop"):
            _check_flag(self, name)
        _within_range(self, "n", 1, MAX_OUTPUTS)
        _within_range(self, "max_tokens", 1, 2**31 - 1)
        _within_range(self, "min_tokens", 0, 2**31 - 1)
        _within_range(self, "temperature", 0.0, 100.0)
        _within_range(self, "top_p", 0.0, 1.0, above=True)
        _within_range(self, "top_k", 0, 2**31 - 1)
        _within_range(self, "min_p", 0.0, 1.0)
        _within_range(self, "seed", -(2**63), 2**63 - 1)
        _within_range(self, "presence_penalty", -2.0, 2.0)
        _within_range(self, "frequency_penalty", -2.0, 2.0)
        _within_range(self, "repetition_penalty", 0.0, 2.0, above=True)
        _within_range(self, "logprobs", 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is greater than max_tokens {self.max_tokens}", field="min_tokens"
            )
        self._check_stops()
        self._check_logit_bias()

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence | None) or isinstance(stop, bytes):
            raise InvalidRequest(f"expected strings, got {type(stop).__name__}", reason="BAD_TEXT", field="stop")
        stop = tuple(stop or ())
        object.__setattr__(self, "stop", stop)
        tokens = () if self.stop_token_ids is None else self.stop_token_ids
        object.__setattr__(self, "stop_token_ids", _token_ids(tokens, "stop_token_ids"))
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"{len(stop)} stop strings, at most {MAX_STOP_STRINGS}", field="stop")
        for index, text in enumerate(stop):
            _check_text(text, f"stop[{index}]")
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters, expected 1..{MAX_STOP_LENGTH}", field=f"stop[{index}]"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"{len(self.stop_token_ids)} stop tokens, at most {MAX_STOP_TOKEN_IDS}", field="stop_token_ids"
            )

    def _check_logit_bias(self) -> None:
        biases = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, Mapping):
            raise InvalidRequest(
                f"logit_bias must map token ids to numbers, got {type(biases).__name__}", field="logit_bias"
            )
        if len(biases) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"{len(biases)} biases, at most {MAX_LOGIT_BIAS}", field="logit_bias")
        tokens = _token_ids(tuple(biases), "logit_bias")
        for token, bias in zip(tokens, biases.values(), strict=True):
            if not _is_number(bias) or not -100.0 <= bias <= 100.0:  # also refuses NaN
                raise InvalidRequest(f"bias {bias!r} is outside -100..100", field=f"logit_bias[{token}]")
        object.__setattr__(self, "logit_bias", dict(zip(tokens, map(float, biases.values()), strict=True)))

    def __hash__(self) -> int:
        return hash((self.max_tokens, self.temperature, self.seed, self.stop))


def _within_range(options: SamplingOptions, name: str, low: float, high: float, *, above: bool = False) -> None:
    value = getattr(options, name)
    if value is None:
        return
    if isinstance(low, int) and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
        raise InvalidRequest(f"{value!r} is not an integer", reason="OUT_OF_RANGE", field=name)
    if not _is_number(value):
        raise InvalidRequest(f"{value!r} is not a number", reason="OUT_OF_RANGE", field=name)
    in_range = low < value <= high if above else low <= value <= high  # also refuses NaN
    if not in_range:
        bounds = f"above {low} and at most {high}" if above else f"{low}..{high}"
        raise InvalidRequest(f"{value} is outside {bounds}", reason="OUT_OF_RANGE", field=name)
    object.__setattr__(options, name, type(low)(value))  # NumPy's numbers do not travel


def _check_flag(options: SamplingOptions, name: str) -> None:
    value = getattr(options, name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{value!r} is not True or False", field=name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)


def _token_ids(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)):  # bytes would pass as small integers
        raise InvalidRequest(f"token ids are integers, got {type(values).__name__}", reason="BAD_TOKEN", field=name)
    try:
        tokens = tuple(map(operator.index, values))
    except TypeError as error:
        raise InvalidRequest(f"token ids are integers: {error}", reason="BAD_TOKEN", field=name) from error
    if tokens and min(tokens) < 0:
        raise InvalidRequest(f"token id {min(tokens)} is negative", reason="BAD_TOKEN", field=name)
    if tokens and max(tokens) > MAX_TOKEN_ID:
        raise InvalidRequest(f"a token id is above {MAX_TOKEN_ID}", reason="BAD_TOKEN", field=name)
    return tokens


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"expected text, got {type(value).__name__}", reason="BAD_TEXT", field=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the character at {error.start} is half of a surrogate pair", reason="BAD_TEXT", field=name
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Everything one generation needs."""

    prompt: Prompt
    """What the model is given."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How tokens are chosen and when to stop."""
    steering: SteeringSpec | None = None
    """What to do to the residual stream; None or an empty spec steers nothing."""
    capture: CaptureSpec | None = None
    """Which layers' streams to return; None captures nothing."""
    request_id: str = ""
    """The caller's name for this request, 1..128 of `A-Za-z0-9._:-`; empty: the server makes one."""
    model: str = ""
    """Name of the model that must serve it; empty: whichever is loaded."""
    cache_salt: str = ""
    """Separates this request's prefix-cache blocks from those of other salts; empty: shared."""
    owner: str = ""
    """Whose capture memory it uses; a server fills it in. Empty: nobody's in particular, and without a quota."""

    def __post_init__(self) -> None:
        _check_kind(self.prompt, (TextPrompt, TokenPrompt, ChatPrompt), "prompt")
        _check_kind(self.sampling, SamplingOptions, "sampling")
        _check_kind(self.steering, (SteeringSpec, type(None)), "steering")
        _check_kind(self.capture, (CaptureSpec, type(None)), "capture")
        for name in ("request_id", "model", "cache_salt"):
            _check_text(getattr(self, name), name)
        if self.request_id and not REQUEST_ID.fullmatch(self.request_id):
            raise InvalidRequest(
                "request_id must be 1..128 characters of A-Z a-z 0-9 . _ : -",
                reason="BAD_REQUEST_ID",
                field="request_id",
            )
        for name in ("model", "cache_salt"):
            if len(getattr(self, name)) > MAX_NAME_LENGTH:
                raise InvalidRequest(f"{name} has more than {MAX_NAME_LENGTH} characters", field=name)


def _check_kind(value: Any, kinds: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kinds):
        expected = kinds if isinstance(kinds, tuple) else (kinds,)
        known = " or ".join(kind.__name__ for kind in expected if kind is not type(None))
        raise InvalidRequest(f"expected {known}, got {type(value).__name__}", field=name)


class FinishReason(enum.Enum):
    """Why an output ended."""

    STOP = "stop"
    """The end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the model's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probabilities at one generated position."""

    token_id: int
    """The chosen token."""
    logprob: float
    """Natural logarithm of its probability, before temperature unless the engine is told otherwise."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was really applied to one output; made by the side that did it, never from the request."""

    steering_digest: str = ""
    """`SteeringSpec.digest()` of the program that ran; "" if none ran."""
    steered_layers: tuple[int, ...] = ()
    """Layers at which the program ran."""
    rows_steered: int = 0
    """Rows (tokens fed to the model) within the spec's positions that went through the program in this request."""
    captured_layers: tuple[int, ...] = ()
    """Layers captured."""
    rows_captured: int = 0
    """Rows captured at each of those layers."""
    rows_from_prefix_cache: int = 0
    """Prompt rows whose keys and values were reused, computed earlier under the same steering."""
    rows_total: int = 0
    """Rows of this output: prompt tokens + generated tokens - 1 (the last sampled token is never fed)."""
    bytes_reserved: int = 0
    """Bytes of memory that were reserved for its captures and for the marks of what was done to its rows."""
    bytes_captured: int = 0
    """Bytes of captured rows, all layers and sites together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the whole request cost."""

    prompt_tokens: int
    """Tokens of the prompt."""
    completion_tokens: int
    """Tokens generated, all outputs together."""
    cached_tokens: int = 0
    """Prompt tokens served from the prefix cache, of the first output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was accepted and given to the engine."""

    request_id: str
    """The caller's id, or the one made for it."""
    prompt_token_ids: tuple[int, ...]
    """The prompt as the model sees it."""
    sampling: SamplingOptions
    """The options in force: no field that has a default is None."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """Where each message of a chat prompt lies in the prompt; empty for other prompts."""
    capture_delivery: CaptureDelivery | None = None
    """How captures are delivered, never SHARED_MEMORY_PREFERRED; None if nothing is captured."""
    shared_memory_fallback: SharedMemoryFallback | None = None
    """Why not through shared memory, if that was preferred."""
    vectors_stored: bool = False
    """True: the server stores the vectors of the request's steering, and later requests may name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New tokens of one output; never cumulative."""

    output_index: int
    """Which of the n outputs, from 0."""
    text: str
    """New text; may be empty while a character is incomplete or a stop string may be under way."""
    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new token if asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLabels:
    """Labels of the captured rows of one output, the same for all its layers; may come in parts, in order."""

    output_index: int
    """Which of the n outputs, from 0."""
    labels: RowLabels
    """One label per row, in the order of positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBlock:
    """Captured rows of one layer of one output at one site; a layer may come in several, in order."""

    output_index: int
    """Which of the n outputs, from 0."""
    layer: int
    """Layer index, 0-based."""
    site: CaptureSite
    """Before or after steering."""
    spans: Spans
    """Positions of the rows."""
    hidden: npt.NDArray[Any]
    """Shape [rows, hidden_size]. Valid until the next event is asked for: copy what must live longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureHeld:
    """All captured rows of one output lie somewhere until they are released; in place of blocks."""

    output_index: int
    """Which of the n outputs, from 0."""
    held: HeldCapture
    """The rows. Whoever takes the event owns it and releases it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFinished:
    """One output is complete."""

    output_index: int
    """Which of the n outputs, from 0."""
    reason: FinishReason
    """Why it ended."""
    stop: str | int | None = None
    """The stop string or stop token that ended it, if one did."""
    receipt: Receipt = field(default_factory=Receipt)
    """What was applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The request is complete; always last."""

    usage: Usage
    """What it cost."""


Event = Started | TokenDelta | CaptureLabels | CaptureBlock | CaptureHeld | OutputFinished | Completed


def prompt_from(value: "Prompt | str | Sequence[int]") -> Prompt:
    """A prompt as users write it: text, token ids, or one of the prompt classes."""
    if isinstance(value, (TextPrompt, TokenPrompt, ChatPrompt)):
        return value
    if isinstance(value, str):
        return TextPrompt(text=value)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(
            f"a prompt is text, token ids or a prompt object, got {type(value).__name__}", field="prompt"
        )
    return TokenPrompt(token_ids=tuple(value))
