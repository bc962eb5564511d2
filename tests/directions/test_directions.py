"""Directions: found in rows that are known, and judged on others."""

from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import AddSpec
from steer_service.directions.directions import Direction, Method, find_direction, find_directions
from steer_service.directions.scores import LayerScore, best_score, cross_validate, evaluate, evaluate_all, tied_scores

WIDTH = 24
SHIFT = 3.0 * np.eye(WIDTH)[5]
"""By how much the positive rows lie from the negative ones."""


def rows_of(seed: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows about a point far from zero, whose columns differ in spread."""
    random = np.random.default_rng(seed)
    shared = 10.0 + random.normal(size=(count, WIDTH)) * np.linspace(0.2, 5.0, WIDTH)
    noise = 0.3 * random.normal(size=(2, count, WIDTH))
    return shared + SHIFT + noise[0], shared + noise[1]


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("method", [Method.DIFFERENCE, Method.PCA])
def test_paired_methods_find_what_the_pairs_differ_in(method: Method) -> None:
    direction = find_direction(method, 3, *rows_of(0))
    assert direction.layer == 3
    assert cosine(direction.vector, SHIFT) > 0.98
    assert np.linalg.norm(direction.vector) == pytest.approx(3.0, rel=0.05)


def test_the_difference_of_means_is_exactly_that() -> None:
    positive, negative = rows_of(1)
    direction = find_direction(Method.DIFFERENCE, 0, positive, negative)
    np.testing.assert_allclose(direction.vector, positive.mean(0) - negative.mean(0), rtol=1e-6, atol=1e-6)


def test_the_probe_orders_rows_of_the_stream_and_not_standardised_ones() -> None:
    random = np.random.default_rng(2)
    spread = np.array([0.01, 100.0])
    positive, negative = (random.normal(size=(200, 2)) * spread + sign * np.array([0.02, 0.0]) for sign in (1, -1))
    direction = find_direction(Method.PROBE, 0, positive, negative)
    assert abs(direction.vector[1] / direction.vector[0]) < 1e-3
    assert evaluate(direction, positive, negative).auc > 0.95


@pytest.mark.parametrize("method", Method)
def test_every_method_parts_rows_held_out_with_positive_higher(method: Method) -> None:
    direction = find_direction(method, 0, *rows_of(3, 200))
    score = evaluate(direction, *rows_of(4))
    assert score.auc > 0.9
    assert score.accuracy > 0.8
    assert direction.project(rows_of(4)[0]).mean() > direction.project(rows_of(4)[1]).mean()


@pytest.mark.parametrize("method", Method)
def test_swapping_the_sides_turns_the_direction_round(method: Method) -> None:
    positive, negative = rows_of(5)
    there, back = find_direction(method, 0, positive, negative), find_direction(method, 0, negative, positive)
    np.testing.assert_allclose(there.vector, -back.vector, rtol=1e-3, atol=1e-4)
    assert there.threshold == pytest.approx(-back.threshold, rel=1e-3)


@pytest.mark.parametrize("method", Method)
def test_a_scale_of_one_moves_one_mean_to_the_other_along_the_direction(method: Method) -> None:
    positive, negative = rows_of(6)
    direction = find_direction(method, 2, positive, negative)
    operation = direction.to_spec().layers[2].operations[0]
    assert isinstance(operation, AddSpec)
    moved = direction.project(negative + operation.materialize())
    assert moved.mean() == pytest.approx(direction.project(positive).mean(), rel=1e-5)
    assert direction.threshold == pytest.approx((moved.mean() + direction.project(negative).mean()) / 2, rel=1e-5)


def test_scores_are_those_of_the_formulas() -> None:
    direction = Direction(layer=0, vector=np.float32([2.0, 0.0]), threshold=1.0)
    positive, negative = np.array([[3.0, 9.0], [1.0, 9.0]]), np.array([[2.0, -9.0], [0.0, -9.0]])
    score = evaluate(direction, positive, negative)
    assert score == LayerScore(layer=0, auc=0.75, accuracy=0.5, separation=1.0)
    assert evaluate(direction, positive, np.zeros((2, 2))).separation == pytest.approx(2 / np.sqrt(0.5))


def test_rows_without_spread_are_infinitely_far_apart() -> None:
    direction = Direction(layer=0, vector=np.float32([1.0]), threshold=0.0)
    assert evaluate(direction, np.ones((2, 1)), -np.ones((2, 1))).separation == np.inf
    assert evaluate(direction, np.ones((2, 1)), np.ones((2, 1))).separation == 0.0


def test_the_best_layer_has_the_highest_auc_however_far_apart_others_are() -> None:
    score = LayerScore(layer=2, auc=0.9, accuracy=0.5, separation=9.0)
    assert best_score([score, replace(score, layer=0, auc=1.0, separation=1.0)], layer_count=5).layer == 0


def test_of_layers_that_tie_the_one_nearest_to_the_middle_of_the_model_is_chosen() -> None:
    perfect = LayerScore(layer=0, auc=1.0, accuracy=0.5, separation=np.inf)
    scores = [replace(perfect, layer=layer) for layer in (9, 2, 5, 3)]
    worse = [replace(perfect, layer=0, auc=0.9), replace(perfect, layer=1, separation=8.0)]
    for given in (scores + worse, worse + scores[::-1]):
        chosen = [best_score(given, layer_count).layer for layer_count in (2, 4, 8, 9, 12, 13, 16, 30)]
        assert chosen == [1, 1, 3, 3, 5, 5, 9, 9]
        assert [score.layer for score in tied_scores(given)] == [1, 2, 3, 5, 9]
    far_apart = replace(perfect, layer=8, separation=99.0)
    assert best_score([*scores, far_apart], layer_count=8).layer == 3
    assert tied_scores(worse) == worse[1:]


def test_cross_validation_judges_pairs_that_a_direction_was_not_found_in() -> None:
    positive, negative = rows_of(8, count=10)
    noise = np.random.default_rng(9).normal(size=(2, 10, WIDTH))  # as wide as there are rows: any side can be learnt
    rows = {0: positive, 3: noise[0]}, {0: negative, 3: noise[1]}
    found, nothing = cross_validate(Method.DIFFERENCE, *rows)
    assert (found.layer, nothing.layer) == (0, 3)
    assert cross_validate(Method.DIFFERENCE, {0: positive[:4]}, {0: negative[:4]})[0].auc > 0.9
    assert found.auc > 0.9
    assert 0.2 < nothing.auc < 0.8 < evaluate_all(find_directions(Method.DIFFERENCE, *rows), *rows)[1].auc


def test_too_few_pairs_are_not_cross_validated() -> None:
    positive, negative = rows_of(8, count=3)
    with pytest.raises(InvalidRequest, match=r"3 training pairs are too few .* 4 are needed"):
        cross_validate(Method.PCA, {0: positive}, {0: negative})


def test_layers_are_treated_each_for_itself() -> None:
    positive, negative = rows_of(7)
    found = find_directions(Method.DIFFERENCE, {4: positive, 1: negative}, {4: negative, 1: positive})
    np.testing.assert_array_equal(found[4].vector, -found[1].vector)
    scores = evaluate_all(found, {4: positive, 1: positive}, {4: negative, 1: negative})
    assert [score.layer for score in scores] == [1, 4]
    assert scores[0].auc < 0.5 < scores[1].auc


GOOD, _ = rows_of(8, 4)
BAD: dict[str, tuple[np.ndarray, np.ndarray, str, str]] = {
    "no rows": (GOOD[:0], GOOD, "positive", "BAD_SHAPE"),
    "one row alone": (GOOD, GOOD[0], "negative", "BAD_SHAPE"),
    "other widths": (GOOD, GOOD[:, 1:], "negative", "WRONG_WIDTH"),
    "not finite": (GOOD, GOOD * np.nan, "negative", "NON_FINITE"),
    "sides alike": (GOOD, GOOD, "positive", "ZERO_NORM"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("method", Method)
def test_rows_without_a_direction_are_refused(method: Method, what: str) -> None:
    positive, negative, field, reason = BAD[what]
    with pytest.raises(InvalidRequest) as refused:
        find_direction(method, 0, positive, negative)
    assert (refused.value.field, refused.value.reason) == (field, reason)


def test_differences_of_rows_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="40 and 39 rows are not pairs"):
        find_direction(Method.PCA, 0, rows_of(0)[0], rows_of(0)[1][1:])
