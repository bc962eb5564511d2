"""The report of a receipt about the rows of one layer."""

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.layer_change import ACTED, CAPPED, IDLE, LayerChange, layer_change
from steer_service.core.specs import SteeringSpec


def recorded(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 2)


def test_only_rows_on_which_an_operation_acted_count() -> None:
    change = layer_change(3, recorded((9.0, IDLE), (0.5, ACTED), (0.25, CAPPED), (0.0, ACTED)))

    assert change == LayerChange(layer=3, positions=3, largest=0.5, mean=0.25, capped_positions=1)


def test_rows_of_zeros_count_as_positions_and_have_no_change() -> None:
    change = layer_change(0, recorded((np.nan, ACTED), (0.5, CAPPED), (np.nan, CAPPED)))

    assert change == LayerChange(layer=0, positions=3, largest=0.5, mean=0.5, capped_positions=2)


@pytest.mark.parametrize("rows", [(), ((0.0, IDLE),), ((np.nan, ACTED),)])
def test_without_a_change_the_figures_are_zero(rows: tuple[tuple[float, float], ...]) -> None:
    change = layer_change(0, recorded(*rows))

    assert (change.largest, change.mean, change.capped_positions) == (0.0, 0.0, 0)


def test_the_mean_of_very_many_rows_is_exact_enough() -> None:
    rows = np.full((1 << 20, 2), 0.1, np.float32)
    rows[:, 1] = ACTED

    assert layer_change(0, rows).mean == pytest.approx(np.float32(0.1), rel=1e-9)


def test_a_report_is_no_part_of_what_a_spec_does() -> None:
    silent = SteeringSpec.simple_add(1, [1.0, 2.0])
    spec = SteeringSpec(silent.layers, report_change=True)

    assert spec.digest() == silent.digest()
    assert spec != silent
    assert spec.clone().report_change


@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_a_report_is_asked_for_with_true_or_false(bad: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SteeringSpec(report_change=bad)  # type: ignore[arg-type]
    assert refused.value.field == "report_change"
