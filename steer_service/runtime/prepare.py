"""A request as its model can serve it, or the error that refuses it: the same on every backend."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.checks import check_prompt_length, check_request
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection
from steer_service.core.sampling_options import SamplingOptions, effective_options
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.prompts import RenderedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that its model can serve."""

    request: GenerateRequest
    """The request as it came."""
    prompt: RenderedPrompt
    """Its prompt as the model sees it."""
    options: SamplingOptions
    """The options in force: no field that has a default is None."""
    rows: RowSelection
    """Which rows of each output are steered and captured."""

    @property
    def outputs(self) -> range:
        """The numbers of its outputs."""
        return range(self.options.n or 1)

    @property
    def steering(self) -> SteeringSpec | None:
        """How to steer; None if no row is steered."""
        return self.request.steering if self.rows.steered else None

    @property
    def capture(self) -> CaptureSpec | None:
        """What to capture; None if no row is captured."""
        return self.request.capture if self.rows.captured else None

    @property
    def delivery(self) -> CaptureDelivery | None:
        """How captures are delivered within this process; None without captures."""
        return self.capture.delivery.in_process if self.capture is not None else None


async def prepare(
    request: GenerateRequest, info: ModelInfo, render: Callable[[GenerateRequest], Awaitable[RenderedPrompt]]
) -> PreparedRequest:
    """Checks `request` against the model, renders its prompt with `render` and resolves its positions.

    Raises the SteerError that names the field which the model cannot serve, and what `render` raises.
    """
    check_request(request, info)
    prompt = await render(request)
    prompt_tokens = len(prompt.token_ids)
    check_prompt_length(prompt_tokens, info)
    options = effective_options(request.sampling, prompt_tokens, info.max_model_len)
    assert options.max_tokens is not None, "effective options have it"
    rows = RowSelection.of(request, prompt_tokens, prompt_tokens + options.max_tokens - 1)
    return PreparedRequest(request=request, prompt=prompt, options=options, rows=rows)
