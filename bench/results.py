"""The number of rounds, and the file of results."""

import itertools
import json
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def add_arguments(parser: ArgumentParser, rounds: int) -> None:
    """Adds --rounds and --out."""
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="add the results to this file, such as bench/results.json; its other keys stay",
    )


def add_minutes(parser: ArgumentParser) -> None:
    """Adds --minutes."""
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        metavar="N",
        help="add rounds until this much time has passed (default: %(default)s)",
    )


def numbers(rounds: int, minutes: float) -> Iterator[int]:
    """Numbers of rounds, from 0: at least `rounds` of them, and more until `minutes` have passed."""
    until = time.monotonic() + 60 * minutes
    return itertools.takewhile(lambda number: number < rounds or time.monotonic() < until, itertools.count())


def keep(results: dict[str, Any], out: Path | None) -> None:
    """Prints results and adds them to the file `out`, if it is given."""
    print(json.dumps(results, indent=2))
    if out is not None:
        add_to(out, results)


def add_to(out: Path, results: dict[str, Any]) -> None:
    """Adds results to a JSON file; its other keys stay."""
    before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**before, **results}, indent=2) + "\n")
