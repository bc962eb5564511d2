"""Directions that separate two kinds of prompts, found in captured rows.

Letters: R rows (one per prompt), D hidden size.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import SteeringSpec
from steer_service.core.vectors import SMALLEST_NORM
from steer_service.directions.rows import LayerRows, Rows


class Method(enum.Enum):
    """The method that finds a direction."""

    DIFFERENCE = "difference"
    """See `difference_of_means`."""
    PCA = "pca"
    """See `paired_pca`."""
    PROBE = "probe"
    """See `logistic_probe`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """A direction in the residual stream after a layer, and the point on it that separates the two kinds."""

    layer: int
    """Layer, counted from 0."""
    vector: Rows
    """Float32, shape [D]; it points to positive, and its length is the distance of both means along it."""
    threshold: float
    """The projection onto the unit direction halfway between both means, in units of the residual stream."""

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """Adds `scale` times the vector; 1 moves the mean of the negative prompts to that of the positive ones."""
        return SteeringSpec.simple_add(self.layer, self.vector, scale)

    def project(self, rows: Rows) -> Rows:
        """Projections of rows onto the unit direction, float64, shape [R]."""
        return np.asarray(rows, np.float64) @ _unit(self.vector)


def difference_of_means(positive: Rows, negative: Rows) -> Rows:
    """The mean of the positive rows minus that of the negative ones, float64, shape [D]."""
    return _mean(positive) - _mean(negative)


def paired_pca(positive: Rows, negative: Rows) -> Rows:
    """The axis along which the two rows of each pair differ most, norm 1, float64, shape [D].

    Row i of both sides is a pair. Differences are taken in both directions, as in representation engineering (Zou et
    al. 2023): their mean is then zero, and the axis that all of them share is the first component.
    """
    from sklearn.decomposition import PCA

    if len(positive) != len(negative):
        raise InvalidRequest(f"{len(positive)} and {len(negative)} rows are not pairs", reason="NOT_PAIRED")
    differences = np.asarray(positive, np.float64) - np.asarray(negative, np.float64)
    axis = PCA(n_components=1, svd_solver="full").fit(np.concatenate([differences, -differences])).components_[0]
    return np.asarray(axis)


def logistic_probe(positive: Rows, negative: Rows) -> Rows:
    """The normal of the plane with which logistic regression separates both kinds, float64, shape [D].

    Columns are standardised for the regression, which penalises the squares of its weights. The weights are scaled
    back, so that they apply to rows that are not standardised.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = np.concatenate([positive, negative]).astype(np.float64)
    scaler = StandardScaler().fit(rows)
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(rows), labels_of(positive, negative))
    return np.asarray(probe.coef_[0] / scaler.scale_)


METHODS: dict[Method, Callable[[Rows, Rows], Rows]] = {
    Method.DIFFERENCE: difference_of_means,
    Method.PCA: paired_pca,
    Method.PROBE: logistic_probe,
}
"""Method -> its function: (positive rows, negative rows) -> an axis of any length and sign."""


def find_direction(method: Method, layer: int, positive: Rows, negative: Rows) -> Direction:
    """The direction of a layer; its length and sign do not depend on the method.

    Raises InvalidRequest if a side has no rows, if the sides have different hidden sizes, or if their means do
    not differ along the direction.
    """
    check_rows(positive, negative)
    if np.linalg.norm(difference_of_means(positive, negative)) < SMALLEST_NORM:
        raise _alike(layer)
    unit = _unit(METHODS[method](positive, negative))
    high, low = float(_mean(positive) @ unit), float(_mean(negative) @ unit)
    if abs(high - low) < SMALLEST_NORM:
        raise _alike(layer)
    vector = ((high - low) * unit).astype(np.float32)  # the sign of the distance turns it towards positive
    return Direction(layer=layer, vector=vector, threshold=(high + low) / 2 * float(np.sign(high - low)))


def find_directions(method: Method, positive: LayerRows, negative: LayerRows) -> dict[int, Direction]:
    """Layer -> its direction, for all layers; both sides have the same. See `find_direction`."""
    return {layer: find_direction(method, layer, positive[layer], negative[layer]) for layer in positive}


def _mean(rows: Rows) -> Rows:
    return np.asarray(rows.mean(axis=0, dtype=np.float64))


def _unit(vector: Rows) -> Rows:
    vector = np.asarray(vector, np.float64)
    return np.asarray(vector / np.linalg.norm(vector))


def labels_of(positive: Rows, negative: Rows) -> npt.NDArray[np.int64]:
    """1 for each positive row, then 0 for each negative one."""
    return np.repeat([1, 0], [len(positive), len(negative)])


def check_rows(positive: Rows, negative: Rows) -> None:
    """Raises InvalidRequest unless both sides have rows of one hidden size and finite numbers."""
    for name, rows in (("positive", positive), ("negative", negative)):
        if rows.ndim != 2 or not len(rows):
            raise InvalidRequest(
                f"expected rows of shape [rows, hidden_size], got {list(rows.shape)}", reason="BAD_SHAPE", field=name
            )
        if not np.isfinite(rows).all():
            raise InvalidRequest("a row has NaN or Inf values", reason="NON_FINITE", field=name)
    if positive.shape[1] != negative.shape[1]:
        raise InvalidRequest(
            f"expected rows of {positive.shape[1]} numbers, got {negative.shape[1]}",
            reason="WRONG_WIDTH",
            field="negative",
        )


def _alike(layer: int) -> InvalidRequest:
    return InvalidRequest(
        f"positive and negative rows of layer {layer} do not differ on average", reason="ZERO_NORM", field="positive"
    )
