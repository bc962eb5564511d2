"""vLLM's processes: their signs of life, and what is left when they are killed.

Killed processes cannot remove their shared memory and sockets. Both are removed here, so that a server that starts its
engine again does not fill the host's memory.

Relies on (vLLM 0.24 to 0.33): `CoreEngineProcManager.processes` and `DPCoordinator.proc`, the processes that the API
server process starts, all others being their children; shared memory in /dev/shm with names that begin with `psm_`,
those of Python's `SharedMemory`, mapped by the processes that use it. tests/engine/test_seams.py notices a change.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil  # type: ignore[import-untyped]
from vllm.v1.engine.async_llm import AsyncLLM

from steer_service.engine.hang_detector import Vitals
from steer_service.engine.heart import HeartReader

VLLM_MEMORY = "/dev/shm/psm_"
"""How the paths of vLLM's own shared memory begin."""

KILLED_S = 5.0
"""Seconds within which killed processes are gone; the system has to free their memory."""


class EngineProcesses:
    """The processes of one loaded engine on this host."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = {_name_of(process): process for process in processes}
        self._hearts = {name: HeartReader.of(process.pid) for name, process in self._processes.items()}
        self._memory = {path for process in processes for path in _memory_of(process)}

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
                    times = self._processes[name].cpu_times()
                    seen.append(Vitals(name=name, pulse=heart.pulse(), cpu_s=times.user + times.system))
        return seen

    def kill(self) -> None:
        """Kills all of them that run."""
        for process in self._processes.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    async def remove(self) -> None:
        """Kills those that are left, waits until they are gone and removes their shared memory."""
        self.kill()
        await asyncio.to_thread(psutil.wait_procs, list(self._processes.values()), KILLED_S)
        for path in self._memory:
            path.unlink(missing_ok=True)


def _name_of(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return f"{process.name()} (process {process.pid})"
    return f"process {process.pid}"


def _memory_of(process: psutil.Process) -> list[Path]:
    """Paths of the shared memory of vLLM that the process has mapped."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return [Path(mapped.path) for mapped in process.memory_maps() if mapped.path.startswith(VLLM_MEMORY)]
    return []
