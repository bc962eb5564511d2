"""SteeringSpec and its operations <-> messages."""

from steer_service.core.arrays import Float32Array, as_vector
from steer_service.core.errors import InvalidRequest, within
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
from steer_service.wire.tensors import tensor_from_proto, tensor_to_proto


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
    for index, layer_message in enumerate(message.layers):
        if not layer_message.HasField("layer"):
            raise missing(f"the layer of entry {index}", "layers")
        layer = layer_message.layer
        with within(f"layers[{layer}]"):
            if layer in layers:
                raise InvalidRequest(f"layer {layer} is given more than once", reason="DUPLICATE_LAYER")
            layers[layer] = _layer_from_proto(layer_message)
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


def _layer_from_proto(message: steering_pb2.LayerSteeringSpec) -> LayerSteeringSpec:
    operations = []
    for index, operation in enumerate(message.operations):
        with within(f"operations[{index}]"):
            operations.append(_operation_from_proto(operation))
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


def _operation_from_proto(message: steering_pb2.SteeringOperation) -> SteeringOp:
    kind = message.WhichOneof("operation")
    if kind is None:
        raise missing("the operation")
    body = getattr(message, kind)
    with within("vector"):
        vector = vector_from_proto(body.vector)
    match kind:
        case "add":
            return AddSpec(vector=vector, scale=body.scale if body.HasField("scale") else 1.0)
        case "projection_cap":
            return ProjectionCapSpec(
                vector=vector,
                min=body.min if body.HasField("min") else None,
                max=body.max if body.HasField("max") else None,
            )
        case _:
            return AblationSpec(vector=vector, scale=body.scale if body.HasField("scale") else 0.0)
