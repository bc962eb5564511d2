"""Why a process of this host ended, and how to end this one or all children at once."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

TRACKER = b"multiprocessing.resource_tracker"
"""In the command line of Python's own child, which ends with its parent and first removes what others left behind."""


def killed_by(status: int) -> str:
    """The signal that killed a process with this negative exit status of `subprocess`, and its usual cause."""
    name = signal.Signals(-status).name
    return f"{name}; the usual cause is too little memory" if name == "SIGKILL" else name


def end_process(status: int) -> NoReturn:
    """Runs the exit handlers and ends this process, without Python's teardown, as forks of `multiprocessing` do.

    The teardown of torch and vLLM takes seconds, and frees what the system frees anyway.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone, or it is closed
            stream.flush()
    os._exit(status)


def kill_descendants() -> None:
    """Kills all processes that this process and its children started, except Python's resource tracker."""
    stopped: set[int] = set()
    while new := _descendants(os.getpid()) - stopped:  # a stopped process starts no further ones
        for pid in new:
            _send(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _descendants(pid: int) -> set[int]:
    parents = {int(name): _parent_of(name) for name in os.listdir("/proc") if name.isdecimal()}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {one for one in found - {pid} if TRACKER not in _command_of(one)}


def _parent_of(pid: str) -> int:
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])
    return 0


def _command_of(pid: int) -> bytes:
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
    return b""
