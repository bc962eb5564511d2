"""The different positions of a spec's operations, numbered: a program has the numbers, a request the positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steer_service.core.positions import PositionScope

if TYPE_CHECKING:
    from steer_service.core.specs import SteeringSpec  # it has a spec's scopes among its methods


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedScopes:
    """The distinct scopes of a spec's operations, numbered in the order of their first operation."""

    paths: Mapping[str, PositionScope | None]
    """Path of the field that first names each scope -> the scope; None for all positions."""
    numbers: Mapping[int, tuple[int, ...]]
    """Active layer -> the number of each operation's scope."""


def scope_bytes(scope: PositionScope | None) -> bytes:
    """The canonical bytes of a scope, or of all positions."""
    return b"everywhere" if scope is None else scope.canonical_bytes()


def scopes_of(spec: "SteeringSpec") -> NumberedScopes:
    """See `SteeringSpec.numbered_scopes`."""
    layers = spec.active_layers()
    if all(operation.positions is None for layer in layers.values() for operation in layer.operations):
        numbers = {layer: (0,) * len(layer_spec.operations) for layer, layer_spec in layers.items()}
        return NumberedScopes(paths={"positions": spec.positions}, numbers=numbers)
    known: dict[bytes, int] = {}
    paths: dict[str, PositionScope | None] = {}
    numbers = {}
    for layer, layer_spec in layers.items():
        of_layer = []
        for index, operation in enumerate(layer_spec.operations):
            is_own = operation.positions is not None
            scope = operation.positions if is_own else spec.positions
            number = known.setdefault(scope_bytes(scope), len(known))
            if number == len(paths):
                paths[f"layers[{layer}].operations[{index}].positions" if is_own else "positions"] = scope
            of_layer.append(number)
        numbers[layer] = tuple(of_layer)
    return NumberedScopes(paths=paths, numbers=numbers)
