"""Steering after which a row is exactly zero, on any model whose rows are small."""

import numpy as np

from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec

LARGE = 2.0**30
"""So large that a row of elements below 32 is lost when it is added."""


def vanishing(layer: int, width: int) -> SteeringSpec:
    """Adds a huge vector, in which the row is lost, and takes it away again, with `keep_norm`.

    For a width of 128: sixteen elements of 3 and the rest of 1 have the norm 16, so that each step is exact in float32.
    """
    assert width == 128
    vector = np.where(np.arange(width) < 16, 3.0, 1.0) * LARGE
    return SteeringSpec({layer: LayerSteeringSpec([AddSpec(vector), AddSpec(-vector, keep_norm=True)])})
