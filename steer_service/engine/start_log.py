"""Finds the real exception of a failed start in what vLLM's processes printed.

While vLLM starts, the output of its processes is shown as before and also kept in a file. vLLM reports the failed start
of another process as "Engine core initialization failed. See root cause above." In a notebook or a client, there is
nothing above that message.

Relies on (vLLM 0.24 to 0.33): processes that inherit the file descriptors 1 and 2, and print the traceback of the
exception that ends them. tests/engine/test_start_log.py notices a change.
"""

import os
import re
import selectors
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from steer_service.core.processes import killed_by

STANDARD_FDS = (1, 2)
"""Standard output and standard error, which child processes inherit."""

READ_BYTES = 1 << 16

ENDED_TIMEOUT_S = 5.0
"""Time that a failed start waits for the last output of its processes, in seconds."""

_EXCEPTION = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s*)?(?:ERROR \S+ \S+ \[[^\]]*\]\s)?(?P<type>[A-Za-z_][\w.]*): (?P<message>\S.*)$"
)
"""The last line of a traceback, with or without the prefixes of vLLM's processes and logger."""

_EXCEPTION_NAME = re.compile(r"(?:Error|Exception|Exit|Interrupt|Failed|Unsupported|Request|Overloaded|NotFound)$")

_POINTS_ELSEWHERE = re.compile(r"root cause|initialization failed|failed to start", re.IGNORECASE)
"""Messages of exceptions that only report the failure of another process."""

_KILLED = re.compile(r"Failed core proc\(s\): \{.*?: (?P<status>-\d+)")

LSCPU = "lscpu --json --extended=CPU,CORE,NODE --online"
"""How vLLM for the CPU lists the processor's cores. What lscpu says of a failure is in the log."""

_LSCPU_SAYS = re.compile(r"lscpu: (?P<why>[^'\n]+)$", re.MULTILINE)

_starting = threading.Lock()


class StartLog:
    """Within the block, copies the output of this process and its children to a file.

    The children write to the copied descriptors as long as they live, and a thread forwards their output. A second
    StartLog at the same time has no file: its output is part of the first one's.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        """The file; None if nothing is copied or the start has succeeded."""
        self._file: BinaryIO | None = None
        self._saved: dict[int, int] = {}
        self._pump: threading.Thread | None = None
        self._is_first = False

    def __enter__(self) -> Self:
        self._is_first = _starting.acquire(blocking=False)
        if self._is_first:
            try:
                self._begin()
            except OSError:  # a closed descriptor, or no folder to write to: the start continues without a file
                self._restore()
                self.succeed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if error is None:
            self.succeed()
        elif self._pump is not None:
            self._pump.join(ENDED_TIMEOUT_S)

    def succeed(self) -> None:
        """Removes the file; later output is shown only."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

    def cause_of(self, error: BaseException) -> str:
        """The exception that ended the start, from the file or else from `error`. Call it after `__exit__`."""
        text = ""
        if self.path is not None:
            with suppress(OSError):
                text = self.path.read_text(errors="replace")
        cause = root_cause(text, str(error))
        return f"{cause} (whole log: {self.path})" if self.path is not None else cause

    def _begin(self) -> None:
        descriptor, path = tempfile.mkstemp(prefix="steerllm-start-", suffix=".log")
        self.path, self._file = Path(path), os.fdopen(descriptor, "wb", buffering=0)
        sources = {}
        for target in STANDARD_FDS:
            self._saved[target] = os.dup(target)
            reading, writing = os.pipe()
            os.dup2(writing, target)
            os.close(writing)
            sources[reading] = os.dup(self._saved[target])
        self._pump = threading.Thread(target=self._pass_on, args=(sources,), daemon=True, name="steer-start-log")
        self._pump.start()

    def _restore(self) -> None:
        """Restores this process's own descriptors; its children keep the copied ones."""
        for target, saved in self._saved.items():
            os.dup2(saved, target)
            os.close(saved)
        self._saved.clear()
        if self._is_first:
            self._is_first = False
            _starting.release()

    def _pass_on(self, targets: dict[int, int]) -> None:
        """Forwards each pipe to its descriptor, until no process has the other end open."""
        with selectors.DefaultSelector() as selector:  # not `select`, which fails for descriptors from 1024 on
            for source in targets:
                selector.register(source, selectors.EVENT_READ)
            self._forward(selector, targets)
        if self._file is not None:
            self._file.close()

    def _forward(self, selector: selectors.BaseSelector, targets: dict[int, int]) -> None:
        while targets:
            for key, _ in selector.select():
                source = key.fd
                data = os.read(source, READ_BYTES)
                if not data:
                    selector.unregister(source)
                    os.close(source)
                    os.close(targets.pop(source))
                    continue
                _write_all(targets[source], data)
                file = self._file
                if file is not None:
                    with suppress(OSError, ValueError):  # the disk is full, or `succeed` closed the file
                        file.write(data)


def _write_all(target: int, data: bytes) -> None:
    with suppress(OSError):  # the terminal or pipe is gone; the processes must not block
        while data:
            data = data[os.write(target, data) :]


def root_cause(log: str, reported: str) -> str:
    """The last exception in `log` that does not only point to another one; `reported` if there is none."""
    killed = _KILLED.search(reported)
    if killed is not None:
        return f"a process of vLLM was ended by {killed_by(int(killed['status']))}"
    for line in reversed(log.splitlines()):
        match = _EXCEPTION.match(line.rstrip())
        if match is None or not _EXCEPTION_NAME.search(match["type"]):
            continue
        if not _POINTS_ELSEWHERE.search(match["message"]):
            reported = f"{match['type'].rpartition('.')[2]}: {match['message']}"
            break
    if "Command 'lscpu " in reported:
        said = _LSCPU_SAYS.search(log)
        return lscpu_problem(said["why"] if said is not None else reported)
    return reported


def lscpu_problem(why: str) -> str:
    """The sentence for an lscpu that fails; `why`: what it says."""
    return (
        f"vLLM lists the processor's cores with lscpu, which fails ({why.strip()}): mount /sys, which a container or "
        "chroot may lack, and install util-linux, which has lscpu"
    )
