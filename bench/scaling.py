"""Measures how throughput scales with the number and the length of programs: `python -m bench.scaling`.

The output is a table and a plot. Every request is steered after every layer. The requests share the programs evenly.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.child import OURS
from bench.process import Child, ChildFailed
from bench.results import add_arguments, keep
from bench.run import Turns, say
from steer_service.directions.report import DPI, LINES, REFERENCE, add_legend, new_figure
from steer_service.hf.bundled_model import ensure_bundled_model

PROGRAMS = (1, 8, 32, 64)
OPERATIONS = (1, 4, 16, 64)
REQUESTS = 64
PROMPT_TOKENS = 4
TOKENS = 8
"""Tokens of each request. A few are enough: the cost is one of rows, and a round has eight loads."""

Speeds = dict[int, list[float]]
"""Number of programs or operations -> tokens per second of each round, relative to no steering in that round."""


def measure(rounds: int, dtype: str) -> tuple[Speeds, Speeds]:
    """Speeds by the number of programs of three operations per layer, and of 8 programs by operations per layer."""
    by_programs: Speeds = {count: [] for count in PROGRAMS}
    by_operations: Speeds = {count: [] for count in OPERATIONS}
    with ExitStack() as stack:
        child = stack.enter_context(Child(OURS, str(ensure_bundled_model(say)), "--dtype", dtype))
        turns = Turns({OURS: child}, lambda _: (OURS,))

        def run(mode: str, max_tokens: int = TOKENS, **load: int) -> float:
            name = ", ".join([mode, *(f"{count} {what}" for what, count in load.items())])
            load |= {"requests": REQUESTS, "prompt_tokens": PROMPT_TOKENS}
            return turns.take(name, mode, max_tokens, **load).tokens_per_s

        loads = [
            *((by_programs, count, {"programs": count}) for count in PROGRAMS),
            *((by_operations, count, {"programs": 8, "operations": count}) for count in OPERATIONS),
        ]
        for _, _, load in loads:
            run("distinct_all_layers", 2, **load)
        for number in range(rounds):
            plain = run("idle")
            for speeds, count, load in loads if number % 2 == 0 else loads[::-1]:
                speeds[count].append(run("distinct_all_layers", **load) / plain)
    return by_programs, by_operations


def as_table(head: str, speeds: Speeds) -> str:
    """A Markdown table with a line for each count."""
    lines = [f"| {head} | tokens/s relative to no steering | rounds |", "|---|---|---|"]
    lines += [
        f"| {count} | {median(of_count):.3f} | {min(of_count):.3f} to {max(of_count):.3f} |"
        for count, of_count in speeds.items()
    ]
    return "\n".join(lines)


def plot(by_programs: Speeds, by_operations: Speeds, path: Path) -> None:
    """Writes a PNG with a plot of each."""
    figure_of(by_programs, by_operations).savefig(path, format="png", dpi=DPI)


def figure_of(by_programs: Speeds, by_operations: Speeds) -> Any:
    """The figure with a plot of each."""
    figure = new_figure("Throughput of requests that are steered after every layer", (9, 4.5))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, speeds in zip(
        panels,
        ("distinct programs (3 operations per layer)", "operations per layer (8 programs)"),
        (by_programs, by_operations),
        strict=True,
    ):
        middle = [median(of_count) for of_count in speeds.values()]
        below = [centre - min(of_count) for centre, of_count in zip(middle, speeds.values(), strict=True)]
        above = [max(of_count) - centre for centre, of_count in zip(middle, speeds.values(), strict=True)]
        is_first = axes is panels[0]  # one legend is for both
        axes.errorbar(
            list(speeds),
            middle,
            [below, above],
            capsize=3,
            label="median, lowest and highest round" * is_first,
            **LINES[0],
        )
        axes.axhline(1.0, label="no steering" * is_first, **REFERENCE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(speeds), [str(count) for count in speeds])
        axes.set_xlabel(name)
        axes.set_ylim(0, 1.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s relative to no steering (ratio)")
    add_legend(figure)
    return figure


def _summary(speeds: Speeds) -> dict[str, list[float]]:
    """Median, lowest and highest of each count."""
    return {str(count): [round(of(of_count), 4) for of in (median, min, max)] for count, of_count in speeds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    add_arguments(parser, rounds=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot, a .png file")
    options = parser.parse_args(arguments)
    try:
        by_programs, by_operations = measure(options.rounds, options.dtype)
    except ChildFailed as error:
        say(str(error))
        return 1
    print(as_table("programs", by_programs), "", as_table("operations", by_operations), sep="\n")
    if options.plot is not None:
        plot(by_programs, by_operations, options.plot)
    results: dict[str, Any] = {"programs": _summary(by_programs), "operations": _summary(by_operations)}
    keep({"scaling": {**results, "dtype": options.dtype, "rounds": options.rounds}}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
