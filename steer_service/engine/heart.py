"""Signs of life of vLLM's processes: each stamps the time into memory that the API server process reads.

A process begins with `start_heart`: the engine core when it makes its scheduler, a worker when it has loaded the model.
The memory is an anonymous file (memfd). It has no name that could be left behind, and the API server process opens it
through /proc. Workers on another host or in another container cannot be read.

A beat costs a few microseconds per second, a step's two stamps less than 2 microseconds.
"""

import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import Self

BEAT_S = 1.0
"""Seconds between two beats."""

_BEATS, _STEPS, _LONGEST_STEP_NS, _FIELDS = 0, 1, 2, 3
"""Indices of the cells, each an int64, and their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a process has stamped so far."""

    beats: int
    """Beats since it started; one per `BEAT_S`."""
    steps: int
    """Engine steps that it has completed since its warm-up."""
    longest_step_s: float
    """The longest of these steps, in seconds."""


class Heart:
    """The stamps of this process; see `start_heart`."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(_memory_name(os.getpid()))
        os.ftruncate(self._descriptor, 8 * _FIELDS)
        self._cells = memoryview(mmap.mmap(self._descriptor, 8 * _FIELDS)).cast("q")
        threading.Thread(target=self._beat, daemon=True, name="steer-heart").start()

    def count_step(self, took_ns: int) -> None:
        """Counts a completed engine step, which took that many nanoseconds."""
        self._cells[_LONGEST_STEP_NS] = max(self._cells[_LONGEST_STEP_NS], took_ns)
        self._cells[_STEPS] += 1

    def _beat(self) -> None:
        while True:
            self._cells[_BEATS] += 1
            time.sleep(BEAT_S)


class HeartReader:
    """Reads the stamps of another process."""

    def __init__(self, cells: mmap.mmap) -> None:
        self._cells = memoryview(cells).cast("q")

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The heart of a process of this host; None if it has none, has ended, or cannot be read."""
        folder = f"/proc/{pid}/fd"
        wanted = f"/memfd:{_memory_name(pid)} (deleted)"
        try:
            for name in os.listdir(folder):
                path = f"{folder}/{name}"
                if _target_of(path) == wanted:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        return cls(mmap.mmap(descriptor, 8 * _FIELDS, prot=mmap.PROT_READ))
                    finally:
                        os.close(descriptor)
        except OSError:
            return None
        return None

    def pulse(self) -> Pulse:
        """What the process has stamped so far."""
        cells = self._cells
        return Pulse(beats=cells[_BEATS], steps=cells[_STEPS], longest_step_s=cells[_LONGEST_STEP_NS] / 1e9)


_hearts: dict[int, Heart] = {}
"""The heart of this process, by its process id: a forked process needs one of its own."""


def start_heart() -> Heart:
    """The heart of this process; the first call starts it. It beats until the process ends."""
    pid = os.getpid()
    if pid not in _hearts:
        _hearts[pid] = Heart()
    return _hearts[pid]


def _memory_name(pid: int) -> str:
    return f"steer-heart-{pid}"


def _target_of(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""
