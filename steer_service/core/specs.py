"""Steering specs: an ordered list of three kinds of operations per layer.

Layer L is the residual stream after decoder layer L, counted from 0 (HuggingFace `hidden_states[L + 1]`, except after
the last layer, where that is after the final norm). Names and formulas are those of the in-process steerllm. All
operations of a layer run in list order in float32, and the result is rounded once to the model's dtype.
"""

import enum
import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from steer_service.core.arrays import Float32Array, VectorLike, vector_digest
from steer_service.core.errors import InvalidRequest, within
from steer_service.core.field_checks import check_layer, is_integer
from steer_service.core.hook_point import HookPoint, hook_point
from steer_service.core.number_limits import MAX_FLOAT32, MAX_LAYERS, MAX_POSITION_ENTRIES, MAX_SCOPES
from steer_service.core.numbered_scopes import NumberedScopes, scope_bytes, scopes_of
from steer_service.core.one_line import one_line
from steer_service.core.positions import Positions, PositionScope, scope_from
from steer_service.core.vectors import checked_vector, finite, unit_and_norm

NEGLIGIBLE_SCALE = 1e-12
"""An Add whose |scale| is at most this is ignored, as in the in-process steerllm, unless its vector is huge."""

NEGLIGIBLE_STEP = 1e-9
"""Largest change of an element by an ignored Add: float32 rounds it away beside anything above 0.03."""


class AddScaling(enum.Enum):
    """What `scale` of an AddSpec multiplies."""

    ABSOLUTE = "absolute"
    """The vector as given: `x + scale * vector`."""
    RELATIVE = "relative"
    """The norm of the row: `x + scale * |x| * vector / |vector|`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    """What all operations have."""

    vector: Float32Array
    positions: PositionScope | None = field(default=None, kw_only=True)
    """Positions at which this operation acts, in any form that `PositionScope` names. Default: those of the spec."""
    max_relative_change: float | None = field(default=None, kw_only=True)
    """Largest change of a row by this operation, in units of the norm of the row before it; above 0. Default: none."""
    keep_norm: bool = field(default=False, kw_only=True)
    """Scales the row after this operation (and its `max_relative_change`) to the norm that it had before."""

    def clone(self) -> Self:
        """An equal spec that shares no memory with this one."""
        return replace(self, vector=self.vector.copy())

    def _check_common(self, what: str) -> None:
        _set(self, "vector", checked_vector(self.vector, what))
        if self.positions is not None:
            with within("positions"):
                _set(self, "positions", scope_from(self.positions))
        if self.max_relative_change is not None:
            _set(self, "max_relative_change", finite(self.max_relative_change, "max_relative_change"))
            if not 0.0 < self.max_relative_change <= MAX_FLOAT32:
                raise InvalidRequest(
                    f"max_relative_change {self.max_relative_change} is not above 0 and finite in float32",
                    reason="OUT_OF_RANGE",
                    field="max_relative_change",
                )
        if not isinstance(self.keep_norm, bool):
            raise InvalidRequest(f"{self.keep_norm!r} is not True or False", field="keep_norm")


@dataclass(frozen=True, slots=True, eq=False)
class AddSpec(_Operation):
    """Adds `scale * vector` to the residual stream at every selected position; see `AddScaling` for the other way."""

    vector: Float32Array
    """Direction, float32, shape [hidden_size], finite and not zero; used as given, not normalised."""
    scale: float = 1.0
    """Multiplier; negative steers away."""
    scaling: AddScaling = field(default=AddScaling.ABSOLUTE, kw_only=True)
    """What `scale` multiplies; "absolute" and "relative" are accepted."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        self._check_common("Steering vector")
        _set(self, "scale", finite(self.scale, "scale"))
        try:
            _set(self, "scaling", AddScaling(self.scaling))
        except ValueError as error:
            raise InvalidRequest(
                f"scaling {self.scaling!r} is neither 'absolute' nor 'relative'", reason="BAD_SCALING", field="scaling"
            ) from error

    @classmethod
    def from_unnormalized(cls, vector: VectorLike, scale: float = 1.0) -> Self:
        """An Add of the same effect whose vector has norm 1: the norm is folded into the scale."""
        unit, norm = unit_and_norm(vector, "Steering vector")
        return cls(vector=unit, scale=finite(scale, "scale") * norm)

    def is_negligible(self) -> bool:
        """True if it cannot change the residual stream: its scale is almost zero and its vector is not huge.

        Such an addition has no norm to keep either, as it changes none. A relative one is as small as its scale.
        """
        if abs(self.scale) > NEGLIGIBLE_SCALE:
            return False
        if self.scaling is AddScaling.RELATIVE:
            return True
        return abs(self.scale) * float(np.max(np.abs(self.vector))) <= NEGLIGIBLE_STEP

    def materialize(self) -> Float32Array:
        """`scale * vector`, float32, shape [hidden_size]: what an absolute addition adds to each row."""
        with np.errstate(over="ignore"):  # an overflow becomes inf, which the request check refuses
            return (self.vector.astype(np.float64) * self.scale).astype(np.float32)

    def __eq__(self, other: object) -> bool:
        return _same_operation(self, other)

    def __hash__(self) -> int:
        return hash(_operation_bytes(self))


@dataclass(frozen=True, slots=True, eq=False)
class ProjectionCapSpec(_Operation):
    """Clamps the projection onto a direction: `x + (clamp(p, min, max) - p) * v` with `p = x . v` and v of norm 1."""

    vector: Float32Array
    """Direction, float32, shape [hidden_size], finite and not zero; normalised before use."""
    min: float | None = None
    """Lower bound of the projection, in units of the residual stream; None for none, but one of both is needed."""
    max: float | None = None
    """Upper bound of the projection, at least `min`, in units of the residual stream; None for none."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise InvalidRequest(
                "ProjectionCapSpec requires at least one of min or max to be set", reason="NO_BOUND", field="min"
            )
        self._check_common("Projection cap vector")
        if self.min is not None:
            _set(self, "min", finite(self.min, "min"))
        if self.max is not None:
            _set(self, "max", finite(self.max, "max"))
        if self.min is not None and self.max is not None and self.min > self.max:
            raise InvalidRequest(
                f"min {self.min} is greater than max {self.max}", reason="INVERTED_BOUNDS", field="min"
            )

    @classmethod
    def from_unnormalized(cls, vector: VectorLike, min: float | None = None, max: float | None = None) -> Self:
        """A cap on the unit direction of `vector`; the bounds refer to that unit direction and are kept."""
        return cls(vector=unit_and_norm(vector, "Projection cap vector")[0], min=min, max=max)

    def __eq__(self, other: object) -> bool:
        return _same_operation(self, other)

    def __hash__(self) -> int:
        return hash(_operation_bytes(self))


@dataclass(frozen=True, slots=True, eq=False)
class AblationSpec(_Operation):
    """Scales the component along a direction: `x + (scale - 1) * (x . v) * v` with v of norm 1."""

    vector: Float32Array
    """Direction, float32, shape [hidden_size], finite and not zero; normalised before use."""
    scale: float = 0.0
    """What remains of the component: 0 removes it, 1 is a no-op, below 0 reflects, above 1 amplifies."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        self._check_common("Ablation vector")
        _set(self, "scale", finite(self.scale, "scale"))

    @classmethod
    def from_unnormalized(cls, vector: VectorLike, scale: float = 0.0) -> Self:
        """An ablation of the unit direction of `vector`; the scale is kept."""
        return cls(vector=unit_and_norm(vector, "Ablation vector")[0], scale=scale)

    def __eq__(self, other: object) -> bool:
        return _same_operation(self, other)

    def __hash__(self) -> int:
        return hash(_operation_bytes(self))


SteeringOp = AddSpec | ProjectionCapSpec | AblationSpec
"""One operation on the residual stream of one layer."""


@dataclass(frozen=True, slots=True)
class LayerSteeringSpec:
    """The operations of one layer; each acts on the result of the one before."""

    operations: tuple[SteeringOp, ...] = ()
    """Operations in the order in which they run; any sequence is accepted and stored as a tuple."""
    hook: HookPoint = field(default=HookPoint.RESIDUAL_STREAM, kw_only=True)
    """What they act on; also by value, "residual_stream"."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        _set(self, "hook", hook_point(self.hook))
        if isinstance(self.operations, (AddSpec, ProjectionCapSpec, AblationSpec)) or not isinstance(
            self.operations,
            (tuple, list, Sequence),  # the first two are quick to recognise
        ):
            raise InvalidRequest(
                f"operations must be a sequence of operations, got {type(self.operations).__name__}",
                field="operations",
            )
        _set(self, "operations", tuple(self.operations))
        for index, operation in enumerate(self.operations):
            if not isinstance(operation, (AddSpec, ProjectionCapSpec, AblationSpec)):
                raise InvalidRequest(
                    f"{type(operation).__name__} is not an AddSpec, ProjectionCapSpec or AblationSpec",
                    field=f"operations[{index}]",
                )

    def is_empty(self) -> bool:
        """True if it cannot change the residual stream: no operation, or only negligible Adds."""
        return all(isinstance(op, AddSpec) and op.is_negligible() for op in self.operations)

    def clone(self) -> Self:
        """An equal spec that shares no memory with this one."""
        return replace(self, operations=tuple(op.clone() for op in self.operations))


@dataclass(frozen=True, slots=True)
class SteeringSpec:
    """The steering of one request: an ordered list of operations per layer, and the positions that are steered.

    It, its layers and its operations raise InvalidRequest for what breaks a rule; `field` names what does.
    """

    layers: Mapping[int, LayerSteeringSpec] = field(default_factory=dict)
    """Layer index, 0-based -> its operations; kept in ascending order and read-only."""
    positions: PositionScope | None = None
    """Positions to steer, in any form that `PositionScope` names. Default: all, of the prompt and generated."""
    report_change: bool = field(default=False, kw_only=True)
    """True: the receipt says how much each layer changed its rows, see `Receipt.changes`. No part of the digest."""
    _digest: str | None = field(default=None, init=False, repr=False, compare=False)
    """The cached `digest()`: computing it takes half a millisecond for a program on every layer."""
    _program_digest: str | None = field(default=None, init=False, repr=False, compare=False)
    """The cached `program_digest()`."""
    _vector_digests: tuple[bytes, ...] | None = field(default=None, init=False, repr=False, compare=False)
    """The cached `vector_digests()`."""
    _scopes: NumberedScopes | None = field(default=None, init=False, repr=False, compare=False)
    """The cached `numbered_scopes()`."""

    __repr__ = one_line

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise InvalidRequest(
                f"layers must map layer numbers to specs, got {type(self.layers).__name__}", field="layers"
            )
        if len(self.layers) > MAX_LAYERS:
            raise InvalidRequest(
                f"{len(self.layers)} layers, at most {MAX_LAYERS}", reason="PROGRAM_TOO_LARGE", field="layers"
            )
        for layer, spec in self.layers.items():
            _check_layer(layer, spec)
        _set(self, "layers", MappingProxyType({int(layer): self.layers[layer] for layer in sorted(self.layers)}))
        with within("positions"):
            _set(self, "positions", scope_from(self.positions))
        if not isinstance(self.report_change, bool):
            raise InvalidRequest(f"{self.report_change!r} is not True or False", field="report_change")
        self._check_entries()
        scopes = len(self.numbered_scopes().paths)
        if scopes > MAX_SCOPES:
            raise InvalidRequest(
                f"the operations have {scopes} different positions, at most {MAX_SCOPES}",
                reason="PROGRAM_TOO_LARGE",
                field="layers",
            )

    def _check_entries(self) -> None:
        operations = (operation for layer in self.layers.values() for operation in layer.operations)
        scopes = (self.positions, *(operation.positions for operation in operations))
        entries = sum(scope.entry_count for scope in scopes if scope is not None)
        if entries > MAX_POSITION_ENTRIES:
            raise InvalidRequest(
                f"the positions name {entries} ranges, messages and roles in all, at most {MAX_POSITION_ENTRIES}; give "
                "positions that operations share to the spec",
                reason="TOO_MANY_ENTRIES",
                field="layers",
            )

    @classmethod
    def simple_add(
        cls, layer: int, vector: VectorLike, scale: float = 1.0, *, positions: Positions | None = None
    ) -> Self:
        """Adds `scale * vector`, shape [hidden_size], after one layer, at every position or at `positions`."""
        return cls._simple(layer, AddSpec.from_unnormalized(vector, scale), positions)

    @classmethod
    def simple_cap(
        cls,
        layer: int,
        vector: VectorLike,
        min: float | None = None,
        max: float | None = None,
        *,
        positions: Positions | None = None,
    ) -> Self:
        """Clamps the projection onto the direction of `vector` after one layer, at every position or at `positions`."""
        return cls._simple(layer, ProjectionCapSpec.from_unnormalized(vector, min, max), positions)

    @classmethod
    def simple_ablation(
        cls, layer: int, vector: VectorLike, scale: float = 0.0, *, positions: Positions | None = None
    ) -> Self:
        """Scales the component along the direction of `vector` after one layer, at every position or at `positions`."""
        return cls._simple(layer, AblationSpec.from_unnormalized(vector, scale), positions)

    @classmethod
    def _simple(cls, layer: int, operation: SteeringOp, positions: Positions | None) -> Self:
        layers = {layer: LayerSteeringSpec(operations=(operation,))}
        return cls(layers=layers, positions=positions)  # type: ignore[arg-type]  # it takes what `scope_from` takes

    def is_empty(self) -> bool:
        """True if no layer can change the residual stream."""
        return all(layer.is_empty() for layer in self.layers.values())

    def clone(self) -> Self:
        """An equal spec that shares no memory with this one."""
        return replace(self, layers={layer: spec.clone() for layer, spec in self.layers.items()})

    def active_layers(self) -> dict[int, LayerSteeringSpec]:
        """The layers that can change the residual stream, in ascending order."""
        return {layer: spec for layer, spec in self.layers.items() if not spec.is_empty()}

    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the canonical bytes: equal digests steer alike on every backend.

        Empty layers are left out, so every spec that does nothing has the same digest. Without any `positions` it is
        the `program_digest`; with `positions` it is another digest.
        """
        if self._digest is None:
            _set(self, "_digest", hashlib.sha256(b"".join(_canonical_bytes(self))).hexdigest())
        assert self._digest is not None
        return self._digest

    def program_digest(self) -> str:
        """The digest of the operations alone: with the number of each one's scope, but without `positions`."""
        if self._program_digest is None:
            _set(self, "_program_digest", hashlib.sha256(b"".join(_program_bytes(self))).hexdigest())
        assert self._program_digest is not None
        return self._program_digest

    def numbered_scopes(self) -> NumberedScopes:
        """The distinct scopes of the operations that can change the residual stream.

        Operations without positions of their own have those of the spec. If all have the same scope, there is one.
        """
        if self._scopes is None:
            _set(self, "_scopes", scopes_of(self))
        assert self._scopes is not None
        return self._scopes

    def vectors(self) -> Iterator[Float32Array]:
        """The vectors of all operations, by layer in ascending order, empty layers included."""
        return (operation.vector for layer in self.layers.values() for operation in layer.operations)

    def vector_digests(self) -> tuple[bytes, ...]:
        """The digests of `vectors()` in the same order, 32 bytes each: what a server stores vectors by."""
        if self._vector_digests is None:
            _set(self, "_vector_digests", tuple(map(vector_digest, self.vectors())))
        assert self._vector_digests is not None
        return self._vector_digests

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(type(self), report_change=self.report_change)
        return make, (dict(self.layers), self.positions)  # a read-only mapping cannot be copied or pickled


_set = object.__setattr__  # the only way to normalise a field of a frozen dataclass


def _check_layer(layer: Any, spec: Any) -> None:
    with within(f"layers[{layer}]" if is_integer(layer) else "layers"):
        check_layer(layer)
    if not isinstance(spec, LayerSteeringSpec):
        raise InvalidRequest(f"{type(spec).__name__} is not a LayerSteeringSpec", field=f"layers[{layer}]")


def _same_operation(left: SteeringOp, right: object) -> bool:
    return (
        isinstance(right, _Operation)
        and type(left) is type(right)
        and scope_bytes(left.positions) == scope_bytes(right.positions)
        and _operation_bytes(left) == _operation_bytes(right)
    )


def _operation_bytes(operation: SteeringOp) -> bytes:
    """Everything that determines the effect of an operation on a row, little-endian."""
    match operation:
        case AddSpec():
            kind = 4 if operation.scaling is AddScaling.RELATIVE else 1
            head = struct.pack("<Bd", kind, operation.scale + 0.0)  # + 0.0 turns -0.0 into 0.0
        case ProjectionCapSpec():
            lower = -math.inf if operation.min is None else operation.min + 0.0
            upper = math.inf if operation.max is None else operation.max + 0.0
            head = struct.pack("<Bdd", 2, lower, upper)
        case AblationSpec():
            head = struct.pack("<Bd", 3, operation.scale + 0.0)
    limit = operation.max_relative_change
    norms = b"limit" + struct.pack("<d", limit) if limit is not None else b""
    norms += b"norm" if operation.keep_norm else b""
    vector = operation.vector.astype("<f4", copy=False).tobytes()
    return head + struct.pack("<I", operation.vector.size) + vector + norms


def _canonical_bytes(spec: SteeringSpec) -> Iterator[bytes]:
    yield from _program_bytes(spec)
    scopes = spec.numbered_scopes().paths.values()
    if len(scopes) > 1:
        for data in map(scope_bytes, scopes):
            yield struct.pack("<I", len(data)) + data
        return
    for scope in scopes:
        if scope is not None and not spec.is_empty():
            yield b"positions\0" + scope.canonical_bytes()


def _program_bytes(spec: SteeringSpec) -> Iterator[bytes]:
    yield b"steer.v1 program\0"
    for layer, layer_spec in spec.active_layers().items():
        yield struct.pack("<II", layer, len(layer_spec.operations))
        for operation in layer_spec.operations:
            yield _operation_bytes(operation)
    scopes = spec.numbered_scopes()
    if len(scopes.paths) > 1:
        yield b"scopes\0" + bytes(number for layer in scopes.numbers.values() for number in layer)
