"""SteeringSpec and its operations <-> messages, which carry vectors or name them by digest."""

from collections.abc import Container, Iterator, Mapping
from typing import Any

from steer_service.core.arrays import CheckedVector, Float32Array, as_vector, checked_together, vector_digest
from steer_service.core.errors import InvalidRequest, MissingVectors, Unsupported, within, within_each
from steer_service.core.hook_point import HookPoint
from steer_service.core.specs import (
    AblationSpec,
    AddScaling,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)
from steer_service.wire import steering_pb2
from steer_service.wire.fields import missing
from steer_service.wire.hook_points import hook_from_proto, hook_to_proto
from steer_service.wire.positions import scope_from_proto, scope_to_proto
from steer_service.wire.tensors import rows_from_proto, tensor_from_proto, tensor_to_proto

_Body = steering_pb2.AddSpec | steering_pb2.ProjectionCapSpec | steering_pb2.AblationSpec
"""The message of one kind of operation."""

_SCALING_TO_PROTO: dict[AddScaling, steering_pb2.AddScaling] = {
    AddScaling.ABSOLUTE: steering_pb2.ADD_SCALING_ABSOLUTE,
    AddScaling.RELATIVE: steering_pb2.ADD_SCALING_RELATIVE,
}
_SCALING_FROM_PROTO: dict[int, AddScaling] = {
    steering_pb2.ADD_SCALING_UNSPECIFIED: AddScaling.ABSOLUTE,
    **{number: scaling for scaling, number in _SCALING_TO_PROTO.items()},
}

DIGEST_BYTES = 32
"""Bytes of a vector's digest (SHA-256)."""

NO_VECTORS: Mapping[bytes, Float32Array] = {}
"""The stored vectors of a server that stores none."""


def steering_to_proto(spec: SteeringSpec, named: Container[bytes] = ()) -> steering_pb2.SteeringSpec:
    """`spec` as a message that carries its vectors, except those whose digests are in `named`."""
    vectors = _vectors_to_proto(spec, named)
    return steering_pb2.SteeringSpec(
        layers=[
            steering_pb2.LayerSteeringSpec(
                layer=layer,
                operations=[_operation_to_proto(operation, next(vectors)) for operation in layer_spec.operations],
                hook=hook_to_proto(layer_spec.hook),
            )
            for layer, layer_spec in spec.layers.items()
        ],
        positions=scope_to_proto(spec.positions),
        report_change=spec.report_change,
    )


def steering_from_proto(
    message: steering_pb2.SteeringSpec, stored: Mapping[bytes, Float32Array] = NO_VECTORS
) -> SteeringSpec:
    """The spec in a message; vectors that it names by digest come from `stored`.

    Raises MissingVectors for digests that are not in `stored`, and InvalidRequest or Unsupported for other errors. The
    field's path begins at the spec, as in `layers[3].operations[0]`.
    """
    hooks = _hooks_from_proto(message)
    layers: dict[int, LayerSteeringSpec] = {}
    bodies = [[_body_of(operation) for operation in layer.operations] for layer in message.layers]
    messages = [body.vector for layer in bodies for body in layer if body is not None]
    if any(vector.HasField("digest") for vector in messages):
        stored = _with_inline(messages, stored)
        _check_stored(message, stored)
    vectors = _vectors_from_proto(messages, stored)
    for layer_message, hook, operations in zip(message.layers, hooks.values(), bodies, strict=True):
        layer = layer_message.layer
        with within(f"layers[{layer}]"):
            layers[layer] = LayerSteeringSpec(_operations_from_proto(layer_message, operations, vectors), hook=hook)
    with within("positions"):
        positions = scope_from_proto(message.positions) if message.HasField("positions") else None
    return SteeringSpec(layers=layers, positions=positions, report_change=message.report_change)


def named_vectors(message: steering_pb2.SteeringSpec) -> dict[bytes, str]:
    """The digests that name vectors in a message, in order -> the path of the first vector with that digest."""
    named: dict[bytes, str] = {}
    for layer in message.layers:
        for index, body in enumerate(map(_body_of, layer.operations)):
            if body is not None and body.vector.HasField("digest"):
                named.setdefault(body.vector.digest, f"layers[{layer.layer}].operations[{index}].vector")
    return named


def carries_vectors(message: steering_pb2.SteeringSpec) -> bool:
    """True if the message itself carries a vector."""
    bodies = (_body_of(operation) for layer in message.layers for operation in layer.operations)
    return any(body.vector.HasField("inline") for body in bodies if body is not None)


def check_digest(digest: bytes, field: str) -> None:
    """Raises InvalidRequest (BAD_DIGEST), with `field`, unless `digest` has the length of a digest."""
    if len(digest) != DIGEST_BYTES:
        raise InvalidRequest(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}", reason="BAD_DIGEST", field=field)


def _with_inline(
    messages: list[steering_pb2.Vector], stored: Mapping[bytes, Float32Array]
) -> Mapping[bytes, Float32Array]:
    """`stored`, and the vectors that the message itself carries if it names one that is not stored."""
    if all(vector.digest in stored for vector in messages if vector.HasField("digest")):
        return stored
    inline = [_vector_of(vector) for vector in messages if vector.HasField("inline")]
    return {**stored, **{vector_digest(vector): vector for vector in inline}}


def _check_stored(message: steering_pb2.SteeringSpec, stored: Mapping[bytes, Float32Array]) -> None:
    named = named_vectors(message)
    for digest, field in named.items():
        check_digest(digest, field)
    absent = tuple(digest for digest in named if digest not in stored)
    if absent:
        raise MissingVectors(
            f"{len(absent)} of {len(named)} vectors named by digest are not stored on this server",
            digests=absent,
            field=named[absent[0]],
        )


def _vectors_to_proto(spec: SteeringSpec, named: Container[bytes]) -> Iterator[steering_pb2.Vector]:
    for vector, digest in zip(spec.vectors(), spec.vector_digests(), strict=True):
        if digest in named:
            yield steering_pb2.Vector(digest=digest)
        else:
            yield steering_pb2.Vector(inline=tensor_to_proto(vector))


def _body_of(message: steering_pb2.SteeringOperation) -> _Body | None:
    kind = message.WhichOneof("operation")
    return getattr(message, kind) if kind is not None else None


def _vectors_from_proto(messages: list[steering_pb2.Vector], stored: Mapping[bytes, Float32Array]) -> Iterator[Any]:
    """The vectors of all operations in order; if all are in the message and valid, they are checked together."""
    inline = [message.inline for message in messages if message.HasField("inline")]
    rows = rows_from_proto(inline)
    checked = (checked_together(rows) if rows is not None else None) or ()
    if len(checked) == len(messages):
        return iter(checked)
    return _vectors_one_by_one(messages, iter(checked), stored)


def _vectors_one_by_one(
    messages: list[steering_pb2.Vector], checked: Iterator[CheckedVector], stored: Mapping[bytes, Float32Array]
) -> Iterator[Any]:
    """The vectors in order; `checked` has all that are in the message, or none of them."""
    for message in messages:
        match message.WhichOneof("source"):
            case "inline":
                yield next(checked, None) or _vector_of(message)
            case "digest":
                yield CheckedVector(stored[message.digest])  # it was checked before it was stored
            case _:
                raise missing("the vector", "vector")


def _vector_of(message: steering_pb2.Vector) -> Float32Array:
    with within("vector"):
        return as_vector(tensor_from_proto(message.inline))


def _hooks_from_proto(message: steering_pb2.SteeringSpec) -> dict[int, HookPoint]:
    """The hook point of each layer, in the order of the entries; checks that each pair of them is given once."""
    hooks: dict[int, HookPoint] = {}
    for index, entry in enumerate(message.layers):
        if not entry.HasField("layer"):
            raise missing(f"the layer of entry {index}", "layers")
        with within(f"layers[{entry.layer}]"):
            hook = hook_from_proto(entry.hook)
            if entry.layer in hooks:  # there is one hook point, so the layer tells the pair
                raise InvalidRequest(f"layer {entry.layer} is given more than once", reason="DUPLICATE_LAYER")
            hooks[entry.layer] = hook
    return hooks


def _operations_from_proto(
    message: steering_pb2.LayerSteeringSpec, bodies: list[_Body | None], vectors: Iterator[Any]
) -> tuple[SteeringOp, ...]:
    with within_each("operations", enumerate(zip(message.operations, bodies, strict=True))) as numbered:
        return tuple([_operation_from_proto(operation, body, vectors) for _, (operation, body) in numbered])


def _operation_to_proto(operation: SteeringOp, vector: steering_pb2.Vector) -> steering_pb2.SteeringOperation:
    message = steering_pb2.SteeringOperation(
        positions=scope_to_proto(operation.positions),
        max_relative_change=operation.max_relative_change,
        keep_norm=operation.keep_norm,
    )
    match operation:
        case AddSpec():
            scaling = _SCALING_TO_PROTO[operation.scaling]
            message.add.MergeFrom(steering_pb2.AddSpec(vector=vector, scale=operation.scale, scaling=scaling))
        case ProjectionCapSpec():
            cap = steering_pb2.ProjectionCapSpec(vector=vector, min=operation.min, max=operation.max)
            message.projection_cap.MergeFrom(cap)
        case AblationSpec():
            message.ablation.MergeFrom(steering_pb2.AblationSpec(vector=vector, scale=operation.scale))
    return message


def _operation_from_proto(
    message: steering_pb2.SteeringOperation, body: _Body | None, vectors: Iterator[Any]
) -> SteeringOp:
    if body is None:
        raise missing("the operation")
    common = {"vector": next(vectors), **_options_from_proto(message)}
    match body:
        case steering_pb2.AddSpec():
            if body.scaling not in _SCALING_FROM_PROTO:
                raise Unsupported(
                    f"the scaling {body.scaling} is not known to this server", reason="UNKNOWN_SCALING", field="scaling"
                )
            scale = body.scale if body.HasField("scale") else 1.0
            return AddSpec(scale=scale, scaling=_SCALING_FROM_PROTO[body.scaling], **common)
        case steering_pb2.ProjectionCapSpec():
            low, high = (getattr(body, name) if body.HasField(name) else None for name in ("min", "max"))
            return ProjectionCapSpec(min=low, max=high, **common)
        case steering_pb2.AblationSpec():
            return AblationSpec(scale=body.scale if body.HasField("scale") else 0.0, **common)


def _options_from_proto(message: steering_pb2.SteeringOperation) -> dict[str, Any]:
    """The fields that all operations have and that this message sets."""
    options: dict[str, Any] = {"keep_norm": True} if message.keep_norm else {}
    if message.HasField("max_relative_change"):
        options["max_relative_change"] = message.max_relative_change
    if message.HasField("positions"):
        with within("positions"):
            options["positions"] = scope_from_proto(message.positions)
    return options
