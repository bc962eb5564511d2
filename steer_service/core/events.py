"""The events that a backend yields for a request.

Their order:
1. Started.
2. PromptLogprobs, if they were requested; one or several, in the order of positions.
3. TokenDeltas of all outputs, interleaved.
4. Per output: the CaptureLabels of its captured rows (none if they are pooled), its CaptureBlocks or one CaptureHeld,
   and one OutputFinished.
5. Completed, exactly once and last.

Every layer and site that is captured inline has exactly one block; it is empty if no row was captured. A live capture
has many, which come between the TokenDeltas, each after the labels of its rows. A failure raises a SteerError; the
iterator never ends early without one. After an error, the caller still releases the captures that it received as held.
"""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from steer_service.core.arrays import HiddenArray
from steer_service.core.capture import (
    CaptureDelivery,
    CaptureSite,
    MessageBoundary,
    Pooling,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.layer_change import LayerChange
from steer_service.core.one_line import layers_shown
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import Spans
from steer_service.core.stored_capture import HeldCapture


class FinishReason(enum.Enum):
    """Why an output ended."""

    STOP = "stop"
    """The end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the model's limit."""
    TIME_BUDGET = "time_budget"
    """The request's time budget."""
    OTHER = "other"
    """A reason that this client does not know: the server is newer. No backend yields it."""


class TopLogprob(NamedTuple):
    """One of the likeliest tokens at a position."""

    token_id: int
    """The token."""
    logprob: float
    """Natural logarithm of its probability."""
    text: str = ""
    """Its text, as in TokenLogprob."""
    rank: int = 0
    """Its place among the likeliest, from 1; 0: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probabilities at one token, given those before it; before penalties, biases and temperature."""

    token_id: int
    """The chosen token, or the token of the prompt."""
    logprob: float
    """Natural logarithm of its probability under the request's steering."""
    top: tuple[TopLogprob, ...] = ()
    """The likeliest tokens, likeliest first."""
    text: str = ""
    """Text of the token alone, special tokens too, with U+FFFD for bytes that are not a character by themselves.

    "" if the tokenizer does not have the token."""
    rank: int = 0
    """Its place among all tokens by probability, from 1; equally likely tokens may share one; 0: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was really applied to one output; written by the worker that applied it, never from the request."""

    steering_digest: str = ""
    """`SteeringSpec.digest()` of the program that ran; "" if none ran."""
    steered_layers: tuple[int, ...] = ()
    """Layers at which the program ran."""
    rows_steered: int = 0
    """Rows (tokens fed to the model) to which this request applied the program."""
    captured_layers: tuple[int, ...] = ()
    """Layers captured."""
    rows_captured: int = 0
    """Rows captured at each of those layers, before any pooling."""
    rows_from_prefix_cache: int = 0
    """Prompt rows whose keys and values were reused from an earlier request with the same steering."""
    rows_total: int = 0
    """Rows of this output: prompt tokens + generated tokens - 1 (the last sampled token is never fed).

    Those of the prompt for `max_tokens=0`; 0 for an output without a token, which its time budget ended."""
    bytes_reserved: int = 0
    """Bytes reserved for its captures, the marks of what was applied to each row, and the report of changes."""
    bytes_captured: int = 0
    """Bytes of captured rows as they are delivered, all layers and sites together."""
    changes: tuple[LayerChange, ...] = ()
    """How much each of `steered_layers` changed its rows; empty unless `SteeringSpec.report_change` is set."""

    def __repr__(self) -> str:
        """What was applied, on one line: all fields together would not fit there."""
        parts = [f"{self.rows_total} rows"]
        if self.steering_digest or self.rows_steered:
            layers = layers_shown(self.steered_layers)
            parts.append(f"{self.rows_steered} steered at {layers} by {self.steering_digest[:8]}")
        if self.captured_layers or self.rows_captured:
            parts.append(f"{self.rows_captured} captured at {layers_shown(self.captured_layers)}")
        if self.rows_from_prefix_cache:
            parts.append(f"{self.rows_from_prefix_cache} cached")
        return f"Receipt({', '.join(parts)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of the whole request."""

    prompt_tokens: int
    """Tokens of the prompt."""
    completion_tokens: int
    """Tokens generated, all outputs together."""
    cached_tokens: int = 0
    """Prompt tokens served from the prefix cache, of the first output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was accepted and passed to the engine."""

    request_id: str
    """The caller's id, or a generated one."""
    prompt_token_ids: tuple[int, ...]
    """Tokens of the rendered prompt."""
    sampling: SamplingOptions
    """The effective options: no field that has a default is None."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """The tokens of each message of a chat prompt; empty for other prompts."""
    boundaries_missing_reason: str = ""
    """Why a chat has no boundaries, a sentence; "" if it has, or if they were not looked for."""
    capture_delivery: CaptureDelivery | None = None
    """How captures are delivered, never SHARED_MEMORY_PREFERRED; None if nothing is captured."""
    shared_memory_fallback: SharedMemoryFallback | None = None
    """Why the captures are inline although shared memory was preferred; None otherwise."""
    vectors_stored: bool = False
    """True: the server stores the vectors of this request; later requests may send their digests instead."""
    generation_config: str = ""
    """Where defaults in `sampling` come from: "model" or "file" for a generation config, "" for the contract."""
    instance: str = ""
    """The server that runs the request, of several behind a balancer; "" for an engine in this process."""

    def places(self, special_token_ids: tuple[int, ...]) -> PromptPlaces:
        """Where the messages and special tokens of the prompt are; `special_token_ids` are those of the model."""
        return PromptPlaces(
            token_ids=self.prompt_token_ids,
            messages=self.message_boundaries,
            messages_missing_reason=self.boundaries_missing_reason,
            special_token_ids=special_token_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of consecutive tokens of the prompt, once for all outputs; before the first TokenDelta.

    The first token of the prompt has none. They are not sent if the time budget ended before the first token.
    """

    first_position: int
    """Position of the first of these tokens, at least 1."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """New tokens of one output; never cumulative."""

    output_index: int
    """Which of the n outputs, from 0."""
    text: str
    """New text; empty while a character or a possible stop string is incomplete."""
    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new token if asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLabels:
    """Labels of the captured rows of one output, the same for all its layers; may be split into parts, in order."""

    output_index: int
    """Which of the n outputs, from 0."""
    labels: RowLabels
    """One label per row, in the order of positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBlock:
    """Captured rows of one output at one layer and site: all of them, or a part in order if the capture is live."""

    output_index: int
    """Which of the n outputs, from 0."""
    layer: int
    """Layer index, 0-based."""
    site: CaptureSite
    """Before or after steering."""
    spans: Spans
    """Positions of the rows; of pooled ones, those that the one row was made of."""
    hidden: HiddenArray
    """Shape [rows, hidden_size]. Valid until the next event is requested: copy rows that must live longer."""
    pooling: Pooling = Pooling.NONE
    """Whether there is one row for all positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureHeld:
    """All captured rows of one output, held in memory until they are released; sent in place of blocks."""

    output_index: int
    """Which of the n outputs, from 0."""
    held: HeldCapture
    """The rows. The receiver of the event owns them and releases them."""


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
    """Its token counts."""


Event = Started | PromptLogprobs | TokenDelta | CaptureLabels | CaptureBlock | CaptureHeld | OutputFinished | Completed
"""What happens to one request, in order: Started is first, Completed is last."""
