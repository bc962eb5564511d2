"""A spec compiled for the engine: for each steered layer, rows of one primitive operation on a direction.

Every operation is `p' = clamp(a * p + b, lo, hi); x += (p' - p) * direction` with `p = x . direction`:

    Add        a=1, b=1, no bounds, direction = scale * vector (p cancels and is not computed)
    Cap        a=1, b=0, lo=min, hi=max, direction = vector / ||vector||
    Ablation   a=scale, b=0, no bounds, direction = vector / ||vector||

With norms, the direction of an Add is a unit vector too, and the length of the change is |p' - p|:

    relative    b is multiplied by |x|
    limit c     p' - p is clamped to -c * |x| .. c * |x|
    keep norm   then x *= |x before| / |x|

An operation acts on the rows of its scope only. A program knows the number of each operation's scope, not the
positions.
"""

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import Float32Array, norm_of
from steer_service.core.specs import AblationSpec, AddScaling, AddSpec, ProjectionCapSpec, SteeringOp, SteeringSpec

COEFFICIENTS = 8
"""Numbers per operation: a, b, lo, hi, the number of its scope, 1 if b is relative, the limit c, 1 to keep the norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProgram:
    """The operations of one layer, in the order in which they run."""

    directions: Float32Array
    """Shape [operations, hidden_size]."""
    coefficients: Float32Array
    """Shape [operations, COEFFICIENTS]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One spec, compiled for a bank."""

    digest: str
    """`SteeringSpec.program_digest()` of the spec it was compiled from."""
    layers: dict[int, LayerProgram]
    """Layer index -> its operations; empty layers are left out."""

    @property
    def operation_count(self) -> int:
        """The number of operations of all layers: the rows that the program takes in a bank."""
        return sum(len(layer.coefficients) for layer in self.layers.values())


def compile_program(spec: SteeringSpec) -> Program:
    """Compiles a spec, which must fit the model; equal specs give equal programs."""
    numbers = spec.numbered_scopes().numbers
    layers = {
        layer: LayerProgram(
            directions=np.stack([_direction(op) for op in layer_spec.operations]),
            coefficients=np.array(
                [
                    (*_coefficients(op), scope, *_norms(op))
                    for op, scope in zip(layer_spec.operations, numbers[layer], strict=True)
                ],
                dtype=np.float32,
            ),
        )
        for layer, layer_spec in spec.active_layers().items()
    }
    return Program(digest=spec.program_digest(), layers=layers)


def program_to_bytes(program: Program) -> bytes:
    """The program as bytes: a JSON head with the layers' sizes, then the float32 arrays, little-endian."""
    sizes = {layer: len(part.coefficients) for layer, part in program.layers.items()}
    head = json.dumps({"digest": program.digest, "layers": sizes}).encode()
    parts = [struct.pack("<I", len(head)), head]
    for part in program.layers.values():
        parts += [part.directions.astype("<f4").tobytes(), part.coefficients.astype("<f4").tobytes()]
    return b"".join(parts)


def program_from_bytes(data: bytes, hidden_size: int) -> Program:
    """The inverse of `program_to_bytes`."""
    (head_size,) = struct.unpack_from("<I", data)
    head = json.loads(data[4 : 4 + head_size])
    floats = np.frombuffer(data, dtype="<f4", offset=4 + head_size) if head["layers"] else np.empty(0, np.float32)
    layers, start = {}, 0
    for layer, count in head["layers"].items():
        middle, end = start + count * hidden_size, start + count * (hidden_size + COEFFICIENTS)
        layers[int(layer)] = LayerProgram(
            directions=floats[start:middle].reshape(count, hidden_size),
            coefficients=floats[middle:end].reshape(count, COEFFICIENTS),
        )
        start = end
    return Program(digest=head["digest"], layers=layers)


def _direction(operation: SteeringOp) -> Float32Array:
    if isinstance(operation, AddSpec) and not has_norms(operation):
        return operation.materialize()
    return unit_direction(operation.vector)


def unit_direction(vector: npt.NDArray[Any]) -> Float32Array:
    """`vector / ||vector||` with the norm in float64, shape [hidden_size], float32."""
    return (vector.astype(np.float64) / norm_of(vector)).astype(np.float32)


def has_norms(operation: SteeringOp) -> bool:
    """True if what the operation does depends on the norm of a row."""
    is_relative = isinstance(operation, AddSpec) and operation.scaling is AddScaling.RELATIVE
    return is_relative or operation.max_relative_change is not None or operation.keep_norm


def _length(operation: AddSpec) -> float:
    """What the direction of an addition is multiplied by, or for a relative one that times |x|."""
    if not has_norms(operation):
        return 1.0
    return operation.scale * (1.0 if operation.scaling is AddScaling.RELATIVE else norm_of(operation.vector))


def _norms(operation: SteeringOp) -> tuple[float, float, float]:
    is_relative = isinstance(operation, AddSpec) and operation.scaling is AddScaling.RELATIVE
    limit = operation.max_relative_change
    return float(is_relative), math.inf if limit is None else limit, float(operation.keep_norm)


def _coefficients(operation: SteeringOp) -> tuple[float, float, float, float]:
    match operation:
        case AddSpec():
            return 1.0, _length(operation), -math.inf, math.inf
        case ProjectionCapSpec():
            lower = -math.inf if operation.min is None else operation.min
            upper = math.inf if operation.max is None else operation.max
            return 1.0, 0.0, lower, upper
        case AblationSpec():
            return operation.scale, 0.0, -math.inf, math.inf
