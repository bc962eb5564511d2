"""Processes that are started, asked in lines and killed, and the folder of shared memory that they use.

Only processes that were started here are ended, by their number.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import psutil

from steer_service.shm.instances import PREFIX

BOUND_S = 60.0
"""Seconds within which whatever is waited for must happen, where nothing less is promised."""
MANY_CYCLES_S = 900.0
CHALLENGE_BYTES = 32


class Process:
    """A process that was started here and answers in lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.about = psutil.Process(process.pid)

    @classmethod
    @asynccontextmanager
    async def start(cls, module: str, *arguments: str) -> AsyncIterator[Self]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            started = cls(process)
            assert await started.line() == "loaded"
            yield started
        finally:
            await started.end()

    async def line(self, bound_s: float = BOUND_S) -> str:
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), bound_s)).decode().strip()

    def tell(self, line: object = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def ask(self, line: object = "", bound_s: float = BOUND_S) -> str:
        self.tell(line)
        return await self.line(bound_s)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """Ends it in order, or at once if that takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.communicate(), BOUND_S)
        except TimeoutError:
            await self.kill()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and self.about.is_running()


@asynccontextmanager
async def loaded_server(folder: Path, together: int = 0) -> AsyncIterator[Process]:
    """A server around the fake backend, which listens as soon as it is told a line."""
    async with Process.start("tests.shm_server", str(folder), str(together)) as server:
        yield server


def segments(folder: Path) -> set[str]:
    """Names of segments with rows; nonces, which end by themselves, are left out."""
    found = set()
    for entry in os.scandir(folder):
        if entry.name.startswith(PREFIX) and not entry.name.endswith("-foreign"):
            try:
                if entry.stat().st_size != CHALLENGE_BYTES:
                    found.add(entry.name)
            except FileNotFoundError:
                pass
    return found


async def until(is_so: Callable[[], bool], bound_s: float = BOUND_S, every_s: float = 0.002) -> float:
    """Seconds until it was so; fails after `bound_s`."""
    start = time.monotonic()
    async with asyncio.timeout(bound_s):
        while not is_so():
            await asyncio.sleep(every_s)
    return time.monotonic() - start


def report(said: str) -> None:
    print(f"\n[leak checks] {said}")
