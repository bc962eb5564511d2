"""The truth: what each operation does to a stream, in plain differentiable torch.

Kernels, the HuggingFace backend and the engine are compared with this. Run it in float64 for an oracle.
"""

from collections.abc import Sequence

import torch

from steer_service.core.arrays import norm_of
from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp


def apply_operations(stream_TD: torch.Tensor, operations: Sequence[SteeringOp]) -> torch.Tensor:
    """`stream_TD` (T rows, D wide; float32 or float64) after all operations in order; the input is not changed."""
    for operation in operations:
        stream_TD = apply_operation(stream_TD, operation)
    return stream_TD


def apply_operation(stream_TD: torch.Tensor, operation: SteeringOp) -> torch.Tensor:
    """`stream_TD` after one operation, in the stream's own dtype."""
    vector_D = torch.tensor(operation.vector, dtype=torch.float64, device=stream_TD.device)
    if isinstance(operation, AddSpec):
        return stream_TD + (operation.scale * vector_D).to(stream_TD.dtype)
    unit_D = (vector_D / norm_of(operation.vector)).to(stream_TD.dtype)
    projection_T = stream_TD @ unit_D
    match operation:
        case ProjectionCapSpec():
            change_T = projection_T.clamp(operation.min, operation.max) - projection_T
        case AblationSpec():
            change_T = (operation.scale - 1.0) * projection_T
    return stream_TD + change_T.unsqueeze(-1) * unit_D
