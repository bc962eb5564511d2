"""vLLM's processes: their signs of life, and what is left when they are killed.

Killed processes cannot remove their shared memory and sockets. Both are removed here, so that a server that starts its
engine again does not fill the host's memory.

Relies on (vLLM 0.24 to 0.33): `CoreEngineProcManager.processes` and `DPCoordinator.proc`, the processes that the API
server process starts, all others being their children; shared memory and semaphores in /dev/shm that stay mapped once
the engine has loaded. tests/engine/test_seams.py notices a change.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil  # type: ignore[import-untyped]
from vllm.v1.engine.async_llm import AsyncLLM

from steer_service.engine.hang_detector import Vitals
from steer_service.engine.heart import HeartReader
from steer_service.shm.instances import PREFIX
from steer_service.shm.message_rings import unwritten_bytes

MEMORY = "/dev/shm"
"""The folder of POSIX shared memory."""

KILLED_S = 5.0
"""Seconds within which killed processes are gone; the system has to free their memory."""


POLL_S = 0.02


class EngineProcesses:
    """The processes of one loaded engine on this host."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = {_name_of(process): process for process in processes}
        self._hearts = {name: HeartReader.of(process.pid) for name, process in self._processes.items()}
        self._memory = _memory_of(processes)

    @classmethod
    def of(cls, llm: AsyncLLM) -> Self:
        """The processes that the engine has now; call it once the engine has loaded."""
        resources = llm.engine_core.resources
        started = list(resources.engine_manager.processes) if resources.engine_manager is not None else []
        if resources.coordinator is not None:
            started.append(resources.coordinator.proc)
        found: dict[int, psutil.Process] = {}
        for process in started:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found.update({one.pid: one for one in (parent, *parent.children(recursive=True))})
        return cls(list(found.values()))

    def vitals(self) -> list[Vitals]:
        """Signs of life of all processes that have a heart and have not ended."""
        seen = []
        for name, heart in self._hearts.items():
            if heart is not None:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    process = self._processes[name]
                    times, waited_s = process.cpu_times(), _waited_s(process.pid)
                    seen.append(
                        Vitals(name=name, pulse=heart.pulse(), cpu_s=times.user + times.system, waited_s=waited_s)
                    )
        return seen

    def unwritten_bytes(self, directory: Path) -> int:
        """Bytes that their shared memory can still take in the file system of `directory`.

        Without them, a write would end a process with SIGBUS.
        """
        with suppress(OSError):
            if os.stat(directory).st_dev == os.stat(MEMORY).st_dev:
                return unwritten_bytes(self._memory)
        return 0

    def kill(self) -> None:
        """Kills all of them that run."""
        for process in self._processes.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    async def remove(self) -> None:
        """Kills those that are left, waits until they are gone and removes their shared memory; unmaps their hearts."""
        self.kill()
        self._hearts.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(KILLED_S):
                while not all(map(_has_ended, self._processes.values())):
                    await asyncio.sleep(POLL_S)
        for path in self._memory:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _name_of(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return f"{process.name()} (process {process.pid})"
    return f"process {process.pid}"


def _has_ended(process: psutil.Process) -> bool:
    """True once it is gone, or is left only for its parent to collect, which is not done here: vLLM joins its own."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _waited_s(pid: int) -> float:
    """Seconds for which the main thread of a process was ready and waited for a processor; 0 if Linux counts none."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            _, waited_ns, _ = file.read().split()
    except OSError:
        return 0.0
    return int(waited_ns) / 1e9


def _memory_of(processes: Sequence[psutil.Process]) -> list[str]:
    """Paths of the shared memory that any of the processes has mapped, without this project's segments."""
    mapped = {inode for process in processes for inode in _mapped_inodes(process.pid)}
    files = list(os.scandir(MEMORY)) if os.path.isdir(MEMORY) else []
    return [file.path for file in files if file.inode() in mapped and not file.name.startswith(PREFIX)]


def _mapped_inodes(pid: int) -> set[int]:
    """Inodes of the files in `MEMORY` that a process has mapped; a semaphore is mapped under another name."""
    with suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        fields = [line.split(maxsplit=5) for line in maps if f" {MEMORY}/" in line]
        return {int(inode) for *_, inode, _ in fields}
    return set()
