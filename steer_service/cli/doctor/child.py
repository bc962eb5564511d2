"""Runs Python in a process of its own: an import that crashes, hangs or is slow there is an answer here."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from steer_service.cli.doctor.findings import one_line
from steer_service.core.processes import kill_descendants, killed_by

LIMIT_S = 180.0
"""Seconds for one process; importing vLLM takes about ten, and minutes on a cold network drive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a process answered."""

    value: dict[str, Any]
    """The JSON object of its last line; empty if it failed."""
    problem: str
    """Why it failed, in one line; "" if it did not."""
    is_late: bool = False
    """True if it did not answer in time, which need not be its own fault."""


def ask(program: str, *arguments: str, limit_s: float = LIMIT_S) -> Answer:
    """Runs `program`, which prints a JSON object on its last line."""
    command = [sys.executable, "-c", program, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False, process_group=0
        )
    except subprocess.TimeoutExpired:
        return Answer(value={}, problem=f"no answer within {limit_s:g} s", is_late=True)
    if done.returncode < 0:
        return Answer(value={}, problem=f"the process was ended by {killed_by(done.returncode)}")
    if done.returncode != 0:
        return Answer(value={}, problem=one_line(_last_line(done.stderr) or f"exit status {done.returncode}"))
    return Answer(value=json.loads(_last_line(done.stdout)), problem="")


def ask_import(module: str) -> Answer:
    """Whether `module` can be imported."""
    return ask(f"import {module}; print('{{}}')")


def late_text(what: str, answer: Answer) -> str:
    """The finding for `what`, whose process did not answer in time: how busy the machine is, and what to do."""
    load, processors = os.getloadavg()[0], os.cpu_count()
    return (
        f"{what} could not be imported in time: {answer.problem}; the load of this machine is {load:.0f} on "
        f"{processors} processors: if that is high, run `steer doctor` again when it is not"
    )


@contextmanager
def ended_with_this_process() -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT end this process and the processes of `ask` at once.

    They are in process groups of their own, which a signal to this one's does not reach.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    kill_descendants()
    os._exit(128 + number)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
