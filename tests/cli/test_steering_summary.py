"""One line says what a steering does: its layers and their operations."""

import numpy as np
import pytest

from steer_service.cli.steering_summary import summary_of
from steer_service.core.specs import (
    AblationSpec,
    AddScaling,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)

V = np.ones(4, np.float32)
TWICE = AddSpec(V, scale=2.0)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({}, "no layer"),
        ({3: [TWICE]}, "layer 3 (addition, scale x norm 4)"),
        (
            {layer: [TWICE] for layer in (2, 0, 1, 5)},
            "layers 0-2 (addition, scale x norm 4), layer 5 (addition, scale x norm 4)",
        ),
        ({4: [TWICE], 5: [AddSpec(V, scale=-0.5)]}, "layers 4-5 (addition, scale x norm -1 to 4)"),
        ({4: [AddSpec.from_unnormalized(V, -2.0)]}, "layer 4 (addition, scale x norm -4)"),
        (
            {0: [TWICE], 1: [TWICE, AblationSpec(V)], 2: []},
            "layer 0 (addition, scale x norm 4), layer 1 (addition, scale x norm 4 + ablation, scale 0)",
        ),
        (
            {1: [ProjectionCapSpec(V, min=-1.5)], 2: [ProjectionCapSpec(V, max=3)], 3: [ProjectionCapSpec(V, max=5)]},
            "layer 1 (cap, min -1.5), layers 2-3 (cap, max 3 to 5)",
        ),
        ({7: [AddSpec(V, 0.25, scaling=AddScaling.RELATIVE)]}, "layer 7 (relative addition, scale 0.25)"),
    ],
)
def test_neighbours_with_the_same_kinds_of_operations_are_one_group(
    layers: dict[int, list[SteeringOp]], said: str
) -> None:
    assert summary_of(SteeringSpec({layer: LayerSteeringSpec(some) for layer, some in layers.items()})) == said


def test_the_line_stays_short() -> None:
    layers = {layer: LayerSteeringSpec([TWICE]) for layer in range(0, 40, 2)}
    said = summary_of(SteeringSpec(layers))
    assert said.startswith("layer 0 (addition, scale x norm 4), layer 2 (addition, ")
    assert said.endswith("layer 10 (addition, scale x norm 4) and 14 more")
