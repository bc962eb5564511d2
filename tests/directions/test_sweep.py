"""The effect of a direction on targets, over the calls that every backend has, and what is shown of it."""

from pathlib import Path

import numpy as np
import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TextPrompt
from steer_service.core.specs import SteeringSpec
from steer_service.directions.report import plot_scores, plot_sweep, score_table, sweep_table
from steer_service.directions.scores import LayerScore
from steer_service.directions.sweep import SweepPoint, sweep_scales, target_log_probabilities, target_measure
from steer_service.directions.targets import Target
from steer_service.directions.training import log_probabilities
from steer_service.hf.model import HFSteeringModel
from tests.directions.test_training import TARGETS
from tests.tiny_models import WIDTH

PNG = b"\x89PNG\r\n\x1a\n"


def spec_at(scale: float) -> SteeringSpec:
    return SteeringSpec.simple_add(2, np.random.default_rng(0).normal(size=WIDTH), scale)


@pytest.mark.parametrize("steering", [None, spec_at(0.5)])
async def test_by_one_request_for_each_they_are_those_of_one_forward_pass(
    hf: HFSteeringModel, steering: SteeringSpec | None
) -> None:
    measured = await target_log_probabilities(hf, TARGETS, steering)
    np.testing.assert_allclose(measured, log_probabilities(hf, TARGETS, steering), atol=1e-5)


async def test_a_sweep_has_every_scale_once_and_says_what_it_raised(hf: HFSteeringModel) -> None:
    points = await sweep_scales(target_measure(hf, TARGETS[:2]), spec_at, [1.0, 0.0, -1.0, 1.0])
    assert [point.scale for point in points] == [-1.0, 0.0, 1.0]
    for point in points:
        want = log_probabilities(hf, TARGETS[:2], spec_at(point.scale))
        np.testing.assert_allclose(point.log_probabilities, want, atol=1e-5)
        assert point.mean == pytest.approx(want.mean(), abs=1e-5)
        assert point.raised == (want > points[1].log_probabilities + 1e-4).mean()
    assert points[1].raised == 0.0


async def test_what_cannot_be_measured_is_refused(hf: HFSteeringModel) -> None:
    with pytest.raises(InvalidRequest, match="no targets"):
        await target_log_probabilities(hf, [])
    inside_a_word = Target(prompt=TextPrompt(text="The elephan"), text="t sat down.")
    with pytest.raises(InvalidRequest) as refused:
        await target_log_probabilities(hf, [TARGETS[0], inside_a_word])
    assert (refused.value.field, refused.value.reason) == ("targets[1]", "BAD_TARGET")


POINTS = [
    SweepPoint(scale=-0.5, log_probabilities=np.array([-3.0, -4.0]), raised=0.0),
    SweepPoint(scale=1.0, log_probabilities=np.array([-1.0, -2.0]), raised=1.0),
]
SCORES = [LayerScore(layer=layer, auc=0.5 + layer / 20, accuracy=0.5, separation=layer / 3) for layer in (9, 10)]


def test_tables_have_a_line_each_in_columns() -> None:
    assert sweep_table(POINTS).splitlines() == [
        "scale  log-probability  raised",
        " -0.5           -3.500      0%",
        "    1           -1.500    100%",
    ]
    assert score_table(SCORES).splitlines() == [
        "layer    AUC  accuracy    d'",
        "    9  0.950     0.500  3.00",
        "   10  1.000     0.500  3.33",
    ]


def test_plots_are_written_as_png(tmp_path: Path) -> None:
    plot_scores(SCORES, tmp_path / "scores.png")
    plot_sweep(POINTS, tmp_path / "sweep.png")
    for name in ("scores.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_a_plot_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        plot_sweep(POINTS, tmp_path / "missing" / "sweep.png")
