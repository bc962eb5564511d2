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
    fastest = max(speeds[mode] for speeds in rounds)
    return Figure(ratio=round(median(ratios), 4), low=min(ratios), high=max(ratios), tokens_per_s=round(fastest, 1))


def as_table(figures: Mapping[str, Figure]) -> str:
    """A line for each mode."""
    lines = [f"{'':<20} {'ratio':>7} {'low..high':>14} {'tokens/s':>9}"]
    for mode, figure in figures.items():
        spread = "" if mode == STOCK else f"{figure.low:.3f}..{figure.high:.3f}"
        lines.append(f"{mode:<20} {figure.ratio:>7.3f} {spread:>14} {figure.tokens_per_s:>9.0f}")
    return "\n".join(lines)
