"""Steering whose positions are numbers, for tests that look at each row."""

from dataclasses import replace

from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.spans import clipped
from steer_service.core.specs import LayerSteeringSpec, SteeringOp, SteeringSpec


def placed(steering: SteeringSpec | None, places: PromptPlaces, rows: int) -> SteeringSpec | None:
    """The same rows of a sequence of `rows` by their number; what acts on none of them is left out."""
    if steering is None:
        return None

    def of_operation(operation: SteeringOp) -> list[SteeringOp]:
        scope = operation.positions or steering.positions
        if scope is None:
            return [operation]
        numbers = _numbers(scope, places, rows)
        return [replace(operation, positions=numbers)] if numbers else []

    layers = {
        layer: LayerSteeringSpec([one for operation in of_layer.operations for one in of_operation(operation)])
        for layer, of_layer in steering.layers.items()
    }
    return SteeringSpec({layer: spec for layer, spec in layers.items() if spec.operations})


def _numbers(scope: PositionScope, places: PromptPlaces, rows: int) -> list[PositionRange]:
    prompt = len(places.token_ids)
    spans = clipped(scope.resolve(prompt, max(rows, prompt + 1), places), rows)
    return [PositionRange(first, end - 1) for first, end in spans]
