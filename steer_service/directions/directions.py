"""Directions that tell two kinds of prompts apart: found in captured rows, and judged on rows held out.

Rows come from any backend, through its captures, so that a served model needs no second copy. Letters: R rows (one a
prompt), D hidden size.
"""

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import Prompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SMALLEST_NORM, SteeringSpec
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.handle import CaptureHandle

Rows = npt.NDArray[Any]
"""One row of the stream a prompt, shape [R, D]."""

LayerRows = Mapping[int, Rows]
"""Layer -> its rows, one a prompt, in the order of the prompts."""

PROMPTS_AT_ONCE = 16
"""Prompts whose rows are captured at a time: what is held is their rows and no more."""

DEFAULT_GENERATED = 16
"""Tokens that are generated where their rows are wanted."""


class RowChoice(enum.Enum):
    """Which row of the stream stands for a prompt."""

    LAST_PROMPT = "last-prompt"
    """The one of the prompt's last token."""
    MEAN_GENERATED = "mean-generated"
    """The mean of those of the tokens that follow greedily, without the last one, which is never fed."""


class Method(enum.Enum):
    """How a direction is found."""

    DIFFERENCE = "difference"
    """See `difference_of_means`."""
    PCA = "pca"
    """See `paired_pca`."""
    PROBE = "probe"
    """See `logistic_probe`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """A direction in the stream behind a layer, and where on it the two kinds part."""

    layer: int
    """Layer, counted from 0."""
    vector: Rows
    """Float32, shape [D]; towards positive, and as long as the means of both kinds lie apart along it."""
    threshold: float
    """The projection onto the unit direction, in units of the stream, halfway between both means."""

    def to_spec(self, scale: float = 1.0) -> SteeringSpec:
        """Adds `scale` times the vector; 1 moves the mean of the negative prompts to that of the positive ones."""
        return SteeringSpec.simple_add(self.layer, self.vector, scale)

    def project(self, rows: Rows) -> Rows:
        """Projections of rows onto the unit direction, float64, shape [R]."""
        return np.asarray(rows, np.float64) @ _unit(self.vector)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """How well a direction tells rows apart that it was not found in."""

    layer: int
    """Layer, counted from 0."""
    auc: float
    """Share of pairs of a positive and a negative row of which the positive one projects higher; 0.5 is chance."""
    accuracy: float
    """Share of rows on their side of the threshold."""
    separation: float
    """d': the distance of the mean projections in standard deviations, pooled of both kinds; inf without any spread."""


# -- rows ------------------------------------------------------------------------------------------------------------


async def collect_rows(
    model: SteeringCalls,
    prompts: Iterable[Prompt],
    layers: Sequence[int],
    choice: RowChoice = RowChoice.LAST_PROMPT,
    *,
    max_tokens: int = DEFAULT_GENERATED,
) -> dict[int, Rows]:
    """Layer -> the rows of all prompts there, float32, shape [R, D], with a bar on standard error.

    Works over every backend; only the rows that are chosen are captured, of a few prompts at a time. `max_tokens` is
    for MEAN_GENERATED, at least 2. Raises InvalidRequest without prompts and for what the model refuses.
    """
    prompts = list(prompts)
    if not prompts:
        raise InvalidRequest("there are no prompts to capture", reason="NO_PROMPTS", field="prompts")
    sampling, capture = _request_for(choice, tuple(layers), max_tokens)
    rows: dict[int, list[Rows]] = {layer: [] for layer in capture.layers}
    with tqdm(total=len(prompts), desc="capture", unit="prompt", disable=None) as bar:
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[first : first + PROMPTS_AT_ONCE]
            _, handles = await model.generate(some, sampling, capture=capture)
            assert handles is not None
            for handle in handles:
                for layer, row in (await _mean_rows(handle)).items():
                    rows[layer].append(row)
            bar.update(len(some))
    return {layer: np.stack(of_layer) for layer, of_layer in rows.items()}


def _request_for(choice: RowChoice, layers: tuple[int, ...], max_tokens: int) -> tuple[SamplingOptions, CaptureSpec]:
    if choice is RowChoice.LAST_PROMPT:
        return (
            SamplingOptions(max_tokens=1, temperature=0.0),
            CaptureSpec(layers=layers, positions=-1, dtype="float32"),  # type: ignore[arg-type]
        )
    # Two tokens at least: the first of them is fed to the model and has a row.
    return (
        SamplingOptions(max_tokens=max_tokens, min_tokens=2, temperature=0.0),
        CaptureSpec(layers=layers, positions="generated", dtype="float32"),  # type: ignore[arg-type]
    )


async def _mean_rows(handle: CaptureHandle) -> dict[int, Rows]:
    async with handle:
        rows = (await handle.fetch_rows()).hidden
        return {layer: of_layer.mean(axis=0, dtype=np.float64).astype(np.float32) for layer, of_layer in rows.items()}


# -- directions ------------------------------------------------------------------------------------------------------


def difference_of_means(positive: Rows, negative: Rows) -> Rows:
    """The mean of the positive rows minus that of the negative ones, float64, shape [D]."""
    return _mean(positive) - _mean(negative)


def paired_pca(positive: Rows, negative: Rows) -> Rows:
    """The axis along which the two rows of each pair differ most, norm 1, float64, shape [D].

    Row i of both sides is a pair. Differences are taken both ways round, as in representation engineering (Zou et
    al. 2023): their mean is then zero, and the axis that all of them share is the first component.
    """
    from sklearn.decomposition import PCA

    if len(positive) != len(negative):
        raise InvalidRequest(f"{len(positive)} and {len(negative)} rows are no pairs", reason="NOT_PAIRED")
    differences = np.asarray(positive, np.float64) - np.asarray(negative, np.float64)
    axis = PCA(n_components=1, svd_solver="full").fit(np.concatenate([differences, -differences])).components_[0]
    return np.asarray(axis)


def logistic_probe(positive: Rows, negative: Rows) -> Rows:
    """The normal of the plane that logistic regression puts between both kinds, in stream space, float64, shape [D].

    Columns are standardised for the regression, which penalises the squares of its weights; its weights are brought
    back, so that their product with a row, and not with a standardised one, orders the rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = np.concatenate([positive, negative]).astype(np.float64)
    scaler = StandardScaler().fit(rows)
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(rows), _labels(positive, negative))
    return np.asarray(probe.coef_[0] / scaler.scale_)


METHODS: dict[Method, Callable[[Rows, Rows], Rows]] = {
    Method.DIFFERENCE: difference_of_means,
    Method.PCA: paired_pca,
    Method.PROBE: logistic_probe,
}
"""What computes each: (positive rows, negative rows) -> an axis of any length and sign."""


def find_direction(method: Method, layer: int, positive: Rows, negative: Rows) -> Direction:
    """The direction of a layer, of one length and sign whatever the method.

    Raises InvalidRequest if a side has no rows, if the sides have not the same width, or if their means do not
    differ along what was found.
    """
    _check_rows(positive, negative)
    if np.linalg.norm(difference_of_means(positive, negative)) < SMALLEST_NORM:
        raise _alike(layer)
    unit = _unit(METHODS[method](positive, negative))
    high, low = float(_mean(positive) @ unit), float(_mean(negative) @ unit)
    if abs(high - low) < SMALLEST_NORM:
        raise _alike(layer)
    vector = ((high - low) * unit).astype(np.float32)  # the sign of the distance turns it towards positive
    return Direction(layer=layer, vector=vector, threshold=(high + low) / 2 * float(np.sign(high - low)))


def find_directions(method: Method, positive: LayerRows, negative: LayerRows) -> dict[int, Direction]:
    """Layer -> its direction, for all layers of both sides, which have the same; see `find_direction`."""
    return {layer: find_direction(method, layer, positive[layer], negative[layer]) for layer in positive}


# -- what they are worth ---------------------------------------------------------------------------------------------


def evaluate(direction: Direction, positive: Rows, negative: Rows) -> LayerScore:
    """How well `direction` tells these rows apart, which it was not found in; raises InvalidRequest as it does."""
    from sklearn.metrics import roc_auc_score

    _check_rows(positive, negative)
    high, low = direction.project(positive), direction.project(negative)
    return LayerScore(
        layer=direction.layer,
        auc=float(roc_auc_score(_labels(positive, negative), np.concatenate([high, low]))),
        accuracy=float(np.concatenate([high > direction.threshold, low <= direction.threshold]).mean()),
        separation=_separation(high, low),
    )


def evaluate_all(directions: Mapping[int, Direction], positive: LayerRows, negative: LayerRows) -> list[LayerScore]:
    """The scores of all directions, in the order of layers."""
    return [evaluate(directions[layer], positive[layer], negative[layer]) for layer in sorted(directions)]


def cross_validate(method: Method, positive: LayerRows, negative: LayerRows, *, folds: int = 5) -> list[LayerScore]:
    """How well each layer's directions tell pairs apart that they were not found in, in the order of layers.

    Row i of both sides is a pair. In turn each fold of the pairs, of which there are `folds` or as many as have two
    pairs, is left out and judged with a direction found in the others; scores are means over folds. This chooses a
    layer without looking at the pairs that are held out. Raises InvalidRequest for fewer than four pairs, and where
    `find_direction` does.
    """
    from sklearn.model_selection import KFold

    pairs = min(map(len, positive.values()))
    if pairs < 4:
        raise InvalidRequest(f"{pairs} pairs are too few to choose a layer by", reason="TOO_FEW_PAIRS", field="pairs")
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


def best_score(scores: Iterable[LayerScore]) -> LayerScore:
    """The one of the best layer: of the highest AUC, and of these of the largest separation."""
    return max(scores, key=lambda score: (score.auc, score.separation))


def _separation(high: Rows, low: Rows) -> float:
    spread = float(np.sqrt((high.var() + low.var()) / 2))
    distance = float(high.mean() - low.mean())
    if spread == 0.0:
        return float(np.copysign(np.inf, distance)) if distance else 0.0
    return distance / spread


def _mean(rows: Rows) -> Rows:
    return np.asarray(rows.mean(axis=0, dtype=np.float64))


def _unit(vector: Rows) -> Rows:
    wide = np.asarray(vector, np.float64)
    return np.asarray(wide / np.linalg.norm(wide))


def _labels(positive: Rows, negative: Rows) -> npt.NDArray[np.int64]:
    return np.repeat([1, 0], [len(positive), len(negative)])


def _check_rows(positive: Rows, negative: Rows) -> None:
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
