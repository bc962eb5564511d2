"""One generation request."""

from dataclasses import dataclass, field

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_identifier, check_kind, check_text
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec

MAX_NAME_LENGTH = 256


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
    client_id: str = ""
    """Whose capture memory it uses; a server fills it in. Empty: nobody's in particular, and without a quota."""

    def __post_init__(self) -> None:
        check_kind(self.prompt, (TextPrompt, TokenPrompt, ChatPrompt), "prompt")
        check_kind(self.sampling, SamplingOptions, "sampling")
        check_kind(self.steering, (SteeringSpec, type(None)), "steering")
        check_kind(self.capture, (CaptureSpec, type(None)), "capture")
        for name in ("request_id", "model", "cache_salt"):
            check_text(getattr(self, name), name)
        if self.request_id:
            check_identifier(self.request_id, "request_id", reason="BAD_REQUEST_ID")
        for name in ("model", "cache_salt"):
            if len(getattr(self, name)) > MAX_NAME_LENGTH:
                raise InvalidRequest(f"{name} has more than {MAX_NAME_LENGTH} characters", field=name)
