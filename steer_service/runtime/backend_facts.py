"""What every backend says about itself, with the answers of one that has nothing special to say."""

from abc import ABC, abstractmethod

from steer_service.core.backend import ModelInfo
from steer_service.core.start_proof import StartProof
from steer_service.core.usage import BackendUsage


class BackendFacts(ABC):
    """The facts of a backend; a subclass adds `info`."""

    @property
    @abstractmethod
    def info(self) -> ModelInfo:
        """Facts about the model."""

    @property
    def is_alive(self) -> bool:
        """False once the backend cannot recover."""
        return True

    @property
    def requests_at_once(self) -> int:
        """Requests that it computes at once, while others wait; 0 if it has no such limit."""
        return 0

    @property
    def has_priority(self) -> bool:
        """True if requests may have a priority."""
        return False

    @property
    def has_structured_outputs(self) -> bool:
        """True if requests may have structured outputs."""
        return False

    @property
    def default_concurrency(self) -> int | None:
        """Requests of one call that are in flight at most, unless the call says otherwise; None: all."""
        return None

    @property
    def default_timeout_s(self) -> float | None:
        """Seconds of each request of a call without a `timeout_s`; None: no limit."""
        return None

    @property
    def start_proof(self) -> StartProof | None:
        """What it proved about itself when it started; None if it proves nothing."""
        return None

    @property
    def usage(self) -> BackendUsage | None:
        """How much of its limits it uses now; None if it has none."""
        return None

    @property
    def hidden_size(self) -> int:
        """Elements of one position of the residual stream."""
        return self.info.hidden_size

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return self.info.layer_count

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.info.name
