"""Where figures go."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any


def add_arguments(parser: ArgumentParser, rounds: int) -> None:
    """How often to measure, and where to keep what comes of it."""
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="such as bench/results.json, whose other keys stay")


def keep(figures: dict[str, Any], out: Path | None) -> None:
    """Prints figures and adds them to a file of results, if one is given."""
    print(json.dumps(figures, indent=2))
    if out is not None:
        add_to(out, figures)


def add_to(out: Path, figures: dict[str, Any]) -> None:
    """Adds figures to a file of results, of which other keys stay."""
    results = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**results, **figures}, indent=2) + "\n")
