"""The reference of every operation on the residual stream, in plain differentiable torch.

Kernels, the transformers backend and the engine are compared with it; in float64 it is an oracle. Vectors are float64,
so that their directions are as exact as their numbers. The residual stream keeps its own dtype.

T: rows; D: hidden size.
"""

from collections.abc import Callable, Sequence

import torch

from steer_service.core.specs import AblationSpec, AddScaling, AddSpec, ProjectionCapSpec, SteeringOp
from steer_service.ops.program import has_norms


def apply_operations(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> torch.Tensor:
    """`stream_TD` (float32 or float64) after all operations in order; the input is not changed."""
    for operation in operations:
        stream_TD = apply_operation(stream_TD, operation)
    return stream_TD


def apply_operation(stream_TD: torch.Tensor, operation: SteeringOp) -> torch.Tensor:
    """`stream_TD` after one operation, in its own dtype."""
    return prepared(operation, stream_TD.device)(stream_TD)


def prepared(operation: SteeringOp, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """One operation as a function of a residual stream on `device`."""
    vector_D = torch.tensor(operation.vector, dtype=torch.float64, device=device)
    if has_norms(operation):
        return lambda stream_TD: with_norms(stream_TD, vector_D, operation)
    match operation:
        case AddSpec():
            return lambda stream_TD: add(stream_TD, vector_D, operation.scale)
        case ProjectionCapSpec():
            return lambda stream_TD: cap(stream_TD, vector_D, operation.min, operation.max)
        case AblationSpec():
            return lambda stream_TD: ablate(stream_TD, vector_D, operation.scale)


def add(stream_TD: torch.Tensor, vector_D: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """The residual stream plus `scale * vector_D`; `scale`, like all numbers here, may be a trained tensor."""
    return stream_TD + (scale * vector_D).to(stream_TD.dtype)


def cap(
    stream_TD: torch.Tensor, vector_D: torch.Tensor, low: float | torch.Tensor | None, high: float | torch.Tensor | None
) -> torch.Tensor:
    """The residual stream with its projection onto the direction of `vector_D` clamped to `low`..`high`."""
    unit_D, projection_T = _along(stream_TD, vector_D)
    capped_T = torch.clamp(projection_T, _like(low, projection_T), _like(high, projection_T))
    return stream_TD + (capped_T - projection_T).unsqueeze(-1) * unit_D


def ablate(stream_TD: torch.Tensor, vector_D: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """The residual stream with its component along the direction of `vector_D` scaled."""
    unit_D, projection_T = _along(stream_TD, vector_D)
    return stream_TD + ((scale - 1.0) * projection_T).to(stream_TD.dtype).unsqueeze(-1) * unit_D


def is_outside_bounds(stream_TD: torch.Tensor, operation: ProjectionCapSpec) -> torch.Tensor:
    """Whether the projection of each row is outside the bounds of a cap, shape [T]."""
    vector_D = torch.tensor(operation.vector, dtype=torch.float64, device=stream_TD.device)
    _, projection_T = _along(stream_TD, vector_D)
    low, high = _like(operation.min, projection_T), _like(operation.max, projection_T)
    return torch.clamp(projection_T, low, high) != projection_T


def with_norms(stream_TD: torch.Tensor, vector_D: torch.Tensor, operation: SteeringOp) -> torch.Tensor:
    """The residual stream after an operation that is relative to the norm of a row, limited by it, or keeps it.

    A row of zeros is not changed by a relative addition, nor by any limited operation. A row that becomes zero cannot
    keep another norm: it becomes NaN. So does a row whose norm the dtype does not hold, if it is needed.
    """
    unit_D, projection_T = _along(stream_TD, vector_D)
    norm_T = torch.linalg.vector_norm(stream_TD, dim=-1)
    match operation:
        case AddSpec(scaling=AddScaling.RELATIVE):
            change_T = operation.scale * norm_T
        case AddSpec():
            change_T = (operation.scale * torch.linalg.vector_norm(vector_D)).to(norm_T).expand_as(norm_T)
        case ProjectionCapSpec():
            low, high = _like(operation.min, projection_T), _like(operation.max, projection_T)
            change_T = torch.clamp(projection_T, low, high) - projection_T
        case AblationSpec():
            change_T = (operation.scale - 1.0) * projection_T
    if operation.max_relative_change is not None:
        most_T = operation.max_relative_change * norm_T
        change_T = torch.where(norm_T.isfinite(), torch.clamp(change_T, -most_T, most_T), torch.nan)
    changed_TD = stream_TD + change_T.unsqueeze(-1) * unit_D
    if not operation.keep_norm:
        return changed_TD
    now_T = torch.linalg.vector_norm(changed_TD, dim=-1)
    is_nothing_T = (norm_T == 0) & (now_T == 0)
    now_T = torch.where(is_nothing_T, torch.ones_like(now_T), now_T)
    factor_T = torch.where(now_T.isfinite(), norm_T / now_T, torch.nan)
    return changed_TD * factor_T.unsqueeze(-1)


def _along(stream_TD: torch.Tensor, vector_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    unit_D = (vector_D / torch.linalg.vector_norm(vector_D)).to(stream_TD.dtype)
    return unit_D, stream_TD @ unit_D


def _like(bound: float | torch.Tensor | None, projection_T: torch.Tensor) -> torch.Tensor | None:
    """The bound as a tensor: `clamp` takes two tensors or two numbers, and only tensors have gradients."""
    return None if bound is None else torch.as_tensor(bound).to(projection_T)
