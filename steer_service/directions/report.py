"""Results for readers: tables as text, and plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer_service.directions.scores import LayerScore
from steer_service.directions.sweep import SweepPoint


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
    figure, axes = _figure("layer", "AUC, accuracy")
    layers = [score.layer for score in scores]
    axes.plot(layers, [score.auc for score in scores], marker="o", label="AUC")
    axes.plot(layers, [score.accuracy for score in scores], marker="s", label="accuracy")
    right = axes.twinx()
    right.plot(layers, [score.separation for score in scores], color="grey", linestyle="--", label="d'")
    right.set_ylabel("d'")
    figure.legend(loc="lower right")
    figure.savefig(path, format="png")


def plot_sweep(points: Sequence[SweepPoint], path: str | Path) -> None:
    """Writes each target's log-probability by scale, and the mean, as a PNG; raises OSError if that fails."""
    figure, axes = _figure("scale", "log-probability per token (nats)")
    scales = [point.scale for point in points]
    axes.plot(scales, [point.log_probabilities for point in points], color="grey", linewidth=0.5, alpha=0.5)
    axes.plot(scales, [point.mean for point in points], marker="o", label="mean of the held-out targets")
    axes.legend()
    figure.savefig(path, format="png")


def _figure(x: str, y: str) -> tuple[Any, Any]:
    # Without pyplot nothing is global: no window, no backend to choose, no figure to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of right-aligned columns under their heads."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(lines)
