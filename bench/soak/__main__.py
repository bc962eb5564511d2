"""Runs the scenarios and prints their figures: `python -m bench.soak [NAME ...] [--out FILE]`."""

import argparse
import asyncio
import datetime
import inspect
import json
import platform
import random
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil

from bench.soak import python_client, random_faults, real, real_faults, scenarios

SCENARIOS = {
    **scenarios.SCENARIOS,
    **random_faults.SCENARIOS,
    **python_client.SCENARIOS,
    **real.SCENARIOS,
    **real_faults.SCENARIOS,
}


def main() -> int:
    """Returns 1 if a scenario failed or missed its bar."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"scenarios (default: all): {', '.join(SCENARIOS)}")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--seed", type=int, help="seed of the random faults (default: another one each time)")
    parser.add_argument("--seconds", type=float, help="of each scenario with a time of its own (default: its own)")
    namespace = parser.parse_args()
    seed = random.randrange(10**6) if namespace.seed is None else namespace.seed
    given = {"seed": seed} | ({} if namespace.seconds is None else {"seconds": namespace.seconds})
    results = {}
    for name in namespace.names or SCENARIOS:
        try:
            figures: dict[str, Any] = asyncio.run(_begin(SCENARIOS[name], given))
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


def _begin(
    scenario: Callable[..., Coroutine[Any, Any, dict[str, Any]]], given: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    known = inspect.signature(scenario).parameters
    return scenario(**{name: value for name, value in given.items() if name in known})


if __name__ == "__main__":
    sys.exit(main())
