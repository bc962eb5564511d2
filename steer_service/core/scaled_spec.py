"""A steering spec with other scales."""

from dataclasses import replace

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import AddSpec, SteeringOp, SteeringSpec


def scaled_spec(spec: SteeringSpec, factor: float) -> SteeringSpec:
    """The spec with the scale of each addition times `factor`; raises InvalidRequest if it has other operations."""
    if factor == 1.0:
        return spec
    layers = {
        index: replace(layer, operations=tuple(_scaled(operation, factor) for operation in layer.operations))
        for index, layer in spec.layers.items()
    }
    return replace(spec, layers=layers)


def _scaled(operation: SteeringOp, factor: float) -> AddSpec:
    if not isinstance(operation, AddSpec):
        raise InvalidRequest("only additions can be scaled; this steering has other operations too", field="scale")
    return replace(operation, scale=operation.scale * factor)
