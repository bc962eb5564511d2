"""Runs the scenarios and prints their figures: `python -m bench.soak [NAME ...] [--out FILE]`."""

import argparse
import asyncio
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from bench.soak import real, scenarios

SCENARIOS = {**scenarios.SCENARIOS, **real.SCENARIOS}


def main() -> int:
    """Returns 1 if a scenario failed or missed its bar."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"scenarios (default: all): {', '.join(SCENARIOS)}")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    namespace = parser.parse_args()
    results = {}
    for name in namespace.names or SCENARIOS:
        try:
            figures: dict[str, Any] = asyncio.run(SCENARIOS[name]())
        except AssertionError as error:
            figures = {"failed": str(error), "met": False}
        results[name] = figures
        print(f"{name}: {'ok' if figures.get('met', True) else 'MISSED'}", flush=True)
        for what, figure in figures.items():
            print(f"  {what}: {figure}", flush=True)
    if namespace.out is not None:
        about = {
            "date": datetime.date.today().isoformat(),
            "cores": psutil.cpu_count(),
            "memory": f"{psutil.virtual_memory().total >> 30} GiB",
            "python": platform.python_version(),
        }
        namespace.out.write_text(json.dumps({"machine": about, "figures": results}, indent=1) + "\n")
    return 0 if all(figures.get("met", True) for figures in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
