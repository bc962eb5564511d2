"""Processes that own segments of shared memory, end in order or are killed."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BOUND_S = 30.0
"""Seconds within which any process of these tests must do what is waited for."""

IMPORTS = """
import os, signal, sys
from pathlib import Path
from steer_service.shm.instances import claim, lock_path, sweep
from steer_service.shm.segments import SegmentDirectory

folder = Path(sys.argv[1])
directory = SegmentDirectory(path=folder)
def say(*words):
    print(*words, flush=True)
"""

OWNER = "say(*(directory.create(4096).name for _ in range(3)))\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)\n"
WAIT = "sys.stdin.readline()\n"


APART = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Runs a process as the first of a PID namespace, as containers do."""


@contextmanager
def process(folder: Path, script: str, within: Sequence[str] = ()) -> Iterator["subprocess.Popen[str]"]:
    command = [*within, sys.executable, "-c", IMPORTS + script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def line_of(running: "subprocess.Popen[str]") -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def go_on(running: "subprocess.Popen[str]") -> None:
    assert running.stdin is not None
    running.stdin.write("\n")
    running.stdin.flush()


def done(folder: Path, script: str, within: Sequence[str] = ()) -> str:
    """What a process says that ends in order."""
    with process(folder, script, within) as running:
        said, _ = running.communicate(timeout=BOUND_S)
        assert running.returncode == 0
        return said.strip()


def dead_owner(folder: Path) -> list[str]:
    """Segments of a process that was killed."""
    with process(folder, OWNER + DIE) as running:
        names = line_of(running).split()
        assert running.wait(BOUND_S) == -signal.SIGKILL
    assert len(names) == 3
    return sorted(names)
