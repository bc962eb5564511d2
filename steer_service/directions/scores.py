"""How well directions separate rows that they were not found in. Letters: R rows (one per prompt)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from steer_service.core.errors import InvalidRequest
from steer_service.directions.directions import Direction, Method, check_rows, find_direction, labels_of
from steer_service.directions.rows import LayerRows, Rows

MIN_PAIRS = 4
"""Pairs that cross-validation needs: two to find a direction in, and two to judge it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """How well a direction separates rows that it was not found in."""

    layer: int
    """Layer, counted from 0."""
    auc: float
    """Share of pairs of a positive and a negative row in which the positive one projects higher; 0.5 is chance."""
    accuracy: float
    """Share of rows on the right side of the threshold."""
    separation: float
    """d': distance of the mean projections in pooled standard deviations; inf without any spread."""


def evaluate(direction: Direction, positive: Rows, negative: Rows) -> LayerScore:
    """How well `direction` separates rows that it was not found in; raises InvalidRequest for bad rows."""
    from sklearn.metrics import roc_auc_score

    check_rows(positive, negative)
    high, low = direction.project(positive), direction.project(negative)
    return LayerScore(
        layer=direction.layer,
        auc=float(roc_auc_score(labels_of(positive, negative), np.concatenate([high, low]))),
        accuracy=float(np.concatenate([high > direction.threshold, low <= direction.threshold]).mean()),
        separation=_separation(high, low),
    )


def evaluate_all(directions: Mapping[int, Direction], positive: LayerRows, negative: LayerRows) -> list[LayerScore]:
    """The scores of all directions, in the order of layers."""
    return [evaluate(directions[layer], positive[layer], negative[layer]) for layer in sorted(directions)]


def check_pairs(pairs: int) -> None:
    """Raises InvalidRequest if so few pairs cannot choose a layer by cross-validation."""
    if pairs < MIN_PAIRS:
        raise InvalidRequest(
            f"{pairs} training pairs are too few to choose a layer by; {MIN_PAIRS} are needed. Add pairs, or name one "
            "layer, such as --layers 12",
            reason="TOO_FEW_PAIRS",
            field="pairs",
        )


def cross_validate(method: Method, positive: LayerRows, negative: LayerRows, *, folds: int = 5) -> list[LayerScore]:
    """How well each layer's directions separate pairs that they were not found in, in the order of layers.

    Row i of both sides is a pair. The pairs are split into `folds`, or fewer if a fold would have fewer than two pairs.
    Each fold is evaluated with a direction found in the others; scores are means over folds. This chooses a layer
    without the held-out pairs. Raises InvalidRequest for fewer than MIN_PAIRS pairs, and where `find_direction` does.
    """
    from sklearn.model_selection import KFold

    pairs = min(map(len, positive.values()))
    check_pairs(pairs)
    parts = list(KFold(min(folds, pairs // 2)).split(np.arange(pairs)))
    return [
        _mean_score(_fold_scores(method, layer, positive[layer], negative[layer], parts)) for layer in sorted(positive)
    ]


def _fold_scores(
    method: Method, layer: int, positive: Rows, negative: Rows, parts: Sequence[tuple[Rows, Rows]]
) -> list[LayerScore]:
    return [
        evaluate(
            find_direction(method, layer, positive[learned], negative[learned]), positive[judged], negative[judged]
        )
        for learned, judged in parts
    ]


def _mean_score(scores: Sequence[LayerScore]) -> LayerScore:
    return LayerScore(
        layer=scores[0].layer,
        auc=fmean(score.auc for score in scores),
        accuracy=fmean(score.accuracy for score in scores),
        separation=fmean(score.separation for score in scores),
    )


def best_score(scores: Iterable[LayerScore], layer_count: int) -> LayerScore:
    """The score of the best layer of a model with `layer_count` layers: the one with the highest AUC.

    Of layers that tie it is the one nearest to the middle of the model, the lower of two. A larger separation does not
    decide: it says how well rows are told apart, not how strongly texts change.
    """
    return min(tied_scores(scores), key=lambda score: (abs(2 * score.layer - (layer_count - 1)), score.layer))


def tied_scores(scores: Iterable[LayerScore]) -> list[LayerScore]:
    """The scores with the highest AUC, in the order of layers."""
    ordered = sorted(scores, key=lambda score: score.layer)
    highest = max(score.auc for score in ordered)
    return [score for score in ordered if score.auc == highest]


def _separation(high: Rows, low: Rows) -> float:
    spread = float(np.sqrt((high.var() + low.var()) / 2))
    distance = float(high.mean() - low.mean())
    if spread == 0.0:
        return float(np.copysign(np.inf, distance)) if distance else 0.0
    return distance / spread
