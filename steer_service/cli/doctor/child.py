"""Runs Python in a process of its own: an import that crashes, hangs or is slow there is an answer here."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from steer_service.cli.doctor.findings import one_line
from steer_service.core.processes import killed_by

LIMIT_S = 180.0
"""Seconds for one process; importing vLLM takes about ten, and minutes on a cold network drive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a process answered."""

    value: dict[str, Any]
    """The JSON object of its last line; empty if it failed."""
    problem: str
    """Why it failed, in one line; "" if it did not."""


def ask(program: str, *arguments: str, limit_s: float = LIMIT_S) -> Answer:
    """Runs `program`, which prints a JSON object on its last line."""
    command = [sys.executable, "-c", program, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False, process_group=0
        )
    except subprocess.TimeoutExpired:
        return Answer(value={}, problem=f"no answer within {limit_s:g} s")
    if done.returncode < 0:
        return Answer(value={}, problem=f"the process was ended by {killed_by(done.returncode)}")
    if done.returncode != 0:
        return Answer(value={}, problem=one_line(_last_line(done.stderr) or f"exit status {done.returncode}"))
    return Answer(value=json.loads(_last_line(done.stdout)), problem="")


def import_problem(module: str) -> str:
    """Why `module` cannot be imported; "" if it can."""
    return ask(f"import {module}; print('{{}}')").problem


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
