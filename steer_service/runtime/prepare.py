"""What a request comes to on the model that is to serve it, or the error that refuses it: the same on every backend."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.checks import check_positions, check_prompt_length, check_request
from steer_service.core.positions import Spans
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions, effective_options
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.prompts import RenderedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that its model can serve."""

    request: GenerateRequest
    """What was asked for."""
    prompt: RenderedPrompt
    """Its prompt as the model sees it."""
    options: SamplingOptions
    """The options in force: no field that has a default is None."""
    steered: Spans
    """Positions to steer; empty for none."""
    captured: Spans
    """Positions to capture; empty for none."""

    @property
    def row_limit(self) -> int:
        """Rows of an output at most: the last sampled token is never fed."""
        return _row_limit(self.prompt, self.options)

    @property
    def steering(self) -> SteeringSpec | None:
        """What to do to the stream; None if that is nothing."""
        return self.request.steering if self.steered else None

    @property
    def capture(self) -> CaptureSpec | None:
        """What to capture; None if that is nothing."""
        return self.request.capture if self.captured else None

    @property
    def delivery(self) -> CaptureDelivery | None:
        """How captures are delivered to somebody in this process; None if there are none."""
        return self.capture.delivery.in_process if self.capture is not None else None


async def prepare(
    request: GenerateRequest, info: ModelInfo, render: Callable[[GenerateRequest], Awaitable[RenderedPrompt]]
) -> PreparedRequest:
    """What `request` comes to, with the prompt that `render` makes of it once all else is known to fit the model.

    Raises the SteerError that says which field the model cannot serve, and what `render` raises.
    """
    check_request(request, info)
    prompt = await render(request)
    prompt_tokens = len(prompt.token_ids)
    check_prompt_length(prompt_tokens, info)
    options = effective_options(request.sampling, prompt_tokens, info.max_model_len)
    steered, captured = check_positions(request, prompt_tokens, _row_limit(prompt, options))
    return PreparedRequest(request=request, prompt=prompt, options=options, steered=steered, captured=captured)


def _row_limit(prompt: RenderedPrompt, options: SamplingOptions) -> int:
    assert options.max_tokens is not None, "effective options have it"
    return len(prompt.token_ids) + options.max_tokens - 1
