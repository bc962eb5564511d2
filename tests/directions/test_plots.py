"""Plots have titles, units and a legend that covers nothing, and are readable in grey."""

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bench.scaling import figure_of
from steer_service.directions.report import LINES, scores_figure, sweep_figure
from steer_service.directions.scores import LayerScore
from steer_service.directions.sweep import SweepPoint

SCORES = [LayerScore(layer=n, auc=0.5 + n / 40, accuracy=0.5 + n / 50, separation=n / 4) for n in range(16)]
POINTS = [
    SweepPoint(scale=scale, log_probabilities=np.linspace(-4, -2, 12) - 0.1 * (scale - 1) ** 2, raised=0.5)
    for scale in (-2.0, -1.0, 0.0, 1.0, 2.0)
]
SPEEDS = {1: [0.9, 0.95, 0.92], 8: [0.8, 0.9, 0.85], 64: [0.7, 0.8, 0.75]}

FIGURES = {
    "scores": lambda: scores_figure(SCORES),
    "sweep": lambda: sweep_figure(POINTS),
    "scaling": lambda: figure_of(SPEEDS, SPEEDS),
}
UNITS = {
    "scores": {
        "decoder layer (counted from 0)",
        "AUC, accuracy (share, 0 to 1)",
        "d' (pooled standard\ndeviations)",
    },
    "sweep": {"scale (factor of the direction)", "log-probability per token (nats)"},
    "scaling": {
        "distinct programs (3 operations per layer)",
        "operations per layer (8 programs)",
        "tokens/s relative to no steering (ratio)",
    },
}
LEGENDS = {
    "scores": ["AUC", "accuracy", "chance", "separation d'"],
    "sweep": ["one held-out target", "mean of the held-out targets", "without steering"],
    "scaling": ["no steering", "median, lowest and highest round"],
}


@pytest.fixture(params=FIGURES, scope="module")
def plot(request: pytest.FixtureRequest) -> tuple[str, Any]:
    figure = FIGURES[request.param]()
    figure.canvas.draw()
    return request.param, figure


def test_a_plot_has_a_title_and_axes_with_units(plot: tuple[str, Any]) -> None:
    name, figure = plot
    assert len(figure.get_suptitle().split()) > 4
    labels = {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())} - {""}
    assert labels == UNITS[name]


def test_the_legend_is_outside_of_all_axes_and_inside_the_figure(plot: tuple[str, Any]) -> None:
    name, figure = plot
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == LEGENDS[name]
    box = legend.get_window_extent()
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not box.overlaps(axes.get_tightbbox())
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.width


def test_lines_differ_in_grey_and_by_marker_and_dashes() -> None:
    lightness = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (to_rgb(line["color"]) for line in LINES))
    assert min(np.diff(lightness)) > 0.05
    for what in ("color", "marker", "linestyle"):
        assert len({line[what] for line in LINES}) == len(LINES)
