"""From the tokens per second of every run to ratios and a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.load import STOCK

Round = Mapping[str, float]
"""Mode -> tokens per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one mode came to."""

    ratio: float
    """Tokens per second over those of stock in the same round: the median over the rounds."""
    low: float
    """The lowest of these ratios."""
    high: float
    """The highest of these ratios."""
    tokens_per_s: float
    """Of the best round."""


def figures_of(rounds: Sequence[Round]) -> dict[str, Figure]:
    """A figure for every mode, stock included."""
    return {mode: _figure_of(mode, rounds) for mode in rounds[0]}


def _figure_of(mode: str, rounds: Sequence[Round]) -> Figure:
    ratios = [round(speeds[mode] / speeds[STOCK], 4) for speeds in rounds]
    return Figure(
        ratio=round(median(ratios), 4),
        low=min(ratios),
        high=max(ratios),
        tokens_per_s=round(max(speeds[mode] for speeds in rounds), 1),
    )


LIMITS = {
    "idle": 0.99,
    "add_one_layer": 0.98,
    "capture_one_layer": 0.97,
    "distinct_all_layers": 0.95,
    "capture_all_layers": 0.90,
}
"""The least that `ratio` must be."""


def as_table(figures: Mapping[str, Figure]) -> str:
    """A line for each mode."""
    lines = [f"{'':<20} {'median':>7} {'limit':>6} {'low..high':>14} {'tokens/s':>9}"]
    for mode, figure in figures.items():
        spread = "" if mode == STOCK else f"{figure.low:.3f}..{figure.high:.3f}"
        limit = f"{LIMITS[mode]:.2f}" if mode in LIMITS else ""
        missed = "  MISSED" if figure.ratio < LIMITS.get(mode, 0.0) else ""
        lines.append(f"{mode:<20} {figure.ratio:>7.3f} {limit:>6} {spread:>14} {figure.tokens_per_s:>9.1f}{missed}")
    return "\n".join(lines)


def drops(figures: Mapping[str, Figure], committed: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is slower than it was committed to be by more than its rounds differed: a line for each such mode.

    `committed` is what the results' `details` hold of each mode. A drop is a median below the committed lowest round.
    """
    return [
        f"{mode} is at {figure.ratio:.3f} of stock; its rounds were at {before['low']:.3f} to {before['high']:.3f}"
        for mode, figure in figures.items()
        if mode != STOCK and (before := committed.get(mode)) is not None and figure.ratio < before["low"]
    ]
