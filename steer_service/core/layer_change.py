"""How much a layer's operations changed the rows of an output: what a kernel records per row, and what a receipt says.

R: rows; C: columns.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHANGE_COLUMNS = 2
"""Per row, float32: the relative change |y - x| / |x|, which is NaN for a row of zeros, and one of the states below."""

IDLE, ACTED, CAPPED = 0.0, 1.0, 2.0
"""No operation acted on the row; one did; and the projection was outside of the bounds of a cap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """How much the operations of one layer changed the rows of one output.

    x is a row before the operations of the layer, y after all of them, both in float32, before y is rounded to the
    model's dtype. Each position counts once; positions from the prefix cache were not computed, and do not count.
    """

    layer: int
    """Layer, 0-based."""
    positions: int = 0
    """Positions at which an operation of the layer acted."""
    largest: float = 0.0
    """Largest |y - x| / |x| of these positions; 0 if there is none. Rows of zeros are left out here and in the mean."""
    mean: float = 0.0
    """Mean of |y - x| / |x| of these positions; 0 if there is none."""
    capped_positions: int = 0
    """Positions that a projection cap moved: their projection was outside of its bounds."""


def layer_change(layer: int, changes_RC: npt.NDArray[np.float32]) -> LayerChange:
    """The report about a layer from what was recorded of its rows, shape [rows, CHANGE_COLUMNS]."""
    relative_R, states_R = changes_RC.T
    known_R = relative_R[(states_R != IDLE) & ~np.isnan(relative_R)].astype(np.float64)
    return LayerChange(
        layer=layer,
        positions=int((states_R != IDLE).sum()),
        largest=float(known_R.max(initial=0.0)),
        mean=float(known_R.mean()) if len(known_R) else 0.0,
        capped_positions=int((states_R == CAPPED).sum()),
    )
