"""Runs the parts one after the other, and keeps the files of the results up to date."""

import datetime
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from bench.on_gpu import part_process
from bench.on_gpu.part_results import Outcome, PartResult, Reading, load, save
from bench.on_gpu.parts import Part
from bench.on_gpu.readings import Unreadable
from bench.on_gpu.report import log_name, report
from steer_service.formats.atomic_write import atomic_write

RESULTS, REPORT = "results.json", "report.md"
LAST_LINES, MOST_CHARACTERS = 15, 200
"""Of the log of a part that did not pass, in the report."""
LEAST_S = 5.0
"""Where less is left of the time of all parts, no part is begun."""


class Book:
    """The results in a folder; the files there are always up to date."""

    def __init__(self, output: Path, head: str, titles: Mapping[int, str]) -> None:
        self.output = output
        self._head, self._titles = head, titles
        self._results = load(output / RESULTS)

    def write(self, number: int, result: PartResult) -> None:
        """Keeps the result of a part and writes the files again."""
        self._results[number] = result
        save(self.output / RESULTS, dict(sorted(self._results.items())))
        with atomic_write(self.output / REPORT) as part:
            part.write_text(report(self._head, self._titles, self._results))


def run_parts(parts: Mapping[int, Part], book: Book, machine: str, total_s: float, say: Callable[[str], None]) -> bool:
    """Runs the parts one after the other; returns False if one of them did not pass.

    Each result is written as soon as there is one. `total_s`: the limits of the parts are cut to what is left of it.
    """
    until = time.monotonic() + total_s
    passed = True
    for number, part in parts.items():
        left_s = until - time.monotonic()
        limit_s = min(part.limit_s, left_s)
        begun = PartResult(
            outcome=Outcome.NOT_ENDED,
            began=now(),
            machine=machine,
            command=shlex.join(("python", *part.command[1:])),
            limit_s=round(limit_s, 1),
        )
        if not part.command:
            result = PartResult(outcome=Outcome.NOT_RUN, reason="it needs a GPU")
        elif left_s < LEAST_S:
            result = PartResult(outcome=Outcome.NOT_RUN, reason=f"nothing was left of {total_s:.0f} s")
            passed = False
        else:
            say(f"part {number}: {part.title}, at most {limit_s:.0f} s")
            book.write(number, begun)
            result = run_part(part, begun, book.output / log_name(number), limit_s)
            passed &= result.outcome is Outcome.PASSED
        book.write(number, result)
        say(f"part {number}: {result.outcome}{', ' + result.reason if result.reason else ''}")
    return passed


def run_part(part: Part, begun: PartResult, log: Path, limit_s: float) -> PartResult:
    """Runs one part, and reads what it has found so far if it failed or was ended."""
    ended = part_process.run(part.command, log, limit_s)
    text = log.read_text(errors="replace")
    outcome, reasons, reading = Outcome.PASSED, list[str](), Reading()
    if ended.is_over_limit:
        outcome = Outcome.OVER_LIMIT
    elif ended.status:
        outcome = Outcome.FAILED
        reasons.append(f"its exit status is {ended.status}")
    try:
        reading = part.read(text)
    except Unreadable as error:
        reasons.append(str(error))
    except Exception as error:  # whatever a log says, the next part is to run
        reasons.append(f"its log cannot be read: {type(error).__name__}: {error}")
    if reasons and outcome is Outcome.PASSED:
        outcome = Outcome.FAILED
    return replace(
        begun,
        outcome=outcome,
        reason="; ".join(reasons),
        seconds=ended.seconds,
        reading=reading,
        last_lines=()
        if outcome is Outcome.PASSED
        else tuple(line[:MOST_CHARACTERS] for line in text.splitlines()[-LAST_LINES:]),
    )


def now() -> str:
    """Date and time, to the minute."""
    return datetime.datetime.now().isoformat(" ", "minutes")
