"""One generation request."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_identifier, check_kind, check_name, check_text, is_integer, is_number
from steer_service.core.number_limits import MAX_TIME_BUDGET_S
from steer_service.core.one_line import one_line
from steer_service.core.positions import PositionScope
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec

AS_MANY_AS_FIT = -1
"""`truncate_prompt_tokens` for as many as the model takes, as in vLLM."""


def kept_tokens_from(value: Any) -> int | None:
    """`truncate_prompt_tokens` as it was given, checked; raises InvalidRequest."""
    if value is None:
        return None
    if not is_integer(value) or (value != AS_MANY_AS_FIT and not 1 <= value < 2**31):
        raise InvalidRequest(
            f"{value!r} is neither an integer in 1..2^31-1 nor -1, as many as fit",
            reason="OUT_OF_RANGE",
            field="truncate_prompt_tokens",
        )
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation request: prompt, options, steering and capture."""

    prompt: Prompt
    """Text, token ids or a conversation."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How tokens are chosen and when to stop."""
    steering: SteeringSpec | None = None
    """Steering of the residual stream; None or an empty spec steers nothing."""
    capture: CaptureSpec | None = None
    """Layers and positions whose hidden states are returned; None captures nothing."""
    request_id: str = ""
    """The caller's name for this request, 1..128 of `A-Za-z0-9._:-`; empty: the server generates one."""
    model: str = ""
    """Name of the model or LoRA adapter that must serve it; empty: the loaded model."""
    cache_salt: str = ""
    """Separates the prefix-cache blocks of this request from those of other salts; empty: shared."""
    time_budget_s: float | None = None
    """Seconds after which generation ends with FinishReason.TIME_BUDGET, above 0 and at most 86,400; None: no limit.

    They count from the arrival of the request: its waits for a place and a slot, the prompt and the tokens. The tokens
    generated until then are kept, with their captures and receipt. An output that has no token yet has no row either.
    """
    priority: int | None = None
    """Lower values run first in the engine, as in vLLM, -2^31..2^31-1; None: 0.

    Needs an engine with the scheduling policy `priority`."""
    stream_interval: int | None = None
    """Tokens of each TokenDelta at least, but the first and the last of an output; 0: one TokenDelta, at its end.

    None: the backend's own, which it can only exceed."""
    truncate_prompt_tokens: int | None = None
    """Only the last tokens of the prompt are kept, at most so many, 1..max_model_len; None: all of them.

    -1 keeps as many as the model takes. Of a text, the special tokens that the tokenizer adds are kept too and count;
    other prompts are cut as they are. Positions and message boundaries are those in the cut prompt."""
    client_id: str = ""
    """The client that owns its captures; a server fills it in. Empty: no client, and no quota."""
    trace_headers: tuple[tuple[str, str], ...] = ()
    """W3C trace context for spans of the engine, as names and values of headers; a server that traces fills it in."""

    __repr__ = one_line

    @property
    def scopes(self) -> Iterator[PositionScope]:
        """Every selection of positions in its steering and its capture."""
        scopes: list[PositionScope | None] = []
        if self.steering is not None:
            scopes += [self.steering.positions, *self.steering.numbered_scopes().paths.values()]
        if self.capture is not None:
            scopes.append(self.capture.positions)
        return (scope for scope in scopes if scope is not None)

    @property
    def names_messages(self) -> bool:
        """True if positions in it are given by messages or roles."""
        return any(scope.names_messages for scope in self.scopes)

    @property
    def names_special_tokens(self) -> bool:
        """True if positions in it leave out special tokens."""
        return any(scope.skip_special_tokens for scope in self.scopes)

    def __post_init__(self) -> None:
        check_kind(self.prompt, (TextPrompt, TokenPrompt, ChatPrompt), "prompt")
        check_kind(self.sampling, SamplingOptions, "sampling")
        check_kind(self.steering, (SteeringSpec, type(None)), "steering")
        check_kind(self.capture, (CaptureSpec, type(None)), "capture")
        check_text(self.request_id, "request_id")
        if self.request_id:
            check_identifier(self.request_id, "request_id", reason="BAD_REQUEST_ID")
        if self.priority is not None:
            if not is_integer(self.priority) or not -(2**31) <= self.priority < 2**31:
                raise InvalidRequest(
                    f"{self.priority!r} is not an integer in -2^31..2^31-1", reason="OUT_OF_RANGE", field="priority"
                )
            object.__setattr__(self, "priority", int(self.priority))
        if self.stream_interval is not None:
            if not is_integer(self.stream_interval) or not 0 <= self.stream_interval < 2**31:
                raise InvalidRequest(
                    f"{self.stream_interval!r} is not an integer in 0..2^31-1",
                    reason="OUT_OF_RANGE",
                    field="stream_interval",
                )
            object.__setattr__(self, "stream_interval", int(self.stream_interval))
        object.__setattr__(self, "truncate_prompt_tokens", kept_tokens_from(self.truncate_prompt_tokens))
        budget_s = self.time_budget_s
        if budget_s is not None and not (is_number(budget_s) and 0 < budget_s <= MAX_TIME_BUDGET_S):
            raise InvalidRequest(
                f"{budget_s} is not above 0 and at most {MAX_TIME_BUDGET_S:g} seconds",
                reason="OUT_OF_RANGE",
                field="time_budget",
            )
        for name in ("model", "cache_salt"):
            check_name(getattr(self, name), name)
