"""Steering operations whose numbers are trained, computed by `ops.reference`.

Names and formulas are those of the in-process steerllm, as in `core.specs`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from steer_service.core.arrays import VectorLike, as_vector
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.ops import reference


class TrainableSteering(nn.Module):
    """One operation on the residual stream after one layer; its direction and its numbers are float32 parameters.

    `forward` takes and returns a residual stream of float32 or float64, shape [..., hidden_size].
    """

    kind = ""
    """The name of the operation in a folder of trained steering."""

    def __init__(self, vector: VectorLike, **numbers: float | None) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.as_tensor(vector).detach().to(torch.float32).clone().flatten())
        for name, number in numbers.items():
            value = None if number is None else nn.Parameter(torch.tensor(float(number)))
            self.register_parameter(name, value)

    def to_operation(self, scale: float = 1.0) -> SteeringOp | None:
        """The operation with its present numbers, an addition times `scale`; None for an addition of zeros.

        Raises InvalidRequest for numbers that no operation can have.
        """
        raise NotImplementedError

    def set_vector(self, vector: VectorLike) -> None:
        """Replaces the direction; raises InvalidRequest unless it has shape [hidden_size] and finite numbers."""
        with within("vector"):
            given = as_vector(vector)
        if given.size != self.vector.numel():
            raise InvalidRequest(
                f"expected {self.vector.numel()} numbers, got {given.size}", reason="WRONG_WIDTH", field="vector"
            )
        with torch.no_grad():
            self.vector.copy_(torch.tensor(given))

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of the parameters that are set: the vector, shape [hidden_size], and numbers, shape []."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.named_parameters()}

    def _direction(self) -> Any:
        return self.vector.detach().cpu().numpy()


class TrainableAdd(TrainableSteering):
    """Adds a vector; its length is trained too."""

    kind = "add"

    def __init__(self, vector: VectorLike) -> None:
        super().__init__(vector)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """The residual stream plus the vector."""
        return reference.add(stream, self.vector, 1.0)

    def to_operation(self, scale: float = 1.0) -> AddSpec | None:
        """An AddSpec with the norm in its scale; None for a vector of zeros."""
        return AddSpec.from_unnormalized(self._direction(), scale) if self._direction().any() else None


class TrainableCap(TrainableSteering):
    """Clamps the projection onto a direction, whose norm does not matter, between trained bounds.

    Raises InvalidRequest for the vectors and bounds that `ProjectionCapSpec` refuses.
    """

    kind = "projection_cap"

    def __init__(self, vector: VectorLike, min: float | None = None, max: float | None = None) -> None:
        ProjectionCapSpec(vector=as_vector(vector), min=min, max=max)  # checks them
        super().__init__(vector, min=min, max=max)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """The residual stream with its projection clamped."""
        return reference.cap(stream, self.vector.double(), self.min, self.max)

    def to_operation(self, scale: float = 1.0) -> ProjectionCapSpec:
        """The cap with its present bounds; raises InvalidRequest if training has put them in the wrong order."""
        low, high = (None if bound is None else float(bound.detach()) for bound in (self.min, self.max))
        return ProjectionCapSpec.from_unnormalized(self._direction(), low, high)


class TrainableAblation(TrainableSteering):
    """Scales the component along a direction, whose norm does not matter, by a trained number.

    Raises InvalidRequest for the vectors and scales that `AblationSpec` refuses.
    """

    kind = "ablation"

    def __init__(self, vector: VectorLike, scale: float = 0.0) -> None:
        AblationSpec(vector=as_vector(vector), scale=scale)  # checks them
        super().__init__(vector, scale=scale)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """The residual stream with its component scaled."""
        return reference.ablate(stream, self.vector.double(), self.scale)

    def to_operation(self, scale: float = 1.0) -> AblationSpec:
        """The ablation with its present scale."""
        return AblationSpec.from_unnormalized(self._direction(), float(self.scale.detach()))


KINDS: dict[str, Callable[..., TrainableSteering]] = {
    kind.kind: kind for kind in (TrainableAdd, TrainableCap, TrainableAblation)
}
"""Name in a folder of trained steering -> its class."""


def restored(kind: str, values: Mapping[str, npt.NDArray[np.float32]]) -> TrainableSteering:
    """The trainable steering of this kind with these `values`.

    Raises InvalidRequest for an unknown kind, and for values that the kind does not have.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"kind {kind!r} is not one of {', '.join(KINDS)}", reason="UNKNOWN_KIND", field="kind")
    try:
        return KINDS[kind](**{name: value.copy() for name, value in values.items()})
    except TypeError as error:
        raise InvalidRequest(f"{kind} does not have {', '.join(values)}", reason="UNKNOWN_KIND") from error
