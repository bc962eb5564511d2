"""Starts a child, sends it batches, and ends it with everything that it started, even after an error."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.load import Batch, Timing

ROOT = Path(__file__).parents[1]
STOP_LIMIT_S = 90.0
"""A child that must stop while it loads finishes loading first."""
DESCENDANTS_LIMIT_S = 10.0
LAST_LINES = 30


class ChildFailed(Exception):
    """A child ended too early; the message has the end of its log."""


class Child:
    """One `bench.child`: ready inside the `with` block, ended after it.

    It leads a process group: Ctrl-C reaches it only through this object, and all that it started ends with it. It stays
    in this session, since Linux 6.18 may stop the processes of others while vLLM's poll.
    """

    def __init__(self, *arguments: str) -> None:
        self.facts: dict[str, Any] = {}
        """The facts that it sent when it was ready."""
        self._arguments = arguments
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            (sys.executable, "-m", "bench.child", *self._arguments),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        )
        try:
            self.facts = self._read()
        except BaseException:
            self._stop(now=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(now=error is not None)

    def run(self, batch: Batch) -> Timing:
        """Has the child run `batch` and waits for the result; raises ChildFailed if the child ends."""
        assert self._process.stdin is not None, "the process has a pipe"
        with contextlib.suppress(BrokenPipeError):  # reading fails too, with the child's log
            self._process.stdin.write(json.dumps(asdict(batch)) + "\n")
            self._process.stdin.flush()
        return Timing(**self._read())

    def cpu_seconds(self) -> float:
        """CPU seconds that the child and its descendants have used so far."""
        child = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (child, *child.children(recursive=True))]
        return sum(used.user + used.system for used in times)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "the process has a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise ChildFailed(f"`{self._arguments[0]}` ended with status {self._process.wait()}:\n{self._end_of_log()}")
        return json.loads(line)

    def _end_of_log(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-LAST_LINES:])

    def _stop(self, *, now: bool) -> None:
        assert self._process.stdin is not None, "the process has a pipe"
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            if now:
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
            self._wait_for_descendants()
        finally:  # also after a second Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _wait_for_descendants(self) -> None:
        # Python's resource tracker frees the child's shared memory after the child has ended.
        deadline = time.monotonic() + DESCENDANTS_LIMIT_S
        with contextlib.suppress(ProcessLookupError):
            while self._process.returncode is not None and time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)
