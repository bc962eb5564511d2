"""SteeringSpec and its operations <-> messages."""

from collections.abc import Iterator
from typing import Any

from steer_service.core.arrays import CheckedVector, Float32Array, as_vector, checked_together
from steer_service.core.errors import InvalidRequest, within, within_each
from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.wire import steering_pb2
from steer_service.wire.fields import missing, not_built
from steer_service.wire.positions import scope_from_proto, scope_to_proto
from steer_service.wire.tensors import rows_from_proto, tensor_from_proto, tensor_to_proto

_Body = steering_pb2.AddSpec | steering_pb2.ProjectionCapSpec | steering_pb2.AblationSpec
"""What an operation does, and to which vector."""


def steering_to_proto(spec: SteeringSpec) -> steering_pb2.SteeringSpec:
    """`spec` as a message."""
    return steering_pb2.SteeringSpec(
        layers=[
            steering_pb2.LayerSteeringSpec(
                layer=layer,
                operations=[_operation_to_proto(operation) for operation in layer_spec.operations],
            )
            for layer, layer_spec in spec.layers.items()
        ],
        positions=scope_to_proto(spec.positions),
    )


def steering_from_proto(message: steering_pb2.SteeringSpec) -> SteeringSpec:
    """The spec of a message; raises InvalidRequest or Unsupported with the path of the field from `layers` on."""
    layers: dict[int, LayerSteeringSpec] = {}
    bodies = [[_body_of(operation) for operation in layer.operations] for layer in message.layers]
    vectors = _checked_vectors(bodies)
    for index, layer_message in enumerate(message.layers):
        if not layer_message.HasField("layer"):
            raise missing(f"the layer of entry {index}", "layers")
        layer = layer_message.layer
        with within(f"layers[{layer}]"):
            if layer in layers:
                raise InvalidRequest(f"layer {layer} is given more than once", reason="DUPLICATE_LAYER")
            layers[layer] = _layer_from_proto(bodies[index], vectors)
    with within("positions"):
        positions = scope_from_proto(message.positions) if message.HasField("positions") else None
    return SteeringSpec(layers=layers, positions=positions)


def vector_to_proto(vector: Float32Array) -> steering_pb2.Vector:
    """`vector` as a message that carries its values."""
    return steering_pb2.Vector(inline=tensor_to_proto(vector))


def vector_from_proto(message: steering_pb2.Vector) -> Float32Array:
    """The vector of a message, float32, shape [n]; raises InvalidRequest or Unsupported."""
    match message.WhichOneof("source"):
        case "inline":
            return as_vector(tensor_from_proto(message.inline))
        case "digest":
            raise not_built("a vector by digest")
        case _:
            raise missing("the vector")


def _body_of(message: steering_pb2.SteeringOperation) -> _Body | None:
    kind = message.WhichOneof("operation")
    return getattr(message, kind) if kind is not None else None


def _checked_vectors(bodies: list[list[_Body | None]]) -> Iterator[CheckedVector] | None:
    """The vectors of all operations in order, checked at once; None if some have to be looked at one by one."""
    rows = rows_from_proto([body.vector.inline for layer in bodies for body in layer if body is not None])
    checked = checked_together(rows) if rows is not None else None
    return iter(checked) if checked is not None else None


def _layer_from_proto(bodies: list[_Body | None], vectors: Iterator[CheckedVector] | None) -> LayerSteeringSpec:
    with within_each("operations", enumerate(bodies)) as numbered:
        operations = [_operation_from_proto(body, vectors) for _, body in numbered]
    return LayerSteeringSpec(operations=tuple(operations))


def _operation_to_proto(operation: SteeringOp) -> steering_pb2.SteeringOperation:
    vector = vector_to_proto(operation.vector)
    match operation:
        case AddSpec():
            return steering_pb2.SteeringOperation(add=steering_pb2.AddSpec(vector=vector, scale=operation.scale))
        case ProjectionCapSpec():
            cap = steering_pb2.ProjectionCapSpec(vector=vector, min=operation.min, max=operation.max)
            return steering_pb2.SteeringOperation(projection_cap=cap)
        case AblationSpec():
            ablation = steering_pb2.AblationSpec(vector=vector, scale=operation.scale)
            return steering_pb2.SteeringOperation(ablation=ablation)


def _operation_from_proto(body: _Body | None, vectors: Iterator[CheckedVector] | None) -> SteeringOp:
    if body is None:
        raise missing("the operation")
    vector: Any = next(vectors) if vectors is not None else _vector_of(body)
    match body:
        case steering_pb2.AddSpec():
            return AddSpec(vector=vector, scale=body.scale if body.HasField("scale") else 1.0)
        case steering_pb2.ProjectionCapSpec():
            return ProjectionCapSpec(
                vector=vector,
                min=body.min if body.HasField("min") else None,
                max=body.max if body.HasField("max") else None,
            )
        case steering_pb2.AblationSpec():
            return AblationSpec(vector=vector, scale=body.scale if body.HasField("scale") else 0.0)


def _vector_of(body: _Body) -> Float32Array:
    with within("vector"):
        return vector_from_proto(body.vector)
