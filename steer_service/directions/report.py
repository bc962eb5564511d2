"""Results for readers: tables as text, and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_service.directions.scores import LayerScore
from steer_service.directions.sweep import SweepPoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150

LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#000000", "marker": "^", "linestyle": "-."},
)
"""Styles of lines: colours of Okabe and Ito, which colour-blind readers can tell apart. Markers and dashes differ too,
for prints in grey."""

REFERENCE: dict[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 1.2}
"""The style of a line to compare with."""


def score_table(scores: Sequence[LayerScore]) -> str:
    """A table of how well the direction of each layer separates held-out prompts."""
    rows = [(f"{s.layer}", f"{s.auc:.3f}", f"{s.accuracy:.3f}", f"{s.separation:.2f}") for s in scores]
    return table(("layer", "AUC", "accuracy", "d'"), rows)


def sweep_table(points: Sequence[SweepPoint]) -> str:
    """A table of the targets' log-probability at each scale, in nats per token, and the share that rose."""
    rows = [(f"{p.scale:g}", f"{p.mean:.3f}", f"{p.raised:.0%}") for p in points]
    return table(("scale", "log-probability", "raised"), rows)


def plot_scores(scores: Sequence[LayerScore], path: str | Path) -> None:
    """Writes AUC, accuracy and separation by layer as a PNG; raises OSError if it cannot be written."""
    scores_figure(scores).savefig(path, format="png", dpi=DPI)


def plot_sweep(points: Sequence[SweepPoint], path: str | Path) -> None:
    """Writes each target's log-probability by scale, and the mean, as a PNG; raises OSError if that fails."""
    sweep_figure(points).savefig(path, format="png", dpi=DPI)


def scores_figure(scores: Sequence[LayerScore]) -> "Figure":
    """The plot of AUC and accuracy, and below it that of the separation, by layer."""
    figure = new_figure("How well each layer's direction separates held-out prompts", (8, 6))
    shares, separations = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    layers = [score.layer for score in scores]
    shares.plot(layers, [score.auc for score in scores], label="AUC", **LINES[0])
    shares.plot(layers, [score.accuracy for score in scores], label="accuracy", **LINES[1])
    shares.axhline(0.5, label="chance", **REFERENCE)
    shares.set_ylim(0, 1.05)
    shares.set_ylabel("AUC, accuracy (share, 0 to 1)")
    separations.plot(layers, [score.separation for score in scores], label="separation d'", **LINES[2])
    separations.set_ylabel("d' (pooled standard\ndeviations)")
    separations.set_xlabel("decoder layer (counted from 0)")
    separations.xaxis.get_major_locator().set_params(integer=True)
    for axes in (shares, separations):
        axes.grid(alpha=0.3)
    add_legend(figure)
    return figure


def sweep_figure(points: Sequence[SweepPoint]) -> "Figure":
    """The plot of each target's log-probability by scale, and of their mean."""
    figure = new_figure("How the scale of the steering changes held-out targets", (8, 5))
    axes = figure.subplots()
    scales = [point.scale for point in points]
    targets = axes.plot(scales, [point.log_probabilities for point in points], color="0.65", linewidth=0.7)
    for line in targets[:1]:
        line.set_label("one held-out target")
    axes.plot(scales, [point.mean for point in points], label="mean of the held-out targets", **LINES[0])
    axes.axvline(0.0, label="without steering", **REFERENCE)
    axes.set_xlabel("scale (factor of the direction)")
    axes.set_ylabel("log-probability per token (nats)")
    axes.grid(alpha=0.3)
    add_legend(figure)
    return figure


def new_figure(title: str, inches: tuple[float, float]) -> "Figure":
    """An empty figure with a title; its parts do not overlap."""
    # Without pyplot nothing is global: no window, no backend to choose, no figure to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def add_legend(figure: "Figure") -> None:
    """Adds one legend for all axes, below them: it covers nothing."""
    handles, labels = [], []
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.append(handle)
            labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of right-aligned columns under their heads."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(lines)
