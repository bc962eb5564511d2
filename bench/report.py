"""Turns the tokens per second of every run into ratios and a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.load import STOCK

Round = Mapping[str, float]
"""Mode -> tokens per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeResult:
    """The result of one mode."""

    ratio: float
    """Tokens per second relative to stock in the same round: the median over the rounds."""
    low: float
    """The lowest of these ratios."""
    high: float
    """The highest of these ratios."""
    tokens_per_s: float
    """Tokens per second of the best round."""


def mode_results(rounds: Sequence[Round]) -> dict[str, ModeResult]:
    """The result of every mode, with stock."""
    return {mode: _mode_result(mode, rounds) for mode in rounds[0]}


def _mode_result(mode: str, rounds: Sequence[Round]) -> ModeResult:
    ratios = [round(speeds[mode] / speeds[STOCK], 4) for speeds in rounds]
    return ModeResult(
        ratio=round(median(ratios), 4),
        low=min(ratios),
        high=max(ratios),
        tokens_per_s=round(max(speeds[mode] for speeds in rounds), 1),
    )


TARGETS = {
    "idle": 0.99,
    "add_one_layer": 0.98,
    "capture_one_layer": 0.97,
    "distinct_all_layers": 0.95,
    "capture_all_layers": 0.90,
}
"""The lowest `ratio` that is good enough."""


def as_table(results: Mapping[str, ModeResult]) -> str:
    """A table with a line for each mode; a mode below its target is marked."""
    lines = [f"{'':<20} {'median':>7} {'target':>6} {'low..high':>14} {'tokens/s':>9}"]
    for mode, result in results.items():
        spread = "" if mode == STOCK else f"{result.low:.3f}..{result.high:.3f}"
        target = f"{TARGETS[mode]:.2f}" if mode in TARGETS else ""
        mark = "  BELOW TARGET" if result.ratio < TARGETS.get(mode, 0.0) else ""
        lines.append(f"{mode:<20} {result.ratio:>7.3f} {target:>6} {spread:>14} {result.tokens_per_s:>9.1f}{mark}")
    return "\n".join(lines)


def drops(results: Mapping[str, ModeResult], committed: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each mode whose median is below the lowest round that is committed.

    `committed` has the `details` of bench/results.json: mode -> fields of ModeResult.
    """
    return [
        f"{mode} is at {result.ratio:.3f} of stock; its rounds were at {before['low']:.3f} to {before['high']:.3f}"
        for mode, result in results.items()
        if mode != STOCK and (before := committed.get(mode)) is not None and result.ratio < before["low"]
    ]
