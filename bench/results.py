"""How often figures are taken, and where they go."""

import itertools
import json
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: ArgumentParser, rounds: int) -> None:
    """How often to measure, and where to keep what comes of it."""
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="such as bench/results.json, whose other keys stay")


def add_minutes(parser: ArgumentParser) -> None:
    """How long to measure at least."""
    parser.add_argument(
        "--minutes", type=float, default=0.0, metavar="N", help="go on with rounds for so long (default: %(default)s)"
    )


def numbers(rounds: int, minutes: float) -> Iterator[int]:
    """Numbers of rounds: so many of them at least, and for so long."""
    until = time.monotonic() + 60 * minutes
    return itertools.takewhile(lambda number: number < rounds or time.monotonic() < until, itertools.count())


def keep(figures: dict[str, Any], out: Path | None) -> None:
    """Prints figures and adds them to a file of results, if one is given."""
    print(json.dumps(figures, indent=2))
    if out is not None:
        add_to(out, figures)


def add_to(out: Path, figures: dict[str, Any]) -> None:
    """Adds figures to a file of results, of which other keys stay."""
    results = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**results, **figures}, indent=2) + "\n")
