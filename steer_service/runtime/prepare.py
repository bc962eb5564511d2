"""Prepares a request for its model, or refuses it; the same on every backend."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.checks import check_prompt_length, check_request, check_token_ids
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection, rows_at_most
from steer_service.core.sampling_options import OUR_DEFAULTS, SamplingDefaults, SamplingOptions, effective_options
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.runtime.time_budget import TimeBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A validated request, with rendered prompt and resolved positions."""

    request: GenerateRequest
    """The request as the user wrote it."""
    prompt: RenderedPrompt
    """The prompt as token ids."""
    options: SamplingOptions
    """The sampling options with defaults applied: no field that has a default is None."""
    rows: RowSelection
    """Which rows of each output are steered and captured."""
    budget: TimeBudget
    """The time that the request has."""
    defaults: SamplingDefaults = OUR_DEFAULTS
    """The defaults that were applied."""

    @property
    def outputs(self) -> range:
        """The numbers of the outputs, from 0."""
        return range(self.options.n or 1)

    @property
    def steering(self) -> SteeringSpec | None:
        """The steering spec; None if no row is steered."""
        return self.request.steering if self.rows.steered else None

    @property
    def capture(self) -> CaptureSpec | None:
        """The capture spec; None if no row is captured."""
        return self.request.capture if self.rows.captured else None

    @property
    def delivery(self) -> CaptureDelivery | None:
        """How captures are delivered within this process; None without captures."""
        return self.capture.delivery.in_process if self.capture is not None else None


async def prepare(
    request: GenerateRequest,
    info: ModelInfo,
    render: Callable[[GenerateRequest], Awaitable[RenderedPrompt]],
    defaults: SamplingDefaults = OUR_DEFAULTS,
) -> PreparedRequest:
    """Checks `request` against the model, renders its prompt with `render` and resolves its positions.

    Raises a SteerError, which names the field that the model cannot serve, and the errors of `render`.
    """
    budget = TimeBudget.of(request.time_budget_s)
    check_request(request, info)
    prompt = await render(request)
    prompt_tokens = len(prompt.token_ids)
    check_prompt_length(prompt_tokens, info, is_rows_only=request.sampling.is_rows_only)
    check_token_ids(prompt.token_ids, info, field="prompt")  # a tokenizer may have more ids than its model
    options = effective_options(request.sampling, prompt_tokens, info.max_model_len, defaults.options)
    assert options.max_tokens is not None, "effective_options sets max_tokens"
    places = prompt.places(info.special_token_ids)
    rows = RowSelection.of(request, prompt_tokens, rows_at_most(prompt_tokens, options.max_tokens), places)
    return PreparedRequest(request=request, prompt=prompt, options=options, rows=rows, budget=budget, defaults=defaults)
