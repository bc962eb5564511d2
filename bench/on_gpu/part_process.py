"""Runs a command with a time limit, and ends everything that it started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.process import ROOT

GRACE_S = 10.0
"""Time that a process has to end after SIGTERM, and what it started after it."""
POLL_S = 0.1

ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # so that the log of a process that is killed is whole
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Added to the environment of this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended."""

    status: int
    """Its exit status; negative: the signal that ended it."""
    is_over_limit: bool
    """True if it ran longer than its limit and was ended."""
    seconds: float


def run(command: Sequence[str], log: Path, limit_s: float) -> Ended:
    """Runs a command in the repository; its output goes to `log`.

    After `limit_s` it gets SIGTERM, and SIGKILL if it has not ended GRACE_S later. It leads a process group. What is
    left of that and, at the limit, of its descendants in other groups, is killed, also if this call is interrupted.
    """
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**os.environ, **ENVIRONMENT},
        )
        is_over_limit = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            is_over_limit = True
        finally:
            _end(process)
    seconds = time.monotonic() - began
    return Ended(status=process.returncode, is_over_limit=is_over_limit, seconds=round(seconds, 1))


def _end(process: subprocess.Popen[bytes]) -> None:
    descendants: list[psutil.Process] = []
    try:
        if process.poll() is None:
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        _wait_for_group(process.pid)
    finally:  # also after Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()  # psutil knows by the time of its start whether it is still that process
        process.wait()


def _wait_for_group(group: int) -> None:
    # Python's resource tracker frees shared memory after the process that it serves has ended.
    deadline = time.monotonic() + GRACE_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(POLL_S)
