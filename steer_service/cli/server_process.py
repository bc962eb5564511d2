"""`steer serve` as a child process that never outlives its parent."""

import asyncio
import collections
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from steer_service.cli.progress import clock, print_message
from steer_service.core.errors import EngineFailed
from steer_service.core.processes import killed_by

LISTENING = "steer: listening on "
SERVING = "steer: serving "
"""Beginnings of the two lines that `steer serve` prints on standard output."""

START_LIMIT_S = 600.0
STOP_LIMIT_S = 180.0
"""A server that is stopped while it loads finishes loading first; killing it would orphan vLLM's processes."""
TICK_S = 0.25
KEPT_LINES = 2000
MAX_LINE_BYTES = 1 << 20
"""A progress bar is one line, however often it is drawn."""

COMMAND = (sys.executable, "-m", "steer_service.cli")
"""The command line of this project."""

FOR_PEOPLE = ("--log-format", "text")
"""The server's last line is shown to the user."""

PR_SET_PDEATHSIG = 1
"""From Linux's sys/prctl.h: the signal that a process gets when its parent dies."""

_DIE_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)})
if os.getppid() != int(sys.argv[1]):  # it died before the signal was set up
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the command behind the parent's process id. `preexec_fn` would fork, which gRPC's threads do not survive."""


class ServerProcess:
    """A server on a free port of this machine; leaving the `async with` always ends it."""

    def __init__(self, flags: Sequence[str]) -> None:
        self.address = ""
        """Where it listens; filled by `wait_until_serving`."""
        self._flags = tuple(flags)
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._serving = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid())),
            *(*COMMAND, "serve", "--port", "0", *FOR_PEOPLE, *self._flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=MAX_LINE_BYTES,
        )
        self._reader = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(EngineFailed):  # the first error is the one to report
            await self.stop()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.returncode

    async def wait_until_serving(self) -> None:
        """Returns when the model is ready; raises EngineFailed if the server ends or takes too long."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_LIMIT_S
        with clock("loading the model in `steer serve`") as shown:
            while not self._serving.is_set():
                if self._reader.done():
                    raise EngineFailed(f"{_ended(await self._process.wait())}: {self._last_words()}")
                if loop.time() > deadline:
                    raise EngineFailed(f"the server did not serve within {START_LIMIT_S:.0f} s: {self._last_words()}")
                await asyncio.wait((self._reader,), timeout=TICK_S)
                shown.update(0)
        print_message(f"serving on {self.address}")

    async def stop(self) -> None:
        """Asks the server to drain and waits; raises EngineFailed if it does not exit with status 0."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await self._wait_or_kill()
        await self._reader
        if self._process.returncode != 0:
            raise EngineFailed(f"the server stopped with status {self._process.returncode}: {self._last_words()}")

    async def _wait_or_kill(self) -> None:
        try:
            await asyncio.wait_for(self._process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            raise EngineFailed(f"the server did not stop within {STOP_LIMIT_S:.0f} s and was killed") from None
        finally:  # also if this task is cancelled
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None, "the process has a pipe"
        while chunk := await self._process.stdout.readline():
            line = chunk.decode(errors="replace").rstrip()
            if line:
                self._lines.append(line)
            if line.startswith(LISTENING):
                self.address = line.removeprefix(LISTENING)
            elif line.startswith(SERVING):
                self._serving.set()

    def _last_words(self) -> str:
        """The server's own last line, which names its log; of a server that crashed, its last line and its output."""
        ours = [line for line in self._lines if line.startswith("steer: ") and not line.startswith(LISTENING)]
        if ours:
            return ours[-1]
        if not self._lines:
            return "it printed nothing"
        with tempfile.NamedTemporaryFile("w", prefix="steerllm-server-", suffix=".log", delete=False) as file:
            file.writelines(f"{line}\n" for line in self._lines)
        return f"{self._lines[-1]} (whole output: {file.name})"


def _ended(status: int) -> str:
    return f"the server was ended by {killed_by(status)}" if status < 0 else f"the server ended with status {status}"
